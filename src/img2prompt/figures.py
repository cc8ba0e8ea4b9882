"""What people would rather look at than read: examples of the data, and the scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from img2prompt.pictures import open_picture

COLOURS = {
    "constant": "#9aa0a6", "ridge": "#e6ab02", "clip": "#4285f4", "model_a": "#1b9e77", "model_b": "#d95f02",
    "ensemble": "#7b3294",
}  # fmt: skip


def draw_examples(path: Path, table: pd.DataFrame, columns: int = 6, rows: int = 3) -> None:
    """Draw pictures with their prompts, evenly spread over a table of `picture` and `prompt`, as a JPEG."""
    side, text = 160, 52
    font = ImageFont.load_default(11)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + text) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(np.linspace(0, len(table) - 1, columns * rows).astype(int)):
        x, y = 8 + place % columns * (side + 8), 8 + place // columns * (side + text)
        sheet.paste(ImageOps.pad(open_picture(table.picture.iloc[row]), (side, side), color="white"), (x, y))
        lines = wrap(table.prompt.iloc[row], 28, max_lines=3, placeholder=" …")
        draw.multiline_text((x, y + side + 3), "\n".join(lines), "black", font, spacing=2)
    sheet.save(path, "JPEG", quality=88)


def draw_scores(
    path: Path,
    fold_scores: pd.DataFrame,
    alpha: float,
    curve: pd.DataFrame,
    histories: pd.DataFrame,
    thresholds: pd.DataFrame,
    threshold: float,
) -> None:
    """Draw fold scores, the alpha curve, training and the dedup table as a PNG; equal inputs are equal bytes.

    Args:
        path: of the PNG.
        fold_scores: `fold`, then a column of mean cosines a model.
        alpha: the best share of Model A's family out of fold.
        curve: `alpha`, `score`, the best at that share.
        histories: `epoch`, then a column of mean cosines a head.
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
        training.set(title="Training, mean over the held-out folds", xlabel="epoch", ylabel="mean cosine")
        dedup.plot(thresholds.threshold, thresholds["share"], marker=".", color="#555555")
        dedup.axvline(threshold, color="black", linewidth=0.8, linestyle=":", label=f"in use: {threshold}")
        dedup.set(title="Dedup", xlabel="cosine threshold", ylabel="share of prompts kept", ylim=(0, 1))
        dedup.legend(frameon=False)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _lines(axes: Axes, table: pd.DataFrame, x: str, style: Mapping[str, str]) -> None:
    for name in table.columns.drop(x):
        # As text, fold ids are equally far apart and no half fold gets a tick.
        places = table[x].astype(str) if x == "fold" else table[x]
        axes.plot(places, table[name], color=COLOURS[name], label=name, **style)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # never over a point
