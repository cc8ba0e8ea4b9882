"""The submission file: one row for each of the 384 values of each image's vector."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

HEADER = ["imgId_eId", "val"]
CHUNK = 512  # images written at a time: some 5 MB of text
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
    # Arrow joins the text as whole columns: a Python loop over single values would be slow.
    prefixes = [f"{quote}{name.replace(quote, quote * 2) if quote else name}_" for name in ids]
    suffixes = [f"{element}{quote}," for element in range(predictions.shape[1])]
    with path.open("wb") as file:
        file.write(f"{','.join(HEADER)}\n".encode())
        for start in range(0, len(ids), CHUNK):
            rows = slice(start, start + CHUNK)
            values = np.asarray(predictions[rows], dtype=np.float32)
            names = _product(prefixes[rows], suffixes)
            lines = pc.binary_join_element_wise(*names, pc.cast(pa.array(values.ravel()), pa.string()), "\n", "")
            _, offsets, text = lines.buffers()
            file.write(memoryview(text)[: np.frombuffer(offsets, np.int32)[len(lines)]])


def check_submission(path: Path, ids: Sequence[str], dim: int = 384) -> None:
    """Read the file back as a stream and make sure that it has the competition's format.

    Every id of ids must occur once and in their order, with its dim values in order; each value must be finite and
    each vector of norm 1 within 1e-4. Raises ValueError naming the file, the row (the first below the
    header is 1) and what to do.
    """
    _check_ids(path, ids)
    squares, row = np.zeros(len(ids)), 0
    text = pa.string()
    try:
        # Values as text first: Arrow's own conversion does not say which row it failed at.
        with csv.open_csv(
            path,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(HEADER, text)),
        ) as reader:
            if reader.schema.names != HEADER:
                raise ValueError(f"{path}: the header is {reader.schema.names}; it must be {HEADER}")
            for batch in reader:
                squares += _read_batch(path, batch, row, ids, dim)
                row += len(batch)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: after row {row} or so: {error}: write the file again") from error
    if row < len(ids) * dim:
        raise ValueError(f"{path}: ends after row {row} of {len(ids)} x {dim}: write the file again")
    _check_norms(path, ids, squares)


def _read_batch(path: Path, batch: pa.RecordBatch, row: int, ids: Sequence[str], dim: int) -> np.ndarray:
    """Check the names and values of the rows from `row` on; return their sum of squares for each id: (n,) float64."""
    if row + len(batch) > len(ids) * dim:
        raise ValueError(f"{path}: more rows than {len(ids)} ids x {dim}: write one vector for each id")
    first, last = row // dim, -(-(row + len(batch)) // dim)
    skip = row - first * dim
    prefix, suffix = _product([f"{name}_" for name in ids[first:last]], [str(i) for i in range(dim)])
    expected = pc.binary_join_element_wise(prefix, suffix, "")[skip : skip + len(batch)]
    names, texts = batch.columns
    same = pc.equal(names, expected).to_numpy(zero_copy_only=False)
    if not same.all():
        bad = int(same.argmin())
        raise ValueError(
            f"{path}: row {row + bad + 1} is {names[bad].as_py()!r} where {expected[bad].as_py()!r} belongs: "
            "write each id once, in the order of the sample submission"
        )
    try:
        values = pc.cast(texts, pa.float32()).to_numpy()
    except pa.ArrowInvalid:
        numeric = pc.match_substring_regex(texts, NUMBER).to_numpy(zero_copy_only=False)
        values = np.where(numeric, 0, np.nan)
    if not np.isfinite(values).all():
        bad = int(np.isfinite(values).argmin())
        raise ValueError(
            f"{path}: row {row + bad + 1} ({names[bad].as_py()!r}) has {texts[bad].as_py()!r}, "
            "no finite number: look at the predictions of that image"
        )
    image = (row + np.arange(len(batch))) // dim
    return np.bincount(image, weights=np.square(values, dtype=np.float64), minlength=len(ids))


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
