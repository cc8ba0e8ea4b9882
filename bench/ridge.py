"""ridge, a part of model_a: the regressions of all folds, each with its strength, against 40 of scikit-learn's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.harness import Task, Work, from_right
from img2prompt.core.blocks import Stack
from img2prompt.model_a.ridge import ridge

WIDTH, FOLDS = 768, 5  # of a ViT-B's pooled features; row i is in fold i % 5
STRENGTHS = 10 ** np.linspace(-3, 4, 29)[::4]  # eight of ours, over the number of rows
CHECKED = 256  # rows of the first fold


class Fit(NamedTuple):
    """Predictions (n, 384) out of fold, and the strength of each fold."""

    predictions: np.ndarray
    strengths: list[float]


def features(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, WIDTH) float32, and targets (n, 384) float32 at norm 1 of which they tell with noise."""
    rng = np.random.default_rng(seed)
    targets = rng.standard_normal((n, 384), dtype=np.float32)
    targets[:, :48] += np.tile(np.float32([1, -1]), 24)  # all have something in common, and a mean of about 0
    telling = targets @ (rng.standard_normal((384, WIDTH), dtype=np.float32) / 20)
    pooled = np.tanh(telling) + rng.standard_normal((n, WIDTH), dtype=np.float32)
    return pooled, targets / np.linalg.norm(targets, axis=1, keepdims=True)


def make(folder: Path, rows: int) -> Work:
    """pooled.npy and targets.npy. No limit: it takes products of several precisions and decompositions."""
    for name, array in zip(("pooled", "targets"), features(rows), strict=True):
        np.save(folder / f"{name}.npy", array)
    return Work()


def load(folder: Path, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / "pooled.npy")[:rows], np.load(folder / "targets.npy")[:rows]


def ours(pooled: np.ndarray, targets: np.ndarray) -> Fit:
    """As a fold's start: the strength is chosen by leave-one-group-out, groups of three."""
    fold, predictions, strengths = np.arange(len(pooled)) % FOLDS, np.empty_like(targets), []
    for held_out in range(FOLDS):
        rows = np.flatnonzero(fold != held_out)
        found = ridge(Stack([pooled], rows), Stack([targets], rows), rows // 3)
        x = (torch.from_numpy(pooled[fold == held_out]) - found.mean) / found.std
        predictions[fold == held_out] = (x @ found.weight.T + found.bias).numpy()
        strengths.append(found.strength)
    return Fit(predictions, strengths)


def sklearn(pooled: np.ndarray, targets: np.ndarray) -> Fit:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    fold, predictions, strengths = np.arange(len(pooled)) % FOLDS, np.empty_like(targets), []
    for held_out in range(FOLDS):
        rows, unseen = fold != held_out, fold == held_out
        scaler = StandardScaler().fit(pooled[rows])
        x, x_unseen, best = scaler.transform(pooled[rows]), scaler.transform(pooled[unseen]), (-1.0, 0.0, None)
        for strength in rows.sum() * STRENGTHS:
            found = Ridge(strength).fit(x, targets[rows]).predict(x_unseen)
            score = ((found * targets[unseen]).sum(1) / np.linalg.norm(found, axis=1)).mean()
            best = max(best, (score, strength, found), key=lambda tried: tried[0])
        predictions[unseen] = best[2]
        strengths.append(best[1])
    return Fit(predictions, strengths)


def check(fit: Fit, folder: Path) -> str:
    """Against the normal equations of the first fold in float64, at the strength that was chosen."""
    pooled, targets = load(folder, len(fit.predictions))
    rows = np.arange(len(pooled)) % FOLDS != 0
    x, y = pooled[rows].astype(np.float64), targets[rows].astype(np.float64)
    mean, std, middle = x.mean(0), x.std(0), y.mean(0)
    x = (x - mean) / std
    weight = np.linalg.solve(x.T @ x + fit.strengths[0] * np.eye(WIDTH), x.T @ (y - middle))
    right = (pooled[~rows][:CHECKED] - mean) / std @ weight + middle
    return from_right(fit.predictions[~rows], right)


TASKS = [Task("ridge", make, load, {"ours": ours, "40 fits of scikit-learn": sklearn}, check, growth={"": 1})]
