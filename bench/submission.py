"""Writing the submission against pandas: interleaved runs, medians, ratios, peak memory, bit-exact or not.

    python bench/submission.py --images 16000 --runs 3

`pandas` is what people do: a list of names, a frame, `to_csv`; `to_csv` is its last step alone. Each run is a
process of its own, so that its peak memory is its own; a small run before it pays for imports.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

PATH = Path("submission.csv")


def ours(ids: list[str], predictions: np.ndarray) -> float:
    from img2prompt.predict.submission import write_submission

    start = time.perf_counter()
    write_submission(PATH, ids, predictions)
    return time.perf_counter() - start


def check(ids: list[str], predictions: np.ndarray) -> float:
    from img2prompt.predict.submission import check_submission, write_submission

    write_submission(PATH, ids, predictions)
    start = time.perf_counter()
    check_submission(PATH, ids)
    return time.perf_counter() - start


def pandas(ids: list[str], predictions: np.ndarray, whole: bool = True) -> float:
    import pandas as pd

    start = time.perf_counter()
    names = [f"{name}_{element}" for name in ids for element in range(predictions.shape[1])]
    frame = pd.DataFrame({"imgId_eId": names, "val": predictions.ravel()})
    start = start if whole else time.perf_counter()
    frame.to_csv(PATH, index=False)
    return time.perf_counter() - start


def to_csv(ids: list[str], predictions: np.ndarray) -> float:
    return pandas(ids, predictions, whole=False)


METHODS = {"ours": ours, "check": check, "pandas": pandas, "to_csv": to_csv}


def measure(name: str) -> tuple[float, float, bool]:
    """Seconds, MB beyond what the data take, whether float32 come back bit for bit."""
    ids, predictions = DATA
    METHODS[name](ids[:10], predictions[:10])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = METHODS[name](ids, predictions)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    import pandas as pd

    values = pd.read_csv(PATH, usecols=["val"], dtype=np.float32)["val"].to_numpy()
    return seconds, extra, values.tobytes() == predictions.tobytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    predictions = rng.standard_normal((args.images, 384), dtype=np.float32)
    predictions /= np.linalg.norm(predictions, axis=1, keepdims=True)
    DATA = ([f"{i:08x}" for i in rng.permutation(args.images)], predictions)
    results = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
            for _ in range(args.runs):
                for name in METHODS:
                    results[name].append(pool.apply(measure, (name,)))
        print(f"{predictions.size / 1e6:.1f}M rows, {PATH.stat().st_size / 2**20:.0f} MB")
        os.chdir("/")
    ours_took = statistics.median(took for took, _, _ in results["ours"])
    for name, runs in results.items():
        took = statistics.median(took for took, _, _ in runs)
        exact = "bit-exact" if all(exact for _, _, exact in runs) else "not bit-exact"
        memory = max(extra for _, extra, _ in runs)
        print(f"{name:7} {took:6.2f} s  {took / ours_took:5.1f} x ours  +{memory:5.0f} MB  {exact}")
