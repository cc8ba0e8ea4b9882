"""Model A on inner splits: trained without a held-out fold and another one, and scored on that other one."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from img2prompt.core.device import device
from img2prompt.model_a.fold import Features, Fold, TrainRows
from img2prompt.model_a.inputs import Inputs
from img2prompt.model_a.params import Augmentation, ModelAParams
from img2prompt.model_a.prediction import predict
from img2prompt.model_a.training import Start

NONE = Augmentation(crop=0, rotation=0, flip=0)


@dataclass(frozen=True)
class InnerSplit:
    """The first CLIP of the run in the working folder, and two of its folds: nothing is learned from either.

    held_out: the fold that is not even scored on, as it would be where a setting is chosen for it. scored_on: the fold
    after it.
    """

    rows: TrainRows
    features: Features
    section: ModelAParams
    held_out: int
    scored_on: int

    @classmethod
    def read(cls, section: ModelAParams, ids: list[int], held_out: int) -> InnerSplit:
        """Read outputs/; ids: the folds'."""
        rows, features = TrainRows.read(Path("outputs")), Features.read(Path("outputs"), 0, section)
        return cls(rows, features, section, held_out, ids[(ids.index(held_out) + 1) % len(ids)])

    @cached_property
    def wanted(self) -> np.ndarray:
        """The rows that are scored, (m,) int64."""
        return np.flatnonzero(self.rows.scored & (self.rows.fold == self.scored_on))

    @property
    def targets(self) -> np.ndarray:
        """Of the rows that are scored: (m, 384) float32, norm 1."""
        return self.rows.targets[0, self.wanted]

    @property
    def group(self) -> np.ndarray:
        """Of the rows that are scored: (m,) int64."""
        return self.rows.group[self.wanted]

    @cached_property
    def start(self) -> Start:
        """The ridge regression that both heads start as."""
        return self._fold(self.rows.targets).start(self.section)

    @cached_property
    def plain(self) -> list[Inputs]:
        """The inputs of the layers that train, of images as they are."""
        return self.features.inputs(NONE, 0, device())

    def _fold(self, targets: np.ndarray) -> Fold:
        return Fold(replace(self.rows, targets=targets), self.features, [self.held_out, self.scored_on])

    def train(
        self, kind: str, seed: int, augmentation: Augmentation = NONE, targets: np.ndarray | None = None
    ) -> tuple[np.ndarray, float]:
        """Train a head, `linear` or `model_a`, with its layers: predictions (m, 384) float32, and the seconds it took.

        targets: (copies, n, 384), if they are not those of the run.
        """
        section, start, where = self.section, self.start, device()
        rates = section.linear if kind == "linear" else section
        began = time.monotonic()
        inputs = self.features.inputs(augmentation, seed, where) if augmentation.on else self.plain
        fold = self._fold(self.rows.targets if targets is None else targets)
        with tempfile.TemporaryDirectory() as resume:
            model, *_ = fold.train(kind, start, inputs, section, rates, (seed, self.held_out), where, Path(resume))
        seconds = time.monotonic() - began
        return predict(model["tower"], model["head"], self.plain, self.wanted, section.batch_size, where), seconds
