"""Exact deduplication against what people use: interleaved runs, medians, peak memory, equal results or not.

    python bench/dedup.py --n 20000 --runs 3
    python bench/dedup.py --n 90000 --runs 1 --skip naive sklearn faiss-topk

Each run is a process of its own, so that its peak memory is its own. faiss takes part where it is installed.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

SEVEN = (0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.99)


def clustered(n: int, d: int = 384, seed: int = 0) -> np.ndarray:
    """(n, d) float32 at norm 1, like prompts: families of all sizes and densities, 5% equal rows."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.zipf(1.8, size=n), n // 20)
    family = rng.permutation(np.repeat(np.arange(n), sizes)[:n])
    centre = rng.standard_normal((n, d), dtype=np.float32)
    centre[:, : d // 8] += 1.0  # prompts share a direction: unrelated ones have a cosine of about 0.1
    spread = rng.uniform(0.05, 1.0, size=n).astype(np.float32)  # a family's cosines: 1 / (1 + spread**2)
    rows = centre[family] + spread[family, None] * rng.standard_normal((n, d), dtype=np.float32)
    again = rng.random(n) < 0.05
    rows[again] = rows[rng.integers(n, size=again.sum())]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ours(rows: np.ndarray, threshold: float) -> np.ndarray:
    from img2prompt.prompts.dedup import deduplicate

    return deduplicate(rows, threshold).kept[0]


def ours_seven(rows: np.ndarray, threshold: float) -> np.ndarray:
    from img2prompt.prompts.dedup import deduplicate

    result = deduplicate(rows, threshold, also=SEVEN)
    return result.kept[result.thresholds.index(threshold)]


def greedy(n: int, neighbours: Iterable[np.ndarray]) -> np.ndarray:
    """The same rule as ours on given neighbour lists, one for each row in order."""
    kept = np.zeros(n, dtype=bool)
    for row, near in enumerate(neighbours):
        kept[row] = not kept[near[near < row]].any()
    return kept


def naive(rows: np.ndarray, threshold: float) -> np.ndarray:
    """The whole matrix at once."""
    near = rows @ rows.T > threshold
    return greedy(len(rows), (np.flatnonzero(line[:row]) for row, line in enumerate(near)))


def sklearn(rows: np.ndarray, threshold: float) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(radius=1 - threshold, metric="cosine", algorithm="brute").fit(rows)
    return greedy(len(rows), index.radius_neighbors(rows, return_distance=False))


def faiss_topk(rows: np.ndarray, threshold: float, k: int = 1024) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    scores, near = index.search(rows, k)
    return greedy(len(rows), (n[s > threshold] for n, s in zip(near, scores, strict=True)))


def faiss_range(rows: np.ndarray, threshold: float) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    limits, _, near = index.range_search(rows, threshold)
    return greedy(len(rows), np.split(near, limits[1:-1].astype(np.int64)))


METHODS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "ours": ours,
    "ours-7-thresholds": ours_seven,
    "faiss-range": faiss_range,
    "faiss-topk": faiss_topk,
    "sklearn": sklearn,
    "naive": naive,
}


def peak_bytes() -> int:
    """The highest resident size of this process (Linux)."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(method: str, n: int, threshold: float) -> None:
    """In a process of its own: prints seconds, peak memory above the start in MB, and the kept rows."""
    import torch

    rows = clustered(n)
    METHODS[method](rows[:2000], threshold)  # imports and thread pools are not timed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = peak_bytes()
    start = time.perf_counter()
    kept = METHODS[method](rows, threshold)
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "extra_mb": (peak - before) / 1e6,
                "peak_mb": peak / 1e6,
                "threads": torch.get_num_threads(),
                "kept": np.packbits(kept).tobytes().hex(),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.85)
    parser.add_argument("--skip", nargs="*", default=[], choices=list(METHODS))
    parser.add_argument("--measure", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.n, options.threshold)

    results: dict[str, list[dict]] = {}
    for _ in range(options.runs):
        for method in METHODS:
            if method in options.skip:
                continue
            command = [sys.executable, __file__, "--measure", method, "--n", str(options.n)]
            command += ["--threshold", str(options.threshold)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                print(f"{method}: {run.stderr.strip().splitlines()[-1]}")
            else:
                results.setdefault(method, []).append(json.loads(run.stdout))
    kept = {method: int(runs[0]["kept"], 16) for method, runs in results.items()}
    base = statistics.median(run["seconds"] for run in results["ours"])
    print(
        f"{options.n} rows, threshold {options.threshold}: {kept['ours'].bit_count()} kept; "
        f"{results['ours'][0]['threads']} threads"
    )
    print(f"{'':20}{'median s':>9}{'min..max':>16}{'/ ours':>8}{'extra MB':>10}{'peak MB':>9}  kept as ours")
    for method, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        middle, span = statistics.median(seconds), f"{min(seconds):.2f}..{max(seconds):.2f}"
        extra, peak = (max(run[key] for run in runs) for key in ("extra_mb", "peak_mb"))
        differ = (kept[method] ^ kept["ours"]).bit_count()
        print(
            f"{method:20}{middle:9.2f}{span:>16}{middle / base:8.1f}{extra:10.0f}{peak:9.0f}  "
            f"{f'no: {differ} rows differ' if differ else 'yes'}"
        )


if __name__ == "__main__":
    main()
