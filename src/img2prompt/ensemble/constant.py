"""The best constant prediction, the same for every image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from img2prompt.core.blocks import Stack
from img2prompt.core.metric import unit


def constant(
    targets: np.ndarray, fold: np.ndarray, fold_ids: Sequence[int], kept: np.ndarray
) -> tuple[Stack, np.ndarray]:
    """The best constant prediction: the mean direction of the targets (n, d) of the kept rows, (n,) bool.

    For the train rows (n, d), the mean is over the other folds; for any test row (d,), over all folds. Both have norm 1
    and the targets' dtype. Among constants they maximise eq. 8 where the targets have norm 1. Raises ValueError where
    no kept rows are left for a mean, or they cancel.
    """
    ids, place = np.unique(fold, return_inverse=True)
    sums = np.stack([targets[kept & (fold == own)].sum(axis=0, dtype=np.float64) for own in ids])
    directions = np.full((len(ids), targets.shape[1]), np.nan)  # a fold missing from fold_ids stays NaN
    asked = np.isin(ids, fold_ids)
    others = [np.delete(sums, number, axis=0).sum(axis=0) for number in np.flatnonzero(asked)]
    directions[asked] = unit(np.stack(others))
    whole = unit(sums.sum(axis=0, keepdims=True))[0]
    return Stack([directions.astype(targets.dtype)], place), whole.astype(targets.dtype)
