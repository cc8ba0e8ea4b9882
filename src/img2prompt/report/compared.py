"""What a comparison says of experiments against their base, in tables, charts, pictures and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product

import numpy as np
import pandas as pd

from img2prompt.report.charts import Chart, Line, chart
from img2prompt.report.comparison import KEY, Pairs, Side, most_changed
from img2prompt.report.page import Cell, Table, cell, listed, picture
from img2prompt.report.scores import markdown

PLACES = {"oof": "out of fold", "test": "on test"}
SHOWN = 6  # images of an experiment that gain most, and as many that lose most


@dataclass(frozen=True)
class Card:
    """An image that an experiment changed.

    id: its row's. place: `out of fold` or `on test`. known: whether the row is among the workspace's. picture: its
    small copy, None where it cannot be had. base, score: its cosines.
    """

    id: str
    place: str
    known: bool
    picture: str | None
    prompt: str | None
    base: float
    score: float


def percent(level: float) -> str:
    """The level of an interval as a text."""
    return f"{100 * level:.4g}%"


def changed_params(base: Side, experiments: Sequence[Side]) -> Table:
    """The params in which any experiment differs from the base: a row for each, a column for each side."""
    sides = [base, *experiments]
    keys = sorted({key for side in sides for params in side.params for key in params})
    values = {key: [side.value(key) for side in sides] for key in keys}
    rows = [[cell(text) for text in (key, *texts)] for key, texts in values.items() if len(set(texts)) > 1]
    return Table("Params that differ", ["param", *(side.name for side in sides)], rows)


def _by_place(table: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    """The rows of `differences` by model and place."""
    return {(line.model, line.on): line for _, line in table.iterrows()}


def _difference(line: pd.Series | None) -> Cell:
    if line is None:
        return Cell("")
    interval = f"[{line.low:+.4f}, {line.high:+.4f}]" if np.isfinite(line.low) else ""
    return Cell(f"{line.difference:+.4f}", line.difference, interval)


def _cells(line: pd.Series | None) -> list[Cell]:
    facts = [""] * 3 if line is None else [line.verdict, line.base, line.score]
    return [*map(cell, facts), _difference(line)]


def scores(found: Mapping[str, pd.DataFrame], model: str, level: float) -> Table:
    """Every experiment's models, the one that is judged first: verdict, mean cosines and difference, by place.

    found: the `differences` of each experiment, by its name.
    """
    places = {on: place for on, place in PLACES.items() if any((table.on == on).any() for table in found.values())}
    columns = ["experiment", "model"]
    for place in places.values():
        columns += [place, f"base, {place}", f"score, {place}", f"difference, {place} [{percent(level)}]"]
    lines = {name: _by_place(table) for name, table in found.items()}
    models = dict.fromkeys([model, *(own for line in lines.values() for own, _ in line)])
    rows = [
        [cell(name), cell(own), *chain.from_iterable(_cells(lines[name].get((own, on))) for on in places)]
        for own, name in product(models, found)
        if any((own, on) in lines[name] for on in places)
    ]
    return Table("Every model against the base", columns, rows, filtered=True)


def by_fold(found: Mapping[str, pd.DataFrame], model: str, level: float) -> Table:
    """What a model of every experiment gains over the base in every fold."""
    lines = {name: _by_place(table) for name, table in found.items()}
    folds = dict.fromkeys(on for line in lines.values() for _, on in line if on.startswith("fold_"))
    rows = [[cell(name), *(_difference(line.get((model, on))) for on in folds)] for name, line in lines.items()]
    columns = ["experiment", *(fold.replace("_", " ") for fold in folds)]
    return Table(f"Differences of {model} by fold [{percent(level)}]", columns, rows)


def charts(found: Mapping[str, pd.DataFrame], model: str, level: float, at_least: float) -> list[Chart]:
    """A chart for each experiment, all on one scale: what the model gains in all, in every fold and on test."""
    tables = {name: table[table.model == model] for name, table in found.items()}
    reach = [end for table in tables.values() for end in (*table.low.dropna(), *table.high.dropna(), *table.difference)]
    edges, legend = ([0.0, -at_least, at_least], f"0 and ±{at_least:g}") if at_least else ([0.0], "no difference")
    drawn = []
    for name, table in tables.items():
        of_fold = table.on.str.startswith("fold_").to_numpy()
        lines = [
            Line(what, part.difference, np.flatnonzero(rows), style, part.low, part.high, joined=False)
            for what, style, rows in (("all images", "main", ~of_fold), ("a fold's", "second", of_fold))
            for part in [table[rows]]
        ]
        upright = [-0.5, len(table) - 0.5]
        lines[:0] = [Line(legend, [edge, edge], upright, "faint", dots=False) for edge in edges]
        line = table.iloc[0]
        about = f"{line.verdict.capitalize()}: {line.difference:+.4f} {PLACES[line.on]}."
        label = f"cosine minus the base's, with its {percent(level)} interval"
        places = [PLACES.get(on, on.replace("_", " ")) for on in table.on]
        drawn.append(chart(name, about, label, "", lines, y_names=places, reach=reach))
    return drawn


def cards(pairs: Pairs, model: str, known: pd.DataFrame) -> dict[str, list[Card]]:
    """The images that an experiment changed most, for the better and for the worse.

    known: the workspace's images and prompts by split, source and id.
    """
    found = {}
    for name, table in zip(("better", "worse"), most_changed(pairs, model, SHOWN), strict=True):
        rows = table.merge(known, on=KEY, how="left", indicator="found").astype(object)
        rows = rows.where(rows.notna(), None)
        found[name] = [
            Card(
                row.id,
                PLACES["test" if row.split == "test" else "oof"],
                row.found == "both",
                picture(row.image),
                row.prompt,
                row.base,
                row.score,
            )
            for row in rows.itertuples()
        ]
    return found


def notes(base: Side, experiments: Sequence[Side], params: Table, level: float) -> list[str]:
    """What to know of a comparison before its verdicts are believed; params: of `changed_params`."""
    found = []
    if len(experiments) > 1:
        found.append(
            f"Intervals are {percent(level)}, not 95%: those of the {len(experiments)} experiments hold together in "
            "95 of 100 cases (Bonferroni). Other models than the one that is judged, folds and test are there to look "
            "at, and not counted as questions of their own"
        )
    several = len(base.names) > 1
    silent = [side.name for side in experiments if not several and len(side.names) == 1]
    borrowed = [side.name for side in experiments if several != (len(side.names) > 1)]
    if silent:
        found.append(
            f"{base.name} and {listed(silent)} are one run each: how much another seed of the training would change is "
            "not in the intervals. Runs with other seeds are joined to a side by commas"
        )
    if borrowed:
        found.append(
            f"Of {base.name} and {listed(borrowed)}, one side is one run: its training is taken to vary as that of the "
            "other side's seeds does"
        )
    if any(row[0].text.startswith("prepare.sample.") for row in params.rows):
        found.append("`prepare.sample` differs: pictures of the sample that have the same id need not be the same")
    return found + [note for side in (base, *experiments) for note in side.notes()]


def as_markdown(table: Table) -> str:
    """A table in Markdown, without its caption."""
    rule = [
        "---:" if any(row[place].number is not None for row in table.rows) else "---"
        for place in range(len(table.columns))
    ]
    texts = [[f"{own.text} {own.interval}".strip() for own in row] for row in table.rows]
    return markdown([[text.replace("|", "\\|") for text in line] for line in (table.columns, rule, *texts)])
