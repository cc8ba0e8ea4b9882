"""Why the ensemble gains what it gains: the members' errors, the ceiling of any mix, what one more member would add.

    python bench/members.py

Reads outputs/ of the last run. Weights fitted on test, and the best member of each image, are looked at here only:
they are ceilings, nothing that could be had.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.cli.check import load_params
from img2prompt.core.metric import bootstrap_interval, unit
from img2prompt.core.rows import read_rows
from img2prompt.ensemble.members import CONSTANT, members_of, read_oof
from img2prompt.ensemble.weights import Cosines, search_weights


def residuals(prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What is wrong with predictions (n, d): the part across the target, norm 1."""
    prediction = unit(prediction)
    return unit(prediction - (prediction * targets).sum(axis=1, keepdims=True) * targets)


def joined(first: float, second: float, likeness: float) -> float:
    """The best score of two members of these cosines whose errors have a cosine of `likeness`."""
    dot = first * second + np.sqrt((1 - first**2) * (1 - second**2)) * likeness
    gram, to_target = np.array([[1, dot], [dot, 1]]), np.array([first, second])
    weights = np.maximum(np.linalg.solve(gram, to_target), 0)
    return float(to_target @ weights / np.sqrt(weights @ gram @ weights))


def limit(score: float, likeness: float) -> float:
    """What the mean of ever more members of this score tends to, any two of which have errors of this cosine."""
    return score / np.sqrt(score**2 + (1 - score**2) * likeness)


def show(title: str, values: np.ndarray, names: list[str]) -> None:
    print(f"\n{title}")
    print(pd.DataFrame(values, names, names).round(3).to_string())


def main() -> None:
    params = load_params()
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    stored = pd.read_parquet("outputs/scores/cosines.parquet")
    targets = {"train": np.load("outputs/embed_prompts/train.npy"), "test": np.load("outputs/prepare_test/targets.npy")}
    known = read_rows(Path("outputs/prepare_test/test.parquet")).prompt.notna().to_numpy()
    names = [name for name in members_of(params.ensemble, len(params.clip.models)) if name != CONSTANT]
    oof = read_oof(Path("outputs"), fold)
    files = [f"outputs/predict/{'knn' if name.startswith('model_b') else 'model_a'}/{name}.npy" for name in names]
    predictions = {"train": [oof[name] for name in names], "test": [np.load(file)[known] for file in files]}
    for split, place in (("train", "out of fold"), ("test", "test")):
        rows = stored[stored.split == split]
        if rows.empty:
            continue
        scored = rows.scored.to_numpy()
        rows, members, wanted = rows[scored], [p[scored] for p in predictions[split]], targets[split][scored]
        own, ensemble = rows[names].to_numpy(), rows.ensemble.to_numpy()
        best = own.mean(axis=0).argmax()
        low, high = bootstrap_interval(ensemble - own[:, best], rows.group)
        print(f"\n== {place}: ensemble {ensemble.mean():.4f}, best member {names[best]} {own[:, best].mean():.4f}, "
              f"gain {(ensemble - own[:, best]).mean():+.4f} [{low:+.4f}, {high:+.4f}]")  # fmt: skip
        across = [residuals(member, wanted) for member in members]
        likeness = np.array([[np.mean((a * b).sum(axis=1)) for b in across] for a in across])
        show(
            "mean cosine between the members' errors (1: they err alike, and mixing them gains nothing)",
            likeness,
            names,
        )
        show("correlation of the members' scores over images", np.corrcoef(own.T), names)
        cosines = Cosines.between(members, wanted)
        weights = search_weights(cosines)
        fitted = cosines.of_mix(weights).mean() - own[:, best].mean()
        print(f"\nceiling, weights fitted on these very rows: gain {fitted:+.4f} with",
              ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, weights, strict=True)))  # fmt: skip
        per_image = own.max(axis=1).mean() - own[:, best].mean()
        print(f"ceiling, the best member of each image known: gain {per_image:+.4f}")
        score = ensemble.mean()
        table = {
            f"scores {own[:, best].mean() - worse:.3f}": [
                joined(score, own[:, best].mean() - worse, like) - score for like in (0.9, 0.8, 0.7, 0.5)
            ]
            for worse in (0.0, 0.02, 0.05)
        }
        print(
            "\nwhat one more member would add to the ensemble, by its score and its errors' likeness to the ensemble's"
        )
        print(pd.DataFrame(table, [f"likeness {like}" for like in (0.9, 0.8, 0.7, 0.5)]).T.round(4).to_string())
        top = own[:, best].mean()
        gains = ", ".join(f"{like}: {limit(top, like) - top:+.4f}" for like in (0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8))
        print(f"\never more members as good as the best, by how alike any two err, gain over it at most\n{gains}")


if __name__ == "__main__":
    main()
