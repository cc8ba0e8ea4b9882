"""dedup: of every pair of near-duplicate prompts one is kept."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.device import device
from img2prompt.core.engine import engine
from img2prompt.core.rows import read_rows
from img2prompt.core.shards import forget
from img2prompt.core.storage import RESUME, resume_folder, room, whole_folder
from img2prompt.prompts.dedup import deduplicate
from img2prompt.prompts.params import DedupParams
from img2prompt.prompts.waves import deduplicate_files
from pipelines import run

FILES = [Path("outputs/embed_prompts/train.npy"), Path("outputs/embed_prompts/texts.npy")]
TABLE = [round(0.70 + 0.05 * step, 2) for step in range(6)] + [0.99]


def main(dedup: DedupParams) -> None:
    """Write kept.npy and scored.npy (n,) bool, texts_kept.npy (t,) bool, duplicates.csv, thresholds.csv.

    stands_for.npy (n,) int64: of a dropped row the kept one that it is near, of a kept row itself, else -1.
    """
    targets, texts = (np.load(file, mmap_mode="r") for file in FILES)
    rows = read_rows(Path("outputs/prepare/train.parquet"), ["id", "source", "prompt"])
    threshold, scored = dedup.threshold, dedup.scored
    # Prompts without images come last: they are dropped for the images', never the other way round.
    asked, also, where = threshold if threshold < 1 else scored, [scored, *TABLE], device()
    if engine() == "local":
        found = deduplicate(np.concatenate([targets, texts]), asked, also, where)
    else:
        resume = resume_folder("dedup", f"{asked} {also} {where}", *FILES, room("core"), room("prompts"))
        found = deduplicate_files(FILES, asked, also, where, resume)
    kept = dict(zip(found.thresholds, found.kept[:, : len(targets)], strict=True))
    texts_kept = dict(zip(found.thresholds, found.kept[:, len(targets) :], strict=True))
    pairs = found.duplicates[found.duplicates.dropped < len(targets)]
    if threshold == 1:  # every row: not the cosines' affair, which rounding may put above 1 for equal prompts
        kept[threshold], pairs = np.ones(len(targets), dtype=bool), pairs.iloc[:0]
        texts_kept[threshold] = np.ones(len(texts), dtype=bool)
    counts = [(level, int(mask.sum()), float(mask.mean())) for level, mask in kept.items()]
    train, train_texts = kept[threshold], texts_kept[threshold]
    if dedup.at_random:  # as many, but any
        rng = np.random.default_rng(0)
        train, train_texts = rng.permutation(train), rng.permutation(train_texts)
        pairs = pairs.iloc[:0]  # of what this drops, nothing is a near-duplicate
    stands_for = np.where(train, np.arange(len(train)), -1)
    stands_for[pairs.dropped] = pairs.kept
    with whole_folder(Path("outputs/dedup")) as out:
        np.save(out / "kept.npy", train)
        np.save(out / "stands_for.npy", stands_for)
        np.save(out / "scored.npy", kept[scored])
        np.save(out / "texts_kept.npy", train_texts)
        sides = {side: rows.iloc[pairs[side]] for side in ("dropped", "kept")}
        columns = {
            f"{side}_{column}".removesuffix("_id"): of_side[column].to_numpy()
            for side, of_side in sides.items()
            for column in ("id", "source", "prompt")
        }
        pd.DataFrame(columns | {"cosine": pairs.cosine.round(7).to_numpy()}).to_csv(out / "duplicates.csv", index=False)
        pd.DataFrame(counts, columns=["threshold", "kept", "share"]).to_csv(out / "thresholds.csv", index=False)
    shutil.rmtree(RESUME / "dedup", ignore_errors=True)
    forget(RESUME / "dedup")
    print(
        f"kept {train.sum()} of {len(targets)} prompts"
        + (", at random" if dedup.at_random else f" at cosine {threshold}")
    )


if __name__ == "__main__":
    run(main)
