"""The score: cosine similarity (eq. 7), its mean over images (eq. 8), and a bootstrap interval around that mean."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

from img2prompt.core.blocks import Stack, blocks


def norms(x: np.ndarray, first: int) -> np.ndarray:
    """Norms of the rows of (n, d), summed in float64: (n,).

    Raises ValueError naming the first row that is all zeros or not finite; `first`: the number of row 0.
    """
    found = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
    bad = np.flatnonzero(~((found > 0) & np.isfinite(found)))
    if len(bad):
        raise ValueError(
            f"row {first + bad[0]} has norm {found[bad[0]]} ({len(bad)} of {len(x)} rows have no direction): "
            "drop such rows or look for the stage that left them"
        )
    return found


def unit(x: np.ndarray, first: int = 0) -> np.ndarray:
    """The rows of (n, d) scaled to norm 1; floats keep their dtype, integers become float64.

    Raises ValueError naming the first row that is all zeros or not finite; `first`: the number of row 0.
    """
    x = np.asarray(x)
    x = x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float64)
    return x / norms(x, first).astype(x.dtype)[:, None]


def cosine(a: np.ndarray | Stack, b: np.ndarray | Stack, first: int = 0) -> np.ndarray:
    """Cosine of each row of a (n, d) with the same row of b (n, d): (n,) float64, eq. 7. Norms do not matter.

    Raises ValueError when the shapes differ or a row is all zeros or not finite; `first`: the number of row 0.
    """
    if a.shape != b.shape or len(a.shape) != 2:  # einsum would broadcast a single row silently
        raise ValueError(f"cosine compares row by row: shapes {a.shape} and {b.shape} are not two equal (n, d)")
    found = np.empty(len(a))
    for rows in blocks(len(a)):
        x, y, number = a[rows], b[rows], first + rows.start
        found[rows] = np.einsum("ij,ij->i", x, y, dtype=np.float64) / (norms(x, number) * norms(y, number))
    return found


def bootstrap_interval(
    values: ArrayLike, groups: ArrayLike | None = None, n: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) around the mean of values (m,): the percentile bootstrap over n resamples.

    With groups (m,), whole groups are drawn: rows that resemble each other are no independent evidence, and
    drawing them one by one would make the interval too narrow. For two models, pass the differences of their
    paired values. One group alone tells nothing about the spread and gives (nan, nan).

    Raises ValueError when there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no values to resample")
    group = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    # A resample's mean needs only each drawn group's sum and size.
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    if len(sums) < 2:
        return float("nan"), float("nan")
    interval = bootstrap(
        (sums, sizes),
        lambda drawn, size, axis: drawn.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=n,
        batch=max(1, 2**21 // len(sums)),  # some 50 MB at a time
        confidence_level=level,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
