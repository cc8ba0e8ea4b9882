"""ensemble: Model A and Model B joined by a weight found out of fold, and every model's scores."""

from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.dedup import max_cosine
from img2prompt.device import device
from img2prompt.ensemble import constant, cross_fitted, fold_scores, mix, scores_table, search_alpha
from img2prompt.figures import draw_scores
from img2prompt.metric import mean_cosine
from img2prompt.params import Params
from img2prompt.sources import read_rows
from img2prompt.storage import read_json, whole, whole_folder, write_json
from pipelines import run


def read_folds(name: str, fold: np.ndarray, ids: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Out-of-fold predictions (n, 384) and each fold's test predictions (m, 384).

    The folds are those of params.yaml, not of the disk: a fold that was removed leaves its files behind.
    """
    folder = Path("outputs/model_a")
    parts = [np.load(folder / f"fold_{held_out}/0/{name}_oof.npy") for held_out in ids]
    oof = np.empty((len(fold), parts[0].shape[1]), np.float32)
    for held_out, part in zip(ids, parts, strict=True):
        oof[fold == held_out] = part
    return oof, [np.load(folder / f"fold_{held_out}/0/{name}_test.npy") for held_out in ids]


def agreement(predictions: list[np.ndarray]) -> float:
    """The norm of the mean of several models' predictions (m, 384), norm 1 each; 1 if they all say the same.

    Out of fold one model predicts a picture, on test the mean of all folds': a better one, by as much as they differ.
    """
    return float(np.linalg.norm(np.mean(predictions, axis=0), axis=1).mean())


def main(params: Params) -> None:
    """Write ensemble/{test.npy,scores.md,scores.png,alpha.csv,fold_scores.csv,histories.csv} and scores.json."""
    targets = np.load("outputs/embed_prompts/train.npy")
    test_rows = read_rows(Path("outputs/prepare/test.parquet"))
    table = pd.read_parquet("outputs/folds/folds.parquet")
    fold, group, ids = table.fold.to_numpy(), table.group.to_numpy(), params.folds.ids
    kept, scored = np.load("outputs/dedup/kept.npy"), np.load("outputs/dedup/scored.npy")
    test_targets = np.load("outputs/embed_prompts/test.npy")
    known = len(test_targets) > 0

    oof: dict[str, np.ndarray] = {}
    test: dict[str, np.ndarray] = {}
    oof["constant"], mean = constant(targets, fold, ids, kept)
    test["constant"] = np.tile(mean, (len(test_rows), 1))
    # On few pictures tuning the tower does harm, on many it helps: how far to follow it is searched like alpha, between
    # the predictions before and after. (In weight space this is WiSE-FT, arXiv 2109.01903.)
    tuned: dict[str, float] = {}
    for kind in ("clip", "model_a"):
        before, after = (read_folds(name, fold, ids) for name in ("start", kind))
        oof[kind], _ = cross_fitted(after[0], before[0], targets, fold, scored)
        both = agreement(after[1]), agreement(before[1])
        tuned[kind] = search_alpha(after[0], before[0], targets, scored, both).alpha
        test[kind] = mix(np.mean(after[1], axis=0), np.mean(before[1], axis=0), tuned[kind])
    # Model A as it is on test, out of fold and by each fold's models: what the weight for test is searched on.
    single = mix(after[0], before[0], tuned["model_a"])
    agreed = agreement([mix(a, b, tuned["model_a"]) for a, b in zip(after[1], before[1], strict=True)])
    oof["model_b"], test["model_b"] = np.load("outputs/knn/0/oof.npy"), np.load("outputs/knn/0/test.npy")
    members = oof["model_a"], oof["model_b"], targets
    search = search_alpha(*members, scored)
    if params.ensemble.alpha == "search":
        alpha = search_alpha(single, oof["model_b"], targets, scored, (agreed, 1.0)).alpha
        oof["ensemble"], _ = cross_fitted(*members, fold, scored)
    else:
        alpha = params.ensemble.alpha
        oof["ensemble"] = mix(oof["model_a"], oof["model_b"], alpha)
    test["ensemble"] = mix(test["model_a"], test["model_b"], alpha)
    unreadable = test_rows.picture.isna().to_numpy()
    for predictions in test.values():
        predictions[unreadable] = mean  # no picture to look at

    scores: dict[str, object] = {}
    for name, predictions in oof.items():
        scores[name] = fold_scores(predictions, targets, fold, ids, scored)
        if known:
            scores[name]["test"] = mean_cosine(test[name], test_targets)
    for kind, share in tuned.items():
        scores[kind]["tuned"] = share
    scores["ensemble"] |= {"alpha": alpha, "alpha_searched": search.alpha, "agreement": agreed}
    scores["folds"] = read_json(Path("outputs/folds/folds.json"))
    scores["dedup"] = {"raw": len(kept), "kept": int(kept.sum())}
    if known:
        scores["dedup"]["max_test_train_cosine"] = max_cosine(test_targets, targets, device=device())
    scores["prepare"] = {"quarantined": len(pd.read_csv("outputs/prepare/quarantine.csv"))}

    by_fold = pd.DataFrame({name: [scores[name][f"fold_{held_out}"] for held_out in ids] for name in oof})
    by_fold.insert(0, "fold", ids)
    histories = pd.DataFrame({
        kind: pd.concat([
            pd.read_csv(f"outputs/model_a/fold_{held_out}/0/{kind}_history.csv").score for held_out in ids
        ], axis=1).mean(axis=1)
        for kind in ("clip", "model_a")
    })  # fmt: skip
    histories.insert(0, "epoch", histories.index + 1)
    thresholds = pd.read_csv("outputs/dedup/thresholds.csv")
    with whole_folder(Path("outputs/ensemble")) as out:
        np.save(out / "test.npy", test["ensemble"].astype(np.float32))
        markdown = scores_table(oof, targets, fold, ids, scored, group, test, test_targets if known else None)
        (out / "scores.md").write_text(markdown, encoding="utf-8")
        for name, table in (("alpha", search.curve), ("fold_scores", by_fold), ("histories", histories)):
            table.to_csv(out / f"{name}.csv", index=False)
        draw_scores(
            out / "scores.png", by_fold, search.alpha, search.curve, histories, thresholds, params.dedup.threshold
        )
    with whole(Path("outputs/scores.json")) as path:
        write_json(path, scores)


if __name__ == "__main__":
    run(main)
