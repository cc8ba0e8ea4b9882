"""ensemble: the members' weights, found out of fold, and every model's cosines with the train targets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.metric import cosine
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import numbered, whole_folder
from img2prompt.ensemble.constant import constant
from img2prompt.ensemble.members import CONSTANT, in_family, kind_of, members_of, read_oof
from img2prompt.ensemble.mixture import Mixture
from img2prompt.ensemble.params import EnsembleParams
from img2prompt.ensemble.weights import Cosines, alpha_curve, cross_fitted, models_spread, search_weights
from pipelines import run

OUTPUTS = Path("outputs")


def validated(name: str, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The validation rows (v,) of all folds' trainings of a head, and what its models make of them: (v, 384)."""
    kind, clip = kind_of(name)
    folders = [OUTPUTS / f"model_a/fold_{held_out}/{clip}" for held_out in ids]
    rows = np.concatenate([np.load(folder / "validation_rows.npy") for folder in folders])
    return rows, np.concatenate([np.load(folder / f"{kind}_validation.npy") for folder in folders])


def main(ensemble: EnsembleParams) -> None:
    """Write weights.json and constant.npy, members.csv, alpha.csv and oof.parquet.

    members.csv: the weights in use, those that are best out of fold, where no model is the mean of several, and those
    that each fold is mixed with, found on the other folds. alpha.csv: the best score out of fold at each share of Model
    A's family, and what the same weights have on each fold. oof.parquet: a row a train image, a column a model with the
    cosine of its out-of-fold prediction.
    """
    targets = np.load(OUTPUTS / "embed_prompts/train.npy", mmap_mode="r")
    rows = read_rows(OUTPUTS / "prepare/train.parquet", ["source", "id"])
    table = pd.read_parquet(OUTPUTS / "folds/folds.parquet")
    fold, ids = table.fold.to_numpy(), np.unique(table.fold).tolist()
    kept, scored = np.load(OUTPUTS / "dedup/kept.npy"), np.load(OUTPUTS / "dedup/scored.npy")
    mean_oof, mean = constant(targets, fold, ids, kept)
    models = {CONSTANT: mean_oof, **read_oof(OUTPUTS, fold)}
    names = members_of(ensemble, len(numbered(OUTPUTS / "knn")))
    family, free = in_family(names), np.array(names) == CONSTANT
    alpha = None if ensemble.alpha == "search" else ensemble.alpha
    members = Cosines.between([models[name] for name in names], targets)
    searched = search_weights(members[scored], free=free)
    # Out of fold one model predicts an image, elsewhere the mean of all folds' models: a better one where they differ.
    spread = np.zeros(len(names))
    for place, name in enumerate(names):
        if kind_of(name)[0] in ("linear", "model_a"):
            watched, unknown = validated(name, ids)
            spread[place] = models_spread(models[name].take(watched), unknown, len(ids)) if len(watched) else 0.0
    weights = search_weights(members[scored].averaged(spread), family, alpha, free)
    oof = rows.assign(split="train", fold=fold, group=table.group.to_numpy(), scored=scored)
    for name, predictions in models.items():
        oof[name] = cosine(predictions, targets).astype(np.float32)
    ensembled, by_fold = cross_fitted(members, fold, scored, family, alpha, free)
    oof["ensemble"] = ensembled.astype(np.float32)
    with whole_folder(OUTPUTS / "ensemble") as out:
        found = dict(zip(names, weights.tolist(), strict=True))
        Mixture(found, mean, tuple(ids), found.pop(CONSTANT, 0.0)).save(out)
        weighed = pd.DataFrame({"member": names, "weight": weights, "weight_oof": searched})
        weighed = weighed.assign(**{f"fold_{held_out}": found for held_out, found in by_fold.items()})
        weighed.to_csv(out / "members.csv", index=False)
        alpha_curve(members[scored], family, fold[scored], free).to_csv(out / "alpha.csv", index=False)
        oof.to_parquet(out / "oof.parquet", index=False)
    print(weighed.round(4).to_string(index=False))


if __name__ == "__main__":
    run(main)
