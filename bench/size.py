"""Whole runs of several sizes beside each other: seconds and memory of every stage, and the scores.

    python -m bench.size FOLDER ... [--docs]

Each folder is a project whose last run is looked at. The public recipe's seconds for as many rows are arithmetic on
what `make bench` measured of it (bench/results/bench.csv): the same tower, five folds, neither check nor report.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from bench.run import PROJECT
from img2prompt.cli.documents import caption, put
from img2prompt.core.process import RECORD, records
from img2prompt.core.storage import read_json
from img2prompt.report.scores import markdown

MODELS = ("ridge", "model_a", "model_b", "ensemble")


def stages(home: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and peak memory in GB of every stage of the last run, over all folds and parts."""
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for record in records(home / RECORD):
        name = record["name"].split()[0]
        seconds[name] = seconds.get(name, 0.0) + record["seconds"]
        peaks[name] = max(peaks.get(name, 0.0), record["peak_gb"])
    return seconds, peaks


def public(rows: int) -> float:
    """Seconds of the public recipe on so many train and test rows: those measured, step by step, times their growth."""
    from bench.recipe import TASKS

    table = pd.read_csv(PROJECT / "bench/results/bench.csv")
    own = table[(table.variant == "the public recipe") & (table.runs > 0)]
    steps = own[own.stage.str.startswith("recipe: ")]
    growth = steps.stage.str.removeprefix("recipe: ").map(TASKS[0].growth)
    return float((steps.seconds * (rows / own.rows.max()) ** growth).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/speed.md")
    asked = parser.parse_args()
    found = [stages(home) for home in asked.runs]
    kept = [np.load(home / "outputs/dedup/kept.npy") for home in asked.runs]
    scores = [read_json(home / "outputs/scores.json") for home in asked.runs]
    cells = [["", *(f"{len(rows):,} prompts, {rows.sum():,} kept" for rows in kept)], ["---", *["---:"] * len(found)]]
    for name in found[-1][0]:
        cells.append([f"`{name}`", *(f"{s.get(name, 0):.0f} s, {p.get(name, 0):.1f} GB" for s, p in found)])
    cells.append(["all stages", *(f"{sum(s.values()):.0f} s, {max(p.values()):.1f} GB" for s, p in found)])
    others = [public(len(rows) + of["test"]["images"]) for rows, of in zip(kept, scores, strict=True)]
    ratios = [of / sum(own.values()) for of, (own, _) in zip(others, found, strict=True)]
    cells.append(["the public recipe", *(f"≈ {s:,.0f} s ({r:.1f})" for s, r in zip(others, ratios, strict=True))])
    for name in MODELS:
        of_model = [of[name] for of in scores]
        cells.append([f"`{name}`, out of fold, on test", *(f"{of['oof']:.4f}, {of['test']:.4f}" for of in of_model)])
    made = [record for home in asked.runs for record in records(home / RECORD)]
    text = f"{markdown(cells)}\n{caption('The sample', made)}"
    print(text)
    if asked.docs:
        put({"size": text}, PROJECT)


if __name__ == "__main__":
    main()
