"""Model B as it is applied: the keys and targets of all kept rows, and the choice of how to use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from img2prompt.core.blocks import Stack, save_rows
from img2prompt.core.storage import read_json, write_json
from img2prompt.ensemble.weights import mix
from img2prompt.model_b.neighbours import Neighbours, UnitRows, nearest, on_device
from img2prompt.model_b.regression import regress


@dataclass(frozen=True, slots=True)
class Setting:
    """The number of neighbours and the power of their distance (eq. 4), for one kind of keys."""

    k: int
    distance_dim: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting for each kind of keys in use; image_share is the weight of the image keys' prediction in `mix`."""

    settings: dict[str, Setting]
    image_share: float

    def mixed(self, by_kind: Mapping[str, np.ndarray]) -> np.ndarray:
        """Model B's prediction (n, 384) from those of each kind of keys, norm 1."""
        if len(self.settings) == 1:
            return by_kind[next(iter(self.settings))]
        return mix([by_kind["image"], by_kind["text"]], [self.image_share, 1 - self.image_share])


@dataclass(frozen=True, slots=True)
class Bank:
    """Keys and targets to predict from.

    keys: kind -> (m, d) float32, CLIP's embeddings; of `image` the keys of the first rows of targets, of `text` of all.
    targets (m, 384) float32, norm 1. rows (m,) int32: their row numbers in the train table followed by the texts.
    eps, coef: of eq. 4.
    """

    keys: Mapping[str, np.ndarray | Stack | UnitRows]
    targets: np.ndarray | Tensor
    rows: np.ndarray
    choice: Choice
    eps: float
    coef: float

    def predict(self, queries: np.ndarray, device: str = "cpu") -> tuple[np.ndarray, dict[str, Neighbours]]:
        """B (n, 384) float32, norm 1, for CLIP's image embeddings queries (n, d); and the neighbours by kind of keys.

        The neighbours' index counts rows of the bank.
        """
        settings = self.choice.settings
        found = {kind: nearest(queries, self.keys[kind], setting.k, device) for kind, setting in settings.items()}
        return self.regressed(found, device), found

    def regressed(self, found: Mapping[str, Neighbours], device: str = "cpu") -> np.ndarray:
        """B (n, 384) float32, norm 1, from the neighbours by kind of keys."""
        by_kind = {}
        for kind, setting in self.choice.settings.items():
            arguments = (setting.k, setting.distance_dim, self.eps, self.coef, device)
            by_kind[kind] = regress(found[kind], self.targets, *arguments)
        return self.choice.mixed(by_kind)

    def on(self, device: str) -> Bank:
        """The same bank, to predict from many times on a device: keys and targets go there once."""
        keys = {kind: UnitRows(rows, device) for kind, rows in self.keys.items()}
        return replace(self, keys=keys, targets=on_device(self.targets, device))

    def save(self, folder: Path) -> None:
        """Write {kind}_keys.npy, targets.npy, rows.npy and choice.json."""
        for kind, keys in self.keys.items():
            save_rows(folder / f"{kind}_keys.npy", keys)
        np.save(folder / "targets.npy", self.targets)
        np.save(folder / "rows.npy", self.rows)
        write_json(folder / "choice.json", asdict(self.choice) | {"eps": self.eps, "coef": self.coef})

    @classmethod
    def load(cls, folder: Path, mapped: bool = False) -> Bank:
        """Read what `save` wrote; keys are mapped from disk, unless they are stored in half precision.

        mapped: targets and row numbers are too, for what needs few of them.
        """
        stored = read_json(folder / "choice.json")
        choice = Choice({kind: Setting(**value) for kind, value in stored["settings"].items()}, stored["image_share"])
        keys = {kind: _single(np.load(folder / f"{kind}_keys.npy", mmap_mode="r")) for kind in choice.settings}
        mode = "c" if mapped else None  # torch warns of what cannot be written to
        targets, rows = (np.load(folder / f"{name}.npy", mmap_mode=mode) for name in ("targets", "rows"))
        return cls(keys, _single(targets), rows, choice, stored["eps"], stored["coef"])


def _single(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype == np.float16 else x
