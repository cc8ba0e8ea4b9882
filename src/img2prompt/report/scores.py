"""Scores by fold, with intervals, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.core.storage import numbered
from img2prompt.ensemble.members import kind_of, name_of
from img2prompt.prompts.folds import components, similarity_forest


def known_cosines(
    rows: pd.DataFrame, predictions: Mapping[str, np.ndarray], targets: np.ndarray, threshold: float
) -> pd.DataFrame:
    """The cosines of test predictions, for the rows whose prompt is known: `split`, `source`, `id`, `fold` (-1), ...

    rows: the m test rows. predictions: by model (m, 384). targets (k, 384) float32, norm 1: of the k rows with a
    prompt, in order. `group` joins prompts with a cosine of at least threshold; a column a model follows `scored`.
    """
    known = rows.prompt.notna().to_numpy()
    found = rows.loc[known, ["source", "id"]].assign(split="test", fold=-1, group=0, scored=True)
    if len(targets):
        found["group"] = components(len(targets), similarity_forest(targets, threshold, threshold), threshold)
    for name, predicted in predictions.items():
        found[name] = (cosine(predicted[known], targets) if len(targets) else np.empty(0)).astype(np.float32)
    return found


def fold_scores(cosines: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Mean cosines of out-of-fold predictions by fold; cosines (n,) and fold (n,) are of the scored rows only.

    `fold_0` .. for each fold, `mean` and `std` (ddof 0) over those, and `oof` over all rows at once.
    """
    found = {f"fold_{held_out}": float(cosines[fold == held_out].mean()) for held_out in np.unique(fold).tolist()}
    over_folds = np.array(list(found.values()))
    return {**found, "mean": float(over_folds.mean()), "std": float(over_folds.std()), "oof": float(cosines.mean())}


def scores_of(cosines: pd.DataFrame, models: Sequence[str]) -> dict[str, dict[str, float]]:
    """The `fold_scores` of every model, and `test` where test prompts are known.

    cosines: as in `scores_table`.

    Raises:
        ValueError: a fold has no scored row.
    """
    train, test = (cosines[(cosines.split == split)] for split in ("train", "test"))
    scored = train[train.scored]
    if missing := set(train.fold) - set(scored.fold):
        raise ValueError(f"folds {sorted(missing)} have no scored row: use fewer folds or a milder dedup")
    found = {name: fold_scores(scored[name].to_numpy(np.float64), scored.fold.to_numpy()) for name in models}
    for name in models if len(test) else ():
        found[name]["test"] = float(test[name].to_numpy(np.float64).mean())
    return found


def by_fold(scores: Mapping[str, Mapping[str, float]], models: Sequence[str]) -> pd.DataFrame:
    """The scores of `scores_of` as a table: `fold`, and a column a model."""
    folds = [key for key in scores[models[0]] if key.startswith("fold_")]
    columns = {name: [scores[name][key] for key in folds] for name in models}
    return pd.DataFrame({"fold": [int(key.removeprefix("fold_")) for key in folds]} | columns)


def mean_histories(folder: Path, folds: Sequence[int]) -> pd.DataFrame:
    """Scores of the validation rows by `epoch`, mean over the folds: a column a head, of a second CLIP linear_1, ...

    Where nothing was trained, for want of validation rows, a fold is left out.
    """
    columns = {}
    for clip in numbered(folder / f"fold_{folds[0]}"):
        trained = sorted((folder / f"fold_{folds[0]}" / clip.name).glob("*_history.csv"))
        for kind in (file.name.removesuffix("_history.csv") for file in trained):
            files = [folder / f"fold_{held_out}" / clip.name / f"{kind}_history.csv" for held_out in folds]
            scores = pd.concat([pd.read_csv(file).score for file in files], axis=1)
            columns[name_of(kind, int(clip.name))] = scores.mean(axis=1)
    table = pd.DataFrame(columns)
    table.insert(0, "epoch", table.index + 1)
    return table


def choices_table(folder: Path, folds: Sequence[int]) -> pd.DataFrame:
    """What validation rows chose: `fold`, `head` (of a second CLIP linear_1, ...), and the columns of choices.csv."""
    parts = []
    for held_out in folds:
        for clip in numbered(folder / f"fold_{held_out}"):
            part = pd.read_csv(folder / f"fold_{held_out}" / clip.name / "choices.csv")
            part["head"] = [name_of(kind, int(clip.name)) for kind in part["head"]]
            part.insert(0, "fold", held_out)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def over_start(cosines: pd.DataFrame, choices: pd.DataFrame) -> str:
    """A line of text for each trained head: its scores minus those of the ridge regression that it starts from.

    cosines: as in `scores_table`. choices: of `choices_table`. Intervals are of the paired differences. A head that
    ends below its start, beyond doubt, is named in so many words.
    """
    lines = []
    for head, chosen in choices.groupby("head", sort=False):
        clip = kind_of(str(head))[1]
        parts, below = [], False
        for split, place in (("train", "out of fold"), ("test", "on test")):
            rows = cosines[cosines.scored & (cosines.split == split)]
            if len(rows):
                gain = rows[head] - rows[name_of("ridge", clip)]
                low, high = bootstrap_interval(gain, rows.group)
                parts.append(f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}] {place}")
                below |= split == "train" and high < 0
        shares = ", ".join(f"{share:.1f}" for share in chosen["share"])
        lines.append(
            f"{head} minus its start, {name_of('ridge', clip)}: {', '.join(parts)}; by fold, the validation rows went "
            f"{shares} of the way"
            + ("; it ENDS BELOW ITS START: take it out of ensemble.members, or lower its rates" if below else "")
        )
    return "\n".join(lines) + "\n"


def scores_table(cosines: pd.DataFrame, models: Sequence[str]) -> str:
    """A Markdown table of the scores: one row for each of models, in the order given.

    cosines: one row for each image, with `split` (train or test), `fold`, `group`, `scored`, and for each model a
    column with the cosine of its prediction. Columns of the table: the `fold_scores`, `oof` with its 95% interval, and,
    where there are scored test rows, `test` with its own. Intervals are over whole groups of similar prompts.
    """
    scored = cosines[cosines.scored]
    train, test = scored[scored.split == "train"], scored[scored.split == "test"]
    columns = ["model", *(f"fold_{i}" for i in np.unique(train.fold)), "mean", "std", "oof [95%]"]
    columns += ["test [95%]"] if len(test) else []
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for name in models:
        scores = fold_scores(train[name].to_numpy(), train.fold.to_numpy())
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
