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
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from img2prompt.cli.check import Params, load_params
from img2prompt.core import engine
from img2prompt.core.device import device, on_cuda
from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.core.process import turn
from img2prompt.core.progress import progress
from img2prompt.core.shards import RESUME, fetched, forget
from img2prompt.core.storage import digest, whole
from img2prompt.model_a.fold import Features, Fold, TrainRows
from img2prompt.model_a.params import ModelAParams, Rates
from img2prompt.model_a.prediction import predict

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


class Trials:
    """Trainings on inner splits of the training folds, and what they share.

    Args:
        section: the params around which settings are tried.
        ids: all folds.
        clip: the CLIP's number.
    """

    def __init__(self, section: ModelAParams, ids: Sequence[int], clip: int) -> None:
        self._section, self._ids, self._where = section, ids, device()
        self._rows, self._features = TrainRows.read(Path("outputs")), Features.read(Path("outputs"), clip, section)
        inputs = self._features.inputs(section.augmentation, section.seed, self._where)
        self._frozen = dict(zip(self._features.views, inputs, strict=True))
        self._start = cache(
            lambda held_out, **starting: self._split(held_out).start(section.model_copy(update=starting))
        )

    def _inner(self, held_out: int) -> int:
        return self._ids[(self._ids.index(held_out) + 1) % len(self._ids)]

    def _split(self, held_out: int) -> Fold:
        return Fold(self._rows, self._features, [held_out, self._inner(held_out)])

    def _wanted(self, held_out: int) -> np.ndarray:
        return np.flatnonzero(self._rows.scored & (self._rows.fold == self._inner(held_out)))

    def groups(self, folds: Sequence[int]) -> np.ndarray:
        """The groups of the rows that are scored, fold by fold."""
        return np.concatenate([self._rows.group[self._wanted(held_out)] for held_out in folds])

    def trained(self, kind: str, held_out: int, seed: int, setting: Setting, resume: Path) -> nn.ModuleDict:
        """A tower's last layers with a head, trained with a setting."""
        rates = Rates(**{key: value for key, value in setting.items() if key in Rates.model_fields})
        changed = self._section.model_copy(update=setting)
        starting = {key: getattr(changed, key) for key in ("pretrain", "validation", "cross_fit")}
        model, *_ = self._split(held_out).train(
            kind, self._start(held_out, **starting), [self._frozen["plain"]], changed, rates,
            (self._section.seed + seed, held_out), self._where, resume,
        )  # fmt: skip
        return model

    def cosines(self, model: nn.ModuleDict, held_out: int, views: Sequence[str]) -> np.ndarray:
        """With the targets, of what a model predicts of the scored rows' views, the plain one and these."""
        seen, those = [self._frozen[name] for name in ("plain", *views)], self._wanted(held_out)
        found = predict(model["tower"], model["head"], seen, those, self._section.batch_size, self._where)
        return cosine(found, self._rows.targets[0, those])

    def views(self, setting: Setting) -> Sequence[str]:
        """Those that a setting averages beside the plain one."""
        return setting.get("tta", self._section.tta)


@lru_cache(maxsize=1)
def _trials(_search: str, section: str, ids: tuple[int, ...], clip: int) -> Trials:
    """Once a process and search."""
    return Trials(ModelAParams.model_validate_json(section), ids, clip)


def _training(setting: Setting) -> Setting:
    return {key: value for key, value in setting.items() if key != "tta"}


def _try(
    trials: Callable[[], Trials], kind: str, held_out: int, seed: int, settings: Sequence[Setting], path: Path
) -> None:
    """Train once and leave the cosines of each of the settings, which differ in views alone, and the seconds."""
    common, setting, found, seconds = trials(), _training(settings[0]), {}, []
    resume = RESUME / "search" / digest(repr((kind, held_out, seed, setting)))
    began = time.monotonic()
    model = common.trained(kind, held_out, seed, setting, resume)
    for place, views in enumerate(map(common.views, settings)):
        found[f"cosines_{place}"] = common.cosines(model, held_out, views)
        seconds.append(time.monotonic() - began)
        began = time.monotonic()
    with path.open("wb") as file:
        np.savez(file, seconds=seconds, **found)
    shutil.rmtree(resume, ignore_errors=True)


def _read(file: Path) -> dict[str, np.ndarray]:
    with fetched(file) as path, np.load(path) as arrays:
        return dict(arrays)


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
    # Unlike that of any other search: what a worker has read for it may have changed since.
    trials = partial(_trials, str(time.time_ns()), section.model_dump_json(), tuple(ids), asked.clip)
    wanted_group = trials().groups(folds)
    views = [[], *([seen] for seen in section.tta), section.tta] if len(section.tta) > 1 else [[], section.tta]
    grids = GRIDS | {"tta": views}
    folder = RESUME / "search"
    shutil.rmtree(folder, ignore_errors=True)
    forget(folder)

    def scored(kind: str, name: str, settings: list[Setting]) -> Iterator[tuple[Setting, np.ndarray, float]]:
        """Of each setting the cosines (seeds, images), and the seconds of one training."""
        # Views take no training of their own: settings that differ in views alone share one.
        alike: dict[str, list[Setting]] = {}
        for setting in settings:
            alike.setdefault(repr(_training(setting)), []).append(setting)
        places = [(seed, held_out) for seed in range(asked.seeds) for held_out in folds]
        pieces = [
            engine.Piece(
                f"search, {kind} with {members[0]}, fold {held_out}, seed {seed}",
                partial(_try, trials, kind, held_out, seed, members),
                folder / f"{digest(repr((kind, held_out, seed, same)))}.npz",
            )
            for same, members in alike.items()
            for seed, held_out in places
        ]
        runs = engine.run(pieces, f"{kind}, {name}", "training", on_cuda(where))
        bar = progress(runs, f"{kind}, {name}", len(pieces), "training", quiet=engine.engine() != "local")
        done = iter(bar)
        for number, members in enumerate(alike.values()):
            own = [piece.file for piece in pieces[number * len(places) :][: len(places)]]
            list(islice(done, len(places)))
            found = [_read(file) for file in own]
            for place, setting in enumerate(members):
                cosines = np.concatenate([arrays[f"cosines_{place}"] for arrays in found]).reshape(asked.seeds, -1)
                yield setting, cosines, float(np.mean([arrays["seconds"][place] for arrays in found]))
        list(done)
        forget(folder)

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
            for setting, found, seconds in scored(kind, name, [s for i, s in enumerate(new) if s not in new[:i]]):
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
