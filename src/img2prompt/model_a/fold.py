"""Training of Model A with held-out folds: its rows, its features, and the start of both heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold
from torch import nn

from img2prompt.clip.features import Images, stem
from img2prompt.clip.model import Clip, load_clip, view
from img2prompt.clip.towers import frozen, projection, tower, unfrozen
from img2prompt.core.blocks import Stack
from img2prompt.core.rows import read_rows
from img2prompt.model_a.inputs import Augmented, Drawn, Inputs, Stored
from img2prompt.model_a.params import Augmentation, ModelAParams, Rates
from img2prompt.model_a.ridge import TextPrior, refit, ridge
from img2prompt.model_a.training import Start, train
from img2prompt.model_a.validation import Choice, validation_rows


@dataclass(frozen=True)
class TrainRows:
    """The data of the n train rows and of the t prompts without images that are the same for every CLIP."""

    targets: np.ndarray  # (copies, n, 384) float32, norm 1; the first copy is of the unaugmented prompts
    fold: np.ndarray  # (n,) int64
    group: np.ndarray  # (n,) int64, equal for similar prompts
    kept: np.ndarray  # (n,) bool: may be trained on
    scored: np.ndarray  # (n,) bool: counts in the scores
    stands_for: np.ndarray  # (n,) int64: of near-duplicate rows the one that may be trained on; below 0: none
    texts_targets: np.ndarray  # (t, 384) float32, norm 1
    texts_kept: np.ndarray  # (t,) bool: may be trained on
    texts_near: np.ndarray  # (t, folds) bool: is near a prompt of the fold; folds in ascending order

    @classmethod
    def read(cls, outputs: Path) -> TrainRows:
        """Read the stages' files in a folder of outputs."""
        prompts = outputs / "embed_prompts"
        plain, augmented = (np.load(prompts / f"{name}.npy", mmap_mode="r") for name in ("train", "augmented"))
        table = pd.read_parquet(outputs / "folds/folds.parquet")
        return cls(
            targets=np.concatenate([plain[None], augmented]),
            fold=table.fold.to_numpy(),
            group=table.group.to_numpy(),
            kept=np.load(outputs / "dedup/kept.npy"),
            scored=np.load(outputs / "dedup/scored.npy"),
            stands_for=np.load(outputs / "dedup/stands_for.npy"),
            texts_targets=np.load(prompts / "texts.npy", mmap_mode="r"),
            texts_kept=np.load(outputs / "dedup/texts_kept.npy"),
            texts_near=np.load(outputs / "folds/texts_near.npy"),
        )


@dataclass(frozen=True)
class Features:
    """One CLIP's features of images and prompts, and its image tower."""

    clip: Clip  # as loaded and never trained, on the CPU
    layers: nn.Sequential  # all layers of its image tower, in order
    unfreeze: int  # how many of the last layers train
    outputs: Path
    number: int  # the CLIP's, in outputs
    views: Sequence[str]  # of `clip.model.view`, the plain one first

    @classmethod
    def read(cls, outputs: Path, number: int, section: ModelAParams) -> Features:
        """Load a CLIP from a folder of outputs; its features of images are read only when they are asked for."""
        clip = load_clip(outputs / f"clip/{number}", "cpu")
        views = ("plain", *section.tta)
        return cls(clip, tower(clip.model.visual), section.layers(number), outputs, number, views)

    @property
    def last(self) -> nn.Sequential:
        """A copy of the layers that train."""
        return unfrozen(self.layers, self.unfreeze)

    @cached_property
    def pooled(self) -> np.ndarray:
        """V(x) of the train images by the untouched tower: (n, d) float32, mapped from disk."""
        return np.load(self._embedded / "train_pooled.npy", mmap_mode="r")

    def stored_pooled(self, device: str) -> list[Inputs]:
        """The stored V(x) of the train images, (b, d) a batch: an item for each view."""
        return self._stored(self._embedded, "pooled", device)

    def inputs(self, augmentation: Augmentation, seed: int, device: str) -> list[Inputs]:
        """The inputs of the layers that train, one item for each view; `seed`: of the augmentation."""
        if not self.unfreeze and not augmentation.on:
            return self.stored_pooled(device)
        store = self.outputs / f"freeze/{self.number}"
        if not augmentation.on and (store / "train_frozen.npy").is_file():
            return self._stored(store, "frozen", device)
        references = read_rows(self.outputs / "prepare/train.parquet", ["image"]).image
        transforms = [view(self.clip, seen) for seen in self.views]
        drawn: list[Images] = [
            Augmented(references, transform, augmentation, seed) if augmentation.on else Images(references, transform)
            for transform in transforms
        ]
        return [Drawn(images, frozen(self.layers, self.unfreeze), device) for images in drawn]

    def text_prior(self, rows: TrainRows, training: np.ndarray, unseen: Sequence[int]) -> TextPrior:
        """The prior from training rows' prompts and from prompts without images, but none near a prompt of `unseen`.

        Raises:
            ValueError: CLIP's projection is not linear.
        """
        near = rows.texts_near[:, np.isin(np.unique(rows.fold), unseen)].any(axis=1)
        wanted = np.concatenate([training, len(rows.fold) + np.flatnonzero(rows.texts_kept & ~near)])
        texts = [np.load(self._embedded / f"{name}_text.npy", mmap_mode="r") for name in ("train", "texts")]
        spoken = [rows.targets[0], rows.texts_targets]
        matrix = projection(self.clip.model.visual, self.pooled.shape[1])
        return TextPrior(Stack(texts, wanted), Stack(spoken, wanted), matrix)

    @property
    def _embedded(self) -> Path:
        return self.outputs / f"embed_images/{self.number}"

    def _stored(self, folder: Path, name: str, device: str) -> list[Inputs]:
        files = [folder / f"{stem('train', seen)}_{name}.npy" for seen in self.views]
        return [Stored(np.load(file, mmap_mode="r"), device) for file in files]


@dataclass(frozen=True)
class Fold:
    """Which rows train, and which folds are held out: nothing here learns from those, and nothing is chosen on them."""

    rows: TrainRows
    features: Features
    unseen: Sequence[int]

    @property
    def training_rows(self) -> np.ndarray:
        """The rows that train or validate, (m,) int64: kept, and in no held-out fold."""
        return np.flatnonzero(self.rows.kept & ~np.isin(self.rows.fold, self.unseen))

    def start(self, settings: ModelAParams) -> Start:
        """The ridge regressions that both heads start as, and the rows that watch their training.

        Raises:
            ValueError: `settings.pretrain`, and CLIP's projection is not linear.
        """
        training, groups = self.training_rows, self.rows.group
        watch = validation_rows(training, groups[training], settings.validation, (settings.seed, *self.unseen))
        fitted = training[~watch]
        without, parts = [watch], None
        count = min(settings.cross_fit, len(np.unique(groups[fitted]))) if watch.any() else 0
        if count > 1:
            parts = np.full(len(groups), -1)
            for part, (_, members) in enumerate(GroupKFold(count).split(fitted, groups=groups[fitted])):
                parts[fitted[members]] = part
                without.append(watch | (parts[training] == part))
        prior = self.features.text_prior(self.rows, training, self.unseen) if settings.pretrain else None
        data = Stack([self.features.pooled], training), Stack([self.rows.targets[0]], training)
        whole = ridge(*data, groups[training], prior)
        # Standardisation, strength and prior know the validation rows, so these think a little too well of the start.
        inner, *others = refit(whole, *data, without)
        mask = np.zeros(len(groups), dtype=bool)
        mask[fitted] = True
        return Start(whole, mask, training[watch], inner, parts, others)

    def train(
        self,
        kind: str,
        start: Start,
        views: Sequence[Inputs],
        settings: ModelAParams,
        rates: Rates,
        seed: Sequence[int],
        device: str,
        resume: Path,
    ) -> tuple[nn.ModuleDict, pd.DataFrame, Choice, np.ndarray]:
        """Train a copy of the tower's last layers with a head.

        Args: as `training.train`.

        Returns:
            The trained `tower` and `head`, the history, what the validation rows chose, and what is predicted of
            them: see `training.train`.
        """
        rows, last = self.rows, self.features.last
        stands_for = None
        if settings.any_image:
            # In a group of similar prompts all rows train or none: what stands in for one that trains is not watched.
            barred = np.isin(rows.fold, self.unseen) | np.isin(rows.group, rows.group[start.validation])
            free = (rows.stands_for >= 0) & ~barred & start.fitted[rows.stands_for]
            stands_for = np.where(free, rows.stands_for, -1)
        head, *found = train(
            kind, start, self.features.pooled, views, last, rows.targets, rows.group, settings, rates, seed, device,
            resume, stands_for,
        )  # fmt: skip
        return nn.ModuleDict({"tower": last, "head": head}), *found
