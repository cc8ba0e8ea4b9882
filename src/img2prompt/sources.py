"""Competitions as tables: what can be used, and what was set aside and why."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from joblib import Parallel, delayed

from img2prompt.pictures import decode, read_picture
from img2prompt.progress import progress
from img2prompt.storage import digest

ROW = ["id", "source", "picture", "prompt"]
SET_ASIDE = ["split", "source", "row", "id", "reason", "fix"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class Rows:
    """A split's rows: `id, source, picture, prompt`, all text.

    `prompt` is null where it is unknown, `picture` where a test picture cannot be read. `set_aside` holds
    what cannot be used, `pictures` the digest of every picture's bytes.
    """

    table: pd.DataFrame
    set_aside: list[dict[str, object]] = field(default_factory=list)
    pictures: str = ""


def read_train(folder: Path) -> Rows:
    """Read the usable rows of a Kaggle-layout folder: those with a readable picture and a prompt.

    Raises:
        FileNotFoundError, ValueError: the folder lacks its files or columns, or nothing is usable.
    """
    rows = _check_pictures(_read_folder(folder, "train"), "train")
    if rows.table.empty:
        reasons = "; ".join(f"{row['id']}: {row['reason']}" for row in rows.set_aside[:10]) or "it is empty"
        raise ValueError(f"{folder}: no usable row ({reasons})")
    return rows


def read_test(folder: Path) -> Rows:
    """Read a Kaggle-layout folder to be predicted: no row is dropped, `sample_submission.csv` gives the order.

    Raises:
        FileNotFoundError, ValueError: the folder lacks its files or columns, or holds no picture.
    """
    rows = _check_pictures(_read_folder(folder, "test"), "test")
    if rows.table.empty:
        raise ValueError(f"{folder}: no picture to predict; put them in {folder / 'images'}")
    return rows


def join(parts: Sequence[Rows]) -> Rows:
    """Several sources as one, in order."""
    return Rows(
        pd.concat([part.table for part in parts], ignore_index=True),
        [row for part in parts for row in part.set_aside],
        digest(*(part.pictures for part in parts)),
    )


def write_rows(path: Path, rows: Rows) -> None:
    """Write the table as parquet.

    The pictures' digest stands in the file's metadata: pictures that change under the same names change
    the file, and with it every later stage.
    """
    table = pa.Table.from_pandas(
        rows.table, schema=pa.schema([(name, pa.string()) for name in ROW]), preserve_index=False
    )
    pq.write_table(table.replace_schema_metadata({"pictures_sha256": rows.pictures}), path)


def read_rows(path: Path) -> pd.DataFrame:
    """Read a table that `write_rows` wrote; unknown prompts and pictures are None."""
    table = pq.read_table(path).to_pandas()
    return table.astype(object).where(table.notna(), None)


def _read_folder(folder: Path, split: str) -> Rows:
    images = folder / "images"
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; it holds the pictures as ID.png, .jpg, .jpeg or .webp")
    files: dict[str, str] = {}
    for file in sorted(images.iterdir()):
        if file.suffix.lower() in SUFFIXES:
            files.setdefault(file.stem, file.as_posix())
    source = folder.as_posix()
    aside: list[dict[str, object]] = []

    def set_aside(row: int, name: str, reason: str, fix: str) -> None:
        aside.append(dict(zip(SET_ASIDE, (split, source, row, name, reason, fix), strict=True)))

    asked = _submission_ids(folder / "sample_submission.csv") if split == "test" else {}
    prompts: dict[str, str] = {}
    csv = folder / "prompts.csv"
    if csv.is_file():
        table = _read_csv(csv, ["imgId", "prompt"])
        # The header is line 1 of the file, so its first row is row 2 to whoever opens it.
        for row, (name, prompt) in enumerate(zip(table["imgId"], table["prompt"], strict=True), start=2):
            if name in prompts:
                set_aside(row, name, "repeated id", "give each picture one row; the first was kept")
            elif not prompt.strip():
                set_aside(row, name, "empty prompt", "write the prompt or delete the row")
            else:
                prompts[name] = prompt
                # A test picture that the submission asks for is reported when pictures are checked.
                if name not in files and name not in asked:
                    set_aside(row, name, "missing picture", f"add {images}/{name}.png or delete the row")
    elif split == "train":
        raise FileNotFoundError(f"{csv}: no such file; it holds the prompts, with the columns imgId,prompt")

    if split == "train":
        known = {row["id"] for row in aside}
        for name in files:
            if name not in prompts and name not in known:
                set_aside(0, name, "no prompt", f"add the picture's row to {csv}")
        ids = [name for name in prompts if name in files]
    else:
        ids = list(asked or files)
    table = pd.DataFrame(
        [(name, source, files.get(name), prompts.get(name)) for name in ids], columns=ROW, dtype=object
    )
    return Rows(table, aside)


def _submission_ids(path: Path) -> dict[str, None]:
    """The ids that a sample submission asks for, in its order; none without the file."""
    if not path.is_file():
        return {}
    return dict.fromkeys(_read_csv(path, ["imgId_eId"])["imgId_eId"].str.rpartition("_")[0])


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    # Text only: the id 001 is not 1, and a prompt that reads NA is a prompt.
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8 ({error})") from None
    for column in columns:
        if column not in table:
            near = difflib.get_close_matches(column, table.columns, n=1, cutoff=0.4)
            hint = f"; rename {near[0]!r}" if near else ""
            raise ValueError(f"{path}: no column {column!r} among {list(table.columns)}{hint}")
    return table


def _check_pictures(rows: Rows, split: str) -> Rows:
    """Decode every picture once: unreadable ones are set aside (train) or left without picture (test)."""

    def check(reference: str | None) -> tuple[bytes, str]:
        if reference is None:
            return b"", "missing picture"
        try:
            data = read_picture(reference)
            decode(data)
        except (OSError, ValueError) as error:
            return b"", f"unreadable picture: {error}"
        return hashlib.sha256(data).digest(), ""

    table = rows.table
    # Threads: Pillow decodes outside the interpreter lock.
    jobs = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(map(delayed(check), table["picture"]))
    total, reasons = hashlib.sha256(), []
    for sha, reason in progress(jobs, f"checking {split} pictures", len(table), "picture"):
        total.update(sha)
        reasons.append(reason)
    bad = pd.Series(reasons, index=table.index, dtype=object)
    for index in table.index[bad != ""]:
        reason, _, detail = bad[index].partition(": ")
        fix = f"replace {table.at[index, 'picture']} ({detail})" if detail else "add the picture"
        values = (split, table.at[index, "source"], 0, table.at[index, "id"], reason, fix)
        rows.set_aside.append(dict(zip(SET_ASIDE, values, strict=True)))
    if split == "train":
        table = table[bad == ""].reset_index(drop=True)
    else:
        table = table.assign(picture=table["picture"].where(bad == "", None))
    return Rows(table, rows.set_aside, total.hexdigest())
