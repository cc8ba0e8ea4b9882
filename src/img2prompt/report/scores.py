"""Scores by fold, with intervals, as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from img2prompt.core.metric import bootstrap_interval


def fold_scores(cosines: np.ndarray, fold: np.ndarray, fold_ids: Sequence[int]) -> dict[str, float]:
    """Mean cosines of out-of-fold predictions by fold; cosines (n,) and fold (n,) are of the scored rows only.

    `fold_0` .. for each of fold_ids, `mean` and `std` (ddof 0) over those, and `oof` over all rows at once.
    Raises ValueError for a fold without rows.
    """
    missing = set(fold_ids) - set(fold.tolist())
    if missing:
        raise ValueError(f"folds {sorted(missing)} have no scored row: use fewer folds or a milder dedup")
    by_fold = {f"fold_{i}": float(cosines[fold == i].mean()) for i in fold_ids}
    over_folds = np.array(list(by_fold.values()))
    return {
        **by_fold,
        "mean": float(over_folds.mean()),
        "std": float(over_folds.std()),
        "oof": float(cosines.mean()),
    }


def scores_table(cosines: pd.DataFrame, models: Sequence[str], fold_ids: Sequence[int]) -> str:
    """A Markdown table of the scores: one row for each of models, in the order given.

    cosines: one row for each image, with `split` (train or test), `fold`, `group`, `scored`, and for each model a
    column with the cosine of its prediction. Columns of the table: the `fold_scores`, `oof` with its 95% interval, and,
    where there are scored test rows, `test` with its own. Intervals are over whole groups of similar prompts.
    """
    scored = cosines[cosines.scored]
    train, test = scored[scored.split == "train"], scored[scored.split == "test"]
    columns = ["model", *(f"fold_{i}" for i in fold_ids), "mean", "std", "oof [95%]"]
    columns += ["test [95%]"] if len(test) else []
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for name in models:
        scores = fold_scores(train[name].to_numpy(), train.fold.to_numpy(), fold_ids)
        cells = [name, *(f"{score:.4f}" for key, score in scores.items() if key != "oof")]
        for rows in (train, test) if len(test) else (train,):
            low, high = bootstrap_interval(rows[name], rows.group)
            cells.append(f"{rows[name].mean():.4f} [{low:.4f}, {high:.4f}]")
        lines.append(cells)
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first two the header and its rule, as a Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def gain_over_best_member(cosines: pd.DataFrame, members: Sequence[str]) -> str:
    """A line of text: the ensemble minus its best member, out of fold and, where there are test rows, on test.

    cosines: as in `scores_table`, with the column `ensemble`. The best member is the best on these same rows,
    which makes it the hardest to beat. Intervals are of the paired differences.
    """
    parts = []
    for split, place in (("train", "out of fold"), ("test", "on test")):
        rows = cosines[cosines.scored & (cosines.split == split)]
        if len(rows):
            best = rows[members].mean().idxmax()
            gain = rows["ensemble"] - rows[best]
            low, high = bootstrap_interval(gain, rows.group)
            parts.append(f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}] {place} ({best})")
    return f"ensemble minus its best member: {', '.join(parts)}\n"
