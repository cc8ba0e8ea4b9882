"""Search settings of Model A and of the linear baseline, on inner splits of the training folds.

It prints what to pin in params.yaml. For every held-out fold, the settings are scored on another fold after training
on the rest, so the held-out fold itself is never used. Both heads get the same grids.

    img2prompt search                               # epochs and learning rates
    img2prompt search ema pull --folds 0 2          # other grids, one after the other, on two folds
    img2prompt search ema pull --apart --seeds 3    # the gain of each value alone, as the mean of three trainings
"""

import argparse
import shutil
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from img2prompt.cli.check import Params, load_params
from img2prompt.core.device import device
from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.core.process import turn
from img2prompt.core.progress import progress
from img2prompt.core.storage import RESUME, digest, whole
from img2prompt.model_a.fold import Features, Fold, TrainRows
from img2prompt.model_a.params import Rates
from img2prompt.model_a.prediction import predict
from img2prompt.model_a.training import Start

# The values to try of each parameter, while the others have their best values so far, at first those of params.yaml.
GRIDS: dict[str, list[object]] = {
    "lr_head": [1e-5, 1e-4, 3e-4, 1e-3, 3e-3],
    "lr_tower": [1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3],  # from the best for a public CLIP to the best for the sample's
    "epochs": [2, 3, 4, 6],
    "batch_size": [16, 32, 64],
    "pretrain": [False, True],
    "layer_decay": [1.0, 0.8, 0.6],
    "mse": [0.0, 0.01, 1.0],
    "hidden": [0, 2048],
    "ema": [0.0, 0.15, 0.4],
    "pull": [0.0, 0.3, 1.0, 3.0],
    "cross_fit": [0, 5],
    "validation": [64, 128, 256],
    "any_image": [False, True],
    "dropout": [0.0, 0.2, 0.4],
    "weight_decay": [0.01, 0.1, 1.0],
    "tta": [],  # `search` fills in no view, each view of params.yaml, and all: no others are stored
}
TABLE = Path("outputs/search.csv")
LINE = (
    "{head}, {changed}: {score:.4f}, {gain:+.4f} [{low:+.4f}, {high:+.4f}], "
    "lowest seed {lowest_seed:+.4f}, {seconds:.1f} s"
)
Setting = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: what to search, and on which folds, heads, seeds and CLIP."""
    parser.add_argument("grids", nargs="*", default=list(GRIDS)[:3], metavar="grid")
    parser.add_argument("--folds", type=int, nargs="+", help="default: all")
    parser.add_argument("--heads", nargs="+", choices=["linear", "model_a"], help="default: those of params.yaml")
    parser.add_argument("--seeds", type=int, default=1, help="number of trainings of each setting")
    parser.add_argument("--clip", type=int, default=0, help="number of the CLIP")
    parser.add_argument("--apart", action="store_true", help="each grid around params.yaml, not around the best so far")


def main(options: argparse.Namespace) -> None:
    """Search, when no other process writes to outputs/."""
    with turn("search"):
        search(load_params(), options)


def search(params: Params, asked: argparse.Namespace) -> None:
    """Write outputs/search.csv and print it, one line for each setting, and the best settings.

    `gain` is over the settings of params.yaml, image by image, with its 95% interval over groups of similar
    prompts; `lowest_seed` is the least gain of any one seed, for the interval covers the choice of images only;
    `seconds` is the time of one training.

    Raises:
        ValueError: an unknown grid or fold, fewer than three folds, nothing unfrozen, or augmentation on.
    """
    section, ids, where = params.model_a, params.folds.ids, device()
    folds = asked.folds or ids
    if unknown := set(asked.grids) - set(GRIDS):
        raise ValueError(f"no grid {', '.join(sorted(unknown))}: choose from {', '.join(GRIDS)}")
    if section.augmentation.on or not section.layers(asked.clip):
        raise ValueError("model_a: the search wants unfreeze above 0 and augmentation off, as it is pinned")
    if len(ids) < 3:
        raise ValueError(f"folds.ids: {ids}: inner splits take three folds: to predict, to score on, to train on")
    if unknown := set(folds) - set(ids):
        raise ValueError(f"no folds {sorted(unknown)}: folds.ids are {ids}")
    rows, features = TrainRows.read(Path("outputs")), Features.read(Path("outputs"), asked.clip, section)
    inputs = features.inputs(section.augmentation, section.seed, where)
    frozen = dict(zip(features.views, inputs, strict=True))
    inner = {held_out: ids[(ids.index(held_out) + 1) % len(ids)] for held_out in folds}
    splits = {held_out: Fold(rows, features, [held_out, inner[held_out]]) for held_out in folds}
    wanted = {held_out: np.flatnonzero(rows.scored & (rows.fold == inner[held_out])) for held_out in folds}
    wanted_group = np.concatenate([rows.group[of_fold] for of_fold in wanted.values()])
    views = [[], *([seen] for seen in section.tta), section.tta] if len(section.tta) > 1 else [[], section.tta]
    grids = GRIDS | {"tta": views}
    shutil.rmtree(RESUME / "search", ignore_errors=True)

    @cache
    def start(held_out: int, **starting: object) -> Start:
        return splits[held_out].start(section.model_copy(update=starting))

    latest: dict[tuple[str, int, int], tuple[Setting, nn.ModuleDict]] = {}

    def trained(kind: str, held_out: int, seed: int, setting: Setting) -> nn.ModuleDict:
        # Views take no training of their own: their settings follow one another and share it. Others are not held.
        setting = {key: value for key, value in setting.items() if key != "tta"}
        place = kind, held_out, seed
        if place in latest and latest[place][0] == setting:
            return latest[place][1]
        latest.pop(place, None)
        rates = Rates(**{key: value for key, value in setting.items() if key in Rates.model_fields})
        changed = section.model_copy(update=setting)
        folder = RESUME / "search" / digest(repr((*place, setting)))
        starting = {key: getattr(changed, key) for key in ("pretrain", "validation", "cross_fit")}
        model, *_ = splits[held_out].train(
            kind, start(held_out, **starting), [frozen["plain"]], changed, rates, (section.seed + seed, held_out),
            where, folder,
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        if "tta" in asked.grids:
            latest[place] = setting, model
        return model

    def cosines(kind: str, held_out: int, seed: int, setting: Setting) -> np.ndarray:
        model, those = trained(kind, held_out, seed, setting), wanted[held_out]
        seen = [frozen[name] for name in ("plain", *setting.get("tta", section.tta))]
        found = predict(model["tower"], model["head"], seen, those, section.batch_size, where)
        return cosine(found, rows.targets[0, those])

    results: list[dict[str, object]] = []
    for kind in asked.heads or section.heads:
        rates = section if kind == "model_a" else section.linear
        pinned: Setting = {key: getattr(rates, key) for key in Rates.model_fields}
        pinned |= {key: [] if key == "tta" else getattr(section, key) for key in sorted(set(asked.grids) - set(pinned))}
        known: dict[str, float] = {}
        first: np.ndarray | None = None
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
                first = found if first is None else first
                gain = found - first  # (seeds, images)
                low, high = bootstrap_interval(gain.mean(axis=0), wanted_group)
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
    if set(folds) == set(ids):
        print("Over all folds the inner splits see every row once: out-of-fold scores flatter what was picked here")
    with whole(TABLE) as path:
        pd.DataFrame(results).round(6).to_csv(path, index=False)
