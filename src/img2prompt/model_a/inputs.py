"""The inputs of the layers that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from img2prompt.clip.features import Fixed, Images, within_half
from img2prompt.core.device import onto
from img2prompt.model_a.params import Augmentation

if TYPE_CHECKING:
    import albumentations


class Inputs(Protocol):
    """The inputs of the layers that train, by row."""

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield (b, ...) float32 on the device for each batch of row numbers.

        `epoch` seeds the augmentation, None is without.
        """


class Stored:
    """Inputs computed once: an array, in memory or memory-mapped, with one entry for each row."""

    def __init__(self, array: np.ndarray, device: str = "cpu") -> None:
        self._array, self._device = array, device

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield (b, ...) float32 on the device."""
        return onto((torch.from_numpy(self._array[batch]) for batch in rows), self._device)


class AnyImage:
    """Draws, for rows that train, one of all rows that may stand in for them, each anew for every epoch.

    Args:
        stands_for: (n,) int64, the row that each row may stand in for, itself among them; below 0: none.
        seed: of the draw, together with the epoch.
    """

    def __init__(self, stands_for: np.ndarray, seed: Sequence[int]) -> None:
        self._seed = seed
        drawable = np.flatnonzero(stands_for >= 0)
        self._rows = drawable[np.argsort(stands_for[drawable], kind="stable")]
        self._counts = np.bincount(stands_for[drawable], minlength=len(stands_for))
        self._starts = np.cumsum(self._counts) - self._counts

    def __call__(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """The rows (m,) that stand in for `rows` (m,) in an epoch."""
        rng = np.random.default_rng([*self._seed, epoch])
        return self._rows[self._starts[rows] + rng.integers(self._counts[rows])]


def _augmentation(amount: Augmentation) -> albumentations.Compose:
    import albumentations  # slow to import, and few runs augment

    steps: list[albumentations.BasicTransform] = []
    if amount.crop:
        # RandomResizedCrop needs a size in pixels; most towers take images of 224 or larger, and resize again.
        steps.append(albumentations.RandomResizedCrop(size=(224, 224), scale=(1 - amount.crop, 1), ratio=(0.9, 1.1)))
    if amount.rotation:
        # Border mode 2 is cv2.BORDER_REFLECT: the image is mirrored at its edges.
        steps.append(albumentations.Rotate(limit=amount.rotation, border_mode=2, p=1))
    if amount.flip:
        steps.append(albumentations.HorizontalFlip(p=amount.flip))
    return albumentations.Compose(steps)


class Augmented(Images):
    """Images that are augmented anew in each epoch; without an epoch they are not augmented.

    Args:
        references: as in `Images`.
        transform: as in `Images`.
        amount: of the augmentation.
        seed: of the augmentation, together with epoch and row.
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
        """The RGB image of a row, augmented for an epoch."""
        image = super().look(row, epoch)
        if epoch is None:
            return image
        # Seeded by row, not by worker: the same images with any number of workers, and after a resume.
        self._augment.set_random_seed(int(np.random.SeedSequence([self._seed, epoch, row]).generate_state(1)[0]))
        return Image.fromarray(self._augment(image=np.asarray(image))["image"])


class Drawn:
    """Inputs that are not stored, as with augmentation: in each epoch the images run through the frozen layers."""

    def __init__(self, images: Images, frozen: nn.Module, device: str) -> None:
        self._images, self._frozen, self._device = images, Fixed(frozen, device), device

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield (b, ...) float32 on the device, the frozen layers' output as it would be stored.

        Raises:
            ValueError: it is beyond half precision.
        """
        within = torch.ones((), dtype=torch.bool, device=self._device)
        for x in onto(self._images.batches(rows, epoch), self._device, torch.float16):
            found = self._frozen(x).half()
            within &= found.isfinite().all()
            yield found.float()
        within_half(within)
