"""The paired difference between two runs, out of fold: is it more than noise, and on which folds?

    cp -r outputs /tmp/before && dvc exp run -S model_a.unfreeze=0
    PYTHONPATH=src python bench/compare.py /tmp/before outputs

Prints, for each model, the mean over scored rows of (cosine in the first run - cosine in the second), its 95% interval
over groups of similar prompts, and the same by fold. Both runs must share rows, folds and scored rows.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.metric import bootstrap_interval, cosine


def out_of_fold(outputs: Path, model: str, fold: np.ndarray) -> np.ndarray:
    """(n, d) predictions of a model for every row."""
    if model == "model_b":
        return np.load(outputs / "knn/oof.npy")
    parts = {f: np.load(outputs / f"model_a/fold_{f}/{model}_oof.npy") for f in np.unique(fold)}
    predictions = np.empty((len(fold), next(iter(parts.values())).shape[1]), np.float32)
    for f, part in parts.items():
        predictions[fold == f] = part
    return predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    runs = [parser.parse_args().first, parser.parse_args().second]
    for name in ("folds/folds.parquet", "dedup/scored.npy", "embed_prompts/train.npy"):
        if (runs[0] / name).read_bytes() != (runs[1] / name).read_bytes():
            parser.error(f"{name} differs: the runs are not scored on the same rows")
    table = pd.read_parquet(runs[0] / "folds/folds.parquet")
    scored, targets = np.load(runs[0] / "dedup/scored.npy"), np.load(runs[0] / "embed_prompts/train.npy")
    fold, group = table.fold.to_numpy(), table.group.to_numpy()
    for model in ("clip", "model_a", "model_b"):
        scores = [cosine(out_of_fold(run, model, fold)[scored], targets[scored]) for run in runs]
        difference = scores[0] - scores[1]
        low, high = bootstrap_interval(difference, group[scored])
        by_fold = " ".join(f"{f}: {difference[fold[scored] == f].mean():+.4f}" for f in np.unique(fold))
        print(f"{model:8} {scores[0].mean():.4f} - {scores[1].mean():.4f} = {difference.mean():+.4f} "
              f"[{low:+.4f}, {high:+.4f}]   by fold {by_fold}")  # fmt: skip


if __name__ == "__main__":
    main()
