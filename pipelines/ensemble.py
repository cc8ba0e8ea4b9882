"""ensemble: all members joined by weights found out of fold, and every model's scores."""

from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.device import device
from img2prompt.core.metric import cosine
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import read_json, whole, whole_folder, write_json
from img2prompt.ensemble.constant import constant
from img2prompt.ensemble.members import members_of, read_models
from img2prompt.ensemble.params import EnsembleParams
from img2prompt.ensemble.weights import Cosines, alpha_curve, cross_fitted, mix, search_weights, spread
from img2prompt.prompts.dedup import max_cosine
from img2prompt.prompts.folds import components, similarity_forest
from img2prompt.prompts.params import DedupParams
from img2prompt.report.figures import draw_scores
from img2prompt.report.scores import fold_scores, gain_over_best_member, scores_table
from pipelines import run


def main(ensemble: EnsembleParams, dedup: DedupParams) -> None:
    """Write ensemble/ (see below) and scores.json.

    test.npy (m, 384): the ensemble. cosines.parquet: a row an image, a column a model with the cosine of its
    prediction, out of fold or on test. members.csv: the members' weights. alpha.csv, fold_scores.csv, histories.csv:
    what scores.png draws. scores.md: the table.
    """
    targets = np.load("outputs/embed_prompts/train.npy")
    train_rows, test_rows = (read_rows(Path(f"outputs/prepare/{split}.parquet")) for split in ("train", "test"))
    table = pd.read_parquet("outputs/folds/folds.parquet")
    fold, group, ids = table.fold.to_numpy(), table.group.to_numpy(), sorted(set(table.fold))
    clips = len(list(Path("outputs/knn").iterdir()))
    kept, scored = np.load("outputs/dedup/kept.npy"), np.load("outputs/dedup/scored.npy")
    test_targets = np.load("outputs/embed_prompts/test.npy")
    known = len(test_targets) > 0

    mean_oof, mean = constant(targets, fold, ids, kept)
    models = {"constant": (mean_oof, [np.tile(mean, (len(test_rows), 1))])} | read_models(
        Path("outputs"), clips, fold, ids
    )
    oof = {name: found for name, (found, _) in models.items()}
    test = {name: np.mean(behind, axis=0) for name, (_, behind) in models.items()}

    names = members_of(ensemble, clips)
    family = np.array([not name.startswith("model_b") for name in names])
    alpha = None if ensemble.alpha == "search" else ensemble.alpha
    members = Cosines.between([oof[name] for name in names], targets)
    searched = search_weights(members[scored], family)
    curve = alpha_curve(members[scored], family)
    mixed, _ = cross_fitted(members, fold, scored, family, alpha)
    # Out of fold one model predicts an image, on test the mean of all folds': a better one, by as much as they differ.
    differ = spread([models[name][1] for name in names])
    weights = search_weights(members[scored].bagged(differ), family, alpha)
    test["ensemble"] = mix([test[name] for name in names], weights)
    unreadable = test_rows.image.isna().to_numpy()
    for predictions in test.values():
        predictions[unreadable] = mean  # no image to look at

    cosines = train_rows[["source", "id"]].assign(split="train", fold=fold, group=group, scored=scored)
    cosines = cosines.assign(**{name: cosine(predictions, targets) for name, predictions in oof.items()})
    cosines["ensemble"] = mixed
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
        for kind in ("linear", "model_a")
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
            out / "scores.png", by_fold, shares["alpha_searched"], curve, histories, thresholds, dedup.threshold
        )
    with whole(Path("outputs/scores.json")) as path:
        write_json(path, scores)


if __name__ == "__main__":
    run(main)
