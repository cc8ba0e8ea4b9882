"""What feeds the layers that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from img2prompt.clip.features import Pictures
from img2prompt.model_a.params import Augmentation

if TYPE_CHECKING:
    import albumentations


class Inputs(Protocol):
    """What feeds the layers that train."""

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield one input a batch of row numbers; `epoch` seeds the augmentation, None is without."""


class Stored:
    """Inputs computed once: an array, in memory or mapped, with one entry a row."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield (b, ...) float32."""
        for batch in rows:
            yield torch.from_numpy(self._array[batch]).float()


class AnyPicture:
    """Inputs in which an epoch takes any of the pictures of a row's prompt; without an epoch the row's own.

    Args:
        inputs: by row.
        prompts: (n,) int64, equal for rows of one prompt; below 0 for rows that must not be drawn.
        seed: with the epoch, of the draw.
    """

    def __init__(self, inputs: Inputs, prompts: np.ndarray, seed: Sequence[int]) -> None:
        self._inputs, self._prompts, self._seed = inputs, prompts, seed
        drawable = np.flatnonzero(prompts >= 0)
        self._rows = drawable[np.argsort(prompts[drawable], kind="stable")]
        self._counts = np.bincount(prompts[drawable])
        self._starts = np.cumsum(self._counts) - self._counts

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield what `inputs` does, of the pictures drawn."""
        if epoch is not None:
            rng = np.random.default_rng([*self._seed, epoch])
            rows = [self._draw(batch, rng) for batch in rows]
        yield from self._inputs.batches(rows, epoch)

    def _draw(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        prompts = self._prompts[rows]
        return self._rows[self._starts[prompts] + rng.integers(self._counts[prompts])]


def _augmentation(amount: Augmentation) -> albumentations.Compose:
    import albumentations  # every fold would wait for it

    steps: list[albumentations.BasicTransform] = []
    if amount.crop:
        # Albumentations crops by absolute sides only through a size; 224 is what most towers see at least.
        steps.append(albumentations.RandomResizedCrop(size=(224, 224), scale=(1 - amount.crop, 1), ratio=(0.9, 1.1)))
    if amount.rotation:
        steps.append(albumentations.Rotate(limit=amount.rotation, border_mode=2, p=1))  # 2: edges are repeated
    if amount.flip:
        steps.append(albumentations.HorizontalFlip(p=amount.flip))
    return albumentations.Compose(steps)


class Augmented(Pictures):
    """Pictures that each epoch shows another way; without an epoch as they are.

    Args:
        references: where each row's picture is, or None.
        transform: CLIP's own.
        amount: of the augmentation.
        seed: with epoch and row, of the augmentation.
    """

    def __init__(
        self,
        references: Sequence[str | None],
        transform: Callable[[Image.Image], Tensor],
        amount: Augmentation,
        seed: int,
    ) -> None:
        super().__init__(references, transform)
        self._augment, self._seed = _augmentation(amount), seed

    def look(self, row: int, epoch: int | None) -> Image.Image:
        """The RGB picture of a row as an epoch sees it."""
        picture = super().look(row, epoch)
        if epoch is None:
            return picture
        # Seeded by row, not by worker: the same pictures with any number of workers, and after a resume.
        self._augment.set_random_seed(int(np.random.SeedSequence([self._seed, epoch, row]).generate_state(1)[0]))
        return Image.fromarray(self._augment(image=np.asarray(picture))["image"])


class Drawn:
    """Inputs for training with augmentation: pictures drawn anew each epoch, run through the frozen layers."""

    def __init__(self, pictures: Pictures, frozen: nn.Module, device: str) -> None:
        self._pictures, self._frozen, self._device = pictures, frozen.to(device).eval(), device

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield (b, ...) float32, what the frozen layers make of the pictures."""
        for batch in self._pictures.batches(rows, epoch):
            with torch.no_grad():
                x = self._frozen(batch.to(self._device, memory_format=torch.channels_last))
            yield x
