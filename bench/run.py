"""Every stage against what people use instead, and against what the machine can do at most: `make bench`.

    make bench ARGS='--stages dedup knn --rows 10000 --runs 5'

Rounds of runs, ours first, each in a process of its own; medians. A stage has SECONDS: a run that they would not do
for, as far as earlier ones tell, is left out, but for our first. What it would take is arithmetic then (`runs` is 0),
as it is beyond the rows that a task is run on at most. bench.csv keeps the lines of stages that are not run now.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from img2prompt.core import process

process.settle()

import matplotlib as mpl  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from bench.harness import FP32, OURS, Limits, Task, Work, alone, limits, make, measure, tasks  # noqa: E402
from img2prompt.cli.documents import caption, put  # noqa: E402
from img2prompt.core import device  # noqa: E402
from img2prompt.core.storage import whole  # noqa: E402
from img2prompt.report.scores import markdown  # noqa: E402

PROJECT = Path(__file__).resolve().parent.parent
STAGES = ("embed_prompts", "dedup", "embed_images", "ridge", "model_a", "knn", "ensemble", "submit", "recipe")
ROWS = (10_000, 30_000, 90_000)
SECONDS = 190  # a stage: half an hour for all
COLUMNS = [
    "stage", "variant", "rows", "seconds", "ratio", "peak_mb", "share_of_limit", "identical", "least", "most", "runs",
    "commit", "processor", "date",
]  # fmt: skip
MACHINE = "machine"  # the stage of the limits' lines
UNITS = {"float32": 1e12, "bfloat16": 1e12, "copied": 1e9, "written": 1e9}  # what their seconds are of


@dataclass
class Runs:
    """A variant's runs on so many rows. seconds: of each run, of the whole "" and of parts by name."""

    seconds: list[dict[str, float]] = field(default_factory=list)
    peak_mb: float = 0.0
    identical: str = ""

    def add(self, run: Mapping[str, Any]) -> None:
        """Note what `measure` said."""
        self.seconds.append(run["seconds"])
        self.peak_mb = max(self.peak_mb, run["peak_mb"])
        self.identical = self.identical or run["identical"]

    @property
    def medians(self) -> dict[str, float]:
        """The median seconds of the whole and of parts."""
        return {part: statistics.median(run[part] for run in self.seconds) for part in self.seconds[0]}


def arithmetic(seconds: Mapping[str, float], growth: Mapping[str, float], times: float) -> dict[str, float]:
    """The seconds, of the whole "" and of parts, on so many times the rows; the whole is the sum of its parts."""
    grown = {part: value * times ** growth[part] for part, value in seconds.items() if part in growth}
    return {"": sum(grown.values())} | grown


def run(stage: str, task: Task, counts: Sequence[int], runs: int, home: Path, ends: Iterator[float]) -> Iterator[tuple]:
    """Run a task on each number of rows until its end on the clock; yield rows, the work, and every variant's Runs."""
    last: dict[str, tuple[int, dict[str, float]]] = {}
    failed: set[str] = set()
    for rows, end in zip(counts, ends, strict=False):
        folder = home / task.name / str(rows)
        work, found = alone(make, stage, task.name, folder, rows), {name: Runs() for name in task.runs}
        for number in range(runs):
            for name, own in found.items():
                expected = 0.0
                if own.seconds:
                    expected = own.medians[""]
                elif name in last:
                    before, seconds = last[name]
                    expected = arithmetic(seconds, task.growth, rows / before)[""]
                late = expected and time.monotonic() + expected > end
                if name in failed or (late and (name != OURS or own.seconds)):  # ours runs once on every size
                    continue
                try:
                    own.add(alone(measure, stage, task.name, name, folder, rows, number == 0))
                except Exception as error:
                    if name in (OURS, FP32):
                        raise
                    failed.add(name)
                    print(f"{task.name}: {name} is left out: {type(error).__name__}: {error}", flush=True)
        shutil.rmtree(folder)
        found = {name: own for name, own in found.items() if own.seconds}
        last |= {name: (rows, own.medians) for name, own in found.items()}
        print(f"{task.name}, {rows:,} rows: ", ", ".join(f"{n} {own.medians['']:.3g} s" for n, own in found.items()),
              flush=True)  # fmt: skip
        yield rows, work, found


def lines(task: Task, ran: Mapping[int, tuple[Work, Mapping[str, Runs]]], sizes: Sequence[int], here: Limits) -> list:
    """The lines of a task, as dicts: what was run, and by arithmetic the sizes that were not."""
    found = []
    for name in task.runs:
        own = {rows: of[name] for rows, (_, of) in ran.items() if name in of}
        if not own:
            continue
        bfloat16 = name in task.by_flag and device.has_bfloat16("cpu")
        for rows in sorted({*own, *sizes}):
            if rows in own:
                seconds, runs = own[rows].medians, own[rows]
                share = here.seconds(ran[rows][0], bfloat16) / seconds[""]
                about = {"peak_mb": round(runs.peak_mb), "identical": runs.identical, "share_of_limit": share or None}
            else:
                most = max(own)
                seconds, runs = arithmetic(own[most].medians, task.growth, rows / most), Runs()
                about = {}
            for part, median in seconds.items():
                spread = [of[part] for of in runs.seconds]
                line = {"stage": f"{task.name}: {part}" if part else task.name, "variant": name, "rows": rows}
                line |= {"seconds": median, "runs": len(spread)}
                line |= {"least": min(spread), "most": max(spread)} if spread else {}
                found.append(line | (about if not part else {}))
    return found


def bench(stage: str, sizes: Sequence[int], runs: int, home: Path) -> tuple[list[dict[str, Any]], Limits]:
    """The lines of a stage, and the machine's limits beside it."""
    start, here, found = time.monotonic(), alone(limits, home), []
    counts = {
        name: sorted({min(rows, task.most) if task.most else rows for rows in sizes})
        for name, task in tasks(stage).items()
    }
    parts = sum(map(len, counts.values()))
    ends = iter(start + SECONDS * (number + 1) / parts for number in range(parts))
    for name, task in tasks(stage).items():
        ran = {rows: (work, of) for rows, work, of in run(stage, task, counts[name], runs, home, ends)}
        found += lines(task, ran, sizes, here)
    return found, here


def machine(found: Sequence[Limits]) -> list[dict[str, Any]]:
    """The lines of the limits, of every stage's call."""
    lines = []
    for name, unit in UNITS.items():
        seconds = [unit / getattr(one, name) for one in found if getattr(one, name)]
        if seconds:
            spread = {"least": min(seconds), "most": max(seconds), "runs": len(seconds)}
            lines.append({"stage": MACHINE, "variant": name, "seconds": statistics.median(seconds)} | spread)
    return lines


def merged(new: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The new lines with a file's lines of other stages, in the order of STAGES, with ratios."""
    if path.is_file():
        old = pd.read_csv(path, dtype={"identical": str})
        new = pd.concat([old[~base(old).isin(base(new))], new])
    new = new.astype({"rows": "Int64"})  # the limits have none
    order = {stage: place for place, stage in enumerate((*STAGES, MACHINE))}
    new = new.iloc[np.argsort(base(new).map(order).to_numpy(), kind="stable")].reset_index(drop=True)
    ours = new[new.variant == OURS].set_index(["stage", "rows"]).seconds
    keys = pd.MultiIndex.from_frame(new[["stage", "rows"]])
    return new.assign(ratio=new.seconds / ours.reindex(keys).to_numpy())[COLUMNS]


def base(frame: pd.DataFrame) -> pd.Series:
    """The stage of every line, without what of it."""
    return frame.stage.str.partition(":")[0]


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def columns_of(frame: pd.DataFrame) -> list[int]:
    """The numbers of rows that most stages have."""
    stages = base(frame).groupby(frame.rows).nunique()
    return sorted(stages.index[stages == stages.max()].astype(int))


def cell(line: pd.Series) -> str:
    """Seconds with half their spread, and the ratio."""
    spread = f" ± {(line.most - line.least) / 2:.1g}" if line.runs > 1 else ""
    ratio = "" if line.variant == OURS else f" ({number(line.ratio)})"
    return f"{'' if line.runs else '≈ '}{number(line.seconds)}{spread}{ratio}"


def table(frame: pd.DataFrame) -> str:
    """The lines as Markdown, a row a variant."""
    frame, about = frame[frame.stage != MACHINE], frame[frame.stage == MACHINE].set_index("variant")
    sizes = columns_of(frame)
    titles = ["stage", "variant", *(f"{rows:,} rows" for rows in sizes), "MB", "of the limit", "identical"]
    cells = [titles, ["---"] * 2 + ["---:"] * (len(titles) - 3) + ["---"]]
    for (stage, variant), own in frame.groupby(["stage", "variant"], sort=False):
        by_rows, ran = own.set_index("rows"), own[own.runs > 0]
        beside = [f"{rows:,.0f}" for rows in ran.rows if rows not in sizes]
        largest = ran.iloc[-1]
        cells.append([
            f"{stage}, run on {beside[0]}" if beside else stage, variant,
            *(cell(by_rows.loc[rows]) if rows in by_rows.index else "" for rows in sizes),
            "" if pd.isna(largest.peak_mb) else f"{largest.peak_mb:,.0f}",
            "" if pd.isna(largest.share_of_limit) else f"{largest.share_of_limit:.0%}",
            "" if pd.isna(largest.identical) else largest.identical,
        ])  # fmt: skip
    made = frame[["commit", "processor", "date"]].drop_duplicates().to_dict("records")
    rates = [f"{name} {number(UNITS[name] / about.seconds[name] / 1e9)}" for name in about.index]
    said = f"{process.threads()} threads; a second: {', '.join(rates)} (products in GFLOP, bytes in GB)"
    return f"{markdown(cells)}\n{caption(said, made)}"


def draw(frame: pd.DataFrame, path: Path) -> None:
    """How many times as long as ours every variant takes, and its share of the limit; hollow: by arithmetic."""
    frame = frame[(frame.stage != MACHINE) & ~frame.stage.str.startswith("recipe:")]
    names = frame[["stage", "variant"]].drop_duplicates().reset_index(drop=True)
    place = {(row.stage, row.variant): number for number, row in names.iterrows()}
    colours = dict(zip(columns_of(frame), ("#e6ab02", "#4285f4", "#7b3294", "#1b9e77", "#d95f02"), strict=False))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 1.2 + 0.24 * len(names)), layout="constrained")
        ratios, shares = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for rows, own in frame.groupby("rows"):
            for some, fill, size in ((own[own.runs > 0], "full", 5), (own[own.runs == 0], "none", 9)):
                places = [place[key] for key in zip(some.stage, some.variant, strict=True)]
                colour = colours.get(rows, "#9aa0a6")
                ratios.plot(some.ratio, places, "o", color=colour, fillstyle=fill, markersize=size)
                shares.plot(100 * some.share_of_limit, places, "o", color=colour, fillstyle=fill, markersize=size)
        for axes in (ratios, shares):
            for row in names.index[1:]:
                if names.stage[row] != names.stage[row - 1]:
                    axes.axhline(row - 0.5, color="#dddddd", linewidth=0.8)
        ratios.axvline(1, color="black", linewidth=0.8, linestyle=":")
        labels = [f"{row.stage}   {row.variant}" for row in names.itertuples()]
        ratios.set(xscale="log", xlabel="seconds over ours", yticks=names.index, yticklabels=labels)
        ratios.xaxis.set_major_formatter("{x:g}")
        ratios.invert_yaxis()
        shares.set(xlabel="of what the machine can do at most, %", xlim=(0, None))
        legend = [(f"{rows:,} rows", colour, "full") for rows, colour in colours.items()]
        legend += [("other rows", "#9aa0a6", "full"), ("by arithmetic", "#9aa0a6", "none")]
        marks = [Line2D([], [], color=c, marker="o", linestyle="", fillstyle=fill, label=x) for x, c, fill in legend]
        figure.legend(handles=marks, loc="outside upper right", ncols=len(marks), frameon=False)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--runs", type=int, default=3, help="rounds, as far as a stage's time goes")
    parser.add_argument("--out", type=Path, default=PROJECT / "bench/results", help="the folder of bench.csv")
    parser.add_argument("--docs", action="store_true", help="put the table and the figure into docs/speed.md")
    options = parser.parse_args()
    print(f"{len(options.stages)} stages, {SECONDS / 60:.0f} minutes each at most", flush=True)
    found, here = [], []
    with tempfile.TemporaryDirectory() as home:
        for stage in options.stages:
            own, beside = bench(stage, sorted(options.rows), options.runs, Path(home))
            found += own
            here.append(beside)
    frame = merged(pd.DataFrame(found + machine(here)).assign(**process.made()), options.out / "bench.csv")
    with whole(options.out / "bench.csv") as path:
        frame.to_csv(path, index=False, float_format="%.4g")
    text = table(frame)
    print(text)
    if options.docs:
        put({"speed": text}, PROJECT)
        draw(frame, PROJECT / "docs/speed.png")


if __name__ == "__main__":
    main()
