"""Reads rows of CSV, TSV, JSON lines and parquet as text, a few at a time; a broken row does not end the reading."""

from __future__ import annotations

import csv
import difflib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = (",", ";", "\t", "|")
BATCH = 4096  # rows of parquet at a time


class Line(NamedTuple):
    """A row, numbered as a spreadsheet does; a broken one has no cells, and `wrong` says how to mend it."""

    row: int
    cells: list[str | None]
    wrong: str = ""


def columns(path: Path) -> list[str]:
    """The columns of a table, in order; for JSON lines the keys of the first object.

    Raises:
        ValueError: the file is empty or of another kind; the message names it.
    """
    if path.suffix == ".parquet":
        return _parquet(path).schema_arrow.names
    if path.suffix == ".jsonl":
        return list(next((value for _, value, _ in _objects(path) if value), {}))
    return _header(path)[1]


def pick(path: Path, known: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The column `wanted`, or else the first of the `usual` names that the table has; None without either.

    Raises:
        ValueError: `wanted` is not there; or none of the usual names is, but one that resembles them.
    """
    if wanted is not None:
        if wanted not in known:
            raise ValueError(missing_column(path, wanted, known))
        return wanted
    found = [name for name in usual if name in known]
    for name in () if found else usual:
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(missing_column(path, name, known, near))
    return found[0] if found else None


def missing_column(path: Path, wanted: str, known: Sequence[str], near: Sequence[str] = ()) -> str:
    """The error message for a column that is not there; it suggests the most similar one."""
    near = near or difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    return f"{path}: no column {wanted!r} among {list(known)}" + (f"; rename {near[0]!r}" if near else "")


def read_table(path: Path, names: Sequence[str]) -> Iterator[Line]:
    """Yield the cells of the named columns row by row, as text; missing and null values of JSON and parquet are None.

    Bytes that are not UTF-8 become lone surrogates. An unclosed quote breaks its own row, not those below.

    Raises:
        ValueError: the file is of another kind or lacks a column; the message names it.
    """
    known = columns(path)
    for name in names:
        if name not in known:
            raise ValueError(missing_column(path, name, known))
    if path.suffix == ".parquet":
        yield from _read_parquet(path, names)
    elif path.suffix == ".jsonl":
        for row, value, wrong in _objects(path):
            try:
                cells = [text((value or {}).get(name)) for name in names]
            except TypeError as error:
                cells, wrong = [], f"write text where it has {error}"
            yield Line(row, [] if wrong else cells, wrong)
    else:
        delimiter, _ = _header(path)
        places = [known.index(name) for name in names]
        with _open(path) as file:
            records = _records(file, delimiter)
            next(records)
            for row, (cells, wrong) in enumerate(records, start=2):
                yield Line(row, [] if wrong else [cells[place] for place in places], wrong)


def count(path: Path) -> int:
    """The approximate number of rows of a table, for the progress bar."""
    if path.suffix == ".parquet":
        return _parquet(path).metadata.num_rows
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def text(value: object) -> str | None:
    """A cell as text; null and NaN are None.

    Raises:
        TypeError: the value is a list or an object, which is no cell.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, float):
        if value != value:
            return None
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path}: it is in UTF-16; save it as UTF-8")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _header(path: Path) -> tuple[str, list[str]]:
    """A CSV's delimiter, the one that splits its header into the most cells, and its columns."""
    found: dict[str, list[str]] = {}
    for delimiter in DELIMITERS:
        with _open(path) as file:
            cells, wrong = next(_records(file, delimiter), ([], "it is empty"))
        found[delimiter] = [] if wrong else [cell.strip() for cell in cells]
    delimiter = max(found, key=lambda key: len(found[key]))  # the first of equals
    if not found[delimiter]:
        raise ValueError(f"{path}: it is empty, or its first line is broken; the first line names the columns")
    return delimiter, found[delimiter]


class _Lines:
    """An iterator over the lines of a file that can put lines back, to be read again."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._back, self.taken = file, deque[str](), list[str]()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._file)
        self.taken.append(line)
        return line

    def give_back_all_but_first(self) -> None:
        self._back.extendleft(reversed(self.taken[1:]))


def _records(file: TextIO, delimiter: str) -> Iterator[tuple[list[str], str]]:
    """Yield each record's cells, as many as the first has; for a broken record no cells, and how to mend it."""
    lines, width = _Lines(file), 0
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = f"close its quotes, and double those inside ({error})"
        else:
            if not cells:
                continue
            width = width or len(cells)
            if len(cells) == width:
                yield cells, ""
                continue
            wrong = f"{len(cells)} fields where the header has {width}: quote text that holds {delimiter!r}"
        # An unclosed quote swallows all lines up to the next quote: put them back, and lose only its own line.
        lines.give_back_all_but_first()
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        yield [], wrong


def _objects(path: Path) -> Iterator[tuple[int, dict[str, object] | None, str]]:
    with _open(path) as file:
        for row, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield row, None, f"write one JSON object a line ({error})"
                continue
            if isinstance(value, dict):
                yield row, value, ""
            else:
                yield row, None, "write one JSON object a line"


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: no parquet file that can be read ({error})") from None


def _read_parquet(path: Path, names: Sequence[str]) -> Iterator[Line]:
    with _parquet(path) as file:
        for name in names:
            kind = file.schema_arrow.field(name).type
            if pa.types.is_nested(kind):
                raise ValueError(f"{path}: column {name!r} holds {kind}; it must hold text")
        row = 0
        try:
            for batch in file.iter_batches(BATCH, columns=list(dict.fromkeys(names))):
                values = [batch.column(name).to_pylist() for name in names]
                for cells in zip(*values, strict=True):
                    row += 1
                    yield Line(row, [text(cell) for cell in cells])
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: broken after row {row} ({error})") from None
