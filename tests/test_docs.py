"""README.md and docs/: no longer than one reads, what they name is there, and their tables are put in by commands."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from dvc.cli.parser import get_main_parser

from img2prompt.cli import table
from img2prompt.cli.documents import caption, put
from img2prompt.cli.main import COMMANDS, main
from img2prompt.core import process

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "input/README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PARAMS = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
CODE = "\n".join(
    path.read_text()
    for folder in ("src", "pipelines")
    for path in (REPOSITORY / folder).rglob("*")
    if path.suffix in (".py", ".js", ".html")
)
OUTS = (REPOSITORY / "dvc.yaml").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()


@cache
def options_of(command: str) -> set[str]:
    """The options of a subcommand of `img2prompt`."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"img2prompt.cli.{command}").add_arguments(parser)
    return set(parser._option_string_actions)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def code_in(text: str) -> tuple[list[str], list[str]]:
    """Inline code, each on one line, and the lines of indented code, less what follows a #."""
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ")).replace("\\\n", " ")
    rest = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    lines = [re.sub(r"(^|\s)# .*", "", line).removeprefix("$ ").strip() for line in indented.splitlines()]
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)], lines


def wrong_in(code: str) -> list[str]:
    """What a piece of code names that is not there: targets, commands, options, params, scripts."""
    found = [f"make {name}" for name in re.findall(r"\bmake ([a-z-]+)", code) if f"\n{name}:" not in MAKEFILE]
    try:
        words = shlex.split(code)
    except ValueError:  # prose in the output of a command
        return found
    keys = [words[place + 1] for place, word in enumerate(words[:-1]) if word in ("-S", "--set-param")]
    keys += [word for word in words if words[:2] == ["img2prompt", "table"] and "=" in word]
    found += [key for key in keys if not is_param(key.partition("=")[0])]
    match words:
        case ["img2prompt"] | ["img2prompt", "--help"]:
            pass
        case ["img2prompt", command, *rest] if command in COMMANDS:
            found += [word for word in rest if word.startswith("-") and word != "-" and word not in options_of(command)]
        case ["img2prompt", *_]:
            found.append(code)
        case ["python", "-m", module, *_]:
            found += [module] * (not (REPOSITORY / f"{module.replace('.', '/')}.py").is_file())
        case ["python", script, *rest] if script.startswith("bench/"):
            text = (REPOSITORY / script).read_text() if (REPOSITORY / script).is_file() else ""
            found += [word for word in rest if word.startswith("--") and f'"{word}"' not in text] or [script] * (
                not text
            )
        case ["dvc", *rest] if rest:
            try:
                get_main_parser().parse_args([word for word in rest if word != "..."])
            except Exception as error:
                found.append(f"{code}: {error!r}")
    return found


def is_param(name: str) -> bool:
    """Whether params.yaml has a section.key."""
    place = PARAMS
    for key in name.split("."):
        if not isinstance(place, dict) or key not in place:
            return False
        place = place[key]
    return True


def missing_in(span: str) -> bool:
    """Whether inline code is a path of the project, a param, a score or a variable, and there is none of the name."""
    if re.fullmatch(r"IMG2PROMPT_\w+", span):
        return span not in CODE
    head, _, tail = span.partition("/")
    if head == "outputs" and tail:
        named = f"outputs/{tail.split('/')[0]}"
        return named not in OUTS + CODE or (Path(tail).suffix != "" and Path(tail).name not in OUTS + CODE)
    if re.fullmatch(r"[\w./-]+", span) and (tail or Path(span).suffix in (".yaml", ".toml")):
        inside = head in {path.name for path in REPOSITORY.iterdir()} - {"input"}
        return (inside or not tail) and not (REPOSITORY / span).exists()
    section, _, key = span.partition("=")[0].partition(": ")[0].partition(".")
    if section in PARAMS and key:
        return not is_param(f"{section}.{key}") and f'"{key}"' not in CODE and span not in CODE
    return False


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(path):
    spans, lines = code_in(path.read_text())
    assert [wrong for code in [*spans, *lines] for wrong in wrong_in(code)] == []
    assert [span for span in spans if missing_in(span)] == []
    linked = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for target, _, anchor in (link.partition("#") for link in linked if not link.startswith("https://")):
        aim = path.parent / target if target else path
        assert aim.exists(), target
        assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)", aim.read_text(), re.MULTILINE)), anchor


def test_what_is_not_there_is_found():
    """The tests above look: each of these is wrong in one word."""
    for code in (
        "make sumbission", "img2prompt predikt a.png", "img2prompt predict a.png --topp 3", "python -m pipelines.non",
        "python bench/non.py", "python bench/sets.py FOLDER --seed 0", "dvc exp run -S model_a.epoch=3",
        "dvc exp shwo", "dvc exp show --changed", "img2prompt table knn.kk=3",
    ):  # fmt: skip
        assert wrong_in(code), code
    for span in (
        "src/img2prompt/non.py", "outputs/prepare/non.csv", "outputs/non/a.csv", "dvc.yml.yaml", "model_a.non: 3",
        "IMG2PROMPT_NON",
    ):  # fmt: skip
        assert missing_in(span), span


def test_documents_are_short():
    assert len(DOCUMENTS[0].read_text().splitlines()) <= 150
    for path in DOCUMENTS:
        prose = re.sub(r"<!-- table: .*?<!-- end -->", "", path.read_text(), flags=re.DOTALL).splitlines()
        assert [line for line in prose if len(line) > 120 and not line.startswith(("    ", "|", "!["))] == []


def test_every_document_is_in_the_readme_and_every_picture_in_a_document():
    texts = {path: path.read_text() for path in DOCUMENTS}
    for path in (REPOSITORY / "docs").iterdir():
        if path.suffix == ".md":
            assert f"](docs/{path.name})" in texts[DOCUMENTS[0]]
        else:
            assert any(f"{path.name})" in text for text in texts.values()), path.name


def test_every_room_is_in_the_readme():
    rooms = {path.parent.name for path in (REPOSITORY / "src/img2prompt").glob("*/__init__.py")}
    assert set(re.findall(r"^      (\w+)/ ", DOCUMENTS[0].read_text(), re.MULTILINE)) == rooms


def test_the_table_s_notes_are_those_of_the_code():
    assert f"-->{table.NOTES}<!-- end -->" in (REPOSITORY / "docs/results.md").read_text()


@pytest.fixture
def project(tmp_path):
    """A project with a place `a` in README.md and a place `b` in docs/."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# One\n\n<!-- table: a -->\n| old |\n<!-- end -->\n\nlast\n")
    (tmp_path / "docs/two.md").write_text("<!-- table: b -->\n<!-- end -->\n")
    return tmp_path


def test_a_table_takes_the_place_of_the_former_one(project, capsys):
    put({"a": "| new \\1 |\n\n", "b": "| b |"}, project)
    assert (project / "README.md").read_text() == "# One\n\n<!-- table: a -->\n| new \\1 |\n<!-- end -->\n\nlast\n"
    assert (project / "docs/two.md").read_text() == "<!-- table: b -->\n| b |\n<!-- end -->\n"
    assert capsys.readouterr().out == f"{project}/README.md: a\n{project}/docs/two.md: b\n"


@pytest.mark.parametrize(
    ("readme", "places"),
    [
        ("nothing\n", 0),
        ("<!-- table: c -->\n| never ended |\n", 0),
        ("<!-- table: c -->\nnever ended\n<!-- table: d -->\n<!-- end -->\n", 0),
        ("<!-- table: c -->\n<!-- end -->\n" * 2, 2),
    ],
)
def test_without_one_place_no_document_is_changed(project, readme, places):
    (project / "README.md").write_text(readme)
    with pytest.raises(ValueError, match=rf"{places} places for the table `c` .*`<!-- table: c -->`"):
        put({"b": "| b |", "c": "| c |"}, project)
    assert (project / "docs/two.md").read_text() == "<!-- table: b -->\n<!-- end -->\n"


def test_a_caption_says_each_thing_once():
    ran = [{"commit": commit, "processor": "P", "date": date} for commit, date in (("c", "1"), ("d", "2"), ("c", "2"))]
    assert caption("Data: x", ran, ["k.l=1"]) == "*Data: x, `k.l=1`. Commit c, d; P; 1, 2.*\n"
    assert caption("Data: x", []) == "*Data: x. Commit unknown; unknown; unknown.*\n"
    assert caption("Data: x", [{"commit": "c"}]) == "*Data: x. Commit c; unknown; unknown.*\n"


def test_a_commit_is_the_last_that_changed_what_figures_depend_on(tmp_path, monkeypatch):
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.setenv(f"GIT_{who}_{what}", "x@y")

    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True).stdout

    assert process.commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "src/room").mkdir(parents=True)
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "src/room/one.py").write_text("")
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")[:10]
    (tmp_path / "README.md").write_text("text")
    assert process.commit(tmp_path / "src/room") == first
    git("add", ".")
    git("commit", "-qm", "second")
    assert process.commit(tmp_path / "src/room") == first
    (tmp_path / "src/two.py").write_text("")
    assert process.commit(tmp_path) == f"{first} with changes"
    (tmp_path / "src/two.py").unlink()
    (tmp_path / "params.yaml").write_text("a: 2\n")
    assert process.commit(tmp_path) == f"{first} with changes"


@pytest.fixture
def run(copy, monkeypatch):
    """A finished run whose scores were made by the commit that its value is, with a place for its scores and tables."""
    at = {"commit": "0123456789"}
    monkeypatch.setattr(process, "commit", lambda: at["commit"])
    monkeypatch.setattr(table, "commit", lambda: at["commit"])
    monkeypatch.setattr(process, "processor", lambda: "Abacus")
    with process.turn("scores", recorded=True):
        pass
    places = ("scores input/train", "paper elsewhere", "notes of the paper's table")
    Path("README.md").write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n\n" for name in places))
    return at


def test_the_documents_get_the_last_scores_and_the_last_table(run):
    main(["table", "--docs"])
    text, scores = Path("README.md").read_text(), Path("outputs/scores/scores.md").read_text()
    assert text.startswith(
        f"<!-- table: scores input/train -->\n{scores.partition(chr(10) * 2)[0]}\n\n- ensemble minus its best"
    )
    [about] = re.findall(r"^\*.*\*$", text, re.MULTILINE)
    assert re.fullmatch(
        r"\*Data: input/train; \d+ seconds in all, at most \d\.\d GB\. Commit 0123456789; Abacus; \d{4}-\d\d-\d\d\.\*",
        about,
    )
    assert text.endswith("<!-- end -->\n\n<!-- table: paper elsewhere -->\n<!-- end -->\n\n"
                         "<!-- table: notes of the paper's table -->\n<!-- end -->\n\n")  # fmt: skip
    Path("outputs/table").mkdir()
    Path("outputs/table/made.json").write_text(json.dumps({"data": "elsewhere"}))
    Path("outputs/table/table.md").write_text(f"| rows |\n{table.NOTES}")
    main(["table", "--docs"])
    again = Path("README.md").read_text()
    assert "<!-- table: paper elsewhere -->\n| rows |\n<!-- end -->" in again
    assert f"<!-- table: notes of the paper's table -->{table.NOTES}<!-- end -->" in again
    assert again.startswith(text[: text.index("<!-- end -->")])


def test_what_was_not_made_by_a_commit_is_refused(run, monkeypatch, capsys):
    before = Path("README.md").read_text()
    for now in ("9876543210", "0123456789 with changes"):
        run["commit"] = now
        with pytest.raises(SystemExit, match=rf"made by 0123456789, and the code and params here are {now}: commit"):
            main(["table", "--docs"])
    with process.turn("scores", recorded=True):
        pass
    with pytest.raises(SystemExit, match="made by 0123456789 with changes"):
        main(["table", "--docs"])
    Path("outputs/run.js").unlink()
    with pytest.raises(SystemExit, match="no scored run in outputs/: `make submission`"):
        main(["table", "--docs"])
    assert Path("README.md").read_text() == before
    with pytest.raises(SystemExit):
        main(["table", "--docs", "knn.k=3"])
    assert "not allowed with argument --docs" in capsys.readouterr().err
