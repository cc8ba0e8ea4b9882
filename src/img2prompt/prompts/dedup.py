"""Exact deduplication of prompts by the cosine of their embeddings (arXiv 2401.06167, section 3.5.2).

Nothing here approximates: no top-k (a cluster larger than k would lose duplicates silently) and no index
(building one takes longer than the answer). A fast matrix product finds the pairs that might matter; every
decision that it leaves open is taken in float64. The result is therefore the same on every device.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from img2prompt.core.device import tile
from img2prompt.core.progress import progress

BLOCK, TILE = 512, 4096  # on the CPU, rows decided in one step and those they are compared with: 4 to 8 MB of scores
CHUNK = 256  # pairs a float64 step gathers: both sides stay in the L2 cache
# How far a fast product may be from the cosine. bf16 rounds both factors, the product and the limit that it
# is compared with by 2**-9 each: 0.008. A device that computes fp32 products in TF32 stays below it as well.
MARGIN = 0.01


@dataclass(frozen=True, slots=True)
class Deduplication:
    """Which rows survive at each threshold, and the duplicates at the `threshold` that was asked for."""

    thresholds: tuple[float, ...]  # ascending
    kept: np.ndarray  # (n_thresholds, n) bool
    duplicates: pd.DataFrame  # dropped, kept: int64 rows; cosine: float64; in order of `dropped`


class FastCosines:
    """Finds the pairs of rows whose cosine may exceed a limit, in fp32 or bf16: whichever is faster here.

    block, tile: how many rows to compare with how many at once.
    """

    def __init__(self, rows: np.ndarray, device: str | torch.device = "cpu") -> None:
        """`rows`: (n, d) float32 at norm 1, or a sample of them to time the two precisions with."""
        self.device = torch.device(device)
        self.block, self.tile = tile(device, (BLOCK, TILE))
        self.dtype = min((torch.float32, torch.bfloat16), key=lambda dtype: self._seconds(rows, dtype))
        # Reused: a fresh one page-faults.
        self.scores = torch.empty(self.block * self.tile, dtype=self.dtype, device=self.device)

    def cast(self, rows: np.ndarray) -> torch.Tensor:
        """(m, d) float32 to the same rows in the fast precision, on the device."""
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device, self.dtype)

    def pairs(self, block: torch.Tensor, tile: torch.Tensor, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (i, j, score) with a cosine above `limit`, and some within 2 * MARGIN below it, by i, then j.

        `block`: (b, d), `tile`: (t, d), both from `cast`, b and t at most self.block and self.tile. i, j: (m,) int64
        row numbers within them; score: (m,) float32, within MARGIN of the cosine.
        """
        out = self.scores[: len(block) * len(tile)].view(len(block), len(tile))
        scores = torch.mm(block, tile.T, out=out)
        loud = (scores.amax(dim=1) > limit - MARGIN).nonzero().squeeze(1)  # few rows of a tile have a pair
        scores = scores[loud]
        i, j = (scores > limit - MARGIN).nonzero(as_tuple=True)
        return loud[i].cpu().numpy(), j.cpu().numpy(), scores[i, j].float().cpu().numpy()

    def _seconds(self, rows: np.ndarray, dtype: torch.dtype) -> float:
        block, tile = (torch.from_numpy(rows[:size]).to(self.device, dtype) for size in (self.block, self.tile))
        out = torch.empty(len(block), len(tile), dtype=dtype, device=self.device)
        times = []
        for _ in range(6):  # the first warms up; the shortest time is the least disturbed
            start = time.perf_counter()
            torch.mm(block, tile.T, out=out).amax().item()
            times.append(time.perf_counter() - start)
        return min(times)


def exact_cosines(a: np.ndarray, i: np.ndarray, b: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(m,) float64: the cosines of rows a[i] and b[j], both (n, d) float32 at norm 1, computed in float64."""
    cosines = np.empty(len(i))
    for start in range(0, len(i), CHUNK):
        part = slice(start, start + CHUNK)
        cosines[part] = np.einsum("nd,nd->n", a[i[part]], b[j[part]], dtype=np.float64)
    return cosines


def check_rows(embeddings: np.ndarray) -> None:
    """Raises ValueError unless `embeddings` is (n, d) float32, n > 0, every row at norm 1 within 1e-3."""
    if embeddings.ndim != 2 or embeddings.dtype != np.float32 or not len(embeddings):
        raise ValueError(
            f"embeddings must be (n, d) float32 with n > 0, not {embeddings.shape} {embeddings.dtype}: "
            "embed at least one prompt, and convert with embeddings.astype(np.float32)"
        )
    norms = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
    bad = ~(np.abs(norms - 1) <= 1e-3)  # NaN and infinity fail it as well
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"embeddings row {row} has norm {norms[row]:.4g}, not 1 ({bad.sum()} such rows): divide each row "
            "by its norm, and embed empty or missing prompts again"
        )


def deduplicate(
    embeddings: np.ndarray,
    threshold: float,
    also: Sequence[float] = (),
    device: str | torch.device = "cpu",
) -> Deduplication:
    """Of every pair of rows with a cosine above the threshold keep one: the earlier.

    Greedy in row order: a row is dropped if and only if its cosine with an earlier *kept* row is above (>)
    the threshold. So one of a set of equal rows survives, no two survivors are above the threshold, and a
    chain A~B~C keeps C where only B, itself dropped, is near it. A cosine is the float64 dot product of two
    rows.

    `embeddings`: (n, d) float32 at norm 1. `also`: further thresholds, served by the same pass. In
    `duplicates`, which is for `threshold` alone, each dropped row names the nearest earlier kept row, and the
    earliest of equally near ones.

    Raises ValueError for rows that `check_rows` refuses, a threshold outside [0.01, 1), or more than 64 thresholds.
    """
    check_rows(embeddings)
    thresholds = tuple(sorted({float(t) for t in (threshold, *also)}))
    if thresholds[0] < MARGIN or thresholds[-1] >= 1 or len(thresholds) > 64:
        raise ValueError(f"dedup.threshold: give up to 64 values from {MARGIN} to below 1, not {thresholds}")

    # Sets of thresholds are the bits of one integer, bit 0 the lowest: `alive[row]` has those at which the
    # row is kept, `under(cosine)` those below the cosine. Then `alive[j] & under(cosine)` are the thresholds
    # at which kept row j drops row i, and a pair costs the same for one threshold as for 64.
    levels = np.array(thresholds)
    lowest = np.array([(1 << count) - 1 for count in range(len(levels) + 1)], dtype=np.uint64)
    asked = np.uint64(1 << thresholds.index(float(threshold)))

    def under(cosine: np.ndarray) -> np.ndarray:
        return lowest[np.searchsorted(levels, cosine)]

    def drop(i: np.ndarray, bits: np.ndarray) -> None:
        np.bitwise_and.at(alive, i, ~bits)

    def note_nearest(i: np.ndarray, j: np.ndarray, cosine: np.ndarray) -> None:
        better = (alive[j] & asked != 0) & (cosine > nearest_cosine[i])  # equal ones of earlier tiles stay
        i, j, cosine = i[better], j[better], cosine[better]
        np.maximum.at(nearest_cosine, i, cosine)
        best = np.flatnonzero(cosine == nearest_cosine[i])[::-1]  # reversed: the earliest is written last
        nearest[i[best]] = j[best]

    n = len(embeddings)
    alive = np.full(n, lowest[-1])
    nearest, nearest_cosine = np.full(n, -1), np.full(n, -np.inf)
    top = np.full(n, threshold + MARGIN, dtype=np.float32)  # highest score with a kept row so far, or this
    fast = FastCosines(embeddings, device)
    # The bank: every row kept at some threshold so far. Pages of it not yet touched cost no memory.
    bank_row = np.empty(n, dtype=np.int64)
    bank = torch.empty(embeddings.shape, dtype=fast.dtype, device=fast.device)
    banked = 0

    for start in progress(range(0, n, fast.block), "dedup", unit="block"):
        stop = min(start + fast.block, n)
        block = fast.cast(embeddings[start:stop])
        for first in range(0, banked, fast.tile):
            # In steps of a block, zero rows at the end: each new shape costs the CPU library a new kernel.
            width = min(fast.tile, -(banked - first) // fast.block * -fast.block)
            i, j, score = fast.pairs(block, bank[first : first + width], levels[0])
            if not len(i):
                continue
            i, j = start + i, bank_row[first + j]
            drop(i, alive[j] & under(score - MARGIN))  # beyond doubt
            in_doubt = alive[j] & alive[i] & under(score + MARGIN) != 0
            listed = np.flatnonzero(alive[j] & asked)
            np.maximum.at(top, i[listed], score[listed])
            in_doubt[listed] |= score[listed] >= top[i[listed]] - 2 * MARGIN  # may be the nearest one
            i, j = i[in_doubt], j[in_doubt]
            cosine = exact_cosines(embeddings, i, embeddings, j)
            drop(i, alive[j] & under(cosine))
            note_nearest(i, j, cosine)

        # Within the block a row's fate hangs on rows decided in the same step. Assume that all are kept
        # and repeat: round r settles the first r rows at least, and in practice a few rounds settle all.
        i, j, _ = fast.pairs(block, block, levels[0])
        i, j = start + i[i > j], start + j[i > j]
        cosine = exact_cosines(embeddings, i, embeddings, j)
        survivors, before = alive[start:stop].copy(), None
        while not np.array_equal(before, alive[start:stop]):
            before = alive[start:stop].copy()
            bits = alive[j] & under(cosine)
            alive[start:stop] = survivors
            drop(i, bits)
        note_nearest(i, j, cosine)

        stay = np.flatnonzero(alive[start:stop])
        bank_row[banked : banked + len(stay)] = start + stay
        bank[banked : banked + len(stay)] = block[torch.from_numpy(stay).to(fast.device)]
        banked += len(stay)
        bank[banked : banked + fast.block] = 0

    dropped = np.flatnonzero(alive & asked == 0)
    duplicates = {"dropped": dropped, "kept": nearest[dropped], "cosine": nearest_cosine[dropped]}
    bits = np.uint64(1) << np.arange(len(levels), dtype=np.uint64)
    return Deduplication(thresholds, (alive & bits[:, None]) != 0, pd.DataFrame(duplicates))


def max_cosine(
    a: np.ndarray,
    b: np.ndarray,
    groups_a: np.ndarray | None = None,
    groups_b: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> float:
    """The largest cosine between a row of `a` and a row of `b`; with groups, between rows of different ones.

    `a`: (n, d), `b`: (m, d), float32 at norm 1. `groups_a`: (n,), `groups_b`: (m,), few distinct values, such
    as folds. Never holds an n x m matrix. Raises ValueError where there is no pair to compare.
    """
    if groups_a is not None and groups_b is not None:
        once = a is b and groups_a is groups_b  # each pair of groups from one side only
        others = {g: groups_a > g if once else groups_a != g for g in np.unique(groups_b)}
        found = [max_cosine(a[o], b[groups_b == g], device=device) for g, o in others.items() if o.any()]
        if not found:
            raise ValueError("max_cosine needs rows of two different groups")
        return max(found)
    check_rows(a)
    check_rows(b)
    fast = FastCosines(a, device)
    tiles = fast.cast(b)
    best = exact_cosines(a, np.zeros(len(b), dtype=np.int64), b, np.arange(len(b))).max()
    for start in progress(range(0, len(a), fast.block), "largest cosine", unit="block"):
        block = fast.cast(a[start : start + fast.block])
        for first in range(0, len(b), fast.tile):
            i, j, score = fast.pairs(block, tiles[first : first + fast.tile], best)
            if len(i):
                near = score >= score.max() - 2 * MARGIN
                best = max(best, exact_cosines(a, start + i[near], b, first + j[near]).max())
    return float(best)


def nearest_below(
    embeddings: np.ndarray, threshold: float, n: int, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n pairs of rows i > j with the largest cosines, where none is above `threshold`: the nearest to it.

    `embeddings`: (m, d) float32 at norm 1, such as rows that `deduplicate` keeps. Returns i, j: (n,) int64 and cosine:
    (n,) float64, the largest first; fewer where there are fewer pairs. Never holds an m x m matrix.
    """
    fast = FastCosines(embeddings, device)
    rows, width, found = fast.cast(embeddings), 0.01, np.empty((3, 0))
    while found.shape[1] < min(n, len(rows) * (len(rows) - 1) // 2):
        width, found = 4 * width, np.empty((3, 0))
        limit = threshold - width  # almost always enough: pairs this near are many
        for start in range(0, len(rows), fast.block):
            stop = min(start + fast.block, len(rows))
            for first in range(0, stop, fast.tile):
                i, j, _ = fast.pairs(rows[start:stop], rows[first : min(first + fast.tile, stop)], limit)
                i, j = start + i, first + j
                i, j = i[i > j], j[i > j]
                cosine = exact_cosines(embeddings, i, embeddings, j)
                found = np.concatenate([found, np.stack([i, j, cosine])[:, cosine >= limit]], axis=1)
                found = found[:, np.lexsort((found[1], found[0], -found[2]))[:n]]
                if found.shape[1] == n:
                    limit = found[2, -1]
    return found[0].astype(np.int64), found[1].astype(np.int64), found[2]
