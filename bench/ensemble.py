"""The search for alpha against recomputing every mix: interleaved runs, medians, ratios, deviation.

PYTHONPATH=src python bench/ensemble.py --rows 60000 --runs 3
"""

import argparse
import statistics
import time

import numpy as np

from img2prompt.ensemble import member_cosines, mixed_scores, search_alpha


def recompute(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """101 times: mix, scale, multiply, average."""
    scores = []
    for alpha in np.arange(101) / 100:
        mixed = alpha * a + (1 - alpha) * b
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        scores.append((mixed * targets).sum(axis=1).mean())
    return np.array(scores)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    targets, a, b = (rng.standard_normal((args.rows, 384), dtype=np.float32) for _ in range(3))
    a, b = targets + 0.8 * a, targets + 1.2 * b
    for rows in (targets, a, b):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = member_cosines([a, b], targets)
    shares = np.stack([np.arange(101) / 100, 1 - np.arange(101) / 100], axis=1)
    methods = {
        "search_alpha, all of it": lambda: search_alpha(a, b, targets).curve["score"].to_numpy(),
        "curve from known cosines": lambda: mixed_scores(shares, *cosines),
        "recompute the curve": lambda: recompute(a, b, targets),
    }
    seconds, curves = {name: [] for name in methods}, {}
    for _ in range(args.runs):
        for name, method in methods.items():
            start = time.perf_counter()
            curves[name] = method()
            seconds[name].append(time.perf_counter() - start)
    slowest = statistics.median(seconds["recompute the curve"])
    for name in methods:
        took = statistics.median(seconds[name])
        deviation = np.abs(curves[name] - curves["recompute the curve"]).max()
        print(f"{name:26} {took:8.4f} s  {slowest / took:6.1f} times as fast  deviation {deviation:.1e}")
