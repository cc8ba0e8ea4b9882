"""predict: of one part, Model A's family or Model B, the members' predictions of the test images."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from img2prompt.clip.params import EmbedImagesParams
from img2prompt.core.device import device
from img2prompt.core.progress import progress
from img2prompt.core.storage import RESUME, grow, numbered, resume_folder, room, whole_folder
from img2prompt.ensemble.members import name_of
from img2prompt.model_b.bank import Bank
from img2prompt.prompts.params import FoldsParams
from pipelines import run

OUTPUTS = Path("outputs")
ROOMS = [room(name) for name in ("core", "clip", "ensemble", "model_a", "model_b")]


def predict_model_a(clip: Path, ids: Sequence[int], batch_size: int, resume: Path, out: Path) -> None:
    """The family's members on one CLIP, batch by batch; a killed run resumes from what is in `resume`."""
    # Model B need not wait for open_clip's import, which takes seconds.
    from img2prompt.clip.features import stem
    from img2prompt.clip.model import load_clip
    from img2prompt.model_a.trained import Trained

    where, stored = device(), OUTPUTS / "embed_test/model_a" / clip.name
    folders = [OUTPUTS / f"model_a/fold_{held_out}" / clip.name for held_out in ids]
    trained = Trained.load(folders, load_clip(clip, "cpu"), where)
    pooled, frozen = (
        [np.load(stored / f"{stem('test', view)}_{name}.npy", mmap_mode="r") for view in trained.views]
        for name in ("pooled", "frozen" if trained.unfreeze else "pooled")
    )
    batches = [range(start, min(start + batch_size, len(pooled[0]))) for start in range(0, len(pooled[0]), batch_size)]

    def predictions(left: Sequence[range]) -> Iterator[dict[str, np.ndarray]]:
        for rows in progress(left, f"Model A on clip {clip.name}", unit="batch"):
            inputs = (
                [torch.from_numpy(np.array(x[rows.start : rows.stop])).to(where) for x in views]
                for views in (pooled, frozen)
            )
            yield {kind: found.cpu().numpy() for kind, found in trained(*inputs).items()}

    for kind, file in grow(resume, batches, predictions).items():
        file.rename(out / f"{name_of(kind, int(clip.name))}.npy")


def predict_model_b(clip: Path, out: Path) -> None:
    """Model B on one CLIP, with the neighbours that it is made of: {name}_{kind}_rows.npy and _distances.npy.

    Rows (m, k) int32 are of train.parquet, from its length on of texts.parquet, nearest first; distances float32.
    """
    bank, name = Bank.load(OUTPUTS / "knn" / clip.name), name_of("model_b", int(clip.name))
    found, neighbours = bank.predict(np.load(OUTPUTS / "embed_test/knn" / clip.name / "test_image.npy"), device())
    np.save(out / f"{name}.npy", found)
    for kind, near in neighbours.items():
        np.save(out / f"{name}_{kind}_rows.npy", bank.rows[near.index])
        np.save(out / f"{name}_{kind}_distances.npy", near.distance)


def main(embed_images: EmbedImagesParams, folds: FoldsParams) -> None:
    """Write {ridge,linear,model_a}.npy or model_b.npy: (m, 384) float32; of a second CLIP ridge_1.npy and so on."""
    part, clips = sys.argv[1], numbered(OUTPUTS / "clip")
    with whole_folder(OUTPUTS / "predict" / part) as out:
        if part == "knn":
            for clip in clips:
                predict_model_b(clip, out)
            return
        key = [device(), str(folds.ids), str(embed_images.batch_size), *clips, *ROOMS, Path(__file__)]
        resume = resume_folder("predict", *key, OUTPUTS / "model_a", OUTPUTS / "embed_test/model_a")
        for clip in clips:
            predict_model_a(clip, folds.ids, embed_images.batch_size, resume / clip.name, out)
    shutil.rmtree(RESUME / "predict")


if __name__ == "__main__":
    run(main)
