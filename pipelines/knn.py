"""knn: Model B, the prompts of the nearest neighbours in CLIP space: its settings, and the train images out of fold."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.device import device
from img2prompt.core.engine import engine
from img2prompt.core.storage import RESUME, numbered, resume_folder, room, whole_folder, write_json
from img2prompt.model_b.choice import Search, Texts, fit
from img2prompt.model_b.neighbours import Neighbours
from img2prompt.model_b.params import KnnParams
from img2prompt.model_b.parts import out_of_fold_by_parts
from pipelines import run

# What neighbours depend on, beside the embeddings and params: a killed run resumes only if none of it has changed.
DEPENDS = [
    Path("outputs/folds"), Path("outputs/dedup/kept.npy"), Path("outputs/dedup/texts_kept.npy"), room("core"),
    room("model_b"), Path(__file__),
]  # fmt: skip


def search_on_cluster(embedded: Path, fold: np.ndarray, knn: KnnParams) -> Search | None:
    """What finds the neighbours out of fold for one CLIP's embeddings; None: this process."""
    if engine() == "local":
        return None
    image, where = embedded / "train_image.npy", device()
    keys = {"text": [embedded / "train_text.npy", embedded / "texts_text.npy"], "image": [image]}
    resume = resume_folder(f"knn_{embedded.name}", f"{knn} {where}", image, *keys["text"], *DEPENDS)

    def search(kind: str, usable: dict[int, np.ndarray], k: int) -> Neighbours:
        what = f"{kind} neighbours on clip {embedded.name}"
        return out_of_fold_by_parts(image, keys[kind], fold, usable, k, where, resume / kind, what)

    return search


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
                search=search_on_cluster(embedded, fold, knn),
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
    for folder in RESUME.glob("knn_*"):
        shutil.rmtree(folder)


if __name__ == "__main__":
    run(main)
