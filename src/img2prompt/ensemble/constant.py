"""The best constant prediction, the same for every image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from img2prompt.core.metric import unit


def constant(
    targets: np.ndarray, fold: np.ndarray, fold_ids: Sequence[int], kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best constant prediction: the mean direction of the targets (n, d) of the kept rows, (n,) bool.

    For the train rows (n, d), the mean is over the other folds; for any test row (d,), over all folds. Both have norm 1
    and the targets' dtype. Among constants they maximise eq. 8 where the targets have norm 1. Raises ValueError where
    no kept rows are left for a mean, or they cancel.
    """
    predictions = np.full_like(targets, np.nan)  # a fold missing from fold_ids stays NaN, which no score accepts
    for held_out in fold_ids:
        predictions[fold == held_out] = _mean_direction(targets[kept & (fold != held_out)])
    return predictions, _mean_direction(targets[kept])


def _mean_direction(x: np.ndarray) -> np.ndarray:
    return unit(x.mean(axis=0, keepdims=True, dtype=np.float64))[0].astype(x.dtype)
