"""The submission file: one row for each of the 384 values of each image's vector."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from img2prompt.core.blocks import blocks
from img2prompt.core.process import threads

Item, Result = TypeVar("Item"), TypeVar("Result")
HEADER = ["imgId_eId", "val"]
CHUNK = 128  # images written at a time: some 1 MB of text
TOLERANCE = 1e-4  # how far a vector's norm may be from 1
NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"


def write_submission(path: Path, ids: Sequence[str], predictions: np.ndarray) -> None:
    """Write predictions (n, 384), rows of norm 1, as `imgId_eId,val`: lines ID_0 .. ID_383 for each of ids, in order.

    Values are float32 in the shortest notation that reads back as the same bits. Where an id has a comma,
    quote or line break, ids are quoted (RFC 4180). Equal predictions give equal bytes. Raises ValueError, before
    anything is written, for repeated ids, another number of ids than rows, values not finite, or norms other than 1.
    """
    if predictions.ndim != 2 or len(ids) != len(predictions):
        raise ValueError(f"{path}: {len(ids)} ids for predictions {predictions.shape}: one row for each id")
    _check_ids(path, ids)
    _check_norms(path, ids, np.einsum("ij,ij->i", predictions, predictions, dtype=np.float64))
    quote = '"' if any(set(name) & set(',"\r\n') for name in ids) else ""
    prefixes = [f"{quote}{name.replace(quote, quote * 2) if quote else name}_" for name in ids]
    suffixes = [f"{element}{quote}," for element in range(predictions.shape[1])]

    def lines(rows: slice) -> memoryview:
        # Arrow joins the text as whole columns: a Python loop over single values would be slow.
        values = np.asarray(predictions[rows], dtype=np.float32)
        names = _product(prefixes[rows], suffixes)
        joined = pc.binary_join_element_wise(*names, pc.cast(pa.array(values.ravel()), pa.string()), "\n", "")
        _, offsets, text = joined.buffers()
        return memoryview(text)[: np.frombuffer(offsets, np.int32)[len(joined)]]

    with path.open("wb") as file:
        file.write(f"{','.join(HEADER)}\n".encode())
        for text in _side_by_side(lines, blocks(len(ids), CHUNK)):
            file.write(text)


def check_submission(path: Path, ids: Sequence[str], dim: int = 384) -> None:
    """Read the file back as a stream and make sure that it has the competition's format.

    Every id of ids must occur once and in their order, with its dim values in order; each value must be finite and
    each vector of norm 1 within 1e-4. Raises ValueError naming the file, the row (the first below the
    header is 1) and what to do.
    """
    _check_ids(path, ids)
    squares, row = np.zeros(len(ids)), 0

    def numbered() -> Iterator[tuple[pa.RecordBatch, int]]:
        row = 0
        for batch in _batches(path, dim):
            yield batch, row
            row += len(batch)

    def values(numbered: tuple[pa.RecordBatch, int]) -> np.ndarray:
        batch, row = numbered
        if row + len(batch) > len(ids) * dim:
            raise ValueError(f"{path}: more rows than {len(ids)} ids x {dim}: write one vector for each id")
        return _values(path, batch, row, ids, dim, pa.float32())

    for found in _side_by_side(values, numbered()):
        image = (row + np.arange(len(found))) // dim
        squares += np.bincount(image, weights=np.square(found, dtype=np.float64), minlength=len(ids))
        row += len(found)
    if row < len(ids) * dim:
        raise ValueError(f"{path}: ends after row {row} of {len(ids)} x {dim}: write the file again")
    _check_norms(path, ids, squares)


def read_submission(path: Path, dim: int = 384) -> tuple[list[str], np.ndarray]:
    """Read any submission: the ids in the file's order, and their vectors (n, dim) float64, of any norm but 0.

    Raises:
        OSError: there is no such file.
        ValueError: an id occurs twice or has not its dim values in order, or a value or a norm is not finite or the
            norm is 0. It names the file, the first wrong row (the first below the header is 1) and what belongs there.
    """
    parts: list[np.ndarray] = []
    ids: list[str] = []
    row, first = 0, {}  # the row at which an id begins
    for batch in _batches(path, dim):
        end, wrong = len(batch), ""
        for start in range(-row % dim, len(batch), dim):
            name = _text(batch.column(0)[start])
            known, mark, element = name.rpartition("_")
            if not mark or element != "0":
                wrong = "where element 0 of another image belongs, `ID_0`"
            elif known in first:
                wrong = f"but {known!r} has its vector from row {first[known]} on: write each id once"
            if wrong:
                end, wrong = start, f"{path}: row {row + start + 1} is {name!r} {wrong}"
                break
            first[known] = row + start + 1
            ids.append(known)
        parts.append(_values(path, batch[:end], row, ids, dim, pa.float64()))
        if wrong:
            raise ValueError(wrong)
        row += len(batch)
    if row % dim or not row:
        last = f"{ids[-1]}_{row % dim}" if ids else "ID_0"
        raise ValueError(f"{path}: ends after row {row}, where {last!r} belongs: an image has {dim} rows")
    found = np.concatenate(parts).reshape(-1, dim)
    norms = np.sqrt(np.einsum("ij,ij->i", found, found))
    bad = np.flatnonzero(~((norms > 0) & np.isfinite(norms)))
    if len(bad):
        start, name = int(bad[0]) * dim, ids[bad[0]]
        raise ValueError(
            f"{path}: rows {start + 1} to {start + dim}, the vector of {name!r}, have norm {norms[bad[0]]:g}: it needs "
            "a direction; the mean of all vectors serves where there is no prediction"
        )
    return ids, found


def _side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `work` makes of the items, in order; Arrow leaves Python's threads free, and few results wait at a time."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads()) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(path: Path, dim: int) -> Iterator[pa.RecordBatch]:
    """The rows, some at a time, both columns as text; ValueError for another header and rows that are no pairs."""
    broken: list[str] = []

    def note(row: csv.InvalidRow) -> str:
        broken.append(row.text)
        return "error"

    try:
        # Values as text first: Arrow's own conversion does not say which row it failed at.
        with csv.open_csv(
            path,
            parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(HEADER, pa.string()), check_utf8=False),
        ) as reader:
            if reader.schema.names != HEADER:
                raise ValueError(f"{path}: the header is {reader.schema.names}; it must be {HEADER}")
            yield from reader
    except pa.ArrowInvalid as error:
        if not broken:
            raise ValueError(f"{path}: {error}: write the file again") from error
        # Arrow knows the text of a row that is no pair, but not its number.
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = (line.rstrip("\n") for line in file if line.strip())
            row = next(number for number, line in enumerate(lines) if line == broken[0].splitlines()[0])
        belongs = f"the name and the value of element {(row - 1) % dim}" if row else f"the header {HEADER}"
        raise ValueError(f"{path}: row {row} is {broken[0]!r} where {belongs} belong") from None


def _values(path: Path, batch: pa.RecordBatch, row: int, ids: Sequence[str], dim: int, kind: pa.DataType) -> np.ndarray:
    """Check the names of the rows from `row` on; return their values, all finite, as floats of a kind."""
    first, last = row // dim, -(-(row + len(batch)) // dim)
    skip = row - first * dim
    prefix, suffix = _product([f"{name}_" for name in ids[first:last]], [str(i) for i in range(dim)])
    expected = pc.binary_join_element_wise(prefix, suffix, "")[skip : skip + len(batch)]
    names, texts = batch.columns
    same = pc.equal(names, expected).to_numpy(zero_copy_only=False)
    if not same.all():
        bad = int(same.argmin())
        raise ValueError(
            f"{path}: row {row + bad + 1} is {_text(names[bad])!r} where {expected[bad].as_py()!r} belongs: "
            "write each id once, in the order of the sample submission"
        )
    try:
        values = pc.cast(texts, kind).to_numpy()
    except pa.ArrowInvalid:
        numeric = pc.match_substring_regex(texts, NUMBER).to_numpy(zero_copy_only=False)
        values = np.where(numeric, 0, np.nan)
    if not np.isfinite(values).all():
        bad = int(np.isfinite(values).argmin())
        raise ValueError(
            f"{path}: row {row + bad + 1} ({_text(names[bad])!r}) has {_text(texts[bad])!r}, "
            "no finite number: look at the predictions of that image"
        )
    return values


def _text(value: pa.StringScalar) -> str:
    return value.cast(pa.binary()).as_py().decode("utf-8", "backslashreplace")


def _product(prefixes: list[str], suffixes: list[str]) -> tuple[pa.Array, pa.Array]:
    """Every prefix with every suffix, as two columns of equal length, prefix by prefix."""
    repeated = np.repeat(np.arange(len(prefixes)), len(suffixes))
    tiled = np.tile(np.arange(len(suffixes)), len(prefixes))
    return pa.array(prefixes, pa.string()).take(repeated), pa.array(suffixes, pa.string()).take(tiled)


def _check_ids(path: Path, ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        repeated = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise ValueError(f"{path}: id {repeated!r} is given twice: an image has one vector")


def _check_norms(path: Path, ids: Sequence[str], squares: np.ndarray) -> None:
    norms = np.sqrt(squares)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= TOLERANCE))  # written so that nan is bad too
    if len(bad):
        raise ValueError(
            f"{path}: the vector of {ids[bad[0]]!r} has norm {norms[bad[0]]:.6g}, and {len(bad)} "
            "ids in all have one other than 1: scale the predictions' rows to norm 1"
        )
