"""The report's galleries: pictures with what their prompts are and what the models make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from img2prompt.core.blocks import Stack
from img2prompt.core.metric import cosine
from img2prompt.model_b.neighbours import nearest
from img2prompt.report.page import picture
from img2prompt.report.run import Run
from img2prompt.words.words import Said, Words

SHOWN = 8  # of the best, the median, the worst pictures, and of those that the models disagree on


@dataclass(frozen=True)
class Nearest:
    """Of one model: its cosine with the truth, and the prompt nearest to its prediction with their cosine."""

    model: str
    score: float
    prompt: str
    cosine: float


@dataclass(frozen=True)
class Card:
    """A picture of a gallery.

    source, id: its row. picture: its small copy, None where it cannot be read any more. prompt: the true one. said: in
    words, what the ensemble predicts. nearest: of Model A, Model B and the ensemble, the last one's first. apart: the
    cosine of Model A's prediction with Model B's.
    """

    source: str
    id: str
    picture: str | None
    prompt: str
    said: Said
    nearest: list[Nearest]
    apart: float


def galleries(run: Run, words: Words, device: str) -> dict[str, object]:
    """Cards of the ensemble's `best`, `median` and `worst` pictures, and of those that the models are most `apart` on.

    They are of test pictures where any prompt of these is known, as `test` says, and else of scored train pictures, out
    of fold. `of`: how many there are to choose from.
    """
    test = len(run.on_test) > 0
    table, rows = (run.on_test, run.test) if test else (run.oof, run.train)
    table = table[rows.image[table.index].notna()]
    models, index = run.leaders, table.index.to_numpy()
    apart = cosine(*(run.member(model, test).take(index) for model in models))
    order, shown = np.argsort(-table.ensemble.to_numpy(), kind="stable"), min(SHOWN, -(-len(table) // 3))
    middle = (len(order) - shown) // 2
    parts = {
        "best": order[:shown],
        "median": order[middle : middle + shown],
        "worst": order[len(order) - shown :][::-1],
        "apart": np.argsort(apart, kind="stable")[:shown],
    }
    chosen = np.unique(np.concatenate(list(parts.values())))
    cards = _cards(run, words, device, models, index[chosen], table.iloc[chosen], apart[chosen], test)
    place = dict(zip(chosen.tolist(), cards, strict=True))
    return {name: [place[number] for number in part.tolist()] for name, part in parts.items()} | {
        "test": test, "of": len(table),
    }  # fmt: skip


def _cards(
    run: Run,
    words: Words,
    device: str,
    models: Sequence[str],
    index: np.ndarray,
    scores: pd.DataFrame,
    apart: np.ndarray,
    test: bool,
) -> list[Card]:
    rows = (run.test if test else run.train).loc[index]
    predictions = {"ensemble": run.ensemble(index, test)}
    predictions |= {model: run.member(model, test)[index] for model in models}
    found = {model: _nearest(run, predicted, index, test, device) for model, predicted in predictions.items()}
    said = words(predictions["ensemble"])
    return [
        Card(
            row.source,
            row.id,
            picture(row.image),
            row.prompt,
            said[number],
            [Nearest(model, float(scores[model].iloc[number]), *near[number]) for model, near in found.items()],
            float(apart[number]),
        )
        for number, row in enumerate(rows.itertuples())
    ]


def _nearest(run: Run, predicted: np.ndarray, index: np.ndarray, test: bool, device: str) -> list[tuple[str, float]]:
    """Of each prediction (p, 384) the nearest prompt and their cosine: out of fold a train prompt of another fold."""
    found: list[tuple[str, float]] = [("", 0.0)] * len(predicted)
    everything = Stack([run.targets, run.text_targets])
    for held_out in [None] if test else np.unique(run.fold[index]).tolist():
        own = np.arange(len(index)) if test else np.flatnonzero(run.fold[index] == held_out)
        allowed = np.arange(len(everything)) if test else np.flatnonzero(run.fold != held_out)
        near = nearest(predicted[own], everything.take(allowed), 1, device)
        for place, row, distance in zip(own, allowed[near.index[:, 0]], near.distance[:, 0], strict=True):
            table, number = (run.train, row) if row < len(run.train) else (run.texts, row - len(run.train))
            found[place] = (table.prompt.iloc[number], 1 - float(distance) ** 2 / 2)
    return found
