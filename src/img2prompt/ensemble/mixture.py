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
    folds: those whose models the members are made of. constant_weight: what the constant weighs in the mix, of either
    sign, beside members whose weights sum to 1.
    """

    weights: Mapping[str, float]
    constant: np.ndarray
    folds: tuple[int, ...]
    constant_weight: float

    def __call__(self, members: Mapping[str, np.ndarray], readable: np.ndarray) -> np.ndarray:
        """The ensemble's predictions (m, 384) float32, norm 1, from those of the members; readable (m,) bool."""
        found = np.tile(self.constant, (len(readable), 1))
        if readable.any():
            parts = [members[name][readable] for name in self.weights] + [found[readable]]
            found[readable] = mix(parts, [*self.weights.values(), self.constant_weight])
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
        self.save_weights(folder / "weights.json")
        np.save(folder / "constant.npy", self.constant)

    def save_weights(self, file: Path) -> None:
        """Write what is not the constant's vector."""
        stored = {"weights": dict(self.weights), "constant": self.constant_weight, "folds": list(self.folds)}
        write_json(file, stored)

    @classmethod
    def load(cls, folder: Path) -> Mixture:
        """Read what `save` wrote."""
        stored = read_json(folder / "weights.json")
        # Bundles of earlier versions have no weight of the constant.
        return cls(
            stored["weights"], np.load(folder / "constant.npy"), tuple(stored["folds"]), stored.get("constant", 0.0)
        )
