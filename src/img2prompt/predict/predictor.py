"""The trained model as one object: from images to embeddings of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from img2prompt.clip.features import Embedder
from img2prompt.clip.model import load_clip, view
from img2prompt.core.device import device as default_device
from img2prompt.core.images import decode, open_image, to_rgb
from img2prompt.core.storage import numbered
from img2prompt.ensemble.members import name_of
from img2prompt.ensemble.mixture import Mixture
from img2prompt.model_a.trained import Trained
from img2prompt.model_b.bank import Bank

Source = str | Path | bytes | Image.Image | None


@dataclass(frozen=True)
class Prediction:
    """Of m images, in their order.

    embeddings (m, 384) float32, norm 1: the ensemble's. members: by name, each model's (m, 384) float32.
    """

    embeddings: np.ndarray
    members: dict[str, np.ndarray]


@dataclass(frozen=True)
class _OneClip:
    """What a CLIP and the models trained on it make of a batch of images."""

    number: int
    transforms: list[Callable[[Image.Image], Tensor]]  # one a view, the plain one first
    embedders: list[Embedder]
    trained: Trained
    bank: Bank
    device: str

    @classmethod
    def load(cls, folder: Path, number: int, folds: Sequence[int], device: str) -> _OneClip:
        clip = load_clip(folder / f"clip/{number}", device)
        trained = Trained.load([folder / f"model_a/fold_{k}/{number}" for k in folds], clip, device)
        transforms = [view(clip, name) for name in trained.views]
        frozen = ["frozen"] * (trained.unfreeze > 0)
        embedders = [
            Embedder(clip, device, trained.unfreeze, [*["image"] * (name == "plain"), "pooled", *frozen])
            for name in trained.views
        ]
        return cls(number, transforms, embedders, trained, Bank.load(folder / f"knn/{number}"), device)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        seen = [
            embed(torch.stack([transform(image) for image in images]))
            for embed, transform in zip(self.embedders, self.transforms, strict=True)
        ]
        pooled = [found["pooled"] for found in seen]
        found = self.trained(pooled, [found.get("frozen", found["pooled"]) for found in seen])
        members = {name_of(kind, self.number): value.cpu().numpy() for kind, value in found.items()}
        predicted, _ = self.bank.predict(seen[0]["image"].cpu().numpy(), self.device)
        return members | {name_of("model_b", self.number): predicted}


class Predictor:
    """A trained model: CLIPs, the models of all folds on them, their banks of neighbours, and the mix.

    An image's prediction is a function of the image and the model, whatever else is predicted with it.
    """

    def __init__(self, clips: Sequence[_OneClip], mixture: Mixture) -> None:
        self._clips, self._mixture = list(clips), mixture

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None) -> Predictor:
        """Load a trained model.

        folder: has clip/N (open_clip folders), model_a/fold_K/N (safetensors), knn/N (keys, targets, choice) and
        ensemble/ (weights.json, constant.npy), as the pipeline's outputs do. device: a torch device; None: CUDA where
        it is, else the CPU.

        Raises:
            OSError, ValueError: something is missing, or the parts do not go together.
        """
        folder, device = Path(folder), device or default_device()
        mixture = Mixture.load(folder / "ensemble")
        numbers = [int(path.name) for path in numbered(folder / "clip")]
        return cls([_OneClip.load(folder, number, mixture.folds, device) for number in numbers], mixture)

    def predict(self, images: Sequence[Source], batch_size: int = 64) -> Prediction:
        """Predict images: paths or references (as `open_image` takes them), bytes of files, or PIL images.

        None stands for an image that cannot be read: it gets the constant answer.

        Raises:
            OSError, ValueError: naming the image that is missing or cannot be decoded.
        """
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(images), batch_size):
            batch = [_rgb(image) for image in images[start : start + batch_size]]
            for clip in self._clips:
                for name, found in clip(batch).items():
                    parts.setdefault(name, []).append(found)
        members = {name: np.concatenate(found) for name, found in parts.items()}
        readable = np.array([image is not None for image in images], dtype=bool)
        for found in members.values():
            found[~readable] = self._mixture.constant
        return Prediction(self._mixture(members, readable), members)


def _rgb(image: Source) -> Image.Image:
    if image is None:
        return Image.new("RGB", (64, 64), (128, 128, 128))
    if isinstance(image, bytes):
        return decode(image)
    return to_rgb(image) if isinstance(image, Image.Image) else open_image(str(image))
