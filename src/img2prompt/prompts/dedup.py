"""Exact deduplication of prompts by the cosine of their embeddings (arXiv 2401.06167, section 3.5.2).

Nothing here approximates: no top-k (a cluster larger than k would lose duplicates silently) and no index
(building one takes longer than the answer). A fast matrix product finds the pairs that might matter; every
decision that it leaves open is taken in float64. The result is therefore the same on every device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.device import has_bfloat16, tile
from img2prompt.core.progress import progress

BLOCK, TILE = 1024, 4096  # on the CPU, rows decided in one step and those they are compared with: 8 or 16 MB of scores
GROUP = 16  # rows of a tile whose highest score is looked at first
CHUNK = 256  # pairs a float64 step gathers: both sides stay in the L2 cache
LOWEST = 0.01  # threshold: above the margin of any rows, so that no row is near those of zeros that fill a tile up
LEAST = {torch.bfloat16: 0.006, torch.float32: 0.0}  # margin, whatever the rows


@dataclass(frozen=True, slots=True)
class Deduplication:
    """Which rows survive at each threshold, and the duplicates at the `threshold` that was asked for."""

    thresholds: tuple[float, ...]  # ascending
    kept: np.ndarray  # (n_thresholds, n) bool
    duplicates: pd.DataFrame  # dropped, kept: int64 rows; cosine: float64; in order of `dropped`


class FastCosines:
    """Finds the pairs of rows whose cosine may exceed a limit: in bf16 where the device is fast at it, else in fp32.

    block, tile: how many rows to compare with how many at once. margin: how far a score may be from the cosine.
    """

    def __init__(self, device: str | torch.device, *rows: np.ndarray | Stack) -> None:
        """`rows`: each (n, d) float32 at norm 1: all that will be compared, for the margin."""
        self.device = torch.device(device)
        self.block, self.tile = tile(device, (BLOCK, TILE))
        self.dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
        # Factors x + e and y + f have a product within |e| + |f| and little more of x.y. Added up in fp32 it may lose d
        # roundings, and a score below 1 half a unit in its last place. The worst rows come to 0.0098 in bf16.
        lost = max(self._lost(array[part]) for array in rows for part in blocks(len(array)))
        adding, last = rows[0].shape[1] * torch.finfo(torch.float32).eps, torch.finfo(self.dtype).eps / 4
        self.margin = max(2.01 * lost + adding + last, LEAST[self.dtype])
        # Reused: a fresh one page-faults.
        self.scores = torch.empty(self.block * (self.tile + GROUP), dtype=self.dtype, device=self.device)

    def cast(self, rows: np.ndarray) -> torch.Tensor:
        """(m, d) float32 to the same rows in the fast precision, on the device."""
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device, self.dtype)

    def _lost(self, rows: np.ndarray) -> float:
        """The largest norm of what `cast` takes from a row."""
        rows = torch.from_numpy(np.ascontiguousarray(rows))
        return float((rows - rows.to(self.dtype)).norm(dim=1).max())

    def pairs(
        self, block: torch.Tensor, tile: torch.Tensor, limit: float | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (i, j, score) with a cosine above `limit`, and some within 2 * margin below it; of one i by j.

        `block`: (b, d), `tile`: (t, d), both from `cast`, b and t at most self.block and self.tile. `limit`: one, or
        (b,) float64, one for each row of the block. i, j: (m,) int64 row numbers within them; score: (m,) float32, at
        most 1, within the margin of the cosine.
        """
        groups, width = -(-len(tile) // GROUP), len(block)
        scores = self.scores[: groups * GROUP * width].view(groups, GROUP, width)
        every = scores.view(groups * GROUP, width)
        torch.mm(tile, block.T, out=every[: len(tile)])  # the larger factor first: the CPU library repacks the second
        every[len(tile) :] = -torch.inf
        lowest = torch.from_numpy(np.full(width, limit - self.margin, dtype=np.float32)).to(self.device)
        # Above 0 floats are in the order of their bits, and the largest of integers is found several times as fast. The
        # bits of a bf16 are the upper ones of a float32.
        bits = {2: torch.int16, 4: torch.int32}[self.dtype.itemsize]
        above = (lowest.view(torch.int32) >> 32 - 8 * self.dtype.itemsize) + 1
        above = torch.where(lowest > 0, above, torch.iinfo(bits).min).to(bits)
        loud = scores.view(bits).amax(dim=1) >= above  # few rows have a pair in a group
        group, row = loud.nonzero(as_tuple=True)
        found = scores[group, :, row].float()
        place, member = (found > lowest[row, None]).nonzero(as_tuple=True)
        score = found[place, member].clamp_(max=1)
        return row[place].cpu().numpy(), (group[place] * GROUP + member).cpu().numpy(), score.cpu().numpy()


class Bank:
    """Rows that others are compared with. Pages of it that are not yet touched cost no memory."""

    def __init__(self, size: int, d: int, fast: FastCosines) -> None:
        """`size`: how many rows of d values it may have to hold."""
        self.fast, self.count = fast, 0
        self.numbers = np.empty(size, dtype=np.int64)
        self.rows = torch.empty((size, d), dtype=fast.dtype, device=fast.device)

    def add(self, numbers: np.ndarray, rows: torch.Tensor) -> None:
        """`numbers`: (m,) int64; `rows`: (m, d) from `FastCosines.cast`, m at most a block."""
        start, self.count = self.count, self.count + len(numbers)
        self.numbers[start : self.count] = numbers
        self.rows[start : self.count] = rows
        self.rows[self.count : self.count + self.fast.block] = 0

    def tiles(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Numbers (m,) and rows (t, d) with t >= m: some rows of zeros may follow.

        The number of rows is one of a few, of blocks: each new shape costs the CPU library a new kernel.
        """
        for part in blocks(self.count, self.fast.tile):
            numbers = self.numbers[part]
            width = min(-(-len(numbers) // self.fast.block) * self.fast.block, self.fast.tile)
            yield numbers, self.rows[part.start : part.start + width]


def exact_cosines(a: np.ndarray | Stack, i: np.ndarray, b: np.ndarray | Stack, j: np.ndarray) -> np.ndarray:
    """(m,) float64: the cosines of rows a[i] and b[j], both (n, d) float32 at norm 1, computed in float64."""
    cosines = np.empty(len(i))
    for start in range(0, len(i), CHUNK):
        part = slice(start, start + CHUNK)
        cosines[part] = np.einsum("nd,nd->n", a[i[part]], b[j[part]], dtype=np.float64)
    return cosines


def check_rows(embeddings: np.ndarray | Stack) -> None:
    """Raises ValueError unless `embeddings` is (n, d) float32, n > 0, every row at norm 1 within 1e-3."""
    if len(embeddings.shape) != 2 or embeddings.dtype != np.float32 or not len(embeddings):
        raise ValueError(
            f"embeddings must be (n, d) float32 with n > 0, not {embeddings.shape} {embeddings.dtype}: "
            "embed at least one prompt, and convert with embeddings.astype(np.float32)"
        )
    parts = (embeddings[part] for part in blocks(len(embeddings)))
    norms = np.concatenate([np.sqrt(np.einsum("nd,nd->n", part, part)) for part in parts])
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
    greedy = Greedy(embeddings, ordered(threshold, also), threshold, device)
    for part in progress(list(blocks(len(embeddings), greedy.block)), "dedup", unit="block"):
        greedy.decide(part)
    return deduplication(greedy.thresholds, threshold, greedy.alive, greedy.nearest, greedy.nearest_cosine)


def ordered(threshold: float, also: Sequence[float]) -> tuple[float, ...]:
    """The distinct thresholds, ascending. Raises ValueError as `deduplicate`."""
    thresholds = tuple(sorted({float(t) for t in (threshold, *also)}))
    if thresholds[0] < LOWEST or thresholds[-1] >= 1 or len(thresholds) > 64:
        raise ValueError(f"dedup.threshold: give up to 64 values from {LOWEST} to below 1, not {thresholds}")
    return thresholds


def deduplication(
    thresholds: tuple[float, ...], threshold: float, alive: np.ndarray, nearest: np.ndarray, cosine: np.ndarray
) -> Deduplication:
    """The result for one of the thresholds, of what `Greedy` has found of all rows."""
    bits = np.uint64(1) << np.arange(len(thresholds), dtype=np.uint64)
    kept = (alive & bits[:, None]) != 0
    dropped = np.flatnonzero(~kept[thresholds.index(float(threshold))])
    duplicates = {"dropped": dropped, "kept": nearest[dropped], "cosine": cosine[dropped]}
    return Deduplication(thresholds, kept, pd.DataFrame(duplicates))


class Greedy:
    """Rows that are kept or dropped in their order, block by block, and what is known of them so far.

    Sets of thresholds are the bits of one integer, bit 0 the lowest: `alive` (n,) uint64 has of each row those at which
    it is kept, `under(cosine)` those below the cosine. Then `alive[j] & under(cosine)` are the thresholds at which kept
    row j drops row i, and a pair costs the same for one threshold as for 64. `nearest` (n,) int64 and `nearest_cosine`
    (n,) float64 are of a row that is dropped at the `threshold`, and name the nearest row yet that is kept there.

    Args:
        rows: (n, d) float32 at norm 1.
        thresholds: from `ordered`.
        threshold: one of them.
        device: a torch device.
    """

    def __init__(
        self, rows: np.ndarray | Stack, thresholds: tuple[float, ...], threshold: float, device: str | torch.device
    ) -> None:
        n = len(rows)
        self.thresholds, self._rows, self._threshold = thresholds, rows, threshold
        self._levels = np.array(thresholds)
        self._at = np.concatenate([self._levels, np.full(65 - len(thresholds), np.inf)])
        self._lowest = np.array([(1 << count) - 1 for count in range(len(thresholds) + 1)], dtype=np.uint64)
        self._asked = np.uint64(1 << thresholds.index(float(threshold)))
        self.alive = np.full(n, self._lowest[-1])
        self.nearest, self.nearest_cosine = np.full(n, -1), np.full(n, -np.inf)
        self._fast = FastCosines(device, rows)
        self.block, self._margin = self._fast.block, self._fast.margin
        # Highest score with a kept row so far, or this.
        self._top = np.full(n, threshold + self._margin, dtype=np.float32)
        # Rows kept at some threshold so far, those kept at `asked` apart: they alone may be the nearest one.
        self._banks = [Bank(size, rows.shape[1], self._fast) for size in (n, n if len(thresholds) > 1 else 0)]

    def decide(self, part: slice) -> None:
        """Keep or drop the next block's rows."""
        block = self._fast.cast(self._rows[part])
        self._against(part, block)
        self._within(part, block)
        self._keep(part, block)

    def compare(self, part: slice) -> None:
        """Drop those of a block's rows that are near earlier blocks' kept ones."""
        self._against(part, self._fast.cast(self._rows[part]))

    def keep(self, part: slice) -> None:
        """Take a block's rows as kept where `alive` says so."""
        self._keep(part, self._fast.cast(self._rows[part]))

    def _under(self, cosine: np.ndarray) -> np.ndarray:
        return self._lowest[np.searchsorted(self._levels, cosine)]

    def _limits(self, part: slice, asked_too: bool) -> np.ndarray:
        """Cosines above which pairs matter to these rows: with rows kept at any threshold, or also with the `asked`."""
        bits = self.alive[part]
        still = self._at[np.bitwise_count(~bits & (bits - 1))]  # the lowest at which it is kept: by zeros below its bit
        return np.minimum(still, np.maximum(self.nearest_cosine[part], self._threshold)) if asked_too else still

    def _drop(self, i: np.ndarray, bits: np.ndarray) -> None:
        np.bitwise_and.at(self.alive, i, ~bits)

    def _note_nearest(self, i: np.ndarray, j: np.ndarray, cosine: np.ndarray) -> None:
        # Equal ones of earlier tiles stay.
        better = (self.alive[j] & self._asked != 0) & (cosine > self.nearest_cosine[i])
        i, j, cosine = i[better], j[better], cosine[better]
        np.maximum.at(self.nearest_cosine, i, cosine)
        best = np.flatnonzero(cosine == self.nearest_cosine[i])[::-1]  # reversed: the earliest is written last
        self.nearest[i[best]] = j[best]

    def _against(self, part: slice, block: torch.Tensor) -> None:
        alive, rows, top, margin, asked = self.alive, self._rows, self._top, self._margin, self._asked
        for bank in self._banks:
            limit = self._limits(part, bank is self._banks[0])
            for numbers, others in bank.tiles():
                i, j, score = self._fast.pairs(block, others, limit)
                if not len(i):
                    continue
                i, j = part.start + i, numbers[j]
                self._drop(i, alive[j] & self._under(score - margin))  # beyond doubt
                in_doubt = alive[j] & alive[i] & self._under(score + margin) != 0
                listed = np.flatnonzero(alive[j] & asked)
                np.maximum.at(top, i[listed], score[listed])
                in_doubt[listed] |= score[listed] >= top[i[listed]] - 2 * margin  # may be the nearest one
                i, j = i[in_doubt], j[in_doubt]
                cosine = exact_cosines(rows, i, rows, j)
                self._drop(i, alive[j] & self._under(cosine))
                self._note_nearest(i, j, cosine)
                limit = self._limits(part, bank is self._banks[0])

    def _within(self, part: slice, block: torch.Tensor) -> None:
        # Within the block a row's fate hangs on rows decided in the same step. Assume that all are kept
        # and repeat: round r settles the first r rows at least, and in practice a few rounds settle all.
        alive = self.alive
        i, j, score = self._fast.pairs(block, block, self._limits(part, True))
        i, j = part.start + i, part.start + j
        in_doubt = (i > j) & (alive[j] & (self._asked | alive[i] & self._under(score + self._margin)) != 0)
        i, j = i[in_doubt], j[in_doubt]
        cosine = exact_cosines(self._rows, i, self._rows, j)
        below = self._under(cosine)
        survivors, before = alive[part].copy(), None
        while not np.array_equal(before, alive[part]):
            before = alive[part].copy()
            bits = alive[j] & below
            alive[part] = survivors
            self._drop(i, bits)
        self._note_nearest(i, j, cosine)

    def _keep(self, part: slice, block: torch.Tensor) -> None:
        bits = self.alive[part]
        asked = bits & self._asked != 0
        for bank, stay in zip(self._banks, (asked, ~asked & (bits != 0)), strict=True):
            stay = np.flatnonzero(stay)
            bank.add(part.start + stay, block[torch.from_numpy(stay).to(self._fast.device)])


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
    fast = FastCosines(device, a, b)
    tiles = fast.cast(b)
    best = exact_cosines(a, np.zeros(len(b), dtype=np.int64), b, np.arange(len(b))).max()
    for start in progress(range(0, len(a), fast.block), "largest cosine", unit="block"):
        block = fast.cast(a[start : start + fast.block])
        for first in range(0, len(b), fast.tile):
            i, j, score = fast.pairs(block, tiles[first : first + fast.tile], best)
            if len(i):
                near = score >= score.max() - 2 * fast.margin
                best = max(best, exact_cosines(a, start + i[near], b, first + j[near]).max())
    return float(best)


def nearest_below(
    embeddings: np.ndarray, threshold: float, n: int, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n pairs of rows i > j with the largest cosines, where none is above `threshold`: the nearest to it.

    `embeddings`: (m, d) float32 at norm 1, such as rows that `deduplicate` keeps. Returns i, j: (n,) int64 and cosine:
    (n,) float64, the largest first; fewer where there are fewer pairs. Never holds an m x m matrix.
    """
    fast = FastCosines(device, embeddings)
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
