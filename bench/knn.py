"""knn: neighbours and their weighted mean against what people use; the search of their number and power beside it.

As many keys as rows, and a fifth as many queries: a fold's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.harness import Task, Work, from_right
from img2prompt.model_b.choice import DISTANCE_DIM_GRID, K_GRID
from img2prompt.model_b.neighbours import Neighbours, nearest
from img2prompt.model_b.regression import grid_scores, regress

K, POWER, EPS, WIDTH = 100, 4.0, 1e-6, 512
CHECKED = 256  # queries


def images(n: int, centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, d) float32 at norm 1 around shared centres, with cosines like those between images in CLIP."""
    rows = centres[rng.integers(len(centres), size=n)] + 0.7 * rng.standard_normal((n, WIDTH), dtype=np.float32)
    rows[:, : WIDTH // 8] += 1.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make(folder: Path, rows: int) -> Work:
    """queries.npy, keys.npy, targets.npy; right.npy: the first predictions in float64. The work: the product."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, WIDTH), dtype=np.float32)
    queries, keys = images(rows // 5, centres, rng), images(rows, centres, rng)
    targets = rng.standard_normal((rows, 384), dtype=np.float32)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    right = []
    for query in queries[:CHECKED].astype(np.float64):
        distance = np.linalg.norm(keys - query, axis=1)
        near = np.argsort(distance, kind="stable")[:K]
        right.append((1 / (distance[near] ** POWER + EPS)) @ targets[near])
    for name, array in {"queries": queries, "keys": keys, "targets": targets, "right": np.array(right)}.items():
        np.save(folder / f"{name}.npy", array)
    return Work(operations=2 * WIDTH * len(queries) * len(keys))


def load(folder: Path, rows: int) -> tuple[np.ndarray, ...]:
    queries, keys, targets = (np.load(folder / f"{name}.npy") for name in ("queries", "keys", "targets"))
    return queries[: rows // 5], keys[:rows], targets[:rows]


def ours(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return regress(nearest(queries, keys, K), targets, K, POWER, EPS, 1.0)


def sklearn(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray) -> np.ndarray:
    from sklearn.neighbors import KNeighborsRegressor

    model = KNeighborsRegressor(K, weights=lambda d: 1 / (d**POWER + EPS), algorithm="brute")
    return model.fit(keys, targets).predict(queries)


def faiss(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """A mean for each query: targets[near] of all of them would be gigabytes."""
    import faiss

    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    squares, near = index.search(queries, K)
    weights = 1 / (np.sqrt(np.maximum(squares, 0)) ** POWER + EPS)
    return np.stack([own @ targets[rows] for own, rows in zip(weights, near, strict=True)])


def cdist(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What one writes by hand in torch, 1024 queries at a time."""
    import torch

    queries, keys, targets = (torch.from_numpy(x) for x in (queries, keys, targets))
    predicted = []
    for block in queries.split(1024):
        distance, index = torch.cdist(block, keys).topk(K, dim=1, largest=False)
        weight = 1 / (distance**POWER + EPS)
        predicted.append((targets[index] * weight[..., None]).sum(dim=1))
    return torch.cat(predicted).numpy()


def check(predicted: np.ndarray, folder: Path) -> str:
    return from_right(predicted, np.load(folder / "right.npy"))


def most_neighbours(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray) -> Neighbours:
    return nearest(queries, keys, min(K_GRID[-1], len(keys)))


def searched(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The cosines of every setting with the first targets, in place of the queries' own."""
    found = most_neighbours(queries, keys, targets)
    ks = tuple(k for k in K_GRID if k <= found.index.shape[1])
    return grid_scores(found, targets, targets[: len(queries)], ks, DISTANCE_DIM_GRID, EPS, 1.0)


# The product grows with the square of the rows and the rest with the rows: together, up to 90,000, with these powers.
TASKS = [
    Task(
        "knn",
        make,
        load,
        {"ours": ours, "sklearn": sklearn, "faiss": faiss, "torch cdist": cdist},
        check,
        growth={"": 1.7},
        by_flag=("ours",),
    ),
    Task(
        "knn: search",
        make,
        load,
        {"ours": searched, "the neighbours alone": most_neighbours},
        lambda *_: "",
        growth={"": 1.2},
        by_flag=("ours", "the neighbours alone"),
    ),
]
