"""Deduplication on a cluster: the same rows are kept as by one pass over them all, and no node holds more than a part.

A wave of rows is compared with the kept rows of every earlier wave, each of these a task, and then decided in order.
Of equal rows all but the first are dropped without a comparison, and looking for the nearest kept row a later one goes
on where the one before it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.device import on_cuda
from img2prompt.core.engine import Piece, run
from img2prompt.core.progress import progress
from img2prompt.core.shards import fetched, forget, there
from img2prompt.core.storage import whole
from img2prompt.prompts.dedup import Deduplication, Greedy, check_rows, deduplication, exact_cosines, ordered

WAVE = 65_536  # rows: a task takes 0.3 GB of them at 384 values, and on one core about ten seconds
COPY = 0.25  # of a row: what one that is equal to an earlier one adds to a wave


class Task(NamedTuple):
    """What is asked of all rows."""

    files: tuple[Path, ...]  # .npy, (n_i, d) float32: rows that are thought of as one below the other
    thresholds: tuple[float, ...]
    threshold: float
    device: str

    def rows(self) -> Stack:
        """All of them, mapped from disk."""
        return Stack([np.load(file, mmap_mode="r") for file in self.files])

    def greedy(self, rows: np.ndarray) -> Greedy:
        """What decides some of them."""
        return Greedy(rows, self.thresholds, self.threshold, self.device)


class Found(NamedTuple):
    """What `Greedy` has found of all rows."""

    alive: np.ndarray
    nearest: np.ndarray
    cosine: np.ndarray


def deduplicate_files(
    files: Sequence[Path], threshold: float, also: Sequence[float], device: str, folder: Path
) -> Deduplication:
    """As `dedup.deduplicate` of the rows of some .npy files, one file after the other.

    Args:
        files: each (n_i, d) float32, rows of norm 1.
        threshold: as there.
        also: as there.
        device: a torch device.
        folder: from which a killed run goes on; use one folder for the same arguments only.

    Raises:
        ValueError, OSError: as there, and as `core.engine.run`.
    """
    task = Task(tuple(files), ordered(threshold, also), threshold, device)
    rows = task.rows()
    check_rows(rows)
    first, before = equal_rows(rows, task.thresholds[-1])
    sizes = np.cumsum(np.where(before < 0, 1, COPY))
    ends = np.searchsorted(sizes, np.arange(WAVE, sizes[-1], WAVE), side="right").tolist()
    waves = [slice(*ends) for ends in pairwise([0, *ends, len(rows)])]
    starts = np.array([wave.start for wave in waves])
    decided = [folder / f"{number}.safetensors" for number in range(len(waves))]
    found = Found(np.zeros(len(rows), np.uint64), np.full(len(rows), -1), np.full(len(rows), -np.inf))
    kept_at = np.uint64(1 << task.thresholds.index(float(threshold)))
    gpu = on_cuda(device)
    with progress(None, "dedup", len(waves) * (len(waves) + 1) // 2, "block") as bar:
        for number, wave in enumerate(waves):
            bar.update()
            if there(decided[number]):
                bar.update(number)
            else:
                known = folder / f"{number}_known.safetensors"
                with whole(known) as path:
                    save_file(_known(rows, wave, starts, first, before, found, kept_at), path)
                compared = [folder / f"{number}_{earlier}.safetensors" for earlier in range(number)]
                pieces = [
                    Piece(
                        f"dedup, rows {_said(wave)} against {_said(waves[other])}",
                        partial(_compare, task, wave, known, waves[other], other, decided[other]),
                        to,
                    )
                    for other, to in enumerate(compared)
                ]
                for _ in run(pieces, None, gpu=gpu):
                    bar.update()
                decide = partial(_decide, task, wave, known, compared)
                list(run([Piece(f"dedup, rows {_said(wave)}", decide, decided[number])], None, gpu=gpu))
                for file in compared:
                    forget(file)
                known.unlink()
            for name, array in _loaded(decided[number]).items():
                getattr(found, name)[wave] = array
    return deduplication(task.thresholds, threshold, *found)


def equal_rows(rows: np.ndarray | Stack, highest: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the first row that is equal, itself or an earlier one, and the last earlier one, or -1: (n,) int64.

    Rows whose cosine with themselves is not above `highest`, for their norm is a hair below 1, are equal to none.
    """
    n = len(rows)
    digests, above = np.empty((n, 2), np.uint64), np.empty(n, bool)
    for part in blocks(n):
        some = np.ascontiguousarray(rows[part])
        hashed = b"".join(blake2b(row, digest_size=16).digest() for row in some)
        digests[part] = np.frombuffer(hashed, np.uint64).reshape(-1, 2)
        each = np.arange(len(some))
        above[part] = exact_cosines(some, each, some, each) > highest
    order = np.lexsort(digests.T)  # equal ones in the order of rows
    same = np.zeros(n, bool)
    same[1:] = (digests[order[1:]] == digests[order[:-1]]).all(axis=1) & above[order[1:]]
    first, before = np.empty(n, np.int64), np.full(n, -1)
    first[order] = order[np.maximum.accumulate(np.where(same, 0, np.arange(n)))]
    before[order[1:][same[1:]]] = order[:-1][same[1:]]
    return first, before


def _known(
    rows: Stack,
    wave: slice,
    starts: np.ndarray,
    first: np.ndarray,
    before: np.ndarray,
    found: Found,
    kept_at: np.uint64,
) -> dict[str, np.ndarray]:
    """What equal rows of earlier waves tell of a wave's rows.

    Of each row `since`: the earliest wave to compare it with; `root`: the first row of the wave that is equal; `copy`:
    it is dropped in any case; `done`: its nearest kept row is known; `nearest` and `cosine`: what is known so far.
    """
    own, last, n = first[wave], before[wave], wave.stop - wave.start
    _, place, inverse = np.unique(own, return_index=True, return_inverse=True)
    # An equal row is kept, which no other kept row is as near to.
    done = (own < wave.start) & (found.alive[own] & kept_at != 0)
    again = ~done & (last >= 0) & (last < wave.start)
    since, nearest, cosine = np.zeros(n, np.int64), np.full(n, -1), np.full(n, -np.inf)
    since[done | (last >= wave.start)] = len(starts)
    since[again] = np.searchsorted(starts, last[again], side="right") - 1
    nearest[again], cosine[again] = found.nearest[last[again]], found.cosine[last[again]]
    nearest[done], cosine[done] = own[done], exact_cosines(rows, own[done], rows, own[done])
    return {
        "since": since, "root": place[inverse], "copy": last >= 0, "done": done, "nearest": nearest, "cosine": cosine,
    }  # fmt: skip


def _loaded(file: Path) -> dict[str, np.ndarray]:
    with fetched(file) as path:
        return load_file(path)


def _said(part: slice) -> str:
    return f"{part.start} to {part.stop - 1}"


def _compare(task: Task, wave: slice, known: Path, other: slice, number: int, kept: Path, path: Path) -> None:
    """Of a wave's rows those that stay beside the kept ones of an earlier wave, and the nearest of these.

    Of the rows, in order, that are to be compared with it.
    """
    told, alive = load_file(known), _loaded(kept)["alive"]
    some, those = np.flatnonzero(told["since"] <= number), np.flatnonzero(alive)
    count = len(those)
    if not len(some):
        save_file({name: told[name][:0] for name in ("nearest", "cosine")} | {"alive": alive[:0]}, path)
        return
    rows = task.rows()
    greedy = task.greedy(np.concatenate([rows[other][those], rows[wave][some]]))
    greedy.alive[:count] = alive[those]
    greedy.alive[count:][told["copy"][some]] = 0
    greedy.nearest_cosine[count:] = told["cosine"][some]
    for part in blocks(count, greedy.block):
        greedy.keep(part)
    for part in blocks(len(some), greedy.block):
        greedy.compare(slice(count + part.start, count + part.stop))
    nearest = greedy.nearest[count:]
    near = nearest >= 0
    nearest[near] = other.start + those[nearest[near]]
    save_file({"alive": greedy.alive[count:], "nearest": nearest, "cosine": greedy.nearest_cosine[count:]}, path)


def _decide(task: Task, wave: slice, known: Path, compared: Sequence[Path], path: Path) -> None:
    """Which of a wave's rows are kept, and the nearest kept row before each."""
    told = load_file(known)
    nearest, cosine, every = told["nearest"], told["cosine"], np.uint64((1 << len(task.thresholds)) - 1)
    alive = np.where(told["copy"], np.uint64(0), every)
    for number, file in enumerate(compared):
        some, found = np.flatnonzero(told["since"] <= number), _loaded(file)
        alive[some] &= found["alive"]
        nearer = found["cosine"] > cosine[some]  # of equally near ones the earliest stays
        nearest[some[nearer]], cosine[some[nearer]] = found["nearest"][nearer], found["cosine"][nearer]
    nearest, cosine = nearest[told["root"]], cosine[told["root"]]
    some = np.flatnonzero(~told["done"])
    if len(some):
        greedy = task.greedy(task.rows()[wave][some])
        greedy.alive[:], greedy.nearest_cosine[:] = alive[some], cosine[some]
        for part in blocks(len(some), greedy.block):
            greedy.decide(part)
        near = greedy.nearest >= 0
        nearest[some[near]] = wave.start + some[greedy.nearest[near]]
        alive[some], cosine[some] = greedy.alive, greedy.nearest_cosine
    save_file({"alive": alive, "nearest": nearest, "cosine": cosine}, path)
