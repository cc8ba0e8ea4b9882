"""What watches a training: rows of the training folds that it does not see, and what they choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from img2prompt.model_a.inputs import Inputs
from img2prompt.model_a.prediction import predict

LINE = (0.2, 0.4, 0.6, 0.8)  # the points between start and end that are tried, as shares of the way


def draw_groups(groups: np.ndarray, limit: int, seed: int | Sequence[int]) -> np.ndarray:
    """A mask (m,) of whole groups at random, at most `limit` rows: a group that does not fit is passed over.

    Args:
        groups: (m,) int, equal for similar prompts.
        seed: of the choice.
    """
    _, own, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    taken, count = np.zeros(len(sizes), dtype=bool), 0
    for place in np.random.default_rng(seed).permutation(len(sizes)):
        if count + sizes[place] <= limit:
            taken[place] = True
            count += sizes[place]
    return taken[own]


def validation_rows(rows: np.ndarray, groups: np.ndarray, limit: int, seed: Sequence[int]) -> np.ndarray:
    """Which of the training rows (m,) validate, as a mask: whole groups at random, at most `limit` and a fifth of them.

    None where fewer than two groups fit: one alone tells nothing. Args: as `draw_groups`.
    """
    drawn = draw_groups(groups, min(limit, len(rows) // 5), seed)
    return drawn if len(np.unique(groups[drawn])) > 1 else np.zeros(len(rows), dtype=bool)


@dataclass(frozen=True)
class Gain:
    """By how much the mean cosine rises, and its standard error over groups of similar prompts."""

    mean: float
    error: float

    @classmethod
    def of(cls, gains: np.ndarray, groups: np.ndarray) -> Gain:
        """The gain of rows, (v,) each; rows of one group are one piece of evidence."""
        mean = gains.mean()
        _, own = np.unique(groups, return_inverse=True)
        apart = np.bincount(own, weights=gains - mean)
        return cls(float(mean), float(np.sqrt(np.square(apart).sum())) / len(gains))

    @property
    def sure(self) -> float:
        """What is left of it one standard error lower: by this, points are chosen."""
        return self.mean - self.error


@dataclass(frozen=True)
class Choice:
    """The point that validation chose: `share` of the way from the start to the weights after `epoch`.

    `gain` is over the start on the v validation rows. `lowered_tower` and `lowered_head` say how often a learning rate
    was lowered because its first steps did harm.
    """

    epoch: int
    share: float
    gain: Gain
    lowered_tower: int = 0
    lowered_head: int = 0

    def facts(self, rows: int) -> dict[str, float]:
        """The choice of so many validation rows as a row of a table."""
        return {
            "validation": rows, "epoch": self.epoch, "share": self.share, "gain": self.gain.mean,
            "error": self.gain.error, "lowered_tower": self.lowered_tower, "lowered_head": self.lowered_head,
        }  # fmt: skip


@dataclass(frozen=True)
class Validation:
    """The v rows that watch a training.

    rows (v,) int64; targets (v, t) float32, norm 1; groups (v,) int; floor: the mean cosine of the best constant
    prediction, which looks at no image.
    """

    inputs: Inputs
    rows: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    floor: float
    batch_size: int
    device: str

    def cosines(self, tower: nn.Module, head: nn.Module) -> np.ndarray:
        """The rows' cosines, (v,) float64; both modules end in evaluation mode."""
        found = predict(tower, head, [self.inputs], self.rows, self.batch_size, self.device)
        return np.einsum("ij,ij->i", found, self.targets, dtype=np.float64)

    def harmful(self, before: np.ndarray, after: np.ndarray) -> bool:
        """Whether training has, beyond doubt, lost all that the start was better than a constant."""
        if not np.isfinite(after).all():  # weights that ran away
            return True
        lost = Gain.of(before - after, self.groups)
        return lost.mean > 2 * lost.error and after.mean() < self.floor


def blend(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights at a share of the way from start to end (WiSE-FT, arXiv 2109.01903)."""
    return {
        name: torch.lerp(start[name], value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }
