"""The ensemble (eq. 6) of any number of members, and the search for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import LinearConstraint, minimize

from img2prompt.core.metric import cosine, unit

TIE = 1e-12  # scores closer than this differ by rounding only
NOTHING = 1e-6  # a weight below it is the optimiser's rounding of 0


def mix(members: Sequence[np.ndarray], weights: np.ndarray | Sequence[float]) -> np.ndarray:
    """The weighted sum, eq. 6, of members (n, d) that are scaled to norm 1 first: (n, d), norm 1.

    Without the scaling, the longest member would outweigh the others whatever the weights say. A member of weight 0
    is not looked at. Raises ValueError where a row is all zeros, not finite, or the members cancel.
    """
    # Python's floats leave float32 members float32.
    return unit(sum(float(weight) * unit(x) for x, weight in zip(members, weights, strict=True) if weight))


@dataclass(frozen=True, slots=True)
class Cosines:
    """All that a search for weights needs to know of m members and the targets of n rows, in float64.

    The mix of any weights is scored from it in O(n * m**2), without touching predictions again.
    """

    to_target: np.ndarray  # (n, m): each member's cosine with the target
    gram: np.ndarray  # (n, m, m): the members' dot products with one another, at norm 1

    @classmethod
    def between(cls, members: Sequence[np.ndarray], targets: np.ndarray) -> Cosines:
        """Of members (n, d) and targets (n, d), in one pass."""
        to_target = np.stack([cosine(member, targets) for member in members], axis=1)
        gram = np.ones((len(targets), len(members), len(members)))
        for i in range(len(members)):
            for j in range(i):
                gram[:, i, j] = gram[:, j, i] = cosine(members[i], members[j])
        return cls(to_target, gram)

    def __getitem__(self, rows: np.ndarray) -> Cosines:
        """Those of some rows: a mask or indices."""
        return Cosines(self.to_target[rows], self.gram[rows])

    def bagged(self, spread: np.ndarray) -> Cosines:
        """What to expect where each member is the mean of several models like the one that these cosines are of.

        spread (m, m): see the function of this name. The mean of models at norm 1 has the same expected dot product
        with the target as one of them; with another member's mean, less by what they share within a fold. It is
        shorter than 1, so at norm 1 again it is nearer to both. No target is needed to know it.
        """
        norms = np.sqrt(1 - np.diag(spread))
        return Cosines(self.to_target / norms, (self.gram - spread) / np.outer(norms, norms))

    def of_mix(self, weights: np.ndarray) -> np.ndarray:
        """The cosine of the `mix` of weights (m,) with the target: (n,), w.c / sqrt(w G w)."""
        return self.to_target @ weights / np.sqrt(self._squared_norms(weights))

    def loss(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the mean of `of_mix`, and its gradient (m,)."""
        squared = self._squared_norms(weights)
        inverse = 1 / np.sqrt(squared)
        scores = self.to_target @ weights * inverse
        pull = np.tensordot(scores / squared, self.gram, axes=1) @ weights
        return -float(scores.mean()), (pull - inverse @ self.to_target) / len(scores)

    def _squared_norms(self, weights: np.ndarray) -> np.ndarray:
        squared = self.gram.reshape(len(self.gram), -1) @ np.outer(weights, weights).ravel()
        # Members that point opposite ways may cancel: there w.c is 0 too, and so is the score of a missing
        # direction.
        return np.maximum(squared, 1e-12)


def spread(members: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """How the models behind each pair of members differ together: (m, m), the covariance over folds, mean over rows.

    members: for each its models' predictions (n, d), norm 1, in the order of the folds; a member that is one model is
    a list of one, and its row is 0. Predictions that are all the same give 0; a member's own entry is
    1 - |mean of its models|**2.
    """
    means = [np.mean(models, axis=0, dtype=np.float64) for models in members]
    found = np.zeros((len(members), len(members)))
    for i, first in enumerate(members):
        for j, second in enumerate(members[: i + 1]):
            if min(len(first), len(second)) > 1:
                within = [_mean_dot(a, b) for a, b in zip(first, second, strict=True)]
                found[i, j] = found[j, i] = np.mean(within) - _mean_dot(means[i], means[j])
    return found


def _mean_dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64)) / len(a)


def search_weights(
    cosines: Cosines, family: np.ndarray | None = None, alpha: float | None = None, start: np.ndarray | None = None
) -> np.ndarray:
    """The weights (m,) on the simplex whose `mix` has the best mean cosine: none below 0, their sum 1.

    With family (m,) bool and alpha in [0, 1], the weights of that family sum to alpha. Scipy's SLSQP climbs with the
    exact gradient, from equal weights and from near each member alone (with `start`, from there only); of equally
    good ends the first counts, so where the data are silent, members count alike. Deterministic.
    Raises ValueError where there are no rows, or alpha asks for weight on a family without members.
    """
    n, m = cosines.to_target.shape
    if not n:
        raise ValueError("no rows to search weights on: some must be scored, and outside the fold in question")
    parts = [(np.ones(m, dtype=bool), 1.0)]
    if alpha is not None:
        parts = [(family, alpha), (~family, 1 - alpha)]
        if any(share > 0 and not members.any() for members, share in parts):
            raise ValueError(f"ensemble.alpha is {alpha}, but one of the families it weighs has no member")

    def onto_simplex(weights: np.ndarray) -> np.ndarray:
        weights = np.where(weights > NOTHING, weights, 0.0)
        for members, share in parts:
            total = weights[members].sum()
            weights[members] = weights[members] * (share / total) if total else share / max(members.sum(), 1)
        return weights

    starts = [np.ones(m), *(1 / m + np.eye(m))] if start is None else [start]
    upper = np.sum([share * members for members, share in parts], axis=0)
    shares = LinearConstraint(np.array([members for members, _ in parts], dtype=float), *2 * [[s for _, s in parts]])
    best, best_loss = None, np.inf
    for weights in map(onto_simplex, starts):
        found = minimize(
            cosines.loss, weights, jac=True, method="SLSQP", bounds=[(0.0, limit) for limit in upper],
            constraints=shares, options={"ftol": 1e-13, "maxiter": 300},
        ).x  # fmt: skip
        # Where it began is the answer if the climb led nowhere, as it does where all weights are given.
        for candidate in (weights, onto_simplex(found)):
            loss = cosines.loss(candidate)[0]
            if loss < best_loss - TIE:
                best, best_loss = candidate, loss
    return best


def alpha_curve(cosines: Cosines, family: np.ndarray) -> pd.DataFrame:
    """The best mean cosine at each of 101 shares of a family (m,) bool of the members: `alpha`, `score`."""
    rows, weights = [], None
    for alpha in np.arange(101) / 100:
        weights = search_weights(cosines, family, alpha, weights)  # from the neighbour's on: the same hill
        rows.append((alpha, -cosines.loss(weights)[0]))
    return pd.DataFrame(rows, columns=["alpha", "score"])


def cross_fitted(
    cosines: Cosines,
    fold: np.ndarray,
    scored: np.ndarray,
    family: np.ndarray | None = None,
    alpha: float | None = None,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The ensemble's cosine with each target (n,), and each fold's weights, found on the scored rows of other folds.

    Weights that were searched on the very rows they are scored on would flatter the ensemble.
    fold (n,) int; scored (n,) bool; family and alpha as in `search_weights`. Every row gets its cosine, only scored
    rows choose.
    """
    found, weights = np.empty(len(fold)), {}
    for held_out in np.unique(fold).tolist():
        rows, others = fold == held_out, scored & (fold != held_out)
        weights[held_out] = search_weights(cosines[others], family, alpha)
        found[rows] = cosines[rows].of_mix(weights[held_out])
    return found, weights
