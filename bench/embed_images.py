"""embed_images: images from PNG files of 512 x 512 pixels through a ViT-B-32 against Pillow, open_clip and float32.

The CLIP has random weights. The images are smooth noise, in files as large as photographs' that are read many times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import Task, Work, from_right
from img2prompt.clip.features import Embedder, image_features
from img2prompt.clip.model import Clip, load_clip, save_clip

MODEL, SIDE, FILES, BATCH = "ViT-B-32", 512, 64, 64
WORKERS = 2


def make(folder: Path, rows: int) -> Work:
    """clip/, FILES images, and right.npy: their embeddings by the others' way. The work: the tower's products."""
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL).eval()
    (folder / "clip").mkdir()
    save_clip(model, open_clip.get_tokenizer(MODEL), open_clip.get_model_config(MODEL), folder / "clip")
    rng = np.random.default_rng(0)
    for number in range(FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 3, smooth.shape)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    np.save(folder / "right.npy", theirs(*load(folder, FILES)))
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, 224, 224))
    return Work(operations=counter.get_total_flops() * float(rows))


def load(folder: Path, rows: int) -> tuple[Path, list[str]]:
    return folder / "clip", [str(folder / f"{number % FILES}.png") for number in range(rows)]


@cache
def clip(folder: Path) -> Clip:
    return load_clip(folder, "cpu")


@cache
def visual(folder: Path) -> tuple[nn.Module, Callable[[Image.Image], torch.Tensor]]:
    """open_clip's own image tower and transform."""
    model = open_clip.create_model(f"local-dir:{folder}").visual.eval()
    return model, image_transform_v2(PreprocessCfg(**model.preprocess_cfg), is_train=False)


def ours(folder: Path, images: list[str]) -> np.ndarray:
    return features(folder, images)["image"]


def features(folder: Path, images: list[str]) -> dict[str, np.ndarray]:
    """As the stage does it: `image` and `pooled`."""
    embedder = Embedder(clip(folder), "cpu", 0, ["image", "pooled"])
    with tempfile.TemporaryDirectory() as resume:
        files = image_features({"0": embedder}, images, BATCH, Path(resume), "train")
        return {name.removeprefix("0/train_"): np.load(file) for name, file in files.items()}


class Files(Dataset):
    """Images as open_clip takes them."""

    def __init__(self, images: list[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, side, side) float32."""
        return self.transform(Image.open(self.images[row]).convert("RGB"))


def batches(
    model: nn.Module, transform: Callable[[Image.Image], torch.Tensor], images: list[str], workers: int = 0
) -> Iterator[torch.Tensor]:
    """What a tower makes of images in float32, batch by batch."""
    with torch.no_grad():
        for batch in DataLoader(Files(images, transform), BATCH, num_workers=workers):
            yield model(batch)


def theirs(folder: Path, images: list[str], workers: int = 0) -> np.ndarray:
    return nn.functional.normalize(torch.cat([*batches(*visual(folder), images, workers)])).numpy()


def check(found: np.ndarray, folder: Path) -> str:
    return from_right(found, np.load(folder / "right.npy"))


TASKS = [
    Task(
        "embed_images",
        make,
        load,
        {
            "ours": ours,
            "Pillow, open_clip, float32": theirs,
            "the same, two workers": partial(theirs, workers=WORKERS),
        },
        check,
        growth={"": 1},
        most=320,
        warm=8,
        by_flag=("ours",),
    )
]
