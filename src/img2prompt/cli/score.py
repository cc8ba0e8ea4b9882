"""Score a submission: the mean over images of the cosine with the truth, as the host has it, and its interval.

    img2prompt score outputs/submission.csv truth.csv
    img2prompt score outputs/submission.csv input/my-test

SUBMISSION has the columns imgId_eId,val. TRUTH is a file of the same form; or prompts, which are embedded: a table with
the columns imgId (or id) and prompt, or a source in a layout of docs/data.md that names its images. Images are matched
by id, in whatever order they are. Norms do not matter. The interval is the 95% percentile bootstrap over images.

An error names the first wrong row and what belongs there; of a submission the first row below the header is row 1.

Exit status: 0, all is well; 1, a file is wrong or cannot be read; 2, wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from img2prompt.core.device import device
from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.predict.submission import HEADER, read_submission
from img2prompt.prompts.encoder import EMBEDDED, Encoder
from img2prompt.sources import tabular
from img2prompt.sources.layouts import recognise
from img2prompt.sources.params import Source
from img2prompt.sources.readers import PROMPT_COLUMNS, Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the submission, the truth, and what embeds prompts."""
    parser.add_argument("submission", type=Path, metavar="SUBMISSION")
    parser.add_argument("truth", type=Path, metavar="TRUTH")
    what = f"the sentence encoder of prompts, a name or a folder; default: the host's, {EMBEDDED}"
    parser.add_argument("--encoder", default=EMBEDDED, metavar="MODEL", help=what)


def main(options: argparse.Namespace) -> None:
    """Print the score; end the process with the status that the help names."""
    try:
        found = score(options.submission, options.truth, options.encoder)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("IMG2PROMPT_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    interval = "[{:.5f}, {:.5f}] ".format(*bootstrap_interval(found)) if len(found) > 1 else ""
    print(f"{found.mean():.8f} {interval} mean cosine of {len(found):,} images")


def score(submission: Path, truth: Path, encoder: str) -> np.ndarray:
    """The cosines of a submission's vectors with the truth's, (n,) float64, in the submission's order.

    Raises:
        OSError, ImportError: a file, or the encoder, is not there.
        ValueError: a file is wrong, or they are of other images; it names the first wrong row.
    """
    ids, vectors = read_submission(submission)
    if truth.is_file() and truth.suffix in tabular.SUFFIXES and HEADER[0] in tabular.columns(truth):
        known, targets = read_submission(truth)
        return cosine(vectors, targets[_places(submission, ids, truth, known)])
    prompts = _prompts(truth)
    places = _places(submission, ids, truth, list(prompts))
    targets = Encoder(encoder, device())(list(prompts.values()))
    if targets.shape[1] != vectors.shape[1]:
        raise ValueError(f"{encoder}: embeds in {targets.shape[1]} dimensions, {submission} has {vectors.shape[1]}")
    return cosine(vectors, targets[places])


def _places(submission: Path, ids: Sequence[str], truth: Path, known: Sequence[str]) -> list[int]:
    """Where each of a submission's ids is among the known ones; ValueError where they are not the same."""
    place = {name: row for row, name in enumerate(known)}
    for number, name in enumerate(ids):
        if name not in place:
            near = get_close_matches(name, known, n=1)
            row, near = number * 384 + 1, f"; {near[0]!r} is there" if near else ""
            raise ValueError(f"{submission}: row {row} is of {name!r}, which {truth} has not{near}")
    given = set(ids)
    missing = [name for name in known if name not in given]
    if missing:
        raise ValueError(
            f"{submission}: ends after row {len(ids) * 384}, and {len(missing)} of the {len(known)} images of {truth} "
            f"are missing: '{missing[0]}_0' belongs there first"
        )
    return [place[name] for name in ids]


def _prompts(truth: Path) -> dict[str, str]:
    """The prompts of a source by the ids of its images.

    Raises:
        OSError, ValueError: it is in no known layout, or a row has no id, no prompt, or an id that is there already.
    """
    found: dict[str, str] = {}
    for entry in _entries(truth):
        wrong = entry.reason if entry.reason.startswith("broken") else ""
        if not wrong and not entry.id.strip():
            wrong = "no id"
        if not wrong and entry.id in found:
            wrong = "repeated id"
        if not wrong and not (entry.prompt or "").strip():
            wrong = "no prompt"
        if wrong:
            fix = entry.fix or "every image of the truth has one row with its id and its prompt"
            raise ValueError(f"{truth}: row {entry.row} ({entry.id!r}): {wrong}: {fix}")
        found[entry.id] = entry.prompt
    return found


def _entries(truth: Path) -> Iterator[Entry]:
    if truth.is_file() and truth.suffix in tabular.SUFFIXES:
        known = tabular.columns(truth)
        names = [tabular.pick(truth, known, None, usual) for usual in (("imgId", "id"), PROMPT_COLUMNS)]
        if all(names):
            for row, cells, wrong in tabular.read_table(truth, names):
                name, prompt = cells or ("", None)
                yield Entry(row, name or "", None, prompt, None, "broken row" if wrong else "", wrong)
            return
    layout = recognise(Source(path=str(truth)), "test")
    if layout.texts:
        raise ValueError(f"{truth}: prompts without ids; it needs the columns imgId and prompt")
    yield from layout.entries()
