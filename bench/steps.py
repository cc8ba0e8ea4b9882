"""Model A's training step by step, by a plain recipe and by ours: scores of rows it has seen and not, and its updates.

    python bench/steps.py [--fold 0] [--out steps.png]

Reads outputs/ of the last run and trains the paper's head of one fold twice. The plain recipe has three epochs,
whatever number of steps that is, and neither pull nor cross-fit nor other images, and nothing finds out its harm.
"""

import argparse
import tempfile
from pathlib import Path
from unittest.mock import patch

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from img2prompt.cli.check import load_params
from img2prompt.core.device import device
from img2prompt.model_a import training
from img2prompt.model_a.fold import Features, Fold, TrainRows
from img2prompt.model_a.heads import PaperHead
from img2prompt.model_a.params import ModelAParams
from img2prompt.model_a.validation import Validation

PLAIN = {"epochs": 3, "steps": 0, "lr_head": 3e-4, "pull": 0.0, "cross_fit": 0, "any_image": False}


def steps(fold: Fold, section: ModelAParams, plain: bool) -> tuple[pd.DataFrame, float, float, list[str]]:
    """A row a step: `training` and `validation`, mean cosines, and of each layer the update's norm over the weights'.

    Also the mean cosines of the start and of the point kept on the validation rows, and the layers' names.
    """
    where, found = device(), []
    start = fold.start(section)
    inputs = fold.features.inputs(section.augmentation, section.seed, where)[0]
    rows, watch, targets = np.flatnonzero(start.fitted)[:256], start.validation, fold.rows.targets[0]
    seen = Validation(inputs, rows, targets[rows], rows, 0.0, 256, where)
    unseen = Validation(inputs, watch, targets[watch], watch, 0.0, 256, where)
    at_start = float(unseen.cosines(fold.features.last, PaperHead(start.inner, 0.0, 0)).mean())
    step = training._Run._step

    def recorded(run: training._Run, number: int) -> None:
        layers = [*run.tower, run.head]
        before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
        step(run, number)
        record = {"training": seen.cosines(run.tower, run.head).mean()}
        record["validation"] = unseen.cosines(run.tower, run.head).mean()
        for place, (layer, old) in enumerate(zip(layers, before, strict=True)):
            moved = sum((p.detach() - q).square().sum() for p, q in zip(layer.parameters(), old, strict=True))
            size = sum(q.square().sum() for q in old)
            record[f"layer {place}" if layer is not run.head else "head"] = float(torch.sqrt(moved / size))
        found.append(record)
        run._train()

    with (
        patch.object(training._Run, "_step", recorded),
        patch.object(Validation, "harmful", (lambda *_: False) if plain else Validation.harmful),
        tempfile.TemporaryDirectory() as resume,
    ):
        seed = (section.seed, *fold.unseen)
        _, _, choice, _ = fold.train("model_a", start, [inputs], section, section, seed, where, Path(resume))
    table = pd.DataFrame(found)
    return table, at_start, at_start + choice.gain.mean, list(table.columns[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("steps.png"))
    asked = parser.parse_args()
    section = load_params().model_a
    fold = Fold(TrainRows.read(Path("outputs")), Features.read(Path("outputs"), 0, section), [asked.fold])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(2, 2, sharey="row")
        for column, (name, plain) in enumerate((("plain", True), ("ours", False))):
            table, start, kept, layers = steps(fold, section.model_copy(update=PLAIN if plain else {}), plain)
            number = np.arange(1, len(table) + 1)
            top, bottom = axes[:, column]
            top.plot(number, table.training, label="training rows", color="#d95f02")
            top.plot(number, table.validation, label="validation rows", color="#1b9e77")
            top.axhline(start, color="black", linewidth=0.8, linestyle=":", label="validation rows, at the start")
            top.axhline(
                kept, color="#1b9e77", linewidth=0.8, linestyle="--", label="validation rows, at the point kept"
            )
            top.set(title=f"{name}: {len(table)} steps", ylabel="mean cosine")
            for place, layer in enumerate(layers):
                colour = "black" if layer == "head" else mpl.colormaps["viridis"](place / len(layers))
                bottom.plot(number, table[layer], label=layer, color=colour)
            bottom.set(xlabel="step", ylabel="update / weights, norms", yscale="log")
            worst, end = (value - start for value in (table.validation.min(), table.validation.iloc[-1]))
            print(f"{name}, {len(table)} steps: training rows {table.training.iloc[-1]:.4f} at the end")
            print(f"  validation rows {start:.4f} at the start, {worst:+.4f} at worst, {end:+.4f} at the end, "
                  f"{kept - start:+.4f} at the point kept")  # fmt: skip
            first = table.iloc[: max(1, len(table) // 10)]
            print(f"  largest update in the first tenth: {', '.join(f'{x} {first[x].max():.3f}' for x in layers)}")
        axes[0, 0].legend(frameon=False)
        axes[1, 1].legend(frameon=False, ncols=2)
        figure.savefig(asked.out, dpi=110)


if __name__ == "__main__":
    main()
