"""Figures of the scores, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from img2prompt.ensemble.members import kind_of

COLOURS = {
    "constant": "#9aa0a6", "ridge": "#e6ab02", "linear": "#4285f4", "model_a": "#1b9e77", "model_b": "#d95f02",
    "ensemble": "#7b3294",
}  # fmt: skip


def draw_scores(
    path: Path,
    fold_scores: pd.DataFrame,
    alpha: float,
    curve: pd.DataFrame,
    histories: pd.DataFrame,
    thresholds: pd.DataFrame,
    threshold: float,
) -> None:
    """Draw fold scores, the alpha curve, training and the dedup table as a PNG; equal inputs give equal bytes.

    Args:
        path: of the PNG.
        fold_scores: `fold`, then a column of mean cosines for each model.
        alpha: the best share of Model A's family out of fold.
        curve: `alpha`, `score`, the best mean cosine at that share.
        histories: `epoch`, then a column of mean cosines on validation rows for each head.
        thresholds: `threshold`, `kept`, `share`.
        threshold: the one that training used.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        folds, mix, training, dedup = figure.subplots(2, 2).flat
        _lines(folds, fold_scores, "fold", {"marker": "o", "linestyle": "none"})
        folds.set(title="Fold scores, out of fold", ylabel="mean cosine", xlabel="fold")
        mix.plot(curve.alpha, curve.score, color=COLOURS["ensemble"])
        mix.axvline(alpha, color="black", linewidth=0.8, linestyle=":", label=f"best: {alpha:.3f}")
        mix.set(
            title="Ensemble, out of fold", xlabel="alpha: 0 is Model B, 1 is Model A's family", ylabel="mean cosine"
        )
        mix.legend(frameon=False)
        _lines(training, histories, "epoch", {"marker": "."})
        training.set(title="Training: validation rows, mean over the folds", xlabel="epoch", ylabel="mean cosine")
        training.xaxis.get_major_locator().set_params(integer=True)
        dedup.plot(thresholds.threshold, thresholds["share"], marker=".", color="#555555")
        dedup.axvline(threshold, color="black", linewidth=0.8, linestyle=":", label=f"in use: {threshold}")
        dedup.set(title="Dedup", xlabel="cosine threshold", ylabel="share of prompts kept", ylim=(0, 1))
        dedup.legend(frameon=False)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def draw_results(path: Path, table: pd.DataFrame, ours: int) -> None:
    """Draw the table of `comparison.results` as a PNG: scores, and what each row gains over the first.

    The last `ours` rows stand below a line. Test scores are drawn where they are known.
    """
    places = np.arange(len(table))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 1.2 + 0.32 * len(table)), layout="constrained")
        scores, gains = figure.subplots(1, 2, sharey=True)
        for axes, oof, test in ((scores, "oof", "test"), (gains, "vs_first", "test_vs_first")):
            width = np.abs(table[[f"{oof}_low", f"{oof}_high"]].to_numpy().T - table[oof].to_numpy())
            axes.errorbar(
                table[oof], places + 0.12, xerr=width, fmt="o", color=COLOURS["linear"], label="out of fold, 95%"
            )
            axes.plot(table[test], places - 0.12, "D", color=COLOURS["model_b"], fillstyle="none", label="test")
            axes.axhline(len(table) - ours - 0.5, color="black", linewidth=0.8)
        gains.axvline(0, color="black", linewidth=0.8, linestyle=":")
        scores.set(xlabel="mean cosine", yticks=places, yticklabels=table.row)
        scores.invert_yaxis()
        gains.set(xlabel=f"minus {table.row[0]}, image by image")
        figure.legend(*scores.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _lines(axes: Axes, table: pd.DataFrame, x: str, style: Mapping[str, str]) -> None:
    for name in table.columns.drop(x):
        # As text, fold ids are equally far apart and no half fold gets a tick.
        places = table[x].astype(str) if x == "fold" else table[x]
        kind, clip = kind_of(name)
        line = {"color": COLOURS.get(kind), "linestyle": "--" if clip else "-"}
        axes.plot(places, table[name], label=name, **line | style)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # never over a point
