"""model_a: for one fold, heads on the last layers of every CLIP's image tower: the baseline's and the paper's."""

import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn

from img2prompt import clip, efficientnet, images, model_a
from img2prompt.clip import load_clip, projection, tower, unfrozen, view
from img2prompt.device import device
from img2prompt.images import Drawn, Pictures, stem
from img2prompt.model_a import Inputs, LinearHead, Stored, TextPrior, predict, ridge, train
from img2prompt.params import Params
from img2prompt.rows import read_rows
from img2prompt.storage import RESUME, digest, whole_folder
from pipelines import run

# What a fold's weights depend on, beside its params: a killed run resumes only if none of it has changed.
DATA = [
    "prepare/train.parquet", "prepare/test.parquet", "embed_prompts/train.npy", "embed_prompts/augmented.npy",
    "embed_prompts/texts.npy", "dedup/kept.npy", "dedup/texts_kept.npy", "folds/folds.parquet", "folds/texts.npy",
]  # fmt: skip
CODE = [Path(file) for file in (clip.__file__, efficientnet.__file__, images.__file__, model_a.__file__, __file__)]


def text_prior(
    embedded: Path, matrix: torch.Tensor, targets: np.ndarray, rows: np.ndarray, unseen: list[int]
) -> TextPrior:
    """What the prompts of rows say, and those without pictures but for any near a prompt of the folds `unseen`.

    `embedded` has CLIP's texts, `matrix` is its projection, targets (n, 384); folds by their place in params.yaml.
    """
    more = np.load("outputs/dedup/texts_kept.npy") & ~np.load("outputs/folds/texts.npy")[:, unseen].any(axis=1)
    texts = [np.load(embedded / "train_text.npy")[rows], np.load(embedded / "texts_text.npy")[more]]
    spoken = [targets[rows], np.load("outputs/embed_prompts/texts.npy")[more]]
    return TextPrior(*(torch.from_numpy(np.concatenate(parts)) for parts in (texts, spoken)), matrix)


def train_clip(number: int, held_out: int, params: Params, targets: np.ndarray, resume: Path, out: Path) -> None:
    """Train both heads on one CLIP and write what `main` says."""
    section, where, embedded = params.model_a, device(), Path(f"outputs/embed_images/{number}")
    loaded = load_clip(Path(f"outputs/clip/{number}"), "cpu")
    layers, unfreeze = tower(loaded.model.visual), section.layers(number)
    table = pd.read_parquet("outputs/folds/folds.parquet")
    fold, group = table.fold.to_numpy(), table.group.to_numpy()
    rows = np.flatnonzero(np.load("outputs/dedup/kept.npy") & (fold != held_out))
    unseen = np.flatnonzero(fold == held_out)
    watched = unseen[np.load("outputs/dedup/scored.npy")[unseen]]
    views = ("plain", *section.tta)
    prompts = None
    if section.any_picture:
        texts = read_rows(Path("outputs/prepare/train.parquet"), ["prompt"]).prompt
        prompts = np.where(fold == held_out, -1, pd.factorize(texts)[0])

    def stored(split: str, name: str) -> list[Inputs]:
        return [Stored(np.load(embedded / f"{stem(split, seen)}_{name}.npy", mmap_mode="r")) for seen in views]

    def inputs(split: str) -> list[Inputs]:
        if not section.augmentation.on:
            return stored(split, "frozen" if unfreeze else "pooled")
        frozen = layers[: len(layers) - unfreeze]
        references = read_rows(Path(f"outputs/prepare/{split}.parquet")).picture
        drawn = [Pictures(references, view(loaded, seen), section.augmentation, section.seed) for seen in views]
        return [Drawn(pictures, frozen, where) for pictures in drawn]

    test = np.arange(len(np.load(embedded / "test_pooled.npy", mmap_mode="r")))
    predicted = (("oof", "train", unseen), ("test", "test", test))
    pooled = np.load(embedded / "train_pooled.npy")
    wanted = torch.from_numpy(targets[0, rows])
    prior = None
    if section.pretrain:
        matrix = projection(loaded.model.visual, pooled.shape[1])
        prior = text_prior(embedded, matrix, targets[0], rows, [params.folds.ids.index(held_out)])
    start = ridge(torch.from_numpy(pooled[rows]), wanted, group[rows], prior)
    print(f"fold {held_out}, clip {number}, ridge: strength {start.strength:.0f}, prior {start.share:.2f}")
    for name, split, wanted in predicted:
        head = LinearHead(start, dropout=0.0, hidden=0)
        found = predict(nn.Sequential(), head, stored(split, "pooled"), wanted, 1024, where)
        np.save(out / f"start_{name}.npy", found)
    sources = {split: inputs(split) for split in ("train", "test")}
    for kind, rates in (("clip", section.baseline), ("model_a", section)):
        last = copy.deepcopy(unfrozen(layers, unfreeze))
        head, history = train(
            kind, start, pooled, sources["train"][0], last, targets, rows, watched, section, rates,
            (section.seed, held_out), where, resume, prompts,
        )  # fmt: skip
        weights = nn.ModuleDict({"tower": last, "head": head}).state_dict()
        save_file({name: value.contiguous() for name, value in weights.items()}, out / f"{kind}.safetensors")
        history.to_csv(out / f"{kind}_history.csv", index=False)
        for name, split, wanted in predicted:
            found = predict(last, head, sources[split], wanted, section.batch_size, where)
            np.save(out / f"{kind}_{name}.npy", found)
        print(f"fold {held_out}, clip {number}, {kind}: {history.score.iloc[-1]:.4f}")


def main(params: Params) -> None:
    """Of every CLIP write {clip,model_a}.safetensors, _oof.npy (fold's rows, 384), _test.npy (m, 384), _history.csv.

    start_oof.npy and start_test.npy are of the ridge regression on the untouched tower, where both heads start.
    """
    held_out, section = int(sys.argv[1]), params.model_a
    targets = np.concatenate(
        [np.load("outputs/embed_prompts/train.npy")[None], np.load("outputs/embed_prompts/augmented.npy")]
    )
    data = [Path("outputs", name) for name in DATA]
    keys = [
        digest(section.model_dump_json(), device(), *data, *sorted(Path(f"outputs/clip/{c}").rglob("*.*")), *CODE)
        for c in range(len(params.clip.models))
    ]
    resume = RESUME / f"model_a/fold_{held_out}"
    for stale in resume.glob("*"):
        if stale.name not in keys:
            shutil.rmtree(stale)
    with whole_folder(Path(f"outputs/model_a/fold_{held_out}")) as out:
        for number, key in enumerate(keys):
            (out / str(number)).mkdir()
            train_clip(number, held_out, params, targets, resume / key, out / str(number))
    shutil.rmtree(resume)


if __name__ == "__main__":
    run(main)
