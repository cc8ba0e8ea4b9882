"""knn: Model B, the prompts of the nearest neighbours in CLIP space: its settings, and the train images out of fold."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.device import device
from img2prompt.core.storage import numbered, whole_folder, write_json
from img2prompt.model_b.choice import Texts, fit
from img2prompt.model_b.params import KnnParams
from pipelines import run


def main(knn: KnnParams) -> None:
    """Of every CLIP write oof.npy (n, 384), fold_choices.json, search.csv, the neighbours used, and the bank.

    oof_{text,image}_rows.npy (n, k) int32 are rows of train.parquet, from n on of texts.parquet, nearest first;
    oof_{text,image}_distances.npy float32.
    """
    targets = np.load("outputs/embed_prompts/train.npy")
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    kept, scored, texts_kept = (np.load(f"outputs/dedup/{name}.npy") for name in ("kept", "scored", "texts_kept"))
    near = dict(zip(np.unique(fold).tolist(), np.load("outputs/folds/texts_near.npy").T, strict=True))
    with whole_folder(Path("outputs/knn")) as out:
        for embedded in numbered(Path("outputs/embed_images")):
            images, prompts, texts = (
                np.load(embedded / f"{name}.npy", mmap_mode="r") for name in ("train_image", "train_text", "texts_text")
            )
            found = fit(
                queries=images,
                bank={"text": prompts, "image": images},
                targets=targets,
                fold=fold,
                kept=kept,
                scored=scored,
                keys=knn.keys,
                k=knn.k,
                distance_dim=knn.distance_dim,
                eps=knn.eps,
                coef=knn.coef,
                device=device(),
                texts=Texts(texts, np.load("outputs/embed_prompts/texts.npy"), texts_kept, near),
            )
            folder = out / embedded.name
            folder.mkdir()
            found.bank.save(folder)
            np.save(folder / "oof.npy", found.oof)
            choices = {str(held_out): asdict(choice) for held_out, choice in found.fold_choices.items()}
            write_json(folder / "fold_choices.json", choices)
            found.search_table.to_csv(folder / "search.csv", index=False)
            for kind, neighbours in found.neighbours.items():
                k = found.bank.choice.settings[kind].k
                np.save(folder / f"oof_{kind}_rows.npy", neighbours.index[:, :k])
                np.save(folder / f"oof_{kind}_distances.npy", neighbours.distance[:, :k])
            print(f"clip {embedded.name}: {found.bank.choice}")


if __name__ == "__main__":
    run(main)
