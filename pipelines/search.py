"""search: epochs and rates for Model A and the baseline, on inner splits of the training folds.

No stage: `make search` prints what to pin in params.yaml. For every fold that is predicted, the settings are
scored on another fold, trained on the rest: the fold itself is never looked at. Both heads get the same grid.
"""

import copy
import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.clip import load_clip, tower, unfrozen
from img2prompt.device import device
from img2prompt.model_a import HEADS, Stored, train
from img2prompt.params import Params
from img2prompt.progress import progress
from img2prompt.storage import RESUME, digest, whole
from pipelines import run

HEAD_ALONE = {"head_epochs": [1, 5, 10, 20], "lr_head": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], "tower_epochs": [0]}
WITH_TOWER = {"tower_epochs": [2, 4, 8], "lr_tower": [3e-5, 1e-4, 3e-4, 1e-3]}
TABLE = Path("outputs/search.csv")


def grid(**values: list[float]) -> list[dict[str, float]]:
    """Every combination."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def main(params: Params) -> None:
    """Write outputs/search.csv (head, fold, the settings, score) and print the best settings."""
    section, where = params.model_a, device()
    if section.augmentation.on or not section.unfreeze:
        raise ValueError("model_a: the search wants unfreeze above 0 and augmentation off, as it is pinned")
    pooled = np.load("outputs/embed_images/train_pooled.npy")
    frozen = np.load("outputs/embed_images/train_frozen.npy", mmap_mode="r")
    targets = np.load("outputs/embed_prompts/train.npy")[None]
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    kept, scored = np.load("outputs/dedup/kept.npy"), np.load("outputs/dedup/scored.npy")
    layers = tower(load_clip(Path("outputs/clip"), "cpu").model.visual)
    ids = params.folds.ids

    def score(kind: str, held_out: int, setting: dict[str, float]) -> float:
        inner = ids[(ids.index(held_out) + 1) % len(ids)]
        rows = np.flatnonzero(kept & (fold != held_out) & (fold != inner))
        last = copy.deepcopy(unfrozen(layers, section.unfreeze))
        folder = RESUME / "search" / digest(kind, repr((held_out, setting)))
        _, history = train(
            kind, pooled, Stored(frozen), last, targets, rows, np.flatnonzero(scored & (fold == inner)), section,
            section.baseline.model_copy(update=setting), (section.seed, held_out), where, folder,
        )  # fmt: skip
        shutil.rmtree(folder)
        return history.score.iloc[-1]

    results = []
    for kind in HEADS:
        best: dict[str, float] = {}
        for settings in (HEAD_ALONE, WITH_TOWER):
            tried = grid(**{key: [value] for key, value in best.items()} | settings)
            for setting, held_out in progress(list(itertools.product(tried, ids)), kind, unit="training"):
                results.append({"head": kind, "fold": held_out, **setting, "score": score(kind, held_out, setting)})
            table = pd.DataFrame(results[-len(tried) * len(ids) :])
            mean = table.groupby(list(tried[0])).score.mean().sort_values(ascending=False)
            print(f"\n{kind}\n{mean.head(5).to_string()}", flush=True)
            best = dict(zip(mean.index.names, mean.index[0], strict=True))
            best = {key: int(value) if key.endswith("epochs") else value for key, value in best.items()}
        print(f"pin for {kind}: {best}")
    with whole(TABLE) as path:
        pd.DataFrame(results).to_csv(path, index=False)


if __name__ == "__main__":
    run(main)
