"""Two experiments image by image: did the idea help, on which folds, and is it noise?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from img2prompt.core.metric import bootstrap_interval
from img2prompt.report.scores import fold_scores, markdown

KEY = ["split", "source", "id"]  # what makes a row of `cosines` the same image in two experiments
FACTS = [*KEY, "fold", "group", "scored"]  # the columns of `cosines` that are not a model's


def pair(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The images that two experiments have both scored, and notes on what makes them hard to compare.

    first, second: `cosines` as the ensemble stage stores them. The result has one row for each image, in the
    order of first: split, source, id, first's fold and group, and for each model that both have its cosines, MODEL_a
    and MODEL_b.
    Raises ValueError where no image, or no model, is in both.
    """
    models = [name for name in first.columns if name in second.columns and name not in FACTS]
    parts = [table[table.scored] for table in (first, second)]
    both = parts[0].merge(parts[1], on=KEY, suffixes=("_a", "_b"), validate="one_to_one")
    if both.empty or not models:
        raise ValueError("A and B have no scored image, or no model, in common: their `source` and `id` must agree")
    notes = []
    for split, place in (("train", "train images"), ("test", "test images")):
        counts = [int((table.split == split).sum()) for table in (*parts, both)]
        if min(counts) < max(counts):
            notes.append(f"{place}: {counts[0]} scored in A, {counts[1]} in B; compared on the {counts[2]} of both")
    if (both.fold_a != both.fold_b).any():
        notes.append("the folds differ: the columns by fold are A's folds")
    missing = sorted({*first.columns, *second.columns} - {*models, *FACTS})
    if missing:
        notes.append(f"only one of them has {', '.join(missing)}")
    columns = {"fold_a": "fold", "group_a": "group"}
    wanted = [*KEY, *columns, *(f"{name}_{side}" for name in models for side in "ab")]
    return both[wanted].rename(columns=columns), notes


def models_of(pairs: pd.DataFrame) -> list[str]:
    """The models of `pair`'s table, in order."""
    return [name.removesuffix("_b") for name in pairs.columns if name.endswith("_b")]


def verdict(low: float, high: float) -> str:
    """An interval of paired differences, B minus A, in words."""
    if low == high == 0:
        return "the same"
    if np.isnan(low):
        return "unknown"  # one group of prompts: no evidence on the spread
    return "better" if low > 0 else "worse" if high < 0 else "within noise"


def differences(pairs: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of `pair`'s table: a row for each model and each of `oof`, the folds and `test`.

    Columns: model, on, images (their number), a, b (mean cosines), difference (b - a), its 95% interval low, high
    (over whole groups of similar prompts), and the verdict on B.
    """
    train, test = pairs[pairs.split == "train"], pairs[pairs.split == "test"]
    places = {"oof": train} | {f"fold_{fold}": rows for fold, rows in train.groupby("fold")} | {"test": test}
    found = []
    for model in models_of(pairs):
        for place, rows in places.items():
            if len(rows):
                a, b = rows[f"{model}_a"].astype(float), rows[f"{model}_b"].astype(float)
                low, high = bootstrap_interval(b - a, rows.group)
                found.append((model, place, len(rows), a.mean(), b.mean(), (b - a).mean(), low, high))
    columns = ["model", "on", "images", "a", "b", "difference", "low", "high"]
    table = pd.DataFrame(found, columns=columns)
    return table.assign(verdict=[verdict(row.low, row.high) for row in table.itertuples()])


def differences_markdown(table: pd.DataFrame) -> str:
    """The result of `differences` as two Markdown tables: over all images with the verdict, and by fold."""
    places = list(dict.fromkeys(table.on))
    rows = {(row.model, row.on): row for row in table.itertuples()}
    models = list(dict.fromkeys(table.model))
    overall, by_fold = [["model"]], [["model"]]
    for place in places:
        if place.startswith("fold_"):
            by_fold[0].append(place)
        else:
            overall[0] += [f"{place}, A", f"{place}, B", "B - A [95%]", "B is"]
    for lines in (overall, by_fold):
        lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
        lines.extend([model] for model in models)
    for number, model in enumerate(models, start=2):
        for place in places:
            row = rows[model, place]
            change = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
            if place.startswith("fold_"):
                by_fold[number].append(change)
            else:
                overall[number] += [f"{row.a:.4f}", f"{row.b:.4f}", change, row.verdict]
    return "\n".join(markdown(lines) for lines in (overall, by_fold) if len(lines[0]) > 1)


def most_changed(pairs: pd.DataFrame, model: str, n: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The at most n images that improve most from A to B, and the at most n that worsen most: split, source, id, a, b.

    The largest change first; of equal ones the earlier row. An image that did not change is in neither.
    """
    table = pairs[KEY].assign(a=pairs[f"{model}_a"], b=pairs[f"{model}_b"])
    change = (table.b - table.a).sort_values(kind="stable")
    better = (-change[change > 0]).sort_values(kind="stable").index[:n]
    return table.loc[better], table.loc[change[change < 0].index[:n]]


def results(rows: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The table of several models, each on the same images, in the order given; the others are compared with the first.

    rows: name -> split, source, id, fold, group and `cosine`, one row for each scored image. Columns of the
    result: row, test (NaN where test prompts are unknown), oof, its 95% interval oof_low, oof_high, oof_std (over
    folds, ddof 0); then the paired differences, each with its 95% interval _low, _high: vs_above and vs_first
    (to the row above and to the first one, out of fold), test_vs_first (to the first one on test). Intervals
    resample whole groups of similar prompts. Raises ValueError where two rows are not on the same images and folds.
    """
    found: list[dict[str, object]] = []
    first = above = None
    for name, table in rows.items():
        ordered = table.sort_values(KEY, ignore_index=True)
        first = ordered if first is None else first
        facts = [*KEY, "fold", "group"]
        if not ordered[facts].equals(first[facts]):
            raise ValueError(f"{name} is scored on other images or folds than {next(iter(rows))}: they do not compare")
        train, test = (ordered[ordered.split == split] for split in ("train", "test"))
        scores = fold_scores(train.cosine.to_numpy(), train.fold.to_numpy())
        line = {"row": name, "test": test.cosine.mean(), "oof": scores["oof"]}
        line["oof_low"], line["oof_high"] = bootstrap_interval(train.cosine, train.group)
        line["oof_std"] = scores["std"]
        for kind, other, own in (
            ("vs_above", above, train),
            ("vs_first", first, train),
            ("test_vs_first", first, test),
        ):
            if other is not None and other is not ordered and len(own):
                gain = own.cosine - other.cosine[own.index]
                low, high = bootstrap_interval(gain, own.group)
                line |= {kind: gain.mean(), f"{kind}_low": low, f"{kind}_high": high}
        found.append(line)
        above = ordered
    kinds = ("vs_above", "vs_first", "test_vs_first")
    columns = ["row", "test", "oof", "oof_low", "oof_high", "oof_std"]
    columns += [f"{kind}{end}" for kind in kinds for end in ("", "_low", "_high")]
    return pd.DataFrame(found).reindex(columns=columns)
