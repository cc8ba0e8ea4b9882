"""What time buys: the scores of more and of less training on inner splits, by the time of the whole run.

    python -m bench.budget FOLDER --docs

Reads outputs/ and run.js of the last run here, and trains both heads with the settings of POINTS on inner splits of two
folds; FOLDER has a project for each, which shares the run's other outputs. The ensemble has the run's Model B, and its
weights are found on the other inner split. The time of a whole run is what its stages took, with `freeze` and `model_a`
replaced: as many folds as it has, each as long as an inner split, which has a fold less. Gains are over params.yaml.
"""

import argparse
import contextlib
from pathlib import Path

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.figure import Figure
from torch import nn

from bench.inner import InnerSplit
from bench.run import PROJECT
from bench.sets import merged, run
from img2prompt.cli.check import load_params
from img2prompt.cli.documents import caption, put
from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.core.process import RECORD, made, records
from img2prompt.core.storage import whole
from img2prompt.ensemble.constant import constant
from img2prompt.ensemble.weights import Cosines, search_weights
from img2prompt.model_a.heads import LinearHead
from img2prompt.model_a.prediction import predict
from img2prompt.report.figures import COLOURS
from img2prompt.report.scores import markdown

POINTS = [(0, 4), (5, 4), (5, 6), (7, 4), (7, 6), (9, 6), (12, 6)]  # layers that train, epochs
FOLDS = (0, 2)
SHARED = ("prepare", "embed_prompts", "dedup", "folds", "clip", "embed_images", "knn")
MEMBERS = ("ridge", "linear", "model_a", "model_b", "constant")
SHOWN = ("linear", "model_a", "ensemble")


def project(folder: Path, layers: int, epochs: int) -> Path:
    """A project with the run's outputs, these settings, and what its frozen layers give."""
    home = folder / f"{layers}-{epochs}"
    (home / "outputs").mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if not (home / "outputs" / name).exists():
            (home / "outputs" / name).symlink_to(Path("outputs", name).resolve())
    settings = {"unfreeze": layers, "epochs": epochs, "linear": {"epochs": epochs}}
    run(home, merged(yaml.safe_load(Path("params.yaml").read_text()), {"model_a": settings}), ("freeze",))
    return home


def measure(seed: int) -> tuple[list[dict[str, np.ndarray]], float]:
    """Of the project here, for each inner split the cosines (m,) of SHOWN; and the seconds of one split."""
    params, found, seconds = load_params(), [], 0.0
    of_splits, groups = [], []
    for held_out in FOLDS:
        split = InnerSplit.read(params.model_a, params.folds.ids, held_out)
        members, rows = {}, split.rows
        for kind in ("linear", "model_a"):
            members[kind], took = split.train(kind, seed)
            seconds += took / len(FOLDS)
        head, stored = LinearHead(split.start.whole, dropout=0.0, hidden=0), split.features.stored_pooled("cpu")
        members["ridge"] = predict(nn.Sequential(), head, stored, split.wanted, 1024, "cpu")
        members["model_b"] = np.load("outputs/knn/0/oof.npy", mmap_mode="r")[split.wanted]
        members["constant"] = constant(rows.targets[0], rows.fold, params.folds.ids, rows.kept)[0][split.wanted]
        of_splits.append(Cosines.between([members[name] for name in MEMBERS], split.targets))
        found.append({kind: cosine(members[kind], split.targets) for kind in ("linear", "model_a")})
        groups.append(split.group)
    free = np.array(MEMBERS) == "constant"
    for own, other, scores in zip(of_splits, of_splits[::-1], found, strict=True):
        scores["ensemble"] = own.of_mix(search_weights(other, free=free))
    joined = {name: np.concatenate([scores[name] for scores in found]) for name in SHOWN}
    return joined | {"group": np.concatenate(groups)}, seconds


def whole_run(home: Path, split_seconds: float, folds: int) -> float:
    """Seconds of a run with a project's settings: the run's here, with `freeze` and `model_a` replaced."""
    others = [one["seconds"] for one in records() if one["name"].split()[0] not in ("freeze", "model_a")]
    frozen = [one["seconds"] for one in records(home / RECORD) if one["name"] == "freeze"]
    return sum(others) + sum(frozen) + folds * split_seconds


def draw(path: Path, labels: list[str], minutes: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    """Draw each model's score at the time of the whole run, with the 95% interval of its gain over params.yaml."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.subplots()
        order = np.argsort(minutes)
        for name, of_model in scores.items():
            axes.plot(minutes[order], of_model[order], marker="o", color=COLOURS[name], label=name)
        for label, x, y in zip(labels, minutes, scores["ensemble"], strict=True):
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(0, 7), ha="center")
        axes.set(xlabel="minutes of the whole run", ylabel="mean cosine on inner splits", xlim=(0, None))
        axes.margins(y=0.12)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the projects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/results.md, with docs/budget.png")
    asked = parser.parse_args()
    section, folds = load_params().model_a, len(load_params().folds.ids)
    points = list(dict.fromkeys([(section.unfreeze, section.epochs), *POINTS]))
    found, minutes = {}, []
    for layers, epochs in points:
        home = project(asked.folder.resolve(), layers, epochs)
        with contextlib.chdir(home):
            found[layers, epochs], seconds = measure(asked.seed)
        minutes.append(whole_run(home, seconds, folds) / 60)
        means = ", ".join(f"{name} {found[layers, epochs][name].mean():.4f}" for name in SHOWN)
        print(f"{layers} layers, {epochs} epochs: {means}, {seconds:.0f} s a split, {minutes[-1]:.1f} min", flush=True)
    cells = [["layers", "epochs", *SHOWN, "ensemble's gain [95%]", "whole run"]]
    cells.append(["---"] * len(cells[0]))
    first = found[points[0]]
    for place in np.argsort(minutes):
        scores = found[points[place]]
        gain = scores["ensemble"] - first["ensemble"]
        low, high = bootstrap_interval(gain, first["group"])
        cells.append([
            *map(str, points[place]), *(f"{scores[name].mean():.4f}" for name in SHOWN),
            f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]" if place else "params.yaml",
            f"{minutes[place]:.1f} min",
        ])  # fmt: skip
    of = f"Inner splits of folds {', '.join(map(str, FOLDS))}, {len(first['group']):,} pictures, seed {asked.seed}"
    text = f"{markdown(cells)}\n{caption(of, [made()])}"
    print(text)
    if asked.docs:
        put({"budget": text}, PROJECT)
        labels = [f"{layers} × {epochs}" for layers, epochs in points]
        scores = {name: np.array([of_point[name].mean() for of_point in found.values()]) for name in SHOWN}
        with whole(PROJECT / "docs/budget.png") as path:
            draw(path, labels, np.array(minutes), scores)


if __name__ == "__main__":
    main()
