"""dedup: the exact decision against what people use, on made rows: families of prompts of all sizes and densities."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench.harness import Task, Work
from img2prompt.core.blocks import blocks
from img2prompt.prompts.dedup import deduplicate

THRESHOLD = 0.85
TABLE = (0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.99)  # what the stage asks for as well


def clustered(n: int, d: int = 384, seed: int = 0) -> np.ndarray:
    """(n, d) float32 at norm 1, like prompts: families of all sizes and densities, 5% equal rows."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.zipf(1.8, size=n), max(1, n // 20))
    family = rng.permutation(np.repeat(np.arange(n), sizes)[:n])
    centre = rng.standard_normal((n, d), dtype=np.float32)
    centre[:, : d // 8] += 1.0  # prompts share a direction: unrelated ones have a cosine of about 0.1
    spread = rng.uniform(0.05, 1.0, size=n).astype(np.float32)  # a family's cosines: 1 / (1 + spread**2)
    rows = centre[family] + spread[family, None] * rng.standard_normal((n, d), dtype=np.float32)
    again = rng.random(n) < 0.05
    rows[again] = rows[rng.integers(n, size=again.sum())]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def decided(rows: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) bool: which rows are kept, by float64 cosines with all rows kept before."""
    bank, count, kept = np.empty(rows.shape), 0, np.zeros(len(rows), dtype=bool)
    for part in blocks(len(rows), 512):
        block = rows[part].astype(np.float64)
        near = (block @ bank[:count].T > threshold).any(axis=1)
        among = block @ block.T > threshold
        for row in np.flatnonzero(~near):
            kept[part.start + row] = not (among[row, :row] & kept[part][:row]).any()
        own = block[kept[part]]
        bank[count : count + len(own)] = own
        count += len(own)
    return kept


def make(folder: Path, rows: int) -> Work:
    """rows.npy, and kept.npy: what is right. The work: every row's cosines with all rows kept before it."""
    made = clustered(rows)
    kept = decided(made, THRESHOLD)
    np.save(folder / "rows.npy", made)
    np.save(folder / "kept.npy", kept)
    return Work(operations=2 * made.shape[1] * float((np.cumsum(kept) - kept).sum()))


def load(folder: Path, rows: int) -> tuple[np.ndarray]:
    return (np.load(folder / "rows.npy")[:rows],)


def ours(rows: np.ndarray) -> np.ndarray:
    return deduplicate(rows, THRESHOLD).kept[0]


def ours_with_table(rows: np.ndarray) -> np.ndarray:
    found = deduplicate(rows, THRESHOLD, also=TABLE)
    return found.kept[found.thresholds.index(THRESHOLD)]


def greedy(n: int, neighbours: Iterable[np.ndarray]) -> np.ndarray:
    """The same rule as ours on given neighbour lists, one for each row in order."""
    kept = np.zeros(n, dtype=bool)
    for row, near in enumerate(neighbours):
        kept[row] = not kept[near[near < row]].any()
    return kept


def faiss_range(rows: np.ndarray) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    limits, _, near = index.range_search(rows, THRESHOLD)
    return greedy(len(rows), np.split(near, limits[1:-1].astype(np.int64)))


def faiss_k_and_filter(rows: np.ndarray, k: int = 1024) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    scores, near = index.search(rows, min(k, len(rows)))
    return greedy(len(rows), (n[s > THRESHOLD] for n, s in zip(near, scores, strict=True)))


def semhash(rows: np.ndarray) -> np.ndarray:
    from semhash import SemHash

    names = [str(row) for row in range(len(rows))]
    found = SemHash.from_embeddings(rows, names, model=None).self_deduplicate(THRESHOLD)
    kept = np.zeros(len(rows), dtype=bool)
    kept[[int(name) for name in found.selected]] = True
    return kept


def check(kept: np.ndarray, folder: Path) -> str:
    wrong = int((kept != np.load(folder / "kept.npy")).sum())
    return f"{wrong} rows wrong" if wrong else "yes"


TASKS = [
    Task(
        "dedup",
        make,
        load,
        {
            "ours": ours,
            "ours, seven thresholds": ours_with_table,
            "faiss range_search": faiss_range,
            "faiss k=1024 and filter": faiss_k_and_filter,
            "semhash": semhash,
        },
        check,
        growth={"": 2},
        by_flag=("ours", "ours, seven thresholds"),
    )
]
