"""knn: Model B, the prompts of the nearest neighbours in CLIP space."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.device import device
from img2prompt.knn import fit_predict
from img2prompt.params import Params
from img2prompt.storage import whole_folder, write_json
from pipelines import run


def main(params: Params) -> None:
    """Write oof.npy (n, 384), test.npy (m, 384), choice.json, search.csv, and the neighbours used.

    {oof,test}_{text,image}_rows.npy (n, k) int32 are rows of train.parquet, nearest first; _distances.npy float32.
    """
    embedded = Path("outputs/embed_images")
    pictures, texts, test = (np.load(embedded / f"{name}.npy") for name in ("train_image", "train_text", "test_image"))
    section = params.knn
    found = fit_predict(
        queries=pictures,
        bank={"text": texts, "image": pictures},
        targets=np.load("outputs/embed_prompts/train.npy"),
        fold=pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy(),
        kept=np.load("outputs/dedup/kept.npy"),
        scored=np.load("outputs/dedup/scored.npy"),
        test_queries=test,
        keys=section.keys,
        k=section.k,
        distance_dim=section.distance_dim,
        eps=section.eps,
        coef=section.coef,
        device=device(),
    )
    with whole_folder(Path("outputs/knn")) as out:
        np.save(out / "oof.npy", found.oof)
        np.save(out / "test.npy", found.test)
        write_json(out / "choice.json", asdict(found.choice))
        found.search_table.to_csv(out / "search.csv", index=False)
        for name, neighbours in (("oof", found.neighbours), ("test", found.test_neighbours)):
            for kind, near in neighbours.items():
                k = found.choice.settings[kind].k
                np.save(out / f"{name}_{kind}_rows.npy", near.index[:, :k].astype(np.int32))
                np.save(out / f"{name}_{kind}_distances.npy", near.distance[:, :k])
    print(f"chosen: {found.choice}")


if __name__ == "__main__":
    run(main)
