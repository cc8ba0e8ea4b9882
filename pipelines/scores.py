"""scores: the mix of the members' test predictions, and every model's scores."""

from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.rows import read_rows
from img2prompt.core.storage import read_json, whole, whole_folder, write_json
from img2prompt.ensemble.members import CONSTANT, in_family
from img2prompt.ensemble.mixture import Mixture
from img2prompt.prompts.folds import few_scored
from img2prompt.prompts.params import DedupParams
from img2prompt.report.facts import facts
from img2prompt.report.figures import draw_scores
from img2prompt.report.scores import (
    by_fold,
    choices_table,
    gain_over_best_member,
    known_cosines,
    mean_histories,
    over_start,
    scores_of,
    scores_table,
)
from pipelines import run

OUTPUTS = Path("outputs")


def main(dedup: DedupParams) -> None:
    """Write scores/ (see below) and scores.json.

    test.npy (m, 384): the ensemble's predictions. cosines.parquet: a row an image, out of fold or on test with a known
    prompt, a column a model with the cosine of its prediction. fold_scores.csv, histories.csv: what scores.png draws.
    choices.csv: how far each fold's heads went from their start. scores.md: the table.
    """
    rows, targets = read_rows(OUTPUTS / "prepare_test/test.parquet"), np.load(OUTPUTS / "prepare_test/targets.npy")
    oof, weighed = pd.read_parquet(OUTPUTS / "ensemble/oof.parquet"), pd.read_csv(OUTPUTS / "ensemble/members.csv")
    mixture = Mixture.load(OUTPUTS / "ensemble")
    models = oof.columns[oof.columns.get_loc("scored") + 1 :].tolist()
    readable = rows.image.notna().to_numpy()
    test = {CONSTANT: np.tile(mixture.constant, (len(rows), 1))}
    for name in models[1:-1]:
        part = "knn" if name.startswith("model_b") else "model_a"
        test[name] = np.load(OUTPUTS / f"predict/{part}/{name}.npy")
        test[name][~readable] = mixture.constant
    test["ensemble"] = mixture(test, readable)
    group_threshold = read_json(OUTPUTS / "folds/folds.json")["group_threshold"]
    cosines = pd.concat([oof, known_cosines(rows, test, targets, group_threshold)], ignore_index=True)
    family = in_family(weighed.member)
    scores: dict[str, object] = scores_of(cosines, models)
    alpha, searched = (float(weighed.loc[family, column].sum()) for column in ("weight", "weight_oof"))
    scores["ensemble"] |= {"alpha": alpha, "alpha_searched": searched}
    histories = mean_histories(OUTPUTS / "model_a", mixture.folds)
    choices = choices_table(OUTPUTS / "model_a", mixture.folds)
    with whole_folder(OUTPUTS / "scores") as out:
        np.save(out / "test.npy", test["ensemble"])
        cosines.to_parquet(out / "cosines.parquet", index=False)
        report = f"{scores_table(cosines, models)}\n{gain_over_best_member(cosines, weighed.member.tolist())}"
        report += over_start(cosines, choices)
        if warning := few_scored(oof.fold[oof.scored].to_numpy()):
            report += f"\n{warning}\n"
        if len(targets) < len(rows):
            report += f"\non test, {len(targets)} of {len(rows)} prompts are known: the scores are of these\n"
        (out / "scores.md").write_text(report, encoding="utf-8")
        by_fold(scores, models).to_csv(out / "fold_scores.csv", index=False)
        histories.to_csv(out / "histories.csv", index=False)
        choices.to_csv(out / "choices.csv", index=False)
        curve, thresholds = (pd.read_csv(OUTPUTS / file) for file in ("ensemble/alpha.csv", "dedup/thresholds.csv"))
        draw_scores(
            out / "scores.png", by_fold(scores, models), searched, curve, histories, thresholds, dedup.threshold
        )
    with whole(OUTPUTS / "scores.json") as path:
        write_json(path, scores | facts(OUTPUTS, rows, targets, dedup.scored))


if __name__ == "__main__":
    run(main)
