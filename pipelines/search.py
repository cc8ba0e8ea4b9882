"""search: epochs and rates for Model A and the baseline, on inner splits of the training folds.

No stage: `make search` prints what to pin in params.yaml. For every fold that is predicted, the settings are
scored on another fold, trained on the rest: the fold itself is never looked at. Both heads get the same grids.
`python -m pipelines.search 0 2` does so for two folds only.
"""

import copy
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.clip import load_clip, tower, unfrozen
from img2prompt.device import device
from img2prompt.model_a import Stored, train
from img2prompt.params import Params, Rates
from img2prompt.progress import progress
from img2prompt.storage import RESUME, digest, whole
from pipelines import run

# One grid after the other, each around what is best so far, from the values of params.yaml on.
GRIDS = [
    {"lr_head": [3e-4, 1e-3, 3e-3], "lr_tower": [1e-3, 2e-3]},
    {"tower_epochs": [2, 3, 4]},
    {"head_epochs": [0, 2]},
]
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
    folds = [int(held_out) for held_out in sys.argv[1:]] or ids

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

    results: list[dict[str, object]] = []
    for kind, rates in (("clip", section.baseline), ("model_a", section)):
        best = {key: getattr(rates, key) for key in Rates.model_fields}
        known: dict[tuple[float, ...], float] = {}
        for settings in GRIDS:
            tried = [best | setting for setting in grid(**settings)]
            new = [setting for setting in tried if tuple(setting.values()) not in known]
            for setting in progress(new, f"{kind}, {' x '.join(settings)}", unit="setting"):
                scores = {held_out: score(kind, held_out, setting) for held_out in folds}
                results += [{"head": kind, "fold": f, **setting, "score": value} for f, value in scores.items()]
                known[tuple(setting.values())] = sum(scores.values()) / len(scores)
            best = max(tried, key=lambda setting: known[tuple(setting.values())])
        print(f"{kind}: {known[tuple(best.values())]:.4f} with {best}", flush=True)
    with whole(TABLE) as path:
        pd.DataFrame(results).to_csv(path, index=False)


if __name__ == "__main__":
    run(main)
