"""The best answer that looks at no picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from img2prompt.core.metric import unit


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
