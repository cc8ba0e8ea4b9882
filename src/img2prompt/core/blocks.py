"""Rows too many to be copied: arrays, in memory or mapped from disk, that are read a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

BLOCK = 4096  # rows read at once: 32 MB of 1,024 float64 features


def blocks(n: int, size: int | None = None) -> Iterator[slice]:
    """The slices of n rows, of `size` rows each (None: of BLOCK), the last of what is left."""
    size = size or BLOCK
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


class Stack:
    """Some rows of arrays (n_i, d) that are thought of as one below the other; it holds none of their values.

    It is read as an array is, by a slice, a mask or row numbers.

    Args:
        arrays: one or more, of one dtype and one d.
        rows: (n,) int64, numbers of rows of the whole stack; None: all of them in order.
    """

    def __init__(self, arrays: Sequence[np.ndarray], rows: np.ndarray | None = None) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])
        self._rows = np.arange(self._starts[-1]) if rows is None else rows
        self.shape = (len(self._rows), *arrays[0].shape[1:])
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """Rows as an array of their own, (..., d)."""
        rows = self._rows[key]
        if len(self._arrays) == 1:
            return np.asarray(self._arrays[0][rows])
        found = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for array, start in zip(self._arrays, self._starts, strict=False):
            own = (rows >= start) & (rows < start + len(array))
            found[own] = array[rows[own] - start]
        return found

    def take(self, rows: np.ndarray) -> Stack:
        """Some of its rows (m,), by number or as a mask."""
        return Stack(self._arrays, self._rows[rows])


def save_rows(path: Path, rows: np.ndarray | Stack) -> None:
    """Write what `np.save` would write of the rows as an array, block by block."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": rows.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in blocks(len(rows)):
            file.write(np.ascontiguousarray(rows[part]))
