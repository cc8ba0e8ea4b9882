"""The ensemble (eq. 6), the search for its weight, and the table of scores it has to beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from img2prompt.metric import bootstrap_interval, cosine, unit

TIE = 1e-12  # scores closer than this differ by rounding only


def mix(a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """alpha*a + (1-alpha)*b, eq. 6, of members (n, d) that are scaled to norm 1 first: (n, d), norm 1.

    Without the scaling, the longer member would outweigh the other whatever alpha says.
    Raises ValueError where a row is all zeros, not finite, or the members cancel.
    """
    return unit(alpha * unit(a) + (1 - alpha) * unit(b))


@dataclass(frozen=True, slots=True)
class AlphaSearch:
    """The best weight of the first member, its mean cosine, and the curve (`alpha`, `score`: 101 points)."""

    alpha: float
    score: float
    curve: pd.DataFrame


def member_cosines(members: Sequence[np.ndarray], targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All that a search for weights needs to know of m members (n, d) and targets (n, d), in float64:

    each member's cosine with the target (n, m), and the members' cosines with one another, the Gram matrix of
    the members at norm 1 (n, m, m). The mix of any weights is then scored without touching the d columns
    again.
    """
    to_target = np.stack([cosine(member, targets) for member in members], axis=1)
    gram = np.ones((len(targets), len(members), len(members)))
    for i in range(len(members)):
        for j in range(i):
            gram[:, i, j] = gram[:, j, i] = cosine(members[i], members[j])
    return to_target, gram


def mixed_scores(weights: np.ndarray, to_target: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Mean cosine (g,) of the g mixtures in weights (g, m): the mean over rows of w.c / sqrt(w G w)."""
    pairs = np.einsum("gi,gj->gij", weights, weights).reshape(len(weights), -1)
    squared_norms = gram.reshape(len(gram), -1) @ pairs.T  # (n, g)
    # Members that point opposite ways may cancel: there w.c is 0 too, and so is the score of a missing
    # direction.
    return (to_target @ weights.T / np.sqrt(np.maximum(squared_norms, 1e-12))).mean(axis=0)


def _search(to_target: np.ndarray, gram: np.ndarray) -> AlphaSearch:
    if not len(to_target):
        raise ValueError("no rows to search alpha on: some must be scored, and outside the fold in question")

    def score(alpha: np.ndarray) -> np.ndarray:
        return mixed_scores(np.stack([alpha, 1 - alpha], axis=1), to_target, gram)

    grid = np.arange(101) / 100
    curve = score(grid)
    ties = grid[curve >= curve.max() - TIE]
    best = ties[np.abs(ties - 0.5).argmin()]  # argmin takes the first: 0.4 before 0.6
    refined = minimize_scalar(
        lambda alpha: -score(np.array([alpha]))[0],
        bounds=(max(best - 0.01, 0.0), min(best + 0.01, 1.0)),
        method="bounded",
        options={"xatol": 1e-6},
    ).x
    candidates = score(np.array([best, refined]))
    alpha = refined if candidates[1] > candidates[0] + TIE else best
    return AlphaSearch(float(alpha), float(candidates.max()), pd.DataFrame({"alpha": grid, "score": curve}))


def search_alpha(
    a: np.ndarray,
    b: np.ndarray,
    targets: np.ndarray,
    rows: np.ndarray | None = None,
    agreement: tuple[float, float] = (1.0, 1.0),
) -> AlphaSearch:
    """The alpha of `mix` with the best mean cosine to targets (n, d) over rows (mask or indices; else all).

    The 101 points 0, 0.01, .. 1 find the hill, a scalar search its top. Of equally good alphas the one
    nearest to 0.5 wins (of two such, the lower): where the data are silent, the members count alike.

    `agreement` (of a, of b) below 1 finds the alpha for where a member will be a mean of several models like the one
    that made it: it is the norm of their mean, each at norm 1. What they agree on has the same dot product with the
    target and the other member as in any one of them, so at norm 1 the mean is nearer to both by 1 / agreement; no
    target is needed to know it.
    Deterministic. Raises ValueError where there are no rows, or one is all zeros or not finite.
    """
    if rows is not None:
        a, b, targets = a[rows], b[rows], targets[rows]
    to_target, gram = member_cosines([a, b], targets)
    to_target /= agreement
    gram[:, [0, 1], [1, 0]] /= agreement[0] * agreement[1]
    return _search(to_target, gram)


def cross_fitted(
    a: np.ndarray, b: np.ndarray, targets: np.ndarray, fold: np.ndarray, scored: np.ndarray
) -> tuple[np.ndarray, dict[int, float]]:
    """Out-of-fold mix (n, d), norm 1, and each fold's alpha: searched on the scored rows of the other folds.

    An alpha that was searched on the very rows it is scored on would flatter the ensemble.
    a, b, targets: (n, d); fold (n,) int; scored (n,) bool. Every row is mixed, only scored rows choose.
    """
    to_target, gram = member_cosines([a, b], targets)
    mixed, alphas = np.empty_like(a), {}
    for held_out in np.unique(fold).tolist():
        rows, others = fold == held_out, scored & (fold != held_out)
        alphas[held_out] = _search(to_target[others], gram[others]).alpha
        mixed[rows] = mix(a[rows], b[rows], alphas[held_out])
    return mixed, alphas


def constant(
    targets: np.ndarray, fold: np.ndarray, fold_ids: Sequence[int], kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best answer that looks at no picture: the mean direction of the prompts, kept (n,) rows only.

    For the train rows (n, d), the mean over the other folds; for any test row (d,), over all folds. Norm 1.
    Maximises eq. 8 among constants where the targets (n, d) have norm 1.
    """
    predictions = np.full_like(targets, np.nan)  # which no score accepts, should a fold be missing here
    for held_out in fold_ids:
        predictions[fold == held_out] = _mean_direction(targets[kept & (fold != held_out)])
    return predictions, _mean_direction(targets[kept])


def _mean_direction(x: np.ndarray) -> np.ndarray:
    return unit(x.mean(axis=0, keepdims=True, dtype=np.float64))[0].astype(x.dtype)


def fold_scores(
    predictions: np.ndarray,
    targets: np.ndarray,
    fold: np.ndarray,
    fold_ids: Sequence[int],
    scored: np.ndarray,
) -> dict[str, float]:
    """Mean cosine of out-of-fold predictions (n, d) over the scored (n,) rows.

    `fold_0` .. for each of fold_ids, `mean` and `std` (ddof 0) over those, and `oof` over all rows at once.
    Raises ValueError for a fold without scored rows.
    """
    cosines, fold = cosine(predictions[scored], targets[scored]), fold[scored]
    missing = set(fold_ids) - set(fold.tolist())
    if missing:
        raise ValueError(f"folds {sorted(missing)} have no scored row: use fewer folds or a milder dedup")
    by_fold = {f"fold_{i}": float(cosines[fold == i].mean()) for i in fold_ids}
    over_folds = np.array(list(by_fold.values()))
    return {
        **by_fold,
        "mean": float(over_folds.mean()),
        "std": float(over_folds.std()),
        "oof": float(cosines.mean()),
    }


def _with_interval(cosines: np.ndarray, groups: np.ndarray | None = None) -> str:
    low, high = bootstrap_interval(cosines, groups)
    return f"{cosines.mean():.4f} [{low:.4f}, {high:.4f}]"


def scores_table(
    oof: Mapping[str, np.ndarray],
    targets: np.ndarray,
    fold: np.ndarray,
    fold_ids: Sequence[int],
    scored: np.ndarray,
    groups: np.ndarray,
    test: Mapping[str, np.ndarray] | None = None,
    test_targets: np.ndarray | None = None,
) -> str:
    """A Markdown table: one row for each model of oof (name -> (n, d) predictions), in the order given.

    Columns: the `fold_scores`, `oof` with its 95% interval (whole prompt groups (n,) resampled), and, where
    test_targets (m, d) are known, the same of the models' test predictions (m, d), picture by picture.
    """
    columns = ["model", *(f"fold_{i}" for i in fold_ids), "mean", "std", "oof [95%]"]
    columns += ["test [95%]"] if test_targets is not None else []
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for name, predictions in oof.items():
        scores = fold_scores(predictions, targets, fold, fold_ids, scored)
        cells = [name, *(f"{score:.4f}" for key, score in scores.items() if key != "oof")]
        cells.append(_with_interval(cosine(predictions[scored], targets[scored]), groups[scored]))
        if test_targets is not None:
            cells.append(_with_interval(cosine(test[name], test_targets)))
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
