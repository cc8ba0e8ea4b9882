"""Make a submission with a bundle of img2prompt, offline: as the script of a Kaggle kernel, or anywhere.

    python infer.py                                          # in a kernel
    python BUNDLE/infer.py --input FOLDER --output FILE      # elsewhere

It first writes a submission of the mean, which is valid, and replaces it at the end. An image that cannot be read keeps
the mean. Where time is short, views are dropped, then members of the ensemble, then what images are left keep the mean;
each is said. `img2prompt export --kaggle` copies this file; until it has installed the bundle's wheels it needs nothing
but Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from img2prompt.predict.predictor import Predictor

START = time.monotonic()
MOUNTS = ("*", "datasets/*/*", "competitions/*")  # where below /kaggle/input a dataset or a competition may be
PROBES = (8, 24)  # images of a model's first batches: one to warm up, one to measure time by
BATCH = 64
RESERVE = 0.02  # of the time, for a batch that takes longer than those before it, and for the end of the process


def main(arguments: Sequence[str] | None = None) -> None:
    """Find the bundle and the images, install, predict, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", type=Path, default=Path("/kaggle/input"), help="a competition, or where data are mounted"
    )
    parser.add_argument("--output", type=Path, default=Path("submission.csv"))
    parser.add_argument("--minutes", type=float, default=500, help="the time for all of it (default: %(default)s)")
    options = parser.parse_args(arguments)
    folders = [options.input, *(path for mount in MOUNTS for path in sorted(options.input.glob(mount)))]
    bundle = one("bundle", [path for path in (Path(__file__).parent, *folders) if (path / "manifest.json").is_file()])
    competition = one("competition", [path for path in folders if (path / "images").is_dir()])
    print(f"bundle: {bundle}\ncompetition: {competition}", flush=True)
    install(sorted(bundle.glob("*.whl")))

    from img2prompt.core.process import settle

    settle()
    import numpy as np

    from img2prompt.core.storage import whole
    from img2prompt.predict.submission import write_submission

    ids, images = listed(competition)
    predictions = np.tile(np.load(bundle / "ensemble.constant.npy"), (len(ids), 1))
    before = time.monotonic()
    with whole(options.output) as path:
        write_submission(path, ids, predictions)
    writing = time.monotonic() - before
    print(f"{options.output}: {len(ids)} images, the mean for now", flush=True)

    deadline, done = START + 60 * options.minutes * (1 - RESERVE) - 2 * writing, 0
    if time.monotonic() < deadline:
        from img2prompt.predict.predictor import Predictor

        done = fill(predictions, Predictor.load(bundle), images, deadline)
    if done < len(images):
        print(f"no time left: {len(images) - done} of {len(images)} images keep the mean", flush=True)
    if done:
        with whole(options.output) as path:
            write_submission(path, ids, predictions)
    print(f"{options.output}: {len(ids)} images, after {time.monotonic() - START:.0f} s", flush=True)


def one(what: str, found: Sequence[Path]) -> Path:
    """The only one of some folders."""
    found = list(dict.fromkeys(path.resolve() for path in found))
    if len(found) != 1:
        sys.exit(f"error: {len(found)} folders look like the {what} ({', '.join(map(str, found))}): name --input")
    return found[0]


def install(wheels: Sequence[Path]) -> None:
    """Install wheels for this process alone, without a network."""
    if not wheels:
        return
    target = tempfile.mkdtemp(prefix="wheels-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target]
    subprocess.run([*command, *map(str, wheels)], check=True)
    sys.path.insert(0, target)


def listed(competition: Path) -> tuple[list[str], list[Path]]:
    """The images' ids and files: in the order of sample_submission.csv where it has the same ids, else sorted."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    from img2prompt.sources.readers import SUFFIXES

    files = {}
    for path in sorted((competition / "images").iterdir()):
        if path.suffix.lower() in SUFFIXES:
            files.setdefault(path.stem, path)
    column, ids, why = "imgId_eId", [], "other ids"
    only = csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
    try:
        names = csv.read_csv(competition / "sample_submission.csv", convert_options=only)[column]
        ids = [name.removesuffix("_0") for name in names.filter(pc.ends_with(names, "_0")).to_pylist()]
    except (OSError, KeyError, ValueError) as error:
        why = str(error)
    if sorted(ids) != sorted(files):
        print(f"sample_submission.csv is not of the {len(files)} images ({why}): ids are sorted", flush=True)
        ids = sorted(files)
    return ids, [files[name] for name in ids]


def fill(predictions: np.ndarray, predictor: Predictor, images: Sequence[Path], deadline: float) -> int:
    """Predict images into predictions (m, 384), with less of the model where time is short; return how many of them."""
    done, measured = 0, []
    while done < len(images) and time.monotonic() < deadline:
        size = PROBES[len(measured)] if len(measured) < len(PROBES) else len(images)
        with closing(predictor.stream(images[done : done + size], min(size, BATCH))) as parts:
            since = time.monotonic()
            for part in parts:
                for error in filter(None, part.errors):
                    print(f"an image keeps the mean: {error}", flush=True)
                predictions[done : done + len(part.embeddings)] = part.embeddings
                done, now = done + len(part.embeddings), time.monotonic()
                measured.append((now - since, len(part.embeddings)))
                since, left = now, deadline - now
                seconds, count = map(sum, zip(*measured[1:], strict=True)) if measured[1:] else (0, 1)
                each = seconds / count
                if left > (len(images) - done) * each:
                    continue
                if left > 0 and (cheaper := predictor.cheaper()):
                    less, predictor = cheaper
                    print(f"{done} of {len(images)} images, {left:.0f} s left: from here on without {less}", flush=True)
                    measured = []
                    break
                if left < BATCH * each:
                    deadline = now
                    break
    return done


if __name__ == "__main__":
    main()
