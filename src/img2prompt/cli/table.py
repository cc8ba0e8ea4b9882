"""Make the paper's table on the data of params.yaml, each row an experiment.

Rows that need the same run share one: an experiment named `table-...`, run in a copy of the project (`dvc exp run
--temp`), so that the workspace stays as it is. What an experiment has in common with one before it, or with the
workspace's own runs, comes from DVC's cache. `img2prompt table knn.k=50` sets a param for every row.

`img2prompt table --docs` makes no table: it puts the scores of the last run and the last table into README.md and
docs/*.md, each between the lines `<!-- table: scores NAME -->` or `<!-- table: paper NAME -->` and `<!-- end -->`. NAME
is that of the data in the report: `sample`, or `my/train`.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from img2prompt.cli.compare import COSINES, read_run
from img2prompt.cli.documents import caption, put
from img2prompt.core.metric import bootstrap_interval
from img2prompt.core.process import CHANGED, commit, made, records, turn
from img2prompt.core.storage import digest, read_json, whole_folder, write_json
from img2prompt.report.comparison import KEY, results
from img2prompt.report.figures import draw_results
from img2prompt.report.run import data_of
from img2prompt.report.scores import gain_over_best_member, markdown

# The settings of the paper's method, without our additions, whatever params.yaml says; our rows, below the line, take
# params.yaml as it is.
PAPER = {
    "dedup.threshold": "0.85",
    "dedup.at_random": "false",
    "model_a.heads": "[linear,model_a]",
    "model_a.pretrain": "false",
    "model_a.layer_decay": "1.0",
    "model_a.mse": "0.0",
    "model_a.hidden": "0",
    "model_a.ema": "0.0",
    "model_a.tta": "[]",
    "model_a.any_image": "false",
    "knn.keys": "both",
    "ensemble.members": "[model_a,model_b]",
    "ensemble.clips": "[0]",
    "ensemble.alpha": "search",
}
FROZEN = {"model_a.unfreeze": "0"}  # the heads alone, on the untouched tower
BASELINE = {"model_a.heads": "[linear]", "ensemble.members": "[linear,model_b]"}  # of the heads, this one alone


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of the table: a model of the experiment that these settings make, and the paper's own score."""

    name: str
    model: str
    settings: dict[str, str]
    paper: float | None = None


ROWS = [
    TableRow("CLIP", "linear", PAPER | BASELINE | {"dedup.threshold": "1"}, 0.5642),
    TableRow("CLIP + filter 1 (0.95)", "linear", PAPER | BASELINE | {"dedup.threshold": "0.95"}, 0.5684),
    TableRow("CLIP + filter 2 (0.85)", "linear", PAPER, 0.5721),
    TableRow("CLIP frozen", "linear", PAPER | FROZEN),
    TableRow("CLIP tuned", "linear", PAPER),
    TableRow("Model A frozen", "model_a", PAPER | FROZEN),
    TableRow("Model A tuned", "model_a", PAPER, 0.5753),
    TableRow("Model B text", "model_b", PAPER | {"knn.keys": "text"}),
    TableRow("Model B image", "model_b", PAPER | {"knn.keys": "image"}),
    TableRow("Model B both", "model_b", PAPER, 0.5531),
    TableRow("Ensemble", "ensemble", PAPER, 0.5961),
]
OURS = [
    TableRow("ours: CLIP, as many rows at random", "linear", PAPER | BASELINE | {"dedup.at_random": "true"}),
    TableRow("ours: ridge regression", "ridge", {}),
    TableRow("ours: ensemble", "ensemble", {}),
    TableRow("ours: ensemble on every row", "ensemble", {"dedup.threshold": "1"}),
]
NOTES = """
- `test` and `oof` (out of fold; `std` over folds) are mean cosines on the same images in every row: the same folds,
  the same test, out of fold the rows kept at `dedup.scored`, whatever the row trains on.
- Differences are out of fold unless they say test, paired by image, with a 95% bootstrap interval over groups of
  similar prompts. Another seed of the training would change them too; that is not in the interval.
- On test, models trained on folds are averaged over them and Model B has the whole bank. Out of fold it is one model,
  and the bank without the fold.
- Our reading: the paper does not define its two filters. We take dedup at cosine 0.95 and 0.85; `CLIP` trains on every
  row. Both heads start as the closed-form ridge regression, and rows of the training folds that training does not see
  choose how far they go from there. `CLIP + filter 2` and `CLIP tuned` are one run.
- Learning rates and epochs are pinned. They were found on the sample, on inner splits of its training folds; that time
  is not in the seconds here.
- The sample's test images repeat no training prompt, and no prompt twice. That favours filtering: rows that a
  filter drops can only help where test images repeat them.
- `paper` is what the paper reports on its own data (arXiv 2401.06167). Nothing here was run on those data: only the
  order of the rows can be held against it.
- `seconds`: what the row needed beyond the rows above it and beyond earlier runs, on this machine.
"""
COLUMNS = [
    "row",
    "test",
    "oof",
    "oof_std",
    *(f"vs_{to}{end}" for to in ("above", "first") for end in ("", "_low", "_high")),
]
SECONDS = Path("outputs/table/seconds.json")
MADE = SECONDS.with_name("made.json")
DVC = [sys.executable, "-m", "dvc"]


def name_of(row: TableRow) -> str:
    """The experiment's name: that of the first row with its settings."""
    first = next(other for other in [*ROWS, *OURS] if other.settings == row.settings)
    return "table-" + "-".join("".join(c if c.isalnum() else " " for c in first.name.lower()).split())


def forget() -> None:
    """Remove the experiments of a former table. What they computed stays in DVC's cache."""
    listed = subprocess.run([*DVC, "exp", "list", "--all-commits", "--name-only"], stdout=subprocess.PIPE, text=True)
    known = {line.strip() for line in listed.stdout.splitlines()}
    for name in sorted({name_of(row) for row in [*ROWS, *OURS]} & known):
        subprocess.run([*DVC, "exp", "remove", "--quiet", name], check=False)


def experiment(name: str, settings: list[str]) -> bool:
    """Run an experiment beside the workspace; return whether any stage had to run. Raises ValueError where it fails."""
    command = [*DVC, "exp", "run", "--temp", "--name", name]
    # DVC copies what git tracks, and the competitions' files are not tracked.
    for path in sorted(Path("input").glob("*")):
        command += [] if path.name == "README.md" else ["--copy-paths", str(path)]
    for setting in settings:
        command += ["--set-param", setting]
    command.append("scores")  # a row needs no submission and no report
    ran = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            ran |= line.startswith("Running stage")
    if process.returncode:
        raise ValueError(
            f"{name} failed, see above: {' '.join(settings)}. Finished stages are kept: fix the cause and run again"
        )
    return ran


def cells(line: pd.Series, kind: str) -> str:
    """A difference with its interval as text, empty where there is none."""
    if pd.isna(line[kind]):
        return ""
    return f"{line[kind]:+.4f} [{line[f'{kind}_low']:+.4f}, {line[f'{kind}_high']:+.4f}]"


def filter_gain(rows: dict[str, pd.DataFrame]) -> str:
    """A line of text: the gain of the filter over as many rows at random, which take as long to train on."""
    filtered, at_random = (rows[row.name].set_index(KEY) for row in (ROWS[2], OURS[0]))
    gain = filtered.assign(gain=filtered.cosine - at_random.cosine.reindex(filtered.index))
    parts = []
    for split, place in (("train", "out of fold"), ("test", "on test")):
        found = gain[gain.index.get_level_values("split") == split]
        if len(found):
            low, high = bootstrap_interval(found.gain, found.group)
            parts.append(f"{found.gain.mean():+.4f} [{low:+.4f}, {high:+.4f}] {place}")
    return f"filter 2 minus as many rows at random, trained for as long: {', '.join(parts)}\n"


def report_of(table: pd.DataFrame) -> str:
    """The table of `results`, with `seconds`, in Markdown."""
    head = ["row", "test", "oof", "std", "vs above [95%]", "vs CLIP [95%]", "test, vs CLIP [95%]", "seconds", "paper"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row, (_, line) in zip([*ROWS, *OURS], table.iterrows(), strict=True):
        if row is OURS[0]:
            lines.append(["—"] * len(head))
        score = ["" if pd.isna(line.test) else f"{line.test:.4f}", f"{line.oof:.4f}", f"{line.oof_std:.4f}"]
        gains = [cells(line, kind) for kind in ("vs_above", "vs_first", "test_vs_first")]
        paper = "" if row.paper is None else f"{row.paper:.4f}"
        lines.append([row.name, *score, *gains, f"{line.seconds:.0f}", paper])
    return markdown(lines)


def scores_for_documents() -> dict[str, str]:
    """The last run's scores by the name of their place.

    Raises:
        ValueError: no run has been scored here, or it was not by a commit's code and params.
    """
    text, ran = Path("outputs/scores/scores.md"), {record["name"]: record for record in records()}
    if "scores" not in ran or not text.is_file():
        raise ValueError("no scored run in outputs/: `make submission` makes one")
    scored, now = ran["scores"], commit()
    if scored["commit"] != now or CHANGED in now:
        raise ValueError(
            f"the scores in outputs/ were made by {scored['commit']}, and the code and params here are {now}: commit "
            "src/, pipelines/, dvc.yaml and params.yaml, then `dvc repro` and `dvc repro --single-item --force scores`"
        )
    data = data_of(pd.read_parquet(COSINES, columns=["source", "split"]))
    how = [record | {key: scored[key] for key in ("commit", "date")} for record in ran.values()]
    lines = text.read_text(encoding="utf-8").splitlines()
    listed = "\n".join(line if line.startswith("|") or not line else f"- {line}" for line in lines)
    took, peak = sum(record["seconds"] for record in how), max(record["peak_gb"] for record in how)
    about = caption(f"Data: {data}; {took:.0f} seconds in all, at most {peak:.1f} GB", how)
    return {f"scores {data}": f"{listed}\n\n{about}"}


def table_for_documents() -> dict[str, str]:
    """The last table by the name of its place, and the notes that hold for all of them; empty where none was made."""
    if not MADE.is_file():
        return {}
    table, _, _ = SECONDS.with_name("table.md").read_text(encoding="utf-8").partition(NOTES)
    return {f"paper {read_json(MADE)['data']}": table, "notes of the paper's table": NOTES.lstrip()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: params for every row, or that the documents get what there is."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("settings", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    either.add_argument("--docs", action="store_true", help="put the last scores and the last table into the documents")


def main(options: argparse.Namespace) -> None:
    """Make the table, or put it into the documents, when no other process writes to outputs/."""
    with turn("table"):
        if options.docs:
            put(scores_for_documents() | table_for_documents())
        else:
            make(options.settings)


def make(settings: list[str]) -> None:
    """Write table/{table.csv,table.md,table.png,seconds.json,made.json} and print table.md."""
    forget()
    # The time of an experiment when its stages last ran, by settings and result: from DVC's cache it takes none.
    known = read_json(SECONDS) if SECONDS.is_file() else {}
    cosines: dict[str, pd.DataFrame] = {}
    took: dict[str, float] = {}
    rows: dict[str, pd.DataFrame] = {}
    seconds: list[float] = []
    for row in [*ROWS, *OURS]:
        name = name_of(row)
        new = name not in cosines
        if new:
            start, wanted = time.monotonic(), [f"{key}={value}" for key, value in row.settings.items()] + settings
            ran = experiment(name, wanted)
            cosines[name] = read_run(name)[0]
            key = digest(*wanted, pd.util.hash_pandas_object(cosines[name]).to_numpy())
            took[key] = time.monotonic() - start if ran or key not in known else known[key]
        seconds.append(round(took[key], 1) if new else 0.0)
        scored = cosines[name][cosines[name].scored]
        rows[row.name] = scored[[*KEY, "fold", "group"]].assign(cosine=scored[row.model].astype(float))
    table = results(rows).assign(seconds=seconds)
    ours = cosines[name_of(OURS[-1])]
    models = [name for name in ours.columns if name.startswith(("model_", "linear", "ridge"))]
    gains = f"{filter_gain(rows)}\n{OURS[-1].name}, {gain_over_best_member(ours, models)}"
    # Where the data are is nobody's business but this machine's.
    data, how = data_of(ours), made()
    about = caption(f"Data: {data}", [how], [text for text in settings if not text.startswith("prepare.t")])
    report = f"{report_of(table)}\n{gains}\n{about}{NOTES}"
    with whole_folder(SECONDS.parent) as out:
        write_json(out / SECONDS.name, took)
        write_json(out / MADE.name, {"data": data} | how)
        table[[*COLUMNS, "seconds"]].round(6).to_csv(out / "table.csv", index=False)
        (out / "table.md").write_text(report, encoding="utf-8")
        draw_results(out / "table.png", table, len(OURS))
    print(report)
