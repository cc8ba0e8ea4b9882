"""Explain what the last run made of an image: the truth, every model's cosine, Model B's neighbours, and the words.

    img2prompt explain 20057f34d
    img2prompt explain 000123 --split test --top 10

ID is that of a train image, which is then shown out of fold, or of a test image; where it is both, or in several
sources, each has its page. Cosines are those of the scores. A neighbour's share is its weight by eq. 4-5 among all
neighbours by one kind of keys.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.cli.predict import said_lines, whole_number
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import numbered, read_json
from img2prompt.ensemble.members import CONSTANT, MODEL_A, name_of, read_oof
from img2prompt.ensemble.mixture import Mixture
from img2prompt.model_b.regression import weights
from img2prompt.words.words import Words

OUTPUTS = Path("outputs")
TABLES = {"train": OUTPUTS / "prepare/train.parquet", "test": OUTPUTS / "prepare_test/test.parquet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: which image, and how much of it."""
    parser.add_argument("id", metavar="ID")
    parser.add_argument("--split", choices=TABLES, help="default: wherever there is such an image")
    parser.add_argument("--top", type=whole_number, default=5, metavar="N", help="neighbours, words and prompts (5)")


def main(options: argparse.Namespace) -> None:
    """Print a page for each image of that id; end the process with a short message where there is none."""
    try:
        tables = {split: read_rows(path) for split, path in TABLES.items() if options.split in (None, split)}
        found = [(split, int(row)) for split, table in tables.items() for row in np.flatnonzero(table.id == options.id)]
        if not found:
            near = get_close_matches(options.id, pd.concat(tables.values()).id.unique(), n=5, cutoff=0)
            raise ValueError(f"no image {options.id!r} in the last run; ids like it: {', '.join(near)}")
        pages = ["\n".join(_page(split, tables[split].iloc[row], row, options.top)) for split, row in found]
    except (ValueError, OSError) as error:
        if os.environ.get("IMG2PROMPT_DEBUG"):
            raise
        remedy = "; outputs/ is not whole: `dvc repro` makes it" if isinstance(error, OSError) else ""
        sys.exit(f"error: {error}{remedy}")
    print("\n\n".join(pages))


def _page(split: str, about: pd.Series, row: int, top: int) -> Iterator[str]:
    """The lines of an image's page: row `row` of its split's table, of which `about` has the columns."""
    folds = pd.read_parquet(OUTPUTS / "folds/folds.parquet").fold.to_numpy()
    yield f"{split} image {about.id} of {about.source}" + (f", out of fold {folds[row]}" if split == "train" else "")
    yield f"image    {about.image or 'cannot be read: every model answers with the constant'}"
    yield f"truth    {about.prompt or 'not known'}"
    mixture = Mixture.load(OUTPUTS / "ensemble")
    models = _predictions(split, row, folds)
    if split == "train":
        mixed = mixture({name: found[None] for name, found in models.items()}, np.array([True]))[0]
    else:
        mixed = np.load(OUTPUTS / "scores/test.npy", mmap_mode="r")[row]
    if about.image is None:
        models = dict.fromkeys(models, mixture.constant)
    yield from ("", *_cosines(split, about, models | {"ensemble": mixed, "constant": mixture.constant}, mixture))
    if about.image is None:
        return
    prompts = pd.concat([read_rows(OUTPUTS / f"prepare/{name}.parquet", ["prompt"]) for name in ("train", "texts")])
    for clip in numbered(OUTPUTS / "knn"):
        yield from _neighbours(split, clip, row, folds, prompts.prompt.to_numpy(), top)
    yield ""
    if not (OUTPUTS / "words").is_dir():
        yield "words    none: `dvc repro words` makes what they take"
        return
    yield from said_lines(Words.load(OUTPUTS / "words", device())(mixed[None], top)[0])


def _predictions(split: str, row: int, folds: np.ndarray) -> dict[str, np.ndarray]:
    """Every model's prediction of the image by name, (384,) float32."""
    if split == "train":
        return {name: rows[np.array([row])][0] for name, rows in read_oof(OUTPUTS, folds).items()}
    names = [name_of(kind, int(clip.name)) for clip in numbered(OUTPUTS / "knn") for kind in (*MODEL_A, "model_b")]
    folder = OUTPUTS / "predict"
    files = {name: folder / ("knn" if name.startswith("model_b") else "model_a") / f"{name}.npy" for name in names}
    found = {name: file for name, file in files.items() if file.is_file()}  # of the heads those that were trained
    return {name: np.array(np.load(file, mmap_mode="r")[row]) for name, file in found.items()}


def _cosines(split: str, about: pd.Series, models: Mapping[str, np.ndarray], mixture: Mixture) -> Iterator[str]:
    """A table with a line a model: its weight, its cosines with the truth, where that is known, and the ensemble."""
    scores = pd.read_parquet(OUTPUTS / "scores/cosines.parquet")
    known = scores[(scores.split == split) & (scores.source == about.source) & (scores.id == about.id)]
    truth = known.iloc[0] if len(known) else {}
    yield f"{'model':12} {'weight':>8} {'truth':>8} {'ensemble':>9}   (cosines with)"
    weights = {**mixture.weights, CONSTANT: mixture.constant_weight}
    for name in sorted(models, key=lambda name: (name != "ensemble", -weights.get(name, -1.0))):
        weight = f"{weights[name]:.4f}" if name in weights else ""
        score = f"{truth[name]:.4f}" if name in truth else ""
        yield f"{name:12} {weight:>8} {score:>8} {float(models[name] @ models['ensemble']):9.4f}"


def _neighbours(split: str, clip: Path, row: int, folds: np.ndarray, prompts: np.ndarray, top: int) -> Iterator[str]:
    """Model B's neighbours on a CLIP, by every kind of keys, nearest first."""
    name, stored = name_of("model_b", int(clip.name)), read_json(clip / "choice.json")
    choice, files = stored, OUTPUTS / f"predict/knn/{name}"
    if split == "train":
        choice, files = read_json(clip / "fold_choices.json")[str(folds[row])], clip / "oof"
    for kind, setting in choice["settings"].items():
        index, distance = (
            np.array(np.load(f"{files}_{kind}_{what}.npy", mmap_mode="r")[row, : setting["k"]])
            for what in ("rows", "distances")
        )
        share = weights(distance[None], setting["distance_dim"], stored["eps"], stored["coef"])[0]
        mixed = choice["image_share"] if kind == "image" else 1 - choice["image_share"]
        yield ""
        yield (
            f"{name}, {kind} keys: {len(index)} neighbours, weight 1/d**{setting['distance_dim']:g}; "
            f"{mixed:.0%} of the model"
        )
        for place in range(min(top, len(index))):
            yield f"  share {share[place]:.4f}  d {distance[place]:.4f}  {prompts[index[place]]}"
