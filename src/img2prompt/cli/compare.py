"""Compare two experiments image by image.

A and B are names of DVC experiments, git revisions, or `workspace` for what outputs/ holds now.
"""

import argparse
from pathlib import Path

import dvc.api
import pandas as pd
from dvc.exceptions import DvcException
from scmrepo.exceptions import SCMError

from img2prompt.core.process import turn
from img2prompt.core.rows import read_rows
from img2prompt.core.sheet import draw_changes
from img2prompt.core.storage import whole_folder
from img2prompt.report.comparison import KEY, differences, differences_markdown, models_of, most_changed, pair

COSINES = "outputs/scores/cosines.parquet"
IMAGES = 6  # how many images that B predicts better are drawn, and how many that it predicts worse


def read_cosines(revision: str) -> pd.DataFrame:
    """Every image's cosines in an experiment, from DVC's cache; `workspace` is outputs/ as it is.

    Raises:
        ValueError: the revision is unknown or has no cosines.
    """
    try:
        if revision == "workspace":
            return pd.read_parquet(COSINES)
        with dvc.api.open(COSINES, rev=revision, mode="rb") as file:
            return pd.read_parquet(file)
    except (DvcException, SCMError, FileNotFoundError) as error:
        raise ValueError(
            f"{revision}: no {COSINES} there ({error}). `dvc exp show` lists the experiments; one that was run on "
            "another machine is fetched by `dvc exp pull`, one from before this file was stored has to run again"
        ) from None


def images() -> pd.DataFrame:
    """The workspace's images and prompts by split, source and id; no rows before `prepare` has run."""
    tables = [pd.DataFrame(columns=[*KEY, "image", "prompt"], dtype=object)]
    for split, stage in (("train", "prepare"), ("test", "prepare_test")):
        path = Path(f"outputs/{stage}/{split}.parquet")
        if path.is_file():
            tables.append(read_rows(path).assign(split=split))
    return pd.concat(tables)[[*KEY, "image", "prompt"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the two experiments."""
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")


def main(options: argparse.Namespace) -> None:
    """Compare, when no other process writes to outputs/."""
    with turn("compare"):
        compare([options.a, options.b])


def compare(names: list[str]) -> None:
    """Write compare/{compare.csv,compare.md,MODEL.png} and print compare.md."""
    pairs, notes = pair(*map(read_cosines, names))
    table, known = differences(pairs), images()
    report = f"A is {names[0]}, B is {names[1]}.\n\n{differences_markdown(table)}"
    report += "".join(f"\n- {note}" for note in notes) + "\n" * bool(notes)
    with whole_folder(Path("outputs/compare")) as out:
        table.to_csv(out / "compare.csv", index=False)
        (out / "compare.md").write_text(report, encoding="utf-8")
        for model in models_of(pairs):
            changed = [part.merge(known, on=KEY, how="left") for part in most_changed(pairs, model, IMAGES)]
            if any(map(len, changed)):
                draw_changes(out / f"{model}.png", *changed)
    print(report)
