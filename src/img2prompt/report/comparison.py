"""Experiments image by image against a base: did the idea help, on which folds, and is it noise?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import t

from img2prompt.core.metric import bootstrap_interval
from img2prompt.report.scores import fold_scores

KEY = ["split", "source", "id"]  # what makes a row of `cosines` the same image in two experiments
FACTS = [*KEY, "fold", "group", "scored"]  # the columns of `cosines` that are not a model's


@dataclass(frozen=True)
class Side:
    """The base or an experiment: one run, or several that differ in their seeds.

    names, cosines, params: of each run; cosines as the scores stage stores them, params by their dotted keys.
    """

    names: Sequence[str]
    cosines: Sequence[pd.DataFrame]
    params: Sequence[Mapping[str, object]]

    @property
    def name(self) -> str:
        """The first run's name, and how many seeds there are."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} ({len(self.names)} seeds)"

    def value(self, key: str) -> str:
        """A param's value as a text; where the runs differ in it, all of its values."""
        return ", ".join(dict.fromkeys(str(params.get(key, "not there")) for params in self.params))

    def notes(self) -> list[str]:
        """What the runs differ in that is no seed. Raises ValueError where two of them have the same cosines."""
        for (one, first), (other, second) in combinations(zip(self.names, self.cosines, strict=True), 2):
            if first.equals(second):
                raise ValueError(
                    f"{one} and {other} have the same cosines in every row: the runs of a side that are joined by "
                    "commas must be trained with different seeds (`dvc exp run -S model_a.seed=1`)"
                )
        found, own = [], self.params[0]
        for name, params in zip(self.names[1:], self.params[1:], strict=True):
            changed = [key for key in sorted({*own, *params}) if params.get(key) != own.get(key)]
            more = [key for key in changed if key.split(".")[-1] != "seed"]
            if more:
                found.append(f"{self.names[0]} and {name} differ in {', '.join(more)}, not only in seeds")
            elif not changed:
                found.append(f"{self.names[0]} and {name} differ in no param, so not in seeds")
        return found


@dataclass(frozen=True)
class Pairs:
    """The images that every run of a base and of an experiment has scored.

    rows: split, source, id, fold and group, one row an image, in the order, folds and groups of the base's first run.
    base, other: for each model that all runs have, in order, its cosines (n, runs) float64.
    """

    rows: pd.DataFrame
    base: dict[str, np.ndarray]
    other: dict[str, np.ndarray]


def pair(base: Side, other: Side) -> tuple[Pairs, list[str]]:
    """The images of both sides, and notes on what makes the sides hard to compare.

    Raises ValueError where no image, or no model, is in all runs.
    """
    tables = [*base.cosines, *other.cosines]
    models = [name for name in tables[0].columns if name not in FACTS and all(name in table for table in tables)]
    parts = [table[table.scored].set_index(KEY, verify_integrity=True) for table in tables]
    images = parts[0].index
    for part in parts[1:]:
        images = images[images.isin(part.index)]
    if images.empty or not models:
        raise ValueError(
            f"{base.name} and {other.name} have no scored image, or no model, in common: their `source` and `id` "
            "must agree"
        )
    both = [part.loc[images] for part in parts]
    notes = []
    for split in ("train", "test"):
        counts = sorted({int((part.index.get_level_values("split") == split).sum()) for part in parts})
        shared = int((images.get_level_values("split") == split).sum())
        if counts != [shared]:
            each = " to ".join(map(str, (counts[0], counts[-1])[: len(counts)]))
            notes.append(f"{split} images: {each} scored by a run; compared on the {shared} that all runs have")
    if any((part.fold != both[0].fold).any() for part in both):
        notes.append(f"the folds differ: those of {base.names[0]} are shown")
    missing = sorted({name for table in tables for name in table.columns} - {*models, *FACTS})
    if missing:
        notes.append(f"not every run has {', '.join(missing)}")
    runs = len(base.cosines)
    cosines = {model: np.column_stack([part[model].to_numpy(np.float64) for part in both]) for model in models}
    rows = both[0].reset_index()[[*KEY, "fold", "group"]]
    return Pairs(
        rows,
        {model: values[:, :runs] for model, values in cosines.items()},
        {model: values[:, runs:] for model, values in cosines.items()},
    ), notes


def interval(base: np.ndarray, other: np.ndarray, group: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """(low, high) around the mean of other (n, l) minus the mean of base (n, k): a row an image, a column a seed.

    The variance is the sum of what groups of prompts and what seeds bring: that of the mean over whole groups drawn at
    random, of the differences between the two sides' mean cosines, plus, for each side, the variance of its seeds'
    means over their number. A side of one seed is taken to vary as the other side does; where both are of one, how
    training varies is unknown and not in the interval. The quantile is Student's, with Satterthwaite's degrees of
    freedom for such a sum (Biometrics Bulletin 2, 1946): two to five seeds say little of their own variance, and
    drawing them with replacement, as a bootstrap does, would understate it by (k - 1) / k besides. What a seed changes
    image by image is in both parts, so that the interval is wide rather than narrow where seeds hardly differ.

    One group alone tells nothing about the spread and gives (nan, nan).
    """
    gain = other.mean(axis=1) - base.mean(axis=1)
    mean, groups = gain.mean(), np.unique(group, return_inverse=True)[1]
    sums = np.bincount(groups, weights=gain - mean)
    if len(sums) < 2:
        return float("nan"), float("nan")
    # (variance, degrees of freedom)
    parts = [(np.sum(sums**2) / len(gain) ** 2 * len(sums) / (len(sums) - 1), len(sums) - 1)]
    for own, theirs in ((base, other), (other, base)):
        if own.shape[1] > 1:
            shares = 1 / own.shape[1] + (theirs.shape[1] == 1)
            parts.append((own.mean(axis=0).var(ddof=1) * shares, own.shape[1] - 1))
    variance = sum(part for part, _ in parts)
    if not variance:
        return float(mean), float(mean)
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    width = t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
    return float(mean - width), float(mean + width)


def verdict(low: float, high: float, at_least: float = 0.0) -> str:
    """An interval around an experiment's gain over the base in words; at_least: the smallest gain that matters."""
    if np.isnan(low):
        return "unknown"  # one group of prompts: no evidence on the spread
    if low == high == 0:
        return "the same"
    shown = {"better": low, "worse": -high}  # by how much at least
    for word, least in shown.items():
        if least > 0 and least >= at_least:
            return f"{word} by at least {at_least:g}" if at_least else word
    if max(-low, high) < at_least:
        return "no difference that matters"
    for word, least in shown.items():
        if least > 0:
            return f"{word}, perhaps by less than {at_least:g}"
    return "within noise"


def fails(low: float, high: float, gate: str, at_least: float = 0.0) -> bool:
    """Whether an experiment with this interval around its gain does not pass a gate.

    `worse`: it is shown to lose, and a loss of at_least or more is not ruled out. `not-better`: it is not shown to
    gain, or not as much as at_least.
    """
    if gate == "not-better":
        return not (low > 0 and low >= at_least)
    return high < 0 and low <= -at_least


def differences(pairs: Pairs, level: float = 0.95, at_least: float = 0.0) -> pd.DataFrame:
    """What an experiment gains over its base: a row for each model and each of `oof`, the folds and `test`.

    Columns: model, on, images (their number), base, score (mean cosines of both sides), difference (score - base), its
    `interval` low, high, and the `verdict` on the experiment.
    """
    split, fold = pairs.rows.split.to_numpy(), pairs.rows.fold.to_numpy()
    train = split == "train"
    places = {"oof": train} | {f"fold_{own}": train & (fold == own) for own in np.unique(fold[train])}
    places["test"] = split == "test"
    found = []
    for model in pairs.base:
        for place, rows in places.items():
            if rows.any():
                base, other = pairs.base[model][rows], pairs.other[model][rows]
                low, high = interval(base, other, pairs.rows.group.to_numpy()[rows], level)
                scores = base.mean(), other.mean()
                line = (model, place, int(rows.sum()), *scores, scores[1] - scores[0], low, high)
                found.append((*line, verdict(low, high, at_least)))
    return pd.DataFrame(
        found, columns=["model", "on", "images", "base", "score", "difference", "low", "high", "verdict"]
    )


def most_changed(pairs: Pairs, model: str, n: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The at most n images that gain most, and the at most n that lose most: split, source, id, base, score.

    The largest change first; of equal ones the earlier row. An image that did not change is in neither.
    """
    table = pairs.rows[KEY].assign(base=pairs.base[model].mean(axis=1), score=pairs.other[model].mean(axis=1))
    found, change = [], (table.score - table.base).to_numpy()
    for gain in (change, -change):
        order = np.argsort(-gain, kind="stable")[:n]
        found.append(table.iloc[order[gain[order] > 0]])
    return found[0], found[1]


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
