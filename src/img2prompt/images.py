"""CLIP on pictures: embeddings, pooled features, and what the frozen layers hand to those that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from img2prompt.clip import Clip, project, tower, unfrozen, view
from img2prompt.params import Augmentation
from img2prompt.pictures import open_picture
from img2prompt.progress import progress
from img2prompt.storage import grow

if TYPE_CHECKING:
    import albumentations


class Pictures(Dataset):
    """Pictures by row as CLIP's input, (3, size, size) float32; a row without picture is mid-grey.

    Args:
        references: where each row's picture is, or None.
        transform: CLIP's own.
        augmentation: applied where a batch asks for an epoch.
        seed: with epoch and row, of the augmentation.
    """

    def __init__(
        self,
        references: Sequence[str | None],
        transform: Callable[[Image.Image], Tensor],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self._references, self._transform, self._seed = list(references), transform, seed
        self._augment = _augmentation(augmentation) if augmentation and augmentation.on else None

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor:
        """Picture of `(row, epoch)`; epoch None is without augmentation."""
        row, epoch = key
        reference = self._references[row]
        picture = Image.new("RGB", (64, 64), (128, 128, 128)) if reference is None else open_picture(reference)
        if self._augment is not None and epoch is not None:
            # Seeded by row, not by worker: the same pictures with any number of workers, and after a resume.
            self._augment.set_random_seed(int(np.random.SeedSequence([self._seed, epoch, row]).generate_state(1)[0]))
            picture = Image.fromarray(self._augment(image=np.asarray(picture))["image"])
        return self._transform(picture)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._references)

    def batches(self, rows: list[np.ndarray], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield (b, 3, size, size) a batch of row numbers, read ahead by worker processes."""
        keys = [[(int(row), epoch) for row in batch] for batch in rows]
        workers = min(torch.get_num_threads(), 8) if sum(map(len, rows)) > 256 else 0
        yield from DataLoader(self, batch_sampler=keys, num_workers=workers)


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


def stem(split: str, seen: str) -> str:
    """What the names of a split's files start with: `train`, and for other views than the plain one `train_flip`."""
    return split if seen == "plain" else f"{split}_{seen}"


def embed_pictures(
    clip: Clip,
    references: Sequence[str | None],
    batch_size: int,
    device: str,
    folder: Path,
    split: str,
    keep: int,
    seen: str = "plain",
) -> list[Path]:
    """Run CLIP's image tower over a view of the pictures; a killed run goes on from what is in `folder`.

    Returns .npy files:

    - `{split}_image`: (n, embed_dim) float32, CLIP's projected embeddings I(x), norm 1
    - `{split}_pooled`: (n, d) float32, the tower's pooled output V(x), not normalised
    - `{split}_frozen`: (n, ...) float16, what the tower hands to its last `keep` layers; not with `keep` 0

    Of other views than the plain one they are called `{split}_{seen}_image` and so on.

    Raises:
        ValueError: the tower has fewer than `keep` layers or no such view, or a picture cannot be decoded.
    """
    layers = tower(clip.model.visual)
    last = unfrozen(layers, keep)
    frozen = layers[: len(layers) - keep]
    pictures = Pictures(references, view(clip, seen))
    rows = [
        np.arange(start, min(start + batch_size, len(references))) for start in range(0, len(references), batch_size)
    ]
    cuda = torch.device(device).type == "cuda"

    def run(left: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        batches = pictures.batches(list(left))
        for x in progress(batches, f"CLIP on {stem(split, seen)} pictures", len(left), "batch"):
            # no_grad and not inference_mode: under autocast the latter casts attention's weights again for every call.
            with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=cuda):
                handed = frozen(x.to(device, memory_format=torch.channels_last))
                pooled = last(handed).float()
                image = functional.normalize(project(clip.model.visual, pooled).float())
            outputs = {"image": image, "pooled": pooled} | ({"frozen": handed.half()} if keep else {})
            yield {f"{stem(split, seen)}_{name}": value.cpu().numpy() for name, value in outputs.items()}

    return list(grow(folder / stem(split, seen), rows, run).values())
