"""Exact nearest neighbours."""

from dataclasses import dataclass

import numpy as np
import torch

from img2prompt.core.metric import unit
from img2prompt.core.progress import progress

QUERY_BLOCK, KEY_BLOCK = 1024, 32_768  # a tile of similarities: 128 MB
GATHERED = 2**20  # floats of neighbours' rows gathered at once: few enough for the CPU's cache
SLACK = 16  # keys beyond k in the shortlist of the float32 search, from which float64 distances choose


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest rows of a bank of keys for each of n queries, nearest first.

    index (n, k) int64: rows of the bank, ascending where distances are equal. distance (n, k) float32, ascending.
    """

    index: np.ndarray
    distance: np.ndarray


def nearest(queries: np.ndarray, keys: np.ndarray, k: int, device: str = "cpu") -> Neighbours:
    """The k keys (m, d) nearest to each query (n, d) by Euclidean distance, both scaled to norm 1.

    Exact for the float32 rows of norm 1: float64 distances decide, and between equal ones the index.
    Memory is bounded by a tile of QUERY_BLOCK x KEY_BLOCK similarities whatever n and m are.
    Raises ValueError for k outside 1..m, and for a row that is all zeros or not finite.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k={k} neighbours of {len(keys)} keys: choose k between 1 and the number of keys")
    query_rows, key_rows = on_device(unit(queries), device), on_device(unit(keys), device)
    index = np.empty((len(queries), k), dtype=np.int64)
    distance = np.empty((len(queries), k), dtype=np.float32)
    # Allocated once: fresh pages for every tile cost a quarter of the matrix product.
    width = min(len(keys), KEY_BLOCK)
    tile = key_rows.new_empty(min(len(queries), QUERY_BLOCK) * (width + int(width**0.5)))
    for start in progress(range(0, len(queries), QUERY_BLOCK), "nearest neighbours"):
        rows = slice(start, start + QUERY_BLOCK)
        block_index, block_distance = _nearest(query_rows[rows], key_rows, k, SLACK, tile)
        index[rows], distance[rows] = block_index.cpu(), block_distance.cpu()
    return Neighbours(index, distance)


def on_device(x: np.ndarray, device: str) -> torch.Tensor:
    """The same values as a contiguous float32 tensor on a device."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device)


def _nearest(
    queries: torch.Tensor, keys: torch.Tensor, k: int, slack: int, tile: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shortlist k + slack keys by one matrix product, then decide on their accurate distances."""
    size = min(k + slack, len(keys))
    similarity, index = _most_similar(queries, keys, size, tile)
    index = index.sort(dim=1).values  # so that the stable sort below leaves ties in the order of the bank
    distance, order = _distances(queries, keys, index).sort(dim=1, stable=True)
    index, distance = index.gather(1, order)[:, :k], distance[:, :k]
    if size < len(keys):
        # The product of unit rows is off by at most d * 2**-24, their norms by a little. Where the last of
        # the shortlist is not clearly farther than the k-th neighbour (many equal images), a key left out
        # might belong in: search with a longer list.
        error = (queries.shape[1] + 8) * 2.0**-24
        doubtful = (similarity[:, k - 1] - similarity[:, -1] <= 2 * error).nonzero().flatten()
        if len(doubtful):
            index[doubtful], distance[doubtful] = _nearest(queries[doubtful], keys, k, 4 * slack, tile)
    return index, distance


def _most_similar(
    queries: torch.Tensor, keys: torch.Tensor, size: int, tile: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest dot products (n, size) of each query with the keys, descending, and their rows."""
    best, index = None, None
    for start in range(0, len(keys), KEY_BLOCK):
        block = keys[start : start + KEY_BLOCK]
        values, columns = _topk(queries, block, min(size, len(block)), tile)
        columns += start
        if best is not None:
            values, columns = torch.cat([best, values], dim=1), torch.cat([index, columns], dim=1)
            values, order = values.topk(min(size, values.shape[1]), dim=1)
            columns = columns.gather(1, order)
        best, index = values, columns
    return best, index


def _topk(
    queries: torch.Tensor, keys: torch.Tensor, size: int, tile: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(queries @ keys.T).topk(size)` with the product in tile, and a faster search of its long rows.

    The columns are split into groups of g: column c to group c % groups. The `size` largest values lie in the
    `size` groups with the largest maxima, so two short searches replace the long one: over m/g maxima and
    over size*g values.
    """
    g = max(1, int((len(keys) / size) ** 0.5))
    groups = -(-len(keys) // g)
    similarity = tile[: len(queries) * g * groups].view(len(queries), g * groups)
    torch.mm(queries, keys.T, out=similarity[:, : len(keys)])
    similarity[:, len(keys) :] = -torch.inf
    top = similarity.view(-1, g, groups).amax(dim=1).topk(size, dim=1, sorted=False).indices
    columns = (top[:, None] + groups * torch.arange(g, device=top.device)[:, None]).flatten(1)
    values, order = similarity.gather(1, columns).topk(size, dim=1)
    return values, columns.gather(1, order)


def _distances(queries: torch.Tensor, keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Distances (n, k), float64 by differences, of queries (n, d) from keys[index].

    Equal keys get equal distances to the last bit, and those close to 0 keep their precision, unlike 2 - 2*dot.
    """
    distance = queries.new_empty(index.shape, dtype=torch.float64)
    step = max(1, GATHERED // (index.shape[1] * keys.shape[1]))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        distance[rows] = torch.cdist(
            queries[rows, None].double(),
            keys[index[rows]].double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )[:, 0]
    return distance
