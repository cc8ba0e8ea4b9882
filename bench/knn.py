"""KNN regression against what people use: interleaved runs, medians, ratios, deviations, peak memory.

    python bench/knn.py --queries 16000 --keys 60000 --runs 3
    python bench/knn.py --queries 2000 --keys 60000 --k 1024 --skip sklearn

Each run is a process of its own, so that its peak memory is its own; a small run before it pays for imports.
On a busy machine compare CPU seconds under OMP_NUM_THREADS=1: threads that wait for others spin.
The last line is `grid_scores` on ours' neighbours: what the whole search of k and distance_dim adds.
"""

import argparse
import multiprocessing
import resource
import statistics
import time

import numpy as np

POWER, EPS = 4.0, 1e-6


def images(n: int, d: int, rng: np.random.Generator, centres: np.ndarray) -> np.ndarray:
    """(n, d) float32 at norm 1 around shared centres, with cosines like those between images in CLIP."""
    rows = centres[rng.integers(len(centres), size=n)] + 0.7 * rng.standard_normal((n, d), dtype=np.float32)
    rows[:, : d // 8] += 1.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ours(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    from img2prompt.model_b.neighbours import nearest
    from img2prompt.model_b.regression import regress

    return regress(nearest(queries, keys, k), targets, k, POWER, EPS, 1.0)


def sklearn(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    from sklearn.neighbors import KNeighborsRegressor

    model = KNeighborsRegressor(k, weights=lambda d: 1 / (d**POWER + EPS), algorithm="brute")
    predicted = model.fit(keys, targets).predict(queries)
    return predicted / np.linalg.norm(predicted, axis=1, keepdims=True)


def cdist(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    """What one writes by hand in torch, 1024 queries at a time because 16K x 60K distances are 4 GB."""
    import torch

    queries, keys, targets = (torch.from_numpy(x) for x in (queries, keys, targets))
    predicted = []
    for block in queries.split(1024):
        distance, index = torch.cdist(block, keys).topk(k, dim=1, largest=False)
        weight = 1 / (distance**POWER + EPS)
        predicted.append((targets[index] * weight[..., None]).sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(predicted)).numpy()


def grid(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray, k: int) -> float:
    """Seconds of the search alone; the neighbours are found before the clock starts."""
    from img2prompt.model_b.choice import DISTANCE_DIM_GRID, K_GRID
    from img2prompt.model_b.neighbours import nearest
    from img2prompt.model_b.regression import grid_scores

    neighbours = nearest(queries, keys, k)
    ks = tuple(size for size in K_GRID if size <= k)
    start = time.perf_counter()
    grid_scores(neighbours, targets, targets[: len(queries)], ks, DISTANCE_DIM_GRID, EPS, 1.0)
    return time.perf_counter() - start


METHODS = {"ours": ours, "sklearn": sklearn, "cdist": cdist}


def measure(name: str) -> tuple[float, float, float, np.ndarray]:
    """Seconds, CPU seconds, MB beyond what the data take, predictions; in a process forked with DATA."""
    *data, k = DATA
    METHODS[name](data[0][:64], data[1][:2000], data[2][:2000], k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    predicted = METHODS[name](*DATA)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds, cpu, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, predicted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=16_000)
    parser.add_argument("--keys", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=METHODS)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, args.dim), dtype=np.float32)
    targets = rng.standard_normal((args.keys, 384), dtype=np.float32)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    DATA = (
        images(args.queries, args.dim, rng, centres),
        images(args.keys, args.dim, rng, centres),
        targets,
        args.k,
    )
    names = [name for name in METHODS if name not in args.skip]
    seconds, cpu, memory, other = ({name: [] for name in names} for _ in range(4))
    reference = np.empty(0)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(args.runs):
            for name in names:
                took, busy, extra, predicted = pool.apply(measure, (name,))
                reference = predicted if name == "ours" else reference
                cosine = (predicted.astype(np.float64) * reference).sum(axis=1)
                seconds[name].append(took)
                cpu[name].append(busy)
                memory[name].append(extra)
                other[name].append(int((cosine < 1 - 1e-5).sum()))
        for name in names:
            took, busy = statistics.median(seconds[name]), statistics.median(cpu[name])
            print(
                f"{name:8} {took:7.2f} s {took / statistics.median(seconds['ours']):5.2f} x ours   "
                f"CPU {busy:7.2f} s {busy / statistics.median(cpu['ours']):5.2f} x ours   "
                f"+{max(memory[name]):4.0f} MB   rows that differ by 1e-5 in cosine: {max(other[name])}"
            )
        took = statistics.median(pool.apply(grid, DATA) for _ in range(args.runs))
        print(f"{'grid':8} {took:8.2f} s")
