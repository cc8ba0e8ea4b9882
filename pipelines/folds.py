"""folds: every raw prompt gets a fold; prompts that are close share one."""

from pathlib import Path

import numpy as np

from img2prompt.folds import make_folds
from img2prompt.params import Params
from img2prompt.sources import read_rows
from img2prompt.storage import whole_folder, write_json
from pipelines import run


def main(params: Params) -> None:
    """Write folds.parquet (id, group, fold) in the rows' order, and folds.json."""
    rows = read_rows(Path("outputs/prepare/train.parquet"))
    targets = np.load("outputs/embed_prompts/train.npy")
    section = params.folds
    # The threshold may rise to that of the scored rows, not of the trained ones: folds outlive experiments on those.
    highest = max(section.threshold, params.dedup.scored)
    folds = make_folds(targets, section.ids, section.threshold, highest, section.seed)
    with whole_folder(Path("outputs/folds")) as out:
        table = rows[["id"]].assign(group=folds.group, fold=folds.fold)
        table.to_parquet(out / "folds.parquet", index=False)
        facts = {"group_threshold": folds.group_threshold, "max_cross_fold_cosine": folds.max_cross_fold_cosine}
        write_json(out / "folds.json", facts)
    print(f"{folds.group.max() + 1} groups at cosine {folds.group_threshold}")


if __name__ == "__main__":
    run(main)
