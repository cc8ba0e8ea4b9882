"""What time buys: the scores of more and of less training on inner splits, by the time of the whole run.

    python -m bench.budget FOLDER [--docs]

Reads outputs/ and run.js of the last run here, and trains both heads with the settings of POINTS on inner splits of two
folds; FOLDER has a project for each, which shares the run's other outputs. The ensemble has the run's Model B, with
the linear baseline or without, and its weights are found on the other inner split. The time of a whole run is what its
stages took, with `freeze` and `model_a` replaced: an inner split trains on all folds but two, a fold on all but one.
Gains are over the run's own settings. --docs puts the table into docs/results.md and draws docs/budget.png.
"""

import argparse
import contextlib
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from torch import nn

from bench.inner import InnerSplit
from bench.sets import ROOT, merged, run
from img2prompt.cli.check import load_params
from img2prompt.cli.documents import caption, put
from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.core.process import RECORD, made, records
from img2prompt.ensemble.constant import constant
from img2prompt.ensemble.members import CONSTANT
from img2prompt.ensemble.weights import Cosines, search_weights
from img2prompt.model_a.heads import LinearHead
from img2prompt.model_a.prediction import predict
from img2prompt.report.figures import COLOURS
from img2prompt.report.scores import markdown

POINTS = [(0, 4), (5, 4), (7, 4), (7, 6), (7, 9)]  # layers that train, epochs
FOLDS = (0, 2)
SHARED = ("prepare", "embed_prompts", "dedup", "folds", "clip", "embed_images", "knn")  # of the run's outputs
HEADS = {"model_a": ("model_a",), "linear, model_a": ("linear", "model_a")}


def project(folder: Path, layers: int, epochs: int) -> Path:
    """A project with the run's outputs, these settings, and what its frozen layers give."""
    home = folder / f"{layers}-{epochs}"
    (home / "outputs").mkdir(parents=True, exist_ok=True)
    for name in ("input", *(f"outputs/{stage}" for stage in SHARED)):
        if not (home / name).exists():
            (home / name).symlink_to(Path(name).resolve())
    settings = {"unfreeze": layers, "epochs": epochs, "linear": {"epochs": epochs}}
    run(home, merged(yaml.safe_load(Path("params.yaml").read_text()), {"model_a": settings}), ("freeze",))
    return home


def measure(seed: int) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Of the project here, by HEADS: cosines (m,) of `model_a` and `ensemble`, and `group`; and seconds of a split."""
    params, splits = load_params(), []
    of_models, seconds = [], dict.fromkeys(("linear", "model_a"), 0.0)
    for held_out in FOLDS:
        split = InnerSplit.read(params.model_a, params.folds.ids, held_out)
        members, rows = {}, split.rows
        for kind in seconds:
            members[kind], took = split.train(kind, seed)
            seconds[kind] += took / len(FOLDS)
        head, stored = LinearHead(split.start.whole, dropout=0.0, hidden=0), split.features.stored_pooled("cpu")
        members["ridge"] = predict(nn.Sequential(), head, stored, split.wanted, 1024, "cpu")
        members["model_b"] = np.load("outputs/knn/0/oof.npy", mmap_mode="r")[split.wanted]
        members[CONSTANT] = constant(rows.targets[0], rows.fold, params.folds.ids, rows.kept)[0][split.wanted]
        of_models.append(members)
        splits.append(split)
    group, found = np.concatenate([split.group for split in splits]), {}
    for heads, trained in HEADS.items():
        names = [*trained, "ridge", "model_b", CONSTANT]
        free = np.array(names) == CONSTANT
        cosines = [
            Cosines.between([members[name] for name in names], split.targets)
            for members, split in zip(of_models, splits, strict=True)
        ]
        mixed = [
            own.of_mix(search_weights(other, free=free)) for own, other in zip(cosines, cosines[::-1], strict=True)
        ]
        own = [cosine(members["model_a"], split.targets) for members, split in zip(of_models, splits, strict=True)]
        found[heads] = {"model_a": np.concatenate(own), "ensemble": np.concatenate(mixed), "group": group}
    return found, {heads: sum(seconds[kind] for kind in trained) for heads, trained in HEADS.items()}


def whole_run(home: Path, split_seconds: float, folds: int) -> float:
    """Seconds of a run with a project's settings: the run's here, with `freeze` and `model_a` replaced."""
    others = [one["seconds"] for one in records() if one["name"].split()[0] not in ("freeze", "model_a")]
    frozen = [one["seconds"] for one in records(home / RECORD) if one["name"] == "freeze"]
    return sum(others) + sum(frozen) + folds * split_seconds * (folds - 1) / (folds - 2)


def draw(path: Path, table: pd.DataFrame) -> None:
    """Draw a table of `main`, by minutes, as a PNG: the ensemble's score with the baseline beside Model A and without.

    The bars are the gain's interval over the first row, which is the run's own setting.
    """
    own = table.loc[0]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for heads, label in (("model_a", "Model A alone"), ("linear, model_a", "and the linear baseline")):
            of = table[table.heads == heads].sort_values("minutes")
            bars = np.abs(of[["low", "high"]].to_numpy().T - of.gain.to_numpy())
            colour = COLOURS[heads.partition(",")[0]]
            axes.errorbar(of.minutes, of.ensemble, yerr=bars, fmt="o-", linewidth=1, color=colour, label=label)
            above = heads == "model_a"
            for row in of.itertuples():
                axes.annotate(
                    f"{row.layers} x {row.epochs}", (row.minutes, row.ensemble), textcoords="offset points",
                    xytext=(-6, 6) if above else (6, -12), ha="right" if above else "left", color=colour,
                )  # fmt: skip
        axes.plot(own.minutes, own.ensemble, "o", markersize=12, fillstyle="none", color="black", label="this run")
        axes.set(xlabel="minutes of the whole run", ylabel="ensemble, mean cosine", xlim=(0, None))
        axes.set_title("Layers that train x epochs, on inner splits", fontsize=9)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the projects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="put the table and the figure into docs/")
    asked = parser.parse_args()
    section, folds = load_params().model_a, len(load_params().folds.ids)
    here = section.unfreeze, section.epochs
    lines, first = [], {}
    for layers, epochs in dict.fromkeys([here, *POINTS]):
        home = project(asked.folder.resolve(), layers, epochs)
        with contextlib.chdir(home):
            found, seconds = measure(asked.seed)
        for heads, scores in found.items():
            first = first or scores
            gain = scores["ensemble"] - first["ensemble"]
            low, high = bootstrap_interval(gain, first["group"])
            line = {
                "layers": layers, "epochs": epochs, "heads": heads, "model_a": scores["model_a"].mean(),
                "ensemble": scores["ensemble"].mean(), "gain": gain.mean(), "low": low, "high": high,
                "minutes": whole_run(home, seconds[heads], folds) / 60,
            }  # fmt: skip
            lines.append(line)
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}, flush=True
            )
    table = pd.DataFrame(lines)
    cells = [["layers", "epochs", "heads", "Model A", "ensemble", "gain [95%]", "whole run"], ["---"] * 7]
    for row in table.sort_values("minutes").itertuples():
        gain = f"{row.gain:+.4f} [{row.low:+.4f}, {row.high:+.4f}]" if row.Index else ""
        cells.append([
            str(row.layers), str(row.epochs), row.heads, f"{row.model_a:.4f}", f"{row.ensemble:.4f}", gain,
            f"{row.minutes:.1f} min",
        ])  # fmt: skip
    of = f"Inner splits of folds {', '.join(map(str, FOLDS))}, {len(first['group']):,} pictures, seed {asked.seed}"
    text = f"{markdown(cells)}\n{caption(of, [made()])}"
    print(text)
    if asked.docs:
        put({"budget": text}, ROOT)
        draw(ROOT / "docs/budget.png", table)


if __name__ == "__main__":
    main()
