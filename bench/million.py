"""Time and peak memory of the stages that see all rows, each in a process of its own, on made rows on disk.

    python bench/million.py 100000
    python bench/million.py 1000000 --stages ridge knn ensemble

Widths are ViT-L's: pooled features 1,024, CLIP embeddings 768, targets 384; at a million rows 15 GB of files. Resident
memory counts pages of mapped files, which the system drops when it needs them; anonymous memory is what a stage needs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from img2prompt.core.blocks import Stack, blocks

QUERIES, K, MEMBERS = 16_000, 1024, 4
LEVELS = [0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.99]


def make(folder: Path, n: int) -> None:
    """Families of prompts of all sizes and densities, 5% of the rows copies; images that tell of them with noise."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.zipf(1.8, size=n), n // 100)
    family = rng.permutation(np.repeat(np.arange(n), sizes)[:n])
    family = np.unique(family, return_inverse=True)[1]
    centre = rng.standard_normal((family.max() + 1, 384), dtype=np.float32)
    centre[:, :48] += 1.0  # prompts share a direction: unrelated ones have a cosine of about 0.1
    spread = rng.uniform(0.05, 1.0, size=len(centre)).astype(np.float32)  # a family's cosines: 1 / (1 + spread**2)
    source = np.where(rng.random(n) < 0.05, rng.integers(n, size=n), np.arange(n))
    family = family[source]
    np.save(folder / "family.npy", family)
    widths = {"targets": 384, "pooled": 1024, "image": 768} | {f"member_{i}": 384 for i in range(MEMBERS)}
    maps = {name: rng.standard_normal((384, widths[name]), dtype=np.float32) / 20 for name in ("pooled", "image")}
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (n, width))
        for name, width in widths.items()
    }
    for rows in blocks(n):
        # A copy has the noise of its source.
        noise = np.stack([np.random.default_rng(row).standard_normal(384, dtype=np.float32) for row in source[rows]])
        targets = centre[family[rows]] + spread[family[rows], None] * noise
        targets /= np.linalg.norm(targets, axis=1, keepdims=True)
        files["targets"][rows] = targets
        for name, width in widths.items():
            if name != "targets":
                noise = rng.standard_normal((len(targets), width), dtype=np.float32)
                x = 20 * targets @ maps[name] + noise if name in maps else targets + noise / (10 + int(name[-1]))
                files[name][rows] = x if name == "pooled" else x / np.linalg.norm(x, axis=1, keepdims=True)


def dedup(load: Callable[[str], np.ndarray]) -> str:
    from img2prompt.prompts.dedup import deduplicate

    found = deduplicate(load("targets"), 0.85, also=LEVELS)
    return f"{found.kept[found.thresholds.index(0.85)].sum()} kept"


def folds(load: Callable[[str], np.ndarray]) -> str:
    from img2prompt.prompts.folds import make_folds

    found = make_folds(load("targets"), range(5), 0.7, 0.85, 0)
    return f"{found.group.max() + 1} groups at {found.group_threshold}"


def ridge(load: Callable[[str], np.ndarray]) -> str:
    from img2prompt.model_a.ridge import refit, ridge

    family = load("family")
    training = np.flatnonzero(family % 5 > 0)
    groups = family[training]
    data = Stack([load("pooled")], training), Stack([load("targets")], training)
    found = ridge(*data, groups)
    watch = groups // 5 % 100 == 0
    refit(found, *data, [watch, *(watch | (groups // 5 % 5 == part) for part in range(5))])
    return f"strength {found.strength:.0f}, score {found.score:.3f}"


def knn(load: Callable[[str], np.ndarray]) -> str:
    from img2prompt.model_b.choice import DISTANCE_DIM_GRID, K_GRID
    from img2prompt.model_b.neighbours import nearest
    from img2prompt.model_b.regression import grid_scores, regress

    keys, targets = load("image"), load("targets")
    queries = np.arange(0, len(keys), max(1, len(keys) // QUERIES))[:QUERIES]
    found = nearest(Stack([keys], queries), keys, K)
    grid_scores(found, targets, targets[queries], K_GRID, DISTANCE_DIM_GRID, 1e-6, 1.0)
    regress(found, targets, 100, 4.0, 1e-6, 1.0)
    return f"{len(queries)} queries"


def ensemble(load: Callable[[str], np.ndarray]) -> str:
    from img2prompt.ensemble.weights import Cosines, alpha_curve, cross_fitted

    cosines = Cosines.between([Stack([load(f"member_{i}")]) for i in range(MEMBERS)], load("targets"))
    fold, family = load("family") % 5, np.arange(MEMBERS) < MEMBERS - 1
    found, _ = cross_fitted(cosines, fold, np.ones(len(fold), dtype=bool), family)
    alpha_curve(cosines, family, fold)
    return f"score {found.mean():.3f}"


STAGES = {stage.__name__: stage for stage in (dedup, folds, ridge, knn, ensemble)}


def memory(name: str) -> float:
    """GB of this process (Linux)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6


def measure(name: str, folder: Path) -> None:
    anonymous, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            anonymous[0] = max(anonymous[0], memory("RssAnon"))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    start = time.perf_counter()
    said = STAGES[name](lambda file: np.load(folder / f"{file}.npy", mmap_mode="c"))
    seconds = time.perf_counter() - start
    done.set()
    watching.join()
    print(json.dumps({"seconds": seconds, "resident": memory("VmHWM"), "anonymous": anonymous[0], "said": said}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--folder", type=Path, help="where the files are, or are made and kept")
    parser.add_argument("--measure", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "family.npy").is_file():
            make(folder, options.rows)
        print(f"{options.rows} rows, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads")
        print(f"{'':10}{'seconds':>9}{'resident GB':>13}{'anonymous GB':>14}")
        for name in options.stages:
            command = [sys.executable, __file__, str(options.rows), "--measure", name, "--folder", str(folder)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                print(f"{name:10} {run.stderr.strip().splitlines()[-1]}")
                continue
            found = json.loads(run.stdout)
            sizes = f"{found['resident']:13.1f}{found['anonymous']:14.1f}"
            print(f"{name:10}{found['seconds']:9.1f}{sizes}  {found['said']}", flush=True)


if __name__ == "__main__":
    main()
