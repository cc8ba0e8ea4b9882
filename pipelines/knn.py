"""knn: Model B, the prompts of the nearest neighbours in CLIP space."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.device import device
from img2prompt.core.storage import whole_folder, write_json
from img2prompt.model_b.choice import Texts, fit_predict
from img2prompt.model_b.params import KnnParams
from pipelines import run


def main(knn: KnnParams) -> None:
    """Of every CLIP write oof.npy (n, 384), test.npy (m, 384), choice.json, search.csv, and the neighbours used.

    {oof,test}_{text,image}_rows.npy (n, k) int32 are rows of train.parquet, from n on of texts.parquet, nearest first;
    _distances.npy float32.
    """
    section = knn
    targets = np.load("outputs/embed_prompts/train.npy")
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    kept, scored, texts_kept = (np.load(f"outputs/dedup/{name}.npy") for name in ("kept", "scored", "texts_kept"))
    texts_targets, near_fold = np.load("outputs/embed_prompts/texts.npy"), np.load("outputs/folds/texts_near.npy")
    with whole_folder(Path("outputs/knn")) as out:
        for embedded in sorted(Path("outputs/embed_images").iterdir()):
            folder = out / embedded.name
            images, prompts, test, texts = (
                np.load(embedded / f"{name}.npy") for name in ("train_image", "train_text", "test_image", "texts_text")
            )
            found = fit_predict(
                queries=images,
                bank={"text": prompts, "image": images},
                targets=targets,
                fold=fold,
                kept=kept,
                scored=scored,
                test_queries=test,
                keys=section.keys,
                k=section.k,
                distance_dim=section.distance_dim,
                eps=section.eps,
                coef=section.coef,
                device=device(),
                texts=Texts(
                    texts, texts_targets, texts_kept, dict(zip(np.unique(fold).tolist(), near_fold.T, strict=True))
                ),
            )
            folder.mkdir()
            np.save(folder / "oof.npy", found.oof)
            np.save(folder / "test.npy", found.test)
            choices = {str(held_out): asdict(choice) for held_out, choice in found.fold_choices.items()}
            write_json(folder / "choice.json", asdict(found.choice) | {"folds": choices})
            found.search_table.to_csv(folder / "search.csv", index=False)
            for name, neighbours in (("oof", found.neighbours), ("test", found.test_neighbours)):
                for kind, near in neighbours.items():
                    k = found.choice.settings[kind].k
                    np.save(folder / f"{name}_{kind}_rows.npy", near.index[:, :k].astype(np.int32))
                    np.save(folder / f"{name}_{kind}_distances.npy", near.distance[:, :k])
            print(f"clip {embedded.name}: {found.choice}")


if __name__ == "__main__":
    run(main)
