"""The ensemble (eq. 6) of any number of members, and the search for its weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import LinearConstraint, minimize

from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.metric import cosine, unit

if TYPE_CHECKING:
    import pandas as pd

TIE = 1e-12  # scores closer than this differ by rounding only
NOTHING = 1e-6  # a weight below it is the optimiser's rounding of 0


def mix(members: Sequence[np.ndarray], weights: np.ndarray | Sequence[float]) -> np.ndarray:
    """The weighted sum, eq. 6, of members (n, d) that are scaled to norm 1 first: (n, d), norm 1.

    Without the scaling, the member of the largest norm would outweigh the others whatever the weights are. A member
    of weight 0 is not looked at; a weight below 0 pushes the mix away from its member. Raises ValueError where a row is
    all zeros, not finite, or the members cancel.
    """
    # Weights as Python floats keep float32 members float32.
    return unit(sum(float(weight) * unit(x) for x, weight in zip(members, weights, strict=True) if weight))


@dataclass(frozen=True, slots=True)
class Cosines:
    """All that a search for weights needs to know of m members and the targets of n rows, in float64.

    The mix of any weights is scored from it in O(n * m**2), without touching predictions again.
    """

    to_target: np.ndarray  # (m, n): each member's cosine with the target
    to_each_other: np.ndarray  # (m * (m - 1) / 2, n): the cosines of two members, in the order of np.triu_indices(m, 1)

    @classmethod
    def between(cls, members: Sequence[np.ndarray | Stack], targets: np.ndarray | Stack) -> Cosines:
        """The cosines of members and targets, (n, d) each; ValueError for a row that is all zeros or not finite."""
        if len({len(rows) for rows in (targets, *members)}) > 1:
            raise ValueError(f"rows differ: {len(targets)} targets, members of {[len(member) for member in members]}")
        n, m = len(targets), len(members)
        found = cls(np.empty((m, n)), np.empty((m * (m - 1) // 2, n)))
        for rows in blocks(n):
            own = [member[rows] for member in members]
            for place, member in enumerate(own):
                found.to_target[place, rows] = cosine(member, targets[rows], rows.start)
            for place, (one, other) in enumerate(itertools.combinations(own, 2)):
                found.to_each_other[place, rows] = cosine(one, other, rows.start)
        return found

    def __getitem__(self, rows: np.ndarray) -> Cosines:
        """The cosines of some rows, given as a mask or as indices."""
        return Cosines(self.to_target[:, rows], self.to_each_other[:, rows])

    def averaged(self, spread: np.ndarray) -> Cosines:
        """What to expect where each member is the mean of models like the one that these cosines are of.

        spread (m,): how much shorter the mean of a member's models is than 1, squared: 1 - |mean|**2. The mean has the
        same expected dot product with the target and with other members as each of its models, and is shorter, so at
        norm 1 again it is nearer to all of them.
        """
        norms = np.sqrt(1 - spread)
        one, other = np.triu_indices(len(norms), 1)
        return Cosines(self.to_target / norms[:, None], self.to_each_other / (norms[one] * norms[other])[:, None])

    def of_mix(self, weights: np.ndarray) -> np.ndarray:
        """The cosine of the `mix` of weights (m,) with the target: (n,), w.c / sqrt(w G w), G the members' cosines."""
        return _sum(weights, self.to_target) / np.sqrt(self._squared_norms(weights))

    def loss(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the mean of `of_mix`, and its gradient (m,) with respect to the weights."""
        squared = self._squared_norms(weights)
        inverse = 1 / np.sqrt(squared)
        scores = _sum(weights, self.to_target) * inverse
        shrinks = scores / squared
        pairs = np.zeros((len(weights), len(weights)))
        pairs[np.triu_indices_from(pairs, 1)] = _along(self.to_each_other, shrinks)
        pull = shrinks.sum() * weights + (pairs + pairs.T) @ weights
        return -float(scores.mean()), (pull - _along(self.to_target, inverse)) / len(scores)

    def _squared_norms(self, weights: np.ndarray) -> np.ndarray:
        one, other = np.triu_indices(len(weights), 1)
        squared = weights @ weights + _sum(2 * weights[one] * weights[other], self.to_each_other)
        # Members that point in opposite directions may cancel. Then w.c is 0 too, and so is the score of a row
        # that has no direction.
        return np.maximum(squared, 1e-12)


# By einsum, which is memory-bound and runs on one thread: BLAS takes longer to wake a second one than the sum takes.
def _sum(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.einsum("p,pn->n", weights, rows)


def _along(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.einsum("pn,n->p", rows, values)


def models_spread(first: np.ndarray | Stack, second: np.ndarray | Stack, k: int) -> float:
    """How much shorter than 1, squared, the mean of k folds' models will be, told from pairs of them.

    first, second (n, d), norm 1: for each of some rows what two of the models make of it, neither of which has trained
    on it. Such rows are those that watched one fold's training: that fold's model is one, and the other is the model
    that the row is held out from. What they disagree on, 1 minus their mean cosine, is half the sum of the variances of
    training; the mean of k models loses all but 1/k of its own. No test image is looked at.
    """
    return float(1 - cosine(first, second).mean()) * (1 - 1 / k)


def search_weights(
    cosines: Cosines,
    family: np.ndarray | None = None,
    alpha: float | None = None,
    free: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """The weights (m,) on the simplex whose `mix` has the best mean cosine: none below 0, their sum 1.

    With family (m,) bool and alpha in [0, 1], the weights of that family sum to alpha. free (m,) bool: members that
    are of no family and not on the simplex; their weights are between -1 and 1, and no part of any sum. It is meant
    for the constant: models that know little of an image answer near the mean target, a mix of them more so than is
    best, and a negative weight of the mean undoes it. Scipy's SLSQP optimises with the exact gradient, from equal
    weights and from near each member alone (with `start`, from there only). Of equally good results the first counts,
    so where the data do not decide, the weights are equal, and 0 of free members. Deterministic.
    Raises ValueError where there are no rows, or alpha asks for weight on a family without members.
    """
    m, n = cosines.to_target.shape
    if not n:
        raise ValueError("no rows to search weights on: some rows outside the held-out fold must be scored")
    free = np.zeros(m, dtype=bool) if free is None else free
    parts = [(~free, 1.0)]
    if alpha is not None:
        parts = [(family, alpha), (~family & ~free, 1 - alpha)]
        if any(share > 0 and not members.any() for members, share in parts):
            raise ValueError(f"ensemble.alpha is {alpha}, but one of the families it weighs has no member")

    def onto_simplex(weights: np.ndarray) -> np.ndarray:
        weights = np.where(weights > NOTHING, weights, np.where(free, weights, 0.0))
        for members, share in parts:
            total = weights[members].sum()
            weights[members] = weights[members] * (share / total) if total else share / max(members.sum(), 1)
        return weights

    starts = [(~free).astype(float)] if start is None else [start]
    if start is None:
        starts += [np.where(free, 0.0, 1 / m + near) for near in np.eye(m)[~free]]
    lower, upper = np.where(free, -1.0, 0.0), np.sum([free, *(share * members for members, share in parts)], axis=0)
    shares = LinearConstraint(np.array([members for members, _ in parts], dtype=float), *2 * [[s for _, s in parts]])
    if not free.any() and all(members.sum() < 2 for members, share in parts if share > 0):
        return onto_simplex(starts[0])  # the shares leave nothing to search
    best, best_loss = None, np.inf
    for weights in map(onto_simplex, starts):
        found = minimize(
            cosines.loss, weights, jac=True, method="SLSQP", bounds=np.stack([lower, upper], axis=1),
            constraints=shares, options={"ftol": 1e-13, "maxiter": 300},
        ).x  # fmt: skip
        for candidate in (weights, onto_simplex(found)):  # the start counts too
            loss = cosines.loss(candidate)[0]
            if loss < best_loss - TIE:
                best, best_loss = candidate, loss
    return best


def alpha_curve(cosines: Cosines, family: np.ndarray, fold: np.ndarray, free: np.ndarray | None = None) -> pd.DataFrame:
    """The best mean cosine at each of 101 shares of a family (m,) bool of the members: columns `alpha`, `score`.

    fold (n,) int64: a column `fold_K` each has the mean cosine that the same weights have on the fold's rows.
    free (m,) bool: as in `search_weights`.
    """
    import pandas as pd  # prediction, which needs `mix`, does without pandas

    rows, weights = [], None
    folds, own, sizes = np.unique(fold, return_inverse=True, return_counts=True)
    for alpha in np.arange(101) / 100:
        # The optimum of the last alpha is near this one.
        weights = search_weights(cosines, family, alpha, free, weights)
        of_mix = cosines.of_mix(weights)
        rows.append((alpha, of_mix.mean(), *(np.bincount(own, of_mix) / sizes)))
    return pd.DataFrame(rows, columns=["alpha", "score", *(f"fold_{number}" for number in folds)])


def cross_fitted(
    cosines: Cosines,
    fold: np.ndarray,
    scored: np.ndarray,
    family: np.ndarray | None = None,
    alpha: float | None = None,
    free: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The ensemble's cosine with each target (n,), and each fold's weights, found on the scored rows of other folds.

    Weights that were searched on the very rows they are scored on would overestimate the ensemble.
    fold (n,) int; scored (n,) bool; family, alpha, free and errors as in `search_weights`. Every row gets its cosine,
    but only scored rows take part in the search.
    """
    found, weights = np.empty(len(fold)), {}
    for held_out in np.unique(fold).tolist():
        rows, others = fold == held_out, scored & (fold != held_out)
        weights[held_out] = search_weights(cosines[others], family, alpha, free)
        found[rows] = cosines[rows].of_mix(weights[held_out])
    return found, weights
