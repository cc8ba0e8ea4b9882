"""model_a: for one fold, the baseline head and the paper's head, each with its own copy of the tower's last layers."""

import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import save_file
from torch import nn

from img2prompt import clip, images, model_a
from img2prompt.clip import load_clip, tower, unfrozen
from img2prompt.device import device
from img2prompt.images import Drawn, Pictures
from img2prompt.model_a import Inputs, Stored, predict, start_head, train
from img2prompt.params import Params
from img2prompt.sources import read_rows
from img2prompt.storage import RESUME, digest, whole_folder
from pipelines import run

# What a fold's weights depend on, beside its params: a killed run resumes only if none of it has changed.
DATA = [
    "prepare/train.parquet", "prepare/test.parquet", "embed_prompts/train.npy", "embed_prompts/augmented.npy",
    "dedup/kept.npy", "folds/folds.parquet", "clip/open_clip_model.safetensors",
]  # fmt: skip
CODE = [Path(file) for file in (clip.__file__, images.__file__, model_a.__file__, __file__)]


def main(params: Params) -> None:
    """Write {clip,model_a}.safetensors, _oof.npy (rows of the fold, 384), _test.npy (m, 384), _history.csv.

    start_oof.npy and start_test.npy are of the ridge regression on the untouched tower, where both heads start.
    """
    held_out, section, where = int(sys.argv[1]), params.model_a, device()
    pooled = np.load("outputs/embed_images/train_pooled.npy")
    targets = np.concatenate(
        [np.load("outputs/embed_prompts/train.npy")[None], np.load("outputs/embed_prompts/augmented.npy")]
    )
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    rows = np.flatnonzero(np.load("outputs/dedup/kept.npy") & (fold != held_out))
    unseen = np.flatnonzero(fold == held_out)
    watched = unseen[np.load("outputs/dedup/scored.npy")[unseen]]
    loaded = load_clip(Path("outputs/clip"), "cpu")
    layers = tower(loaded.model.visual)

    def inputs(split: str) -> Inputs:
        if section.augmentation.on:
            frozen = layers[: len(layers) - section.unfreeze]
            references = read_rows(Path(f"outputs/prepare/{split}.parquet")).picture
            return Drawn(Pictures(references, loaded.transform, section.augmentation, section.seed), frozen, where)
        name = "frozen" if section.unfreeze else "pooled"
        return Stored(np.load(f"outputs/embed_images/{split}_{name}.npy", mmap_mode="r"))

    sources = {split: inputs(split) for split in ("train", "test")}
    test = np.arange(len(np.load("outputs/embed_images/test_pooled.npy", mmap_mode="r")))
    key = digest(section.model_dump_json(), where, *(Path("outputs", name) for name in DATA), *CODE)
    fold_resume = RESUME / f"model_a/fold_{held_out}"
    for stale in fold_resume.glob("*"):
        if stale.name != key:
            shutil.rmtree(stale)
    with whole_folder(Path(f"outputs/model_a/fold_{held_out}")) as out:
        start = start_head("clip", pooled[rows], targets[0, rows], section.dropout)
        for name, split, wanted in (("oof", "train", unseen), ("test", "test", test)):
            features = Stored(np.load(f"outputs/embed_images/{split}_pooled.npy", mmap_mode="r"))
            np.save(out / f"start_{name}.npy", predict(nn.Identity(), start, features, wanted, 1024, where))
        for kind, rates in (("clip", section.baseline), ("model_a", section)):
            last = copy.deepcopy(unfrozen(layers, section.unfreeze))
            head, history = train(
                kind, pooled, sources["train"], last, targets, rows, watched, section, rates,
                (section.seed, held_out), where, fold_resume / key,
            )  # fmt: skip
            model = nn.ModuleDict({"tower": last, "head": head})
            save_file(
                {name: value.contiguous() for name, value in model.state_dict().items()}, out / f"{kind}.safetensors"
            )
            history.to_csv(out / f"{kind}_history.csv", index=False)
            for name, split, wanted in (("oof", "train", unseen), ("test", "test", test)):
                found = predict(last, head, sources[split], wanted, section.batch_size, where)
                np.save(out / f"{kind}_{name}.npy", found)
            print(f"fold {held_out}, {kind}: {history.score.iloc[-1]:.4f}")
    shutil.rmtree(fold_resume)


if __name__ == "__main__":
    run(main)
