"""The search for weights against recomputing every mix: interleaved runs, medians, ratios, deviation.

python bench/ensemble.py --rows 60000 --members 6 --runs 3
"""

import argparse
import statistics
import time

import numpy as np

from img2prompt.ensemble.weights import Cosines, alpha_curve, search_weights


def recompute(members: list[np.ndarray], targets: np.ndarray, weights: np.ndarray) -> float:
    """Mix, scale, multiply, average."""
    mixed = sum(float(weight) * member for weight, member in zip(weights, members, strict=True))
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    return float((mixed * targets).sum(axis=1).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    targets = rng.standard_normal((args.rows, 384), dtype=np.float32)
    members = [
        targets + np.float32(scale) * rng.standard_normal(targets.shape, dtype=np.float32)
        for scale in np.linspace(0.8, 1.6, args.members)
    ]
    for rows in (targets, *members):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    family = np.arange(args.members) < args.members - 1

    start = time.perf_counter()
    cosines = Cosines.between(members, targets)
    print(f"{'cosines, once':24} {time.perf_counter() - start:8.4f} s")
    start = time.perf_counter()
    best = search_weights(cosines)
    print(f"{'best weights':24} {time.perf_counter() - start:8.4f} s  {best.round(3)}")
    start = time.perf_counter()
    alpha_curve(cosines, family, np.arange(len(targets)) % 5)
    print(f"{'curve, 101 alphas':24} {time.perf_counter() - start:8.4f} s")

    seconds: dict[str, list[float]] = {"with its gradient": [], "recomputed": []}
    for _ in range(args.runs):
        start = time.perf_counter()
        for _ in range(10):
            loss, _ = cosines.loss(best)
        seconds["with its gradient"].append((time.perf_counter() - start) / 10)
        start = time.perf_counter()
        direct = recompute(members, targets, best)
        seconds["recomputed"].append(time.perf_counter() - start)
    slow, fast = (statistics.median(seconds[name]) for name in ("recomputed", "with its gradient"))
    print(f"{'one score, recomputed':24} {slow:8.4f} s")
    print(
        f"{'with its gradient':24} {fast:8.4f} s  {slow / fast:.0f} times as fast  deviation {abs(direct + loss):.1e}"
    )
