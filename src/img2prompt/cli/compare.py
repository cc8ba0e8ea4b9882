"""Compare experiments with a base, image by image.

    img2prompt compare                                        # HEAD and what outputs/ holds now
    img2prompt compare HEAD exp1 exp2 exp3
    img2prompt compare base,base-s1,base-s2 exp,exp-s1,exp-s2 # runs with other seeds, joined by commas
    img2prompt compare HEAD workspace --fail-if worse --at-least 0.002

BASE and EXP are names of DVC experiments, git revisions, or `workspace`. A verdict is about the mean difference of a
model's cosines, out of fold, on the images that all runs of both sides have scored; on test where these are all test
images. Its interval is over groups of similar prompts and, where a side has several runs, over seeds; it is widened for
the number of experiments, so that all verdicts on the model hold together in 95 of 100 cases.
outputs/compare/index.html shows it with the images that changed most.

With --at-least, a smaller difference does not matter: `better` becomes `better by at least` or `better, perhaps by less
than`, and where the whole interval is nearer to 0, it is `no difference that matters`.

Exit status: 0, all is well; 1, the gate is not passed, or a run cannot be read; 2, wrong usage. The gate
`--fail-if worse` is not passed by an experiment that is shown to lose, unless it is shown to lose less than --at-least;
`--fail-if not-better` is not passed by one that is not shown to gain, by --at-least or more.
"""

import argparse
import io
import math
import sys
from contextlib import closing
from itertools import chain
from pathlib import Path

import pandas as pd
import yaml
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from scmrepo.exceptions import SCMError

from img2prompt.core.params import with_numbers
from img2prompt.core.process import turn
from img2prompt.core.progress import progress
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import whole_folder
from img2prompt.report import compared
from img2prompt.report.comparison import KEY, Side, differences, fails, pair
from img2prompt.report.page import render

COSINES, PARAMS = "outputs/scores/cosines.parquet", "params.yaml"


def read_run(revision: str) -> tuple[pd.DataFrame, dict[str, object]]:
    """A run's cosines of every image, from DVC's cache, and its params by dotted keys; `workspace` is what is here.

    Raises:
        ValueError: the revision is unknown, or has no cosines.
    """
    try:
        if revision == "workspace":
            files = [Path(path).read_bytes() for path in (COSINES, PARAMS)]
        else:
            with closing(DVCFileSystem(rev=revision)) as system:
                files = [system.cat_file(path) for path in (COSINES, PARAMS)]
    except (DvcException, SCMError, FileNotFoundError) as error:
        raise ValueError(
            f"{revision}: no {COSINES} there ({error}). `dvc exp show` lists the experiments; one that was run on "
            "another machine is fetched by `dvc exp pull`, one from before this file was stored has to run again"
        ) from None
    return pd.read_parquet(io.BytesIO(files[0])), _flat(with_numbers(yaml.safe_load(files[1])))


def _flat(values: dict[str, object], above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def images() -> pd.DataFrame:
    """The workspace's images and prompts by split, source and id; no rows before `prepare` has run."""
    tables = [pd.DataFrame(columns=[*KEY, "image", "prompt"], dtype=object)]
    for split, stage in (("train", "prepare"), ("test", "prepare_test")):
        path = Path(f"outputs/{stage}/{split}.parquet")
        if path.is_file():
            tables.append(read_rows(path).assign(split=split))
    return pd.concat(tables)[[*KEY, "image", "prompt"]]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: names of different runs, joined by commas, without spaces")
    return names


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a cosine above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: base, experiments, the model that is judged, and the gate."""
    parser.add_argument("base", nargs="?", type=_names, default="HEAD", metavar="BASE", help="default: HEAD")
    parser.add_argument(
        "experiments", nargs="*", type=_names, default=[["workspace"]], metavar="EXP", help="default: workspace"
    )
    parser.add_argument("--model", default="ensemble", help="the model that is judged; default: ensemble")
    parser.add_argument("--fail-if", choices=["worse", "not-better"], help="exit with 1 where any experiment is")
    parser.add_argument(
        "--at-least", type=_positive, default=0.0, metavar="COSINE", help="the smallest difference that matters"
    )


def main(options: argparse.Namespace) -> None:
    """Compare, when no other process writes to outputs/, and hold the experiments against the gate."""
    with turn("compare"):
        verdicts = compare(options.base, options.experiments, options.model, options.at_least)
    failed = [
        f"{name}: {line.verdict}, {line.difference:+.4f} [{line.low:+.4f}, {line.high:+.4f}]"
        for name, line in verdicts.items()
        if options.fail_if and fails(line.low, line.high, options.fail_if, options.at_least)
    ]
    if failed:
        sys.exit("\n".join([f"compare: --fail-if {options.fail_if} {options.model}:", *failed]))


def compare(base: list[str], others: list[list[str]], model: str, at_least: float) -> dict[str, pd.Series]:
    """Write compare/{index.html,compare.csv,compare.md} and print compare.md; return each experiment's verdict.

    It is the first row of `differences` for the model, by the experiment's name.
    """
    wanted = list(dict.fromkeys(chain(base, *others)))
    runs = {name: read_run(name) for name in progress(wanted, "reading", unit="run")}
    first, *experiments = (
        Side(names, [runs[name][0] for name in names], [runs[name][1] for name in names]) for names in (base, *others)
    )
    if len({side.name for side in experiments}) < len(experiments):
        raise ValueError("two experiments have the same name: each begins with another run")
    # One question is counted for each experiment, about the model that is judged, out of fold: other rows only say
    # where a difference comes from.
    level = 1 - 0.05 / len(experiments)
    params = compared.changed_params(first, experiments)
    remarks = compared.notes(first, experiments, params, level)
    found, cards, known = {}, {}, images()
    for side in experiments:
        pairs, more = pair(first, side)
        if model not in pairs.base:
            raise ValueError(f"--model {model}: {first.name} and {side.name} have {', '.join(pairs.base)} in common")
        remarks += [f"{side.name}: {note}" for note in more]
        found[side.name] = differences(pairs, level, at_least)
        cards[side.name] = compared.cards(pairs, model, known)
    scores, by_fold = compared.scores(found, model, level), compared.by_fold(found, model, level)
    verdicts = {name: table[table.model == model].iloc[0] for name, table in found.items()}
    report = "\n".join(
        [
            f"The base is {first.name}.\n",
            compared.as_markdown(params) if params.rows else "No param differs.\n",
            *map(compared.as_markdown, (scores, by_fold)),
            *(f"- {note}." for note in remarks),
        ]
    )
    page = render(
        "comparison.html",
        base=first.name,
        experiments=list(found),
        model=model,
        level=compared.percent(level),
        seeded=any(len(side.names) > 1 for side in (first, *experiments)),
        params=params,
        headline=verdicts,
        places=compared.PLACES,
        scores=scores,
        notes=remarks,
        charted=compared.charts(found, model, level, at_least),
        by_fold=by_fold,
        cards=cards,
    )
    with whole_folder(Path("outputs/compare")) as out:
        (out / "index.html").write_text(page, encoding="utf-8")
        pd.concat(found, names=["experiment"]).reset_index(0).to_csv(out / "compare.csv", index=False)
        (out / "compare.md").write_text(report, encoding="utf-8")
    print(report, "outputs/compare/index.html shows it with the images that changed most", sep="\n")
    return verdicts
