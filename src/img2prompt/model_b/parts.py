"""Neighbours on a cluster: blocks of queries against blocks of keys, and the nearest of all that these find."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.device import on_cuda
from img2prompt.core.engine import Piece, run
from img2prompt.core.shards import fetched, forget, there
from img2prompt.core.storage import grow, whole
from img2prompt.model_b.neighbours import Neighbours, nearest

QUERIES, KEYS = 16_384, 262_144  # rows of a task: it holds half a GB of keys of 512 values, and takes a core a minute


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of .npy files that are thought of as one below the other.

    Args:
        files: each (n_i, d) float32.
        count: how many there are of these rows.
        chosen: an .npy file, (count,) int64, of their numbers among all rows; None: these are all rows.
    """

    files: tuple[Path, ...]
    count: int
    chosen: Path | None = None

    @classmethod
    def every(cls, file: Path) -> Rows:
        """All rows of one file."""
        return cls((file,), len(np.load(file, mmap_mode="r")))

    def part(self, part: slice) -> Stack:
        """Some of them, mapped from disk."""
        chosen = self.chosen and np.load(self.chosen, mmap_mode="r")[part]
        rows = np.arange(part.start, part.stop) if chosen is None else np.array(chosen)
        return Stack([np.load(file, mmap_mode="r") for file in self.files], rows)


def nearest_by_parts(queries: Rows, keys: Rows, k: int, device: str, folder: Path, what: str) -> Neighbours:
    """As `neighbours.nearest`, the same to the last bit, from lists that tasks leave in a folder within `folder`.

    Args:
        queries: as there.
        keys: as there.
        k: as there.
        device: a torch device.
        folder: where the result grows, as `storage.grow` has it, and is mapped from.
        what: names the pieces and labels the progress bar.

    Raises:
        ValueError, OSError: as there, and as `core.engine.run`.
    """
    if not 1 <= k <= keys.count:
        raise ValueError(f"k={k} neighbours of {keys.count} keys: choose k between 1 and the number of keys")
    columns, shards, gpu = [*blocks(keys.count, KEYS)], folder / "shards", on_cuda(device)
    batches = [range(rows.start, rows.stop) for rows in blocks(queries.count, QUERIES)]
    merged = {batch: shards / f"{batch.start}.safetensors" for batch in batches}
    appended: deque[tuple[range, Path]] = deque()  # and not yet removed

    def results(left: Sequence[range]) -> Iterator[dict[str, np.ndarray]]:
        new = [batch for batch in left if not there(merged[batch])]
        lists = {batch: [shards / f"{batch.start}_{part.start}.safetensors" for part in columns] for batch in new}
        pieces = [
            Piece(
                f"{what}, queries {batch.start} to {batch.stop - 1}, keys {part.start} to {part.stop - 1}",
                partial(_listed, queries, keys, slice(batch.start, batch.stop), part, k, device),
                file,
            )
            for batch in new
            for part, file in zip(columns, lists[batch], strict=True)
        ]
        with closing(run(pieces, what, "block", gpu)) as found:
            for batch in left:
                if batch in lists:
                    list(islice(found, len(columns)))
                    said = f"{what}, queries {batch.start} to {batch.stop - 1}"
                    list(run([Piece(said, partial(_merged, lists[batch], k), merged[batch])], None))
                    for file in lists[batch]:
                        forget(file)
                appended.append((batch, merged[batch]))
                yield _loaded(merged[batch])

    def saved(done: int) -> None:
        while appended and appended[0][0].stop <= batches[done - 1].stop:
            forget(appended.popleft()[1])

    files = grow(folder, batches, results, saved=saved)
    forget(shards)
    return Neighbours(*(np.load(files[name], mmap_mode="r") for name in ("index", "distance")))


def out_of_fold_by_parts(
    queries: Path,
    keys: Sequence[Path],
    fold: np.ndarray,
    usable: Mapping[int, np.ndarray],
    k: int,
    device: str,
    folder: Path,
    what: str,
) -> Neighbours:
    """As `choice.out_of_fold`, of queries and keys in .npy files, by `nearest_by_parts`."""
    index = np.empty((len(fold), k), dtype=np.int32)
    distance = np.empty((len(fold), k), dtype=np.float32)
    for held_out, mask in usable.items():
        own, chosen = folder / str(held_out), []
        for name, some in (("queries", fold == held_out), ("keys", mask)):
            rows = np.flatnonzero(some)
            with whole(own / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, rows)
            chosen.append((rows, own / f"{name}.npy"))
        (rows, queries_file), (bank, keys_file) = chosen
        of_fold, others = Rows((queries,), len(rows), queries_file), Rows(tuple(keys), len(bank), keys_file)
        found = nearest_by_parts(of_fold, others, k, device, own, f"{what}, fold {held_out}")
        index[rows], distance[rows] = bank[found.index], found.distance
    return Neighbours(index, distance)


def _loaded(file: Path) -> dict[str, np.ndarray]:
    with fetched(file) as path:
        return load_file(path)


def _listed(queries: Rows, keys: Rows, rows: slice, columns: slice, k: int, device: str, path: Path) -> None:
    """The nearest of some keys for some queries, with distances that are not rounded yet."""
    found = nearest(queries.part(rows), keys.part(columns), min(k, columns.stop - columns.start), device, np.float64)
    save_file({"index": found.index + np.int32(columns.start), "distance": found.distance}, path)


def _merged(files: Sequence[Path], k: int, path: Path) -> None:
    """The nearest of several blocks of keys, in whose order the files are."""
    best = _loaded(files[0])
    for file in files[1:]:
        both = {name: np.concatenate([best[name], more], axis=1) for name, more in _loaded(file).items()}
        order = np.argsort(both["distance"], axis=1, kind="stable")[:, :k]  # of equally near keys the earlier is first
        best = {name: np.take_along_axis(array, order, axis=1) for name, array in both.items()}
    save_file({"index": best["index"], "distance": best["distance"].astype(np.float32)}, path)
