"""recipe: all of it, from prompts and image files to the submission, against what public solutions do.

The images are the sample's, the CLIP is the sample's image tower, and a ninth of the rows is the test set. Both sides
train the head and look up neighbours in five folds, mix the two by weights found out of fold (ours with the mean prompt
as a third member), and write the test's predictions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from bench import dedup, embed_images, embed_prompts, ensemble, knn, model_a, submit
from bench.harness import Task, Work
from img2prompt.clip.model import save_clip
from img2prompt.core.images import read_image
from img2prompt.core.metric import cosine, unit
from img2prompt.core.storage import read_json, write_json
from img2prompt.ensemble.constant import constant
from img2prompt.ensemble.weights import Cosines, mix, search_weights
from img2prompt.model_a.inputs import Stored
from img2prompt.model_a.prediction import predict
from img2prompt.model_b.choice import fit
from img2prompt.sample import small_clip
from img2prompt.sample.images import drawn
from img2prompt.sample.wording import generate

TEST = 9  # the part of the rows, from the end, that is the test set
SIDE = 128


class Found(NamedTuple):
    """The score on the test rows, and the seconds of each step."""

    score: float
    steps: dict[str, float]


class Clock:
    """The seconds of steps by name."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.steps[step] = time.perf_counter() - start


def make(folder: Path, rows: int) -> Work:
    """The images, rows.json, and clip/."""
    scenes = [(row.prompt, row.scene) for row in generate(rows, seed=0)]
    listed = []
    for row in drawn(scenes, folder / "train.tar", folder).rows:
        file = folder / f"{row.id}.jpg"
        file.write_bytes(read_image(row.image))
        listed.append([row.prompt, str(file)])
    write_json(folder / "rows.json", listed)
    (folder / "clip").mkdir()
    model, tokenizer = small_clip.untrained("lite0", 0, SIDE)
    save_clip(model, tokenizer, small_clip.config("lite0", SIDE), folder / "clip")
    return Work()


def load(folder: Path, rows: int) -> tuple[list[str], list[str], Path]:
    prompts, images = zip(*read_json(folder / "rows.json")[:rows], strict=True)
    return list(prompts), list(images), folder


def ours(prompts: list[str], images: list[str], folder: Path) -> Found:
    clock, train = Clock(), slice(0, len(prompts) - len(prompts) // TEST)
    with clock("prompts"):
        targets = embed_prompts.ours(prompts)
    with clock("dedup"):
        kept = dedup.ours_with_table(targets[train])
    with clock("images"):
        features = embed_images.features(folder / "clip", images)
    pooled, image = features["pooled"], features["image"]
    own, spoken = pooled[train], targets[train]
    fold = np.arange(len(own)) % model_a.FOLDS
    with clock("head"):
        heads, by_head = [], np.empty_like(spoken)
        for held_out in range(model_a.FOLDS):
            model, unseen = model_a.head(own, spoken, held_out, kept), np.flatnonzero(fold == held_out)
            by_head[unseen] = _predict(model, own, unseen)
            heads.append(_predict(model, pooled[train.stop :], None))
    with clock("neighbours"):
        found = fit(
            image[train], {"image": image[train]}, spoken, fold, kept, kept, "image", knn.K, knn.POWER, knn.EPS, 1.0
        )
        near, _ = found.bank.predict(image[train.stop :])
    with clock("alpha"):
        means, mean = constant(spoken, fold, range(model_a.FOLDS), kept)
        cosines = Cosines.between([by_head[kept], found.oof[kept], means[np.flatnonzero(kept)]], spoken[kept])
        weights = search_weights(cosines, free=np.array([False, False, True]))
        mixed = mix([np.mean(heads, axis=0), near, np.broadcast_to(mean, near.shape)], weights)
    with clock("submission"):
        submit.ours_checked(_ids(mixed), mixed, folder / "submission.csv")
    return Found(float(cosine(mixed, targets[train.stop :]).mean()), clock.steps)


def _predict(model: nn.ModuleDict, pooled: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    rows = np.arange(len(pooled)) if rows is None else rows
    return predict(model["tower"], model["head"], [Stored(pooled)], rows, 1024, "cpu")


def _ids(predictions: np.ndarray) -> list[str]:
    return [f"{number:08x}" for number in range(len(predictions))]


def public(prompts: list[str], images: list[str], folder: Path) -> Found:
    clock, train = Clock(), slice(0, len(prompts) - len(prompts) // TEST)
    with clock("prompts"):
        targets = embed_prompts.encode(prompts)
    with clock("dedup"):
        kept = dedup.faiss_range(targets[train])
    with clock("images"):
        tower, transform = embed_images.visual(folder / "clip")
        pooled = torch.cat([*embed_images.batches(tower.trunk, transform, images)])
        with torch.no_grad():
            image = nn.functional.normalize(tower.head(pooled)).numpy()
    own, spoken, tested = pooled[train], torch.from_numpy(targets[train]), pooled[train.stop :]
    fold = np.arange(len(own)) % model_a.FOLDS
    torch.manual_seed(0)
    with clock("head"):
        heads, by_head = [], np.empty_like(targets[train])
        for held_out in range(model_a.FOLDS):
            rows, unseen = kept & (fold != held_out), fold == held_out
            model = model_a.Paper(own.shape[1], targets.shape[1])
            by_head[unseen] = model_a.loop(
                model, own[rows], spoken[rows], own[unseen], spoken[unseen], model_a.EPOCHS, model_a.RATE, np.inf
            )
            with torch.no_grad():
                heads.append(model(tested).numpy())
    with clock("neighbours"):
        by_near = np.empty_like(by_head)
        for held_out in range(model_a.FOLDS):
            rows, unseen = kept & (fold != held_out), fold == held_out
            by_near[unseen] = knn.sklearn(image[train][unseen], image[train][rows], targets[train][rows])
        near = knn.sklearn(image[train.stop :], image[train][kept], targets[train][kept])
    with clock("alpha"):
        members = [unit(by_head)[kept], unit(by_near)[kept]]
        alpha = float(ensemble.ALPHAS[ensemble.grid(members, targets[train][kept]).argmax()])
        mixed = mix([unit(np.mean(heads, axis=0)), near], [alpha, 1 - alpha])
    with clock("submission"):
        submit.pandas(_ids(mixed), mixed, folder / "submission.csv")
    return Found(float(cosine(mixed, targets[train.stop :]).mean()), clock.steps)


TASKS = [
    Task(
        "recipe",
        make,
        load,
        {"ours": ours, "the public recipe": public},
        lambda found, _: f"score {found.score:.4f}",
        growth={"prompts": 1, "dedup": 2, "images": 1, "head": 1, "neighbours": 2, "alpha": 1, "submission": 1},
        most=9000,
        warm=0,
        by_flag=("ours",),
        parts=lambda found: found.steps,
    )
]
