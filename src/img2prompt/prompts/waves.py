"""Deduplication on a cluster: the same rows are kept as by one pass over them all, and no node holds more than a part.

A wave of rows is compared with the kept rows of every earlier wave, each of these a task, and then decided in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.device import on_cuda
from img2prompt.core.engine import Piece, run
from img2prompt.core.progress import progress
from img2prompt.core.shards import fetched, forget, there
from img2prompt.prompts.dedup import Deduplication, Greedy, check_rows, deduplication, ordered

WAVE = 65_536  # rows: a task takes 0.3 GB of them at 384 values, and on one core about ten seconds


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
    waves = list(blocks(len(rows), WAVE))
    decided = [folder / f"{number}.safetensors" for number in range(len(waves))]
    gpu = on_cuda(device)
    with progress(None, "dedup", len(waves) * (len(waves) + 1) // 2, "block") as bar:
        for number, wave in enumerate(waves):
            bar.update()
            if there(decided[number]):
                bar.update(number)
                continue
            compared = [folder / f"{number}_{earlier}.safetensors" for earlier in range(number)]
            pieces = [
                Piece(
                    f"dedup, rows {_said(wave)} against {_said(other)}", partial(_compare, task, wave, other, kept), to
                )
                for other, kept, to in zip(waves, decided, compared, strict=False)
            ]
            for _ in run(pieces, None, gpu=gpu):
                bar.update()
            piece = Piece(f"dedup, rows {_said(wave)}", partial(_decide, task, wave, compared), decided[number])
            list(run([piece], None, gpu=gpu))
            for file in compared:
                forget(file)
    found = [_loaded(file) for file in decided]
    parts = (np.concatenate([part[name] for part in found]) for name in ("alive", "nearest", "cosine"))
    return deduplication(task.thresholds, threshold, *parts)


def _loaded(file: Path) -> dict[str, np.ndarray]:
    with fetched(file) as path:
        return load_file(path)


def _said(part: slice) -> str:
    return f"{part.start} to {part.stop - 1}"


def _compare(task: Task, wave: slice, other: slice, kept: Path, path: Path) -> None:
    """Of a wave's rows those that stay beside the kept ones of an earlier wave, and the nearest of these."""
    rows, alive = task.rows(), _loaded(kept)["alive"]
    those = np.flatnonzero(alive)
    known = len(those)
    greedy = task.greedy(np.concatenate([rows[other][those], rows[wave]]))
    greedy.alive[:known] = alive[those]
    for part in blocks(known, greedy.block):
        greedy.keep(part)
    for part in blocks(wave.stop - wave.start, greedy.block):
        greedy.compare(slice(known + part.start, known + part.stop))
    nearest = greedy.nearest[known:]
    near = nearest >= 0
    nearest[near] = other.start + those[nearest[near]]
    save_file({"alive": greedy.alive[known:], "nearest": nearest, "cosine": greedy.nearest_cosine[known:]}, path)


def _decide(task: Task, wave: slice, compared: Sequence[Path], path: Path) -> None:
    """Which of a wave's rows are kept, and the nearest kept row before each."""
    greedy, nearest = task.greedy(task.rows()[wave]), np.full(wave.stop - wave.start, -1)
    for found in map(_loaded, compared):
        greedy.alive &= found["alive"]
        nearer = found["cosine"] > greedy.nearest_cosine  # of equally near ones the earliest stays
        greedy.nearest_cosine[nearer], nearest[nearer] = found["cosine"][nearer], found["nearest"][nearer]
    for part in blocks(len(nearest), greedy.block):
        greedy.decide(part)
    nearest = np.where(greedy.nearest >= 0, wave.start + greedy.nearest, nearest)
    save_file({"alive": greedy.alive, "nearest": nearest, "cosine": greedy.nearest_cosine}, path)
