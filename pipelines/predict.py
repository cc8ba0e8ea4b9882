"""predict: of one part, Model A's family or Model B, the members' predictions of the test images."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from img2prompt.clip.params import EmbedImagesParams
from img2prompt.core.blocks import blocks
from img2prompt.core.device import device, off
from img2prompt.core.progress import progress
from img2prompt.core.rows import read_rows
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
    from img2prompt.clip.features import Images, stem
    from img2prompt.clip.model import load_clip, view
    from img2prompt.clip.towers import frozen, tower
    from img2prompt.model_a.inputs import Drawn, Inputs, Stored
    from img2prompt.model_a.trained import Trained

    where, stored, model = device(), OUTPUTS / "embed_test/model_a" / clip.name, load_clip(clip, "cpu")
    trained = Trained.load([OUTPUTS / f"model_a/fold_{held_out}" / clip.name for held_out in ids], model, where)
    references = read_rows(OUTPUTS / "prepare_test/test.parquet", ["image"]).image

    def inputs(name: str) -> Iterator[Inputs]:
        for seen in trained.views:
            file = stored / f"{stem('test', seen)}_{name}.npy"
            if file.is_file():
                yield Stored(np.load(file, mmap_mode="r"), where)
            else:
                before = frozen(tower(model.model.visual), trained.unfreeze)
                yield Drawn(Images(references, view(model, seen)), before, where)

    pooled, last = list(inputs("pooled")), list(inputs("frozen" if trained.unfreeze else "pooled"))
    every = np.arange(len(references))
    batches = [every[part] for part in blocks(len(references), batch_size)]

    def predictions(left: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        streams = [zip(*(of_view.batches(left, None) for of_view in views), strict=True) for views in (pooled, last)]
        parts = progress(zip(*streams, strict=True), f"Model A on clip {clip.name}", len(left), unit="batch")
        for found in off((trained(*inputs) for inputs in parts), where):
            yield {kind: value.numpy() for kind, value in found.items()}

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
