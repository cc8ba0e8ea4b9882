"""The ensemble as it is applied: the members' weights, and the answer where there is nothing to look at."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from img2prompt.core.storage import read_json, write_json
from img2prompt.ensemble.weights import mix


@dataclass(frozen=True)
class Mixture:
    """Eq. 6 with its weights.

    weights: by member, on the simplex. constant (384,) float32, norm 1: the answer for an image that cannot be read.
    folds: those whose models the members are made of.
    """

    weights: Mapping[str, float]
    constant: np.ndarray
    folds: tuple[int, ...]

    def __call__(self, members: Mapping[str, np.ndarray], readable: np.ndarray) -> np.ndarray:
        """The ensemble's predictions (m, 384) float32, norm 1, from those of the members; readable (m,) bool."""
        found = np.tile(self.constant, (len(readable), 1))
        if readable.any():
            parts = [members[name][readable] for name in self.weights]
            found[readable] = mix(parts, list(self.weights.values()))
        return found

    @property
    def members(self) -> list[str]:
        """The names of those that have a weight above 0."""
        return [name for name, weight in self.weights.items() if weight > 0]

    def only(self, names: Collection[str]) -> Mixture:
        """The mixture of some of its members, whose weights are scaled to sum to 1 where they do not."""
        total = sum(weight for name, weight in self.weights.items() if name in names)
        scale = 1 if math.isclose(total, 1) else 1 / total
        return replace(self, weights={name: w * scale for name, w in self.weights.items() if name in names})

    def save(self, folder: Path) -> None:
        """Write weights.json and constant.npy."""
        write_json(folder / "weights.json", {"weights": dict(self.weights), "folds": list(self.folds)})
        np.save(folder / "constant.npy", self.constant)

    @classmethod
    def load(cls, folder: Path) -> Mixture:
        """Read what `save` wrote."""
        stored = read_json(folder / "weights.json")
        return cls(stored["weights"], np.load(folder / "constant.npy"), tuple(stored["folds"]))
