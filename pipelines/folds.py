"""folds: every raw prompt gets a fold; prompts that are close share one."""

from pathlib import Path

import numpy as np

from img2prompt.folds import make_folds, near_folds
from img2prompt.params import Params
from img2prompt.rows import read_rows
from img2prompt.storage import whole_folder, write_json
from pipelines import run


def main(params: Params) -> None:
    """Write folds.parquet (id, group, fold) in the rows' order, folds.json, and texts.npy.

    texts.npy (t, folds) bool says which prompts without pictures are near a prompt of a fold.
    """
    rows = read_rows(Path("outputs/prepare/train.parquet"))
    targets, texts = (np.load(f"outputs/embed_prompts/{name}.npy") for name in ("train", "texts"))
    section = params.folds
    # The threshold may rise to that of the scored rows, not of the trained ones: folds outlive experiments on those.
    highest = max(section.threshold, params.dedup.scored)
    folds = make_folds(targets, section.ids, section.threshold, highest, section.seed, rows.fold.to_numpy(float))
    with whole_folder(Path("outputs/folds")) as out:
        table = rows[["id"]].assign(group=folds.group, fold=folds.fold)
        table.to_parquet(out / "folds.parquet", index=False)
        facts = {"group_threshold": folds.group_threshold, "max_cross_fold_cosine": folds.max_cross_fold_cosine}
        write_json(out / "folds.json", facts)
        np.save(out / "texts.npy", near_folds(texts, targets, folds.fold, section.ids, folds.group_threshold))
    print(f"{folds.group.max() + 1} groups at cosine {folds.group_threshold}")


if __name__ == "__main__":
    run(main)
