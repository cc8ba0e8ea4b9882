"""Exact nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.device import has_bfloat16, tile
from img2prompt.core.metric import norms
from img2prompt.core.progress import progress

QUERY_BLOCK, KEY_BLOCK = 1024, 32_768  # on the CPU, a tile of similarities: 128 MB, of twice the keys in bfloat16
SWEEP = 16  # blocks of queries that one reading of the keys serves
GATHERED = 2**18  # floats of neighbours' rows gathered at once: few enough for the CPU's cache
ALIGNED = 32  # columns of a tile that its rows are a multiple of, for the matrix product's sake
HELD = 2**27  # floats of scaled rows that are held in the CPU's memory: 512 MB
SLACK = 16  # keys beyond k in a shortlist, from which float64 distances choose; of bfloat16 products half of k more
HALF = 64  # keys for each of the k from which on bfloat16 saves more time than the longer shortlist costs


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest rows of a bank of keys for each of n queries, nearest first.

    index (n, k) int32: rows of the bank, ascending where distances are equal. distance (n, k) float32, ascending.
    """

    index: np.ndarray
    distance: np.ndarray


def nearest(
    queries: np.ndarray | Stack,
    keys: np.ndarray | Stack | UnitRows,
    k: int,
    device: str = "cpu",
    dtype: type[np.floating] = np.float32,
) -> Neighbours:
    """The k keys (m, d) nearest to each query (n, d) by Euclidean distance, both scaled to norm 1.

    Keys that are searched often are best given as UnitRows on the device, where they stay.

    Exact for the float32 rows of norm 1: float64 distances decide, and between equal ones the index. Beside the result
    and, on other devices than the CPU, the keys, memory is bounded whatever n and m are.
    dtype: of the distances; float64 where they are to be compared with those of other keys.
    Raises ValueError for k outside 1..m, and for a row that is all zeros or not finite.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k={k} neighbours of {len(keys)} keys: choose k between 1 and the number of keys")
    query_rows, key_rows = UnitRows(queries, "cpu"), keys if isinstance(keys, UnitRows) else UnitRows(keys, device)
    index = np.empty((len(queries), k), dtype=np.int32)
    distance = np.empty((len(queries), k), dtype=dtype)
    height, width = tile(device, (QUERY_BLOCK, KEY_BLOCK))
    # Allocated once: fresh pages for every tile cost a quarter of the matrix product.
    columns = min(len(keys), width) + ALIGNED * int(len(keys) ** 0.5)
    similarity = torch.empty(min(len(queries), height) * columns, device=device)
    # GPUs may round sums of bfloat16 products on the way, by no known bound.
    fast = torch.device(device).type == "cpu" and has_bfloat16(device) and len(keys) >= HALF * k
    for rows in progress([*blocks(len(queries), SWEEP * height)], "nearest neighbours"):
        half = fast and rows.stop - rows.start >= height  # of fewer the rounding of the keys costs more than it saves
        index[rows], distance[rows] = _nearest(query_rows[rows].to(device), key_rows, k, SLACK, half, similarity)
    return Neighbours(index, distance)


def on_device(x: np.ndarray | torch.Tensor, device: str) -> torch.Tensor:
    """The same values as a contiguous float32 tensor on a device; a tensor is one already."""
    x = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return x.to(device)


def double(x: torch.Tensor) -> torch.Tensor:
    """The same values in float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class UnitRows:
    """Rows (n, d) at norm 1, float32 tensors: held, unless the CPU has too many, which are scaled as they are read."""

    def __init__(self, rows: np.ndarray | Stack, device: str) -> None:
        self._rows, self._held = rows if isinstance(rows, Stack) else Stack([rows]), None
        self.shape = rows.shape
        parts = [norms(self._rows[part], part.start) for part in blocks(len(rows))]
        self._norms = np.concatenate([np.empty(0), *parts]).astype(rows.dtype)
        if torch.device(device).type != "cpu" or rows.shape[0] * rows.shape[1] <= HELD:
            held = torch.empty(self.shape, device=device)
            for part in blocks(len(rows)):
                held[part] = self[part]
            self._held = held

    def __len__(self) -> int:
        """n."""
        return len(self._rows)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Rows as a tensor (..., d) that is not to be written to."""
        if self._held is not None:
            return self._held[rows] if isinstance(rows, slice) else F.embedding(rows, self._held)
        rows = rows if isinstance(rows, slice) else rows.numpy()
        found = self._rows[rows]  # a copy
        found /= self._norms[rows][..., None]
        return on_device(found, "cpu")


def _nearest(
    queries: torch.Tensor, keys: UnitRows, k: int, slack: int, half: bool, similarity: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Shortlist keys by one matrix product, then decide on their accurate distances: rows and distances, (n, k)."""
    size = min(k + slack + half * k // 2, len(keys))
    index, distance = np.empty((len(queries), k), np.int32), np.empty((len(queries), k))
    doubtful = np.zeros(len(queries), dtype=bool)
    for rows, highest, listed in _shortlists(queries, keys, size, half, similarity):
        index[rows], distance[rows], doubtful[rows] = _closest(queries[rows], keys, highest, listed, k)
    if size < len(keys) and doubtful.any():
        # What the last of the list may be, a key left out may be as well (many equal images): a longer list.
        again = queries[torch.from_numpy(doubtful).to(queries.device)]
        slack = SLACK if half else 4 * slack
        index[doubtful], distance[doubtful] = _nearest(again, keys, k, slack, False, similarity)
    return index, distance


def _shortlists(
    queries: torch.Tensor, keys: UnitRows, size: int, half: bool, similarity: torch.Tensor
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The keys with the `size` largest products with each query, for one block of queries after the other.

    Yields the block, the most that the exact products may be (n, size) in descending order, and the keys' rows
    (n, size) int32. The product of a key that is left out is no more than the last.

    In bfloat16 (half) the keys' mean is taken from them, which changes all of a query's products alike and leaves less
    to round. What rounding the factors did is measured: half of what it may do at most.
    """
    height, width = tile(queries.device, (QUERY_BLOCK, KEY_BLOCK))
    parts = [*blocks(len(queries), height)]
    found: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(parts)
    rounded, off, centre = queries, queries.new_zeros(len(queries)), queries.new_zeros(queries.shape[1])
    longest, farthest = 0.0, 0.0
    if half:
        rounded, off, _ = _rounded(queries, centre)
        centre = keys[: min(len(keys), width)].mean(dim=0)
    for columns in blocks(len(keys), (1 + half) * width):
        block = keys[columns]
        if half:
            block, away, length = _rounded(block, centre)
            longest, farthest = max(longest, float((length + away).max())), max(farthest, float(away.max()))
        for number, rows in enumerate(parts):
            found[number] = _extended(found[number], rounded[rows], block, columns.start, size, similarity)
    # Sums of d products and the rows' norms are float32; then what was rounded in the query, and in the keys.
    error = (queries.shape[1] + 8) * 2.0**-24 * (1 + longest) + off * longest + farthest
    error = (double(queries) @ double(centre)).cpu().numpy() + error.cpu().numpy()
    for number, rows in enumerate(parts):
        products, index = (x.cpu().numpy() for x in found[number])
        found[number] = None
        highest = products + half * 2.0**-8 * np.abs(products) + error[rows, None]  # bfloat16 rounds products as well
        order = np.argsort(-highest, axis=1)
        yield rows, np.take_along_axis(highest, order, axis=1), np.take_along_axis(index, order, axis=1)


def _rounded(rows: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows (n, d) less the centre (d,), in bfloat16; how far each is from what it was (n,), and its length (n,)."""
    rounded, off, lengths = torch.empty(rows.shape, dtype=torch.bfloat16), *torch.empty(2, len(rows))
    for part in blocks(len(rows), 512):  # few enough for the CPU's cache
        exact = rows[part] - centre
        rounded[part] = exact
        off[part], lengths[part] = (exact - rounded[part]).norm(dim=1), exact.norm(dim=1)
    return rounded, off, lengths


def _extended(
    found: tuple[torch.Tensor, torch.Tensor] | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    first: int,
    size: int,
    tile: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest of the products found (n, <= size) and those with more keys, the first of them row `first`.

    The columns of the product are split into groups of g: column c to group c % groups. The `size` largest values lie
    in the `size` groups with the largest maxima, so two short searches replace the long one: over m/g maxima and over
    size*g values. What is already found leaves fewer groups to look into, so of later keys g is larger.
    """
    g = max(1, int(((first + len(keys)) / size) ** 0.5))
    groups = -(-len(keys) // (g * ALIGNED)) * ALIGNED
    similarity = tile.view(queries.dtype)[: len(queries) * g * groups].view(len(queries), g * groups)
    torch.mm(queries, keys.T, out=similarity[:, : len(keys)])
    similarity[:, len(keys) :] = -torch.inf
    top, most = similarity.view(-1, g, groups).amax(dim=1).float(), min(size, groups)
    if found is not None and found[0].shape[1] == size:
        limit = found[0].amin(dim=1, keepdim=True)
        most = min(most, int((top > limit).sum(dim=1, dtype=torch.int32).max()))
        if not most:
            return found
    columns = _largest(top, most)
    columns = (columns[:, None] + groups * torch.arange(g, device=top.device)[:, None]).flatten(1)
    values, columns = _picked(similarity.gather(1, columns).float(), columns, min(size, len(keys), most * g))
    index = (columns + first).int()
    if found is None:
        return values, index
    values, index = (torch.cat(both, dim=1) for both in zip(found, (values, index), strict=True))
    return _picked(values, index, min(size, values.shape[1]))


def _picked(values: torch.Tensor, index: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest values of each row (n, c) and their index, in no order."""
    columns = _largest(values, size)
    return values.gather(1, columns), index.gather(1, columns)


def _largest(values: torch.Tensor, size: int) -> torch.Tensor:
    """The columns (n, size) of the largest values of each row (n, c), in no order."""
    if values.device.type == "cpu":
        # numpy's is vectorised: on one thread several times as fast as torch's.
        return torch.from_numpy(np.argpartition(values.numpy(), -size, axis=1)[:, -size:])
    return values.topk(size, dim=1, sorted=False).indices


def _closest(
    queries: torch.Tensor, keys: UnitRows, highest: np.ndarray, listed: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and float64 distances (n, k) of the k nearest keys of shortlists, and where a key left out might be one.

    Those with the k highest products come first; of the rest, those that might be as near as the farthest of them.
    """
    distance = np.full(listed.shape, np.inf)
    distance[:, :k] = _distances(queries, keys, listed[:, :k])
    lowest = 1 - distance[:, :k].max(axis=1) ** 2 / 2  # the product at that distance
    row, column = np.nonzero(highest[:, k:] >= lowest[:, None])
    for part in blocks(len(row)):
        some = row[part], column[part] + k
        distance[some] = _distances(queries[torch.from_numpy(row[part])], keys, listed[some][:, None])[:, 0]
    order = np.argsort(distance, axis=1)
    nearest = np.take_along_axis(distance, order[:, : k + 1], axis=1)
    tied = (nearest[:, 1:] == nearest[:, :-1]).any(axis=1)
    order[tied] = np.lexsort((listed[tied], distance[tied]), axis=1)
    index, distance = (np.take_along_axis(x, order[:, :k], axis=1) for x in (listed, distance))
    return index, distance, highest[:, -1] >= lowest


def _distances(queries: torch.Tensor, keys: UnitRows, index: np.ndarray) -> np.ndarray:
    """Distances (n, c), float64 by differences, of queries (n, d) from keys[index].

    Equal keys get equal distances to the last bit, and those close to 0 keep their precision, unlike 2 - 2*dot.
    """
    found, d, mode = np.empty(index.shape), queries.shape[1], "donot_use_mm_for_euclid_dist"
    step = max(1, GATHERED // (index.shape[1] * d))
    width = max(1, GATHERED // (step * d))
    gathered = double(queries.new_empty(step * width * d))  # reused: a fresh one page-faults
    for rows in blocks(len(index), step):
        own = double(queries[rows, None])
        for columns in blocks(index.shape[1], width):
            some = torch.from_numpy(index[rows, columns]).to(queries.device)
            near = gathered[: some.numel() * d].view(*some.shape, d).copy_(keys[some])
            found[rows, columns] = torch.cdist(own, near, compute_mode=mode)[:, 0].cpu()
    return found
