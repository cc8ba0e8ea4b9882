"""ensemble: all members joined by weights found out of fold, and every model's scores."""

from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.dedup import max_cosine
from img2prompt.device import device
from img2prompt.ensemble import (
    Cosines,
    alpha_curve,
    constant,
    cross_fitted,
    fold_scores,
    gain_over_best_member,
    mix,
    scores_table,
    search_weights,
    spread,
)
from img2prompt.figures import draw_scores
from img2prompt.folds import components, similarity_forest
from img2prompt.metric import cosine
from img2prompt.params import Params
from img2prompt.rows import read_rows
from img2prompt.storage import read_json, whole, whole_folder, write_json
from pipelines import run

MODEL_A = {"ridge": "start", "clip": "clip", "model_a": "model_a"}  # the family's models, and the names of their files
Predictions = tuple[np.ndarray, list[np.ndarray]]


def read_model_a(files: str, clip: int, fold: np.ndarray, ids: list[int]) -> Predictions:
    """Out-of-fold predictions (n, 384) and each fold's test predictions (m, 384), of one model on one CLIP.

    The folds are those of params.yaml, not of the disk: a fold that was removed leaves its files behind.
    """
    folders = [Path(f"outputs/model_a/fold_{held_out}/{clip}") for held_out in ids]
    parts = [np.load(folder / f"{files}_oof.npy") for folder in folders]
    oof = np.empty((len(fold), parts[0].shape[1]), np.float32)
    for held_out, part in zip(ids, parts, strict=True):
        oof[fold == held_out] = part
    return oof, [np.load(folder / f"{files}_test.npy", mmap_mode="r") for folder in folders]


def members_of(params: Params) -> list[str]:
    """The names of the models that are in the ensemble: of the CLIPs that params.yaml names the kinds that it names."""
    clips = range(len(params.clip.models)) if params.ensemble.clips == "all" else params.ensemble.clips
    return [name_of(kind, clip) for kind in params.ensemble.members for clip in clips]


def read_models(params: Params, fold: np.ndarray) -> dict[str, Predictions]:
    """Of every CLIP Model A's family and Model B: by name, out of fold, and on test one or one a fold."""
    found = {}
    for clip in range(len(params.clip.models)):
        for kind, files in MODEL_A.items():
            found[name_of(kind, clip)] = read_model_a(files, clip, fold, params.folds.ids)
        knn = Path(f"outputs/knn/{clip}")
        found[name_of("model_b", clip)] = np.load(knn / "oof.npy"), [np.load(knn / "test.npy")]
    return found


def name_of(kind: str, clip: int) -> str:
    """A model's name: the first CLIP's are plain, those of a second one are ridge_1, clip_1, and so on."""
    return f"{kind}_{clip}" if clip else kind


def main(params: Params) -> None:
    """Write ensemble/ (see below) and scores.json.

    test.npy (m, 384): the ensemble. cosines.parquet: a row a picture, a column a model with the cosine of its
    prediction, out of fold or on test. members.csv: the members' weights. alpha.csv, fold_scores.csv, histories.csv:
    what scores.png draws. scores.md: the table.
    """
    targets = np.load("outputs/embed_prompts/train.npy")
    train_rows, test_rows = (read_rows(Path(f"outputs/prepare/{split}.parquet")) for split in ("train", "test"))
    table = pd.read_parquet("outputs/folds/folds.parquet")
    fold, group, ids = table.fold.to_numpy(), table.group.to_numpy(), params.folds.ids
    kept, scored = np.load("outputs/dedup/kept.npy"), np.load("outputs/dedup/scored.npy")
    test_targets = np.load("outputs/embed_prompts/test.npy")
    known = len(test_targets) > 0

    mean_oof, mean = constant(targets, fold, ids, kept)
    models = {"constant": (mean_oof, [np.tile(mean, (len(test_rows), 1))])} | read_models(params, fold)
    oof = {name: found for name, (found, _) in models.items()}
    test = {name: np.mean(behind, axis=0) for name, (_, behind) in models.items()}

    names = members_of(params)
    family = np.array([not name.startswith("model_b") for name in names])
    alpha = None if params.ensemble.alpha == "search" else params.ensemble.alpha
    members = Cosines.between([oof[name] for name in names], targets)
    searched = search_weights(members[scored], family)
    curve = alpha_curve(members[scored], family)
    ensemble, _ = cross_fitted(members, fold, scored, family, alpha)
    # Out of fold one model predicts a picture, on test the mean of all folds': a better one, by as much as they differ.
    differ = spread([models[name][1] for name in names])
    weights = search_weights(members[scored].bagged(differ), family, alpha)
    test["ensemble"] = mix([test[name] for name in names], weights)
    unreadable = test_rows.picture.isna().to_numpy()
    for predictions in test.values():
        predictions[unreadable] = mean  # no picture to look at

    cosines = train_rows[["source", "id"]].assign(split="train", fold=fold, group=group, scored=scored)
    cosines = cosines.assign(**{name: cosine(predictions, targets) for name, predictions in oof.items()})
    cosines["ensemble"] = ensemble
    if known:
        groups = read_json(Path("outputs/folds/folds.json"))["group_threshold"]
        near = components(len(test_rows), similarity_forest(test_targets, groups), groups)
        on_test = test_rows[["source", "id"]].assign(split="test", fold=-1, group=near, scored=True)
        on_test = on_test.assign(**{name: cosine(predictions, test_targets) for name, predictions in test.items()})
        cosines = pd.concat([cosines, on_test], ignore_index=True)
    shown = [*models, "ensemble"]

    train = cosines[(cosines.split == "train") & cosines.scored]
    scores: dict[str, object] = {}
    for name in shown:
        scores[name] = fold_scores(train[name].to_numpy(), train.fold.to_numpy(), ids)
        if known:
            scores[name]["test"] = float(on_test[name].mean())
    shares = {"alpha": float(weights[family].sum()), "alpha_searched": float(searched[family].sum())}
    scores["ensemble"] |= shares
    scores["folds"] = read_json(Path("outputs/folds/folds.json"))
    scores["dedup"] = {"raw": len(kept), "kept": int(kept.sum())}
    if known:
        seen = np.concatenate([targets, np.load("outputs/embed_prompts/texts.npy")])
        scores["dedup"]["max_test_train_cosine"] = max_cosine(test_targets, seen, device=device())
    reasons = pd.read_csv("outputs/prepare/quarantine.csv", usecols=["reason"]).reason.value_counts()
    scores["prepare"] = {"quarantined": int(reasons.sum()), **reasons.sort_index().to_dict()}

    by_fold = pd.DataFrame({name: [scores[name][f"fold_{held_out}"] for held_out in ids] for name in shown})
    by_fold.insert(0, "fold", ids)
    histories = pd.DataFrame({
        kind: pd.concat([
            pd.read_csv(f"outputs/model_a/fold_{held_out}/0/{kind}_history.csv").score for held_out in ids
        ], axis=1).mean(axis=1)
        for kind in ("clip", "model_a")
    })  # fmt: skip
    histories.insert(0, "epoch", histories.index + 1)
    thresholds = pd.read_csv("outputs/dedup/thresholds.csv")
    agreement = np.sqrt(1 - np.diag(differ))
    weighed = pd.DataFrame({"member": names, "weight": weights, "weight_oof": searched, "agreement": agreement})
    with whole_folder(Path("outputs/ensemble")) as out:
        np.save(out / "test.npy", test["ensemble"].astype(np.float32))
        cosines.astype(dict.fromkeys(shown, np.float32)).to_parquet(out / "cosines.parquet", index=False)
        report = f"{scores_table(cosines, shown, ids)}\n{gain_over_best_member(cosines, names)}"
        (out / "scores.md").write_text(report, encoding="utf-8")
        tables = {"alpha": curve, "members": weighed, "fold_scores": by_fold, "histories": histories}
        for name, table in tables.items():
            table.to_csv(out / f"{name}.csv", index=False)
        draw_scores(
            out / "scores.png", by_fold, shares["alpha_searched"], curve, histories, thresholds, params.dedup.threshold
        )
    with whole(Path("outputs/scores.json")) as path:
        write_json(path, scores)


if __name__ == "__main__":
    run(main)
