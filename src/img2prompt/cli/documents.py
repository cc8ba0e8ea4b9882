"""Tables of figures in README.md and docs/*.md, which commands put between the marks of a place and nobody edits.

A place begins with the line `<!-- table: NAME -->` and ends with the line `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from img2prompt.core.storage import whole


def put(tables: Mapping[str, str], project: Path = Path()) -> None:
    """Replace what stands in the places of a project's documents by these tables, Markdown by the name of the place.

    Raises:
        ValueError: there is not exactly one place of a name; then no document is changed.
    """
    paths = [project / "README.md", *sorted((project / "docs").glob("*.md"))]
    texts, changed = {path: path.read_text(encoding="utf-8") for path in paths}, {}
    for name, table in tables.items():
        mark, end = f"<!-- table: {name} -->\n", "<!-- end -->\n"
        place = re.compile(f"^{re.escape(mark)}(?:(?!<!-- ).*\n)*?{end}", re.MULTILINE)
        found = [(path, match) for path, text in texts.items() for match in place.finditer(text)]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} places for the table `{name}` in README.md and docs/*.md: where it is to stand, write "
                f"the lines `{mark.strip()}` and `{end.strip()}`, once"
            )
        [(path, match)] = found
        before, after = texts[path][: match.start()], texts[path][match.end() :]
        texts[path] = f"{before}{mark}{table.rstrip()}\n{end}{after}"
        changed[name] = path
    for path in set(changed.values()):
        with whole(path) as aside:
            aside.write_text(texts[path], encoding="utf-8")
    print("\n".join(f"{path}: {name}" for name, path in changed.items()))


def caption(of: str, made: Sequence[Mapping[str, str]], settings: Sequence[str] = ()) -> str:
    """A line on figures: what they are of, the params that were set, and each thing that `process.made` said.

    What records of a former version lack, or nobody recorded, is unknown.
    """
    commits, processors, dates = (
        ", ".join(dict.fromkeys(one.get(key, "unknown") for one in made)) or "unknown"
        for key in ("commit", "processor", "date")
    )
    params = "".join(f", `{setting}`" for setting in settings)
    return f"*{of}{params}. Commit {commits}; {processors}; {dates}.*\n"
