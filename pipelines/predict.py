"""predict: of one part, Model A's family or Model B, the members' predictions of the test images."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from img2prompt.clip.params import EmbedImagesParams
from img2prompt.core.blocks import BLOCK, blocks
from img2prompt.core.device import device, off, on_cuda
from img2prompt.core.engine import engine, grown
from img2prompt.core.progress import progress
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, numbered, resume_folder, room, whole_folder
from img2prompt.ensemble.members import name_of
from img2prompt.model_b.bank import Bank
from img2prompt.model_b.neighbours import Neighbours, on_device
from img2prompt.model_b.parts import Rows, nearest_by_parts
from img2prompt.prompts.params import FoldsParams
from pipelines import run

if TYPE_CHECKING:
    from img2prompt.model_a.inputs import Inputs
    from img2prompt.model_a.trained import Trained

OUTPUTS = Path("outputs")
TEST = OUTPUTS / "prepare_test/test.parquet"
QUERIES = 16_384  # of Model B at once: one reading of the keys serves them
ROOMS = [room(name) for name in ("core", "clip", "ensemble", "model_a", "model_b")]


class Family:
    """Model A's family on one CLIP, as trained on the folds `ids`; loaded when it predicts first."""

    def __init__(self, clip: Path, ids: Sequence[int]) -> None:
        self.what, self._clip, self._ids, self._loaded = f"Model A on clip {clip.name}", clip, ids, None

    def _load(self, where: str) -> tuple[Trained, list[Inputs], list[Inputs]]:
        """The members' common function, and of each view the pooled features and the last layers' inputs."""
        # Model B need not wait for open_clip's import, which takes seconds.
        from img2prompt.clip.features import Images, stem
        from img2prompt.clip.model import load_clip, view
        from img2prompt.clip.towers import frozen, tower
        from img2prompt.model_a.inputs import Drawn, Stored
        from img2prompt.model_a.trained import Trained

        stored, model = OUTPUTS / "embed_test/model_a" / self._clip.name, load_clip(self._clip, "cpu")
        folds = [OUTPUTS / f"model_a/fold_{held_out}" / self._clip.name for held_out in self._ids]
        trained, references = Trained.load(folds, model, where), read_rows(TEST, ["image"]).image

        def inputs(name: str) -> Iterator[Inputs]:
            for seen in trained.views:
                file = stored / f"{stem('test', seen)}_{name}.npy"
                if file.is_file():
                    yield Stored(np.load(file, mmap_mode="r"), where)
                else:
                    before = frozen(tower(model.model.visual), trained.unfreeze)
                    yield Drawn(Images(references, view(model, seen)), before, where)

        return trained, list(inputs("pooled")), list(inputs("frozen" if trained.unfreeze else "pooled"))

    def __call__(self, left: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The members' predictions (b, 384) float32 for each batch of row numbers (b,)."""
        where = device()
        trained, *views = self._loaded = self._loaded or self._load(where)
        streams = [zip(*(of_view.batches(left, None) for of_view in of_kind), strict=True) for of_kind in views]
        parts = progress(zip(*streams, strict=True), self.what, len(left), unit="batch")
        for found in off((trained(*inputs) for inputs in parts), where):
            yield {name_of(kind, int(self._clip.name)): value.numpy() for kind, value in found.items()}


class Neighbourhood:
    """Model B on one CLIP; loaded when it predicts first.

    Args:
        clip: its folder.
        found: the folder where `find` has left the neighbours; None: each batch looks for its own among all keys.
    """

    def __init__(self, clip: Path, found: Path | None = None) -> None:
        self.what, self._clip, self._found, self._loaded = f"Model B on clip {clip.name}", clip, found, None

    def find(self) -> None:
        """Leave the neighbours of all test images, by tasks that hold some of the keys."""
        folder, where = OUTPUTS / "knn" / self._clip.name, device()
        queries = Rows.every(OUTPUTS / "embed_test/knn" / self._clip.name / "test_image.npy")
        for kind, setting in Bank.load(folder, mapped=True).choice.settings.items():
            keys, what = Rows.every(folder / f"{kind}_keys.npy"), f"{kind} neighbours on clip {self._clip.name}"
            nearest_by_parts(queries, keys, setting.k, where, self._found / kind, what)

    def __call__(self, left: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The predictions for each batch of row numbers (b,), and the neighbours that they are made of.

        {name}_{kind}_rows (b, k) int32 are of train.parquet, from its length on of texts.parquet, nearest first;
        {name}_{kind}_distances (b, k) float32.
        """
        where, name = device(), name_of("model_b", int(self._clip.name))
        bank = self._loaded = self._loaded or self._load(where)
        queries = np.load(OUTPUTS / "embed_test/knn" / self._clip.name / "test_image.npy", mmap_mode="r")
        for rows in left:
            if self._found is None:
                found, neighbours = bank.predict(queries[rows], where)
            else:
                neighbours = {kind: self._neighbours(kind, rows) for kind in bank.choice.settings}
                found = bank.regressed(neighbours, where)
            arrays = {name: found}
            for kind, near in neighbours.items():
                arrays[f"{name}_{kind}_rows"] = bank.rows[near.index]
                arrays[f"{name}_{kind}_distances"] = near.distance
            yield arrays

    def _load(self, where: str) -> Bank:
        folder = OUTPUTS / "knn" / self._clip.name
        if self._found is None:
            return Bank.load(folder).on(where)
        bank = Bank.load(folder, mapped=True)
        return replace(bank, targets=on_device(bank.targets, where))

    def _neighbours(self, kind: str, rows: np.ndarray) -> Neighbours:
        arrays = (np.load(self._found / f"{kind}/{name}.npy", mmap_mode="r") for name in ("index", "distance"))
        return Neighbours(*(np.array(array[rows]) for array in arrays))


def main(embed_images: EmbedImagesParams, folds: FoldsParams) -> None:
    """Write {ridge,linear,model_a}.npy or model_b.npy: (m, 384) float32; of a second CLIP ridge_1.npy and so on."""
    part, clips, where = sys.argv[1], numbered(OUTPUTS / "clip"), device()
    key = [part, where, str(folds.ids), str(embed_images.batch_size), *clips, *ROOMS, Path(__file__)]
    resume = resume_folder("predict", *key, OUTPUTS / part, OUTPUTS / "embed_test" / part)
    every = np.arange(len(read_rows(TEST, ["id"])))
    with whole_folder(OUTPUTS / "predict" / part) as out:
        for clip in clips:
            if part == "knn" and engine() == "local":
                model, size = Neighbourhood(clip), QUERIES
            elif part == "knn":
                model, size = Neighbourhood(clip, resume / f"neighbours_{clip.name}"), BLOCK
                model.find()
            else:
                model, size = Family(clip, folds.ids), embed_images.batch_size
            batches = [every[rows] for rows in blocks(len(every), size)]
            files = grown(resume / clip.name, batches, model, model.what, "image", on_cuda(where))
            for name, file in files.items():
                file.rename(out / f"{name}.npy")
    shutil.rmtree(RESUME / "predict")


if __name__ == "__main__":
    run(main)
