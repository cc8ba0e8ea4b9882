"""ensemble: the curve of alpha, the search for six members' weights and one score, against mixing anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.harness import Task, Work, deviation
from img2prompt.ensemble.weights import Cosines, alpha_curve, search_weights

MEMBERS = 6
SCORES = 10  # in one run: one takes milliseconds
ALPHAS = np.arange(101) / 100
CHECKED = [0, 25, 50, 75, 100]


def make(folder: Path, rows: int, members: int) -> Work:
    """targets.npy and members.npy. The work: every prediction is read once."""
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((rows, 384), dtype=np.float32)
    scales = np.linspace(0.8, 1.6, members).astype(np.float32)
    made = np.stack([targets + scale * rng.standard_normal(targets.shape, dtype=np.float32) for scale in scales])
    np.save(folder / "targets.npy", targets / np.linalg.norm(targets, axis=-1, keepdims=True))
    np.save(folder / "members.npy", made / np.linalg.norm(made, axis=-1, keepdims=True))
    return Work(copied=4.0 * (members + 1) * targets.size)


def load(folder: Path, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / "members.npy")[:, :rows], np.load(folder / "targets.npy")[:rows]


def score(members: Sequence[np.ndarray], targets: np.ndarray, weights: Sequence[float]) -> float:
    """Mix, scale, multiply, average."""
    mixed = sum(weight * member for weight, member in zip(weights, members, strict=True))
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    return float((mixed * targets).sum(axis=1).mean())


def curve(members: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The score at every share of the first member; as the stage does it, with every fold's own."""
    cosines = Cosines.between(members, targets)
    return alpha_curve(cosines, np.array([True, False]), np.arange(len(targets)) % 5).score.to_numpy()


def grid(members: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.array([score(members, targets, [float(alpha), float(1 - alpha)]) for alpha in ALPHAS])


def check_curve(found: np.ndarray, folder: Path) -> str:
    members, targets = (np.asarray(x, np.float64) for x in load(folder))
    right = [score(members, targets, [ALPHAS[place], 1 - ALPHAS[place]]) for place in CHECKED]
    return deviation(found[CHECKED] - right)


def weights(members: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return search_weights(Cosines.between(members, targets))


def weights_anew(members: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """As people search: without a gradient, from equal weights."""
    from scipy.optimize import minimize

    equal = np.full(len(members), 1 / len(members))
    bounds = [(0, 1)] * len(members)
    found = minimize(lambda w: -score(members, targets, w.tolist()), equal, method="Nelder-Mead", bounds=bounds).x
    return found / found.sum()


def check_weights(found: np.ndarray, folder: Path) -> str:
    return f"score {score(*load(folder), found.tolist()):.6f}"


def make_scored(folder: Path, rows: int) -> Work:
    """As for the weights. No limit: ours no longer reads the predictions."""
    make(folder, rows, MEMBERS)
    return Work()


def load_cosines(folder: Path, rows: int) -> tuple[np.ndarray, np.ndarray, Cosines]:
    members, targets = load(folder, rows)
    return members, targets, Cosines.between(members, targets)


def scores(members: np.ndarray, targets: np.ndarray, cosines: Cosines) -> float:
    """Each with its gradient."""
    for _ in range(SCORES):
        loss, _ = cosines.loss(np.full(len(members), 1 / len(members)))
    return -loss


def scores_anew(members: np.ndarray, targets: np.ndarray, cosines: Cosines) -> float:
    for _ in range(SCORES):
        found = score(members, targets, [1 / len(members)] * len(members))
    return found


def check_score(found: float, folder: Path) -> str:
    members, targets = (np.asarray(x, np.float64) for x in load(folder))
    return deviation(found - score(members, targets, [1 / len(members)] * len(members)))


TASKS = [
    Task(
        "ensemble: 101 alphas",
        partial(make, members=2),
        load,
        {"ours": curve, "mixed anew": grid},
        check_curve,
        growth={"": 1},
    ),
    Task(
        "ensemble: weights",
        partial(make, members=MEMBERS),
        load,
        {"ours": weights, "mixed anew": weights_anew},
        check_weights,
        growth={"": 1},
    ),
    Task(
        "ensemble: ten scores",
        make_scored,
        load_cosines,
        {"ours": scores, "mixed anew": scores_anew},
        check_score,
        growth={"": 1},
    ),
]
