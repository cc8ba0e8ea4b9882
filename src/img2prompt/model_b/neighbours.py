"""Exact nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.device import tile
from img2prompt.core.metric import norms
from img2prompt.core.progress import progress

QUERY_BLOCK, KEY_BLOCK = 1024, 32_768  # on the CPU, a tile of similarities: 128 MB
SWEEP = 16  # blocks of queries that one reading of the keys serves
GATHERED = 2**20  # floats of neighbours' rows gathered at once: few enough for the CPU's cache
SLACK = 16  # keys beyond k in the shortlist of the float32 search, from which float64 distances choose


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest rows of a bank of keys for each of n queries, nearest first.

    index (n, k) int32: rows of the bank, ascending where distances are equal. distance (n, k) float32, ascending.
    """

    index: np.ndarray
    distance: np.ndarray


def nearest(
    queries: np.ndarray | Stack, keys: np.ndarray | Stack | UnitRows, k: int, device: str = "cpu"
) -> Neighbours:
    """The k keys (m, d) nearest to each query (n, d) by Euclidean distance, both scaled to norm 1.

    Keys that are searched often are best given as UnitRows on the device, where they stay.

    Exact for the float32 rows of norm 1: float64 distances decide, and between equal ones the index. Beside the result
    and, on other devices than the CPU, the keys, memory is bounded whatever n and m are.
    Raises ValueError for k outside 1..m, and for a row that is all zeros or not finite.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k={k} neighbours of {len(keys)} keys: choose k between 1 and the number of keys")
    query_rows, key_rows = UnitRows(queries, "cpu"), keys if isinstance(keys, UnitRows) else UnitRows(keys, device)
    index = np.empty((len(queries), k), dtype=np.int32)
    distance = np.empty((len(queries), k), dtype=np.float32)
    height, width = tile(device, (QUERY_BLOCK, KEY_BLOCK))
    # Allocated once: fresh pages for every tile cost a quarter of the matrix product.
    size = min(len(keys), width)
    similarity = torch.empty(min(len(queries), height) * (size + int(size**0.5)), device=device)
    for rows in progress([*blocks(len(queries), SWEEP * height)], "nearest neighbours"):
        index[rows], distance[rows] = _nearest(query_rows[rows].to(device), key_rows, k, SLACK, similarity)
    return Neighbours(index, distance)


def on_device(x: np.ndarray | torch.Tensor, device: str) -> torch.Tensor:
    """The same values as a contiguous float32 tensor on a device; a tensor is one already."""
    x = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return x.to(device)


def double(x: torch.Tensor) -> torch.Tensor:
    """The same values in float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class UnitRows:
    """Rows (n, d) at norm 1, float32 tensors: scaled as they are read on the CPU, held by other devices."""

    def __init__(self, rows: np.ndarray | Stack, device: str) -> None:
        self._rows, self._held = rows if isinstance(rows, Stack) else Stack([rows]), None
        self.shape = rows.shape
        parts = [norms(self._rows[part], part.start) for part in blocks(len(rows))]
        self._norms = np.concatenate([np.empty(0), *parts]).astype(rows.dtype)
        if torch.device(device).type != "cpu":
            self._held = torch.cat([self[part].to(device) for part in blocks(len(rows))])

    def __len__(self) -> int:
        """n."""
        return len(self._rows)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Rows as a tensor of their own, (..., d)."""
        if self._held is not None:
            return self._held[rows]
        rows = rows if isinstance(rows, slice) else rows.numpy()
        found = self._rows[rows]  # a copy
        found /= self._norms[rows][..., None]
        return on_device(found, "cpu")


def _nearest(
    queries: torch.Tensor, keys: UnitRows, k: int, slack: int, similarity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shortlist k + slack keys by one matrix product, then decide on their accurate distances; both on the CPU."""
    size = min(k + slack, len(keys))
    products, index = _most_similar(queries, keys, size, similarity)
    index = index.sort(dim=1).values  # so that the stable sort below leaves ties in the order of the bank
    distance, order = _distances(queries, keys, index).cpu().sort(dim=1, stable=True)
    index, distance = index.cpu().gather(1, order[:, :k]), distance[:, :k].float()
    if size < len(keys):
        # The product of unit rows is off by at most d * 2**-24, their norms by a little. Where the last of
        # the shortlist is not clearly farther than the k-th neighbour (many equal images), a key left out
        # might belong in: search with a longer list.
        error = (queries.shape[1] + 8) * 2.0**-24
        doubtful = (products[:, k - 1] - products[:, -1] <= 2 * error).nonzero().flatten()
        if len(doubtful):
            rows = doubtful.cpu()
            index[rows], distance[rows] = _nearest(queries[doubtful], keys, k, 4 * slack, similarity)
    return index, distance


def _most_similar(
    queries: torch.Tensor, keys: UnitRows, size: int, similarity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest dot products (n, size) of each query with the keys, descending, and their rows, int32."""
    height, width = tile(queries.device, (QUERY_BLOCK, KEY_BLOCK))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for columns in blocks(len(keys), width):
        block = keys[columns]
        for number, rows in enumerate(blocks(len(queries), height)):
            values, index = _topk(queries[rows], block, min(size, len(block)), similarity)
            index = (index + columns.start).int()
            if columns.start == 0:
                found.append((values, index))
                continue
            values, index = (torch.cat(both, dim=1) for both in zip(found[number], (values, index), strict=True))
            values, order = values.topk(min(size, values.shape[1]), dim=1)
            found[number] = values, index.gather(1, order)
    values, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, index


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


def _distances(queries: torch.Tensor, keys: UnitRows, index: torch.Tensor) -> torch.Tensor:
    """Distances (n, k), float64 by differences, of queries (n, d) from keys[index].

    Equal keys get equal distances to the last bit, and those close to 0 keep their precision, unlike 2 - 2*dot.
    """
    step = max(1, GATHERED // (index.shape[1] * keys.shape[1]))
    gathered = double(queries.new_empty(step, index.shape[1], keys.shape[1]))  # reused: a fresh one page-faults
    mode, found = "donot_use_mm_for_euclid_dist", []
    for rows in blocks(len(queries), step):
        own = gathered[: rows.stop - rows.start].copy_(keys[index[rows]])
        found.append(torch.cdist(double(queries[rows, None]), own, compute_mode=mode)[:, 0])
    return torch.cat(found)
