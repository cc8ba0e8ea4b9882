"""search: settings of Model A and the baseline, on inner splits of the training folds.

No stage: it prints what to pin in params.yaml. For every fold that is predicted, the settings are scored on another
fold, trained on the rest: the fold itself is never looked at. Both heads get the same grids.

    python -m pipelines.search                               # epochs and rates
    python -m pipelines.search ema wise --folds 0 2          # other grids, one after the other, on two folds
    python -m pipelines.search ema wise --apart --seeds 3    # what each alone changes, as the mean of three trainings
"""

import argparse
import copy
import shutil
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from img2prompt.clip import load_clip, projection, tower, unfrozen
from img2prompt.device import device
from img2prompt.images import stem
from img2prompt.metric import bootstrap_interval, cosine
from img2prompt.model_a import Ridge, Stored, predict, ridge, train
from img2prompt.params import Params, Rates
from img2prompt.progress import progress
from img2prompt.storage import RESUME, digest, whole
from pipelines import run
from pipelines.model_a import text_prior

# The values tried of each param, around what is best so far, from the values of params.yaml on.
GRIDS: dict[str, list[object]] = {
    "lr_head": [1e-5, 1e-4, 3e-4, 1e-3, 3e-3],
    "lr_tower": [1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3],  # from what a public CLIP wants to what the sample's does
    "tower_epochs": [2, 3, 4, 6],
    "head_epochs": [0, 2],  # LP-FT
    "batch_size": [16, 32, 64],
    "pretrain": [False, True],
    "layer_decay": [1.0, 0.8, 0.6],
    "mse": [0.0, 0.01, 1.0],
    "hidden": [0, 2048],
    "ema": [0.0, 0.15, 0.4],
    "wise": [1.0, 0.8, 0.6],
    "dropout": [0.0, 0.2, 0.4],
    "weight_decay": [0.01, 0.1, 1.0],
    "tta": [],  # against none, each view of params.yaml, and all: `embed_images` has no others
}
TABLE = Path("outputs/search.csv")
LINE = (
    "{head}, {changed}: {score:.4f}, {gain:+.4f} [{low:+.4f}, {high:+.4f}], {lowest_seed:+.4f} or up, {seconds:.1f} s"
)
Setting = dict[str, object]


def arguments() -> argparse.Namespace:
    """What to search, and on how much."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.search", description=__doc__.splitlines()[0])
    parser.add_argument("grids", nargs="*", default=list(GRIDS)[:4], metavar="grid")
    parser.add_argument("--folds", type=int, nargs="+", help="default: all")
    parser.add_argument("--heads", nargs="+", default=["clip", "model_a"], choices=["clip", "model_a"])
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each setting")
    parser.add_argument("--clip", type=int, default=0, help="number of the CLIP")
    parser.add_argument("--apart", action="store_true", help="each grid around params.yaml, not around the best so far")
    return parser.parse_args()


def main(params: Params) -> None:
    """Write outputs/search.csv and print it, a line a setting, and the best settings.

    `gain` is over the settings of params.yaml, picture by picture, with its 95% interval over groups of similar
    prompts; `lowest_seed` is the least gain of any one seed, for the interval knows of pictures only; `seconds` is of
    one training.
    """
    asked, section, where = arguments(), params.model_a, device()
    if unknown := set(asked.grids) - set(GRIDS):
        raise ValueError(f"no grid {', '.join(sorted(unknown))}: choose from {', '.join(GRIDS)}")
    unfreeze = section.layers(asked.clip)
    if section.augmentation.on or not unfreeze:
        raise ValueError("model_a: the search wants unfreeze above 0 and augmentation off, as it is pinned")
    embedded = Path(f"outputs/embed_images/{asked.clip}")
    pooled = np.load(embedded / "train_pooled.npy")
    frozen = {
        seen: Stored(np.load(embedded / f"{stem('train', seen)}_frozen.npy", mmap_mode="r"))
        for seen in ("plain", *section.tta)
    }
    targets = np.load("outputs/embed_prompts/train.npy")[None]
    table = pd.read_parquet("outputs/folds/folds.parquet")
    fold, group, ids = table.fold.to_numpy(), table.group.to_numpy(), params.folds.ids
    kept, scored = np.load("outputs/dedup/kept.npy"), np.load("outputs/dedup/scored.npy")
    visual = load_clip(Path(f"outputs/clip/{asked.clip}"), "cpu").model.visual
    layers = tower(visual)
    folds = asked.folds or ids
    if len(ids) < 3:
        raise ValueError(f"folds.ids: {ids}: inner splits take three folds: to predict, to score on, to train on")
    if unknown := set(folds) - set(ids):
        raise ValueError(f"no folds {sorted(unknown)}: folds.ids are {ids}")
    inner = {held_out: ids[(ids.index(held_out) + 1) % len(ids)] for held_out in folds}
    watched = {held_out: np.flatnonzero(scored & (fold == inner[held_out])) for held_out in folds}
    watched_group = np.concatenate([group[rows] for rows in watched.values()])
    views = [[], *([seen] for seen in section.tta), section.tta] if len(section.tta) > 1 else [[], section.tta]
    grids = GRIDS | {"tta": views}
    shutil.rmtree(RESUME / "search", ignore_errors=True)

    def training_rows(held_out: int) -> np.ndarray:
        return np.flatnonzero(kept & (fold != held_out) & (fold != inner[held_out]))

    @cache
    def start(held_out: int, pretrain: bool) -> Ridge:
        rows = training_rows(held_out)
        wanted = torch.from_numpy(targets[0, rows])
        prior = None
        if pretrain:
            unseen = [ids.index(held_out), ids.index(inner[held_out])]
            prior = text_prior(embedded, projection(visual, pooled.shape[1]), targets[0], rows, unseen)
        return ridge(torch.from_numpy(pooled[rows]), wanted, group[rows], prior)

    @cache
    def trained(kind: str, held_out: int, seed: int, values: tuple[tuple[str, object], ...]) -> nn.ModuleDict:
        setting = dict(values)
        rates = Rates(**{key: value for key, value in setting.items() if key in Rates.model_fields})
        changed = section.model_copy(update=setting)
        last = copy.deepcopy(unfrozen(layers, unfreeze))
        folder = RESUME / "search" / digest(repr((kind, held_out, seed, setting)))
        head, _ = train(
            kind, start(held_out, changed.pretrain), pooled, frozen["plain"], last, targets, training_rows(held_out),
            watched[held_out][:0], changed, rates, (section.seed + seed, held_out), where, folder,
        )  # fmt: skip
        shutil.rmtree(folder)
        return nn.ModuleDict({"tower": last, "head": head})

    def cosines(kind: str, held_out: int, seed: int, setting: Setting) -> np.ndarray:
        values = tuple(pair for pair in setting.items() if pair[0] != "tta")  # views take no training of their own
        model, rows = trained(kind, held_out, seed, values), watched[held_out]
        seen = [frozen[name] for name in ("plain", *setting.get("tta", section.tta))]
        return cosine(predict(model["tower"], model["head"], seen, rows, section.batch_size, where), targets[0, rows])

    results: list[dict[str, object]] = []
    for kind in asked.heads:
        rates = section if kind == "model_a" else section.baseline
        pinned: Setting = {key: getattr(rates, key) for key in Rates.model_fields}
        pinned |= {key: [] if key == "tta" else getattr(section, key) for key in sorted(set(asked.grids) - set(pinned))}
        known: dict[str, float] = {}
        baseline: np.ndarray | None = None
        best = pinned
        for name in asked.grids:
            around = pinned if asked.apart else best
            tried = [around | {name: value} for value in grids[name]]
            new = [setting for setting in [pinned, *tried] if repr(setting) not in known]
            for setting in progress(
                [s for i, s in enumerate(new) if s not in new[:i]], f"{kind}, {name}", unit="setting"
            ):
                began = time.monotonic()
                found = np.array([
                    np.concatenate([cosines(kind, held_out, seed, setting) for held_out in folds])
                    for seed in range(asked.seeds)
                ])  # fmt: skip
                seconds = (time.monotonic() - began) / len(folds) / asked.seeds
                baseline = found if baseline is None else baseline
                gain = found - baseline  # (seeds, pictures)
                low, high = bootstrap_interval(gain.mean(axis=0), watched_group)
                known[repr(setting)] = found.mean()
                changes = {key: value for key, value in setting.items() if value != pinned[key]}
                results.append({
                    "head": kind, "changed": ", ".join(f"{key}={value}" for key, value in changes.items()) or "nothing",
                    "score": found.mean(), "gain": gain.mean(), "low": low, "high": high,
                    "lowest_seed": gain.mean(axis=1).min(), "seconds": seconds,
                })  # fmt: skip
                print(LINE.format(**results[-1]), flush=True)
            best = max([around, *tried], key=lambda setting: known[repr(setting)])
        if not asked.apart:
            print(f"{kind}: {known[repr(best)]:.4f} with {best}", flush=True)
    with whole(TABLE) as path:
        pd.DataFrame(results).round(6).to_csv(path, index=False)


if __name__ == "__main__":
    run(main)
