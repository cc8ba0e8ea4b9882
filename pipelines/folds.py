"""folds: every raw prompt gets a fold; prompts that are close share one."""

from pathlib import Path

import numpy as np

from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import whole_folder, write_json
from img2prompt.prompts.folds import few_scored, make_folds, near_folds
from img2prompt.prompts.params import DedupParams, FoldsParams
from pipelines import run


def main(folds: FoldsParams, dedup: DedupParams) -> None:
    """Write folds.parquet (id, group, fold) in the rows' order, folds.json, and texts_near.npy.

    texts_near.npy (t, folds) bool: which prompts without images are near a prompt of which fold, in ascending order.
    """
    rows = read_rows(Path("outputs/prepare/train.parquet"), ["id", "fold"])
    # Copy on write: torch warns of arrays that it may not write to.
    targets, texts = (np.load(f"outputs/embed_prompts/{name}.npy", mmap_mode="c") for name in ("train", "texts"))
    # The threshold may rise to that of the scored rows, not of the trained ones: folds outlive experiments on those.
    highest = max(folds.threshold, dedup.scored)
    scored = np.load("outputs/dedup/scored.npy")
    given = rows.fold.to_numpy(float)
    found = make_folds(targets, folds.ids, folds.threshold, highest, folds.seed, given, scored, device())
    with whole_folder(Path("outputs/folds")) as out:
        table = rows[["id"]].assign(group=found.group, fold=found.fold)
        table.to_parquet(out / "folds.parquet", index=False)
        facts = {"group_threshold": found.group_threshold, "max_cross_fold_cosine": found.max_cross_fold_cosine}
        write_json(out / "folds.json", facts)
        near = near_folds(texts, targets, found.fold, sorted(folds.ids), found.group_threshold, device())
        np.save(out / "texts_near.npy", near)
    print(f"{found.group.max() + 1} groups at cosine {found.group_threshold}")
    counts = dict(zip(*map(np.ndarray.tolist, np.unique(found.fold[scored], return_counts=True)), strict=True))
    print("scored rows by fold:", ", ".join(f"{fold} has {count}" for fold, count in counts.items()))
    if warning := few_scored(found.fold[scored]):
        print(f"WARNING: {warning}")


if __name__ == "__main__":
    run(main)
