"""Answers on uploads, and small training images to show with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from img2prompt.app.uploads import Upload
from img2prompt.core.metric import unit
from img2prompt.core.storage import read_json
from img2prompt.predict.answer import Answer, answer
from img2prompt.predict.bundle import MANIFEST, Bundle, is_bundle
from img2prompt.predict.export import thumbnail
from img2prompt.predict.predictor import Predictor

TOP = 5  # words and nearest prompts of an image, as `img2prompt predict` has them
SAMPLES = 12


class Model(TypedDict):
    """What one model makes of an image.

    weight: in the ensemble; the ensemble's own is 1. prompt: the training prompt nearest to its prediction, with their
    cosine. cosines: of its prediction with every model's, by name.
    """

    model: str
    weight: float
    prompt: str
    cosine: float
    cosines: dict[str, float]


class FullAnswer(Answer, total=False):
    """As `Answer`, with the ensemble and its models side by side.

    thumbnails: the address of a training image, relative to the page's, by its prompt.
    """

    models: list[Model]
    thumbnails: dict[str, str]


@dataclass(frozen=True)
class Gallery:
    """Small images of the training, or what there is in their place.

    texts: of n images, their prompts. read: the JPEG of an image by its number, 0 to n - 1.
    """

    texts: Sequence[str]
    read: Callable[[int], bytes]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Those of a bundle, which was checked, or of a run's outputs; of a bundle without any, its canaries.

        Raises:
            OSError, ValueError: a table cannot be read.
        """
        if is_bundle(folder):
            bundle = Bundle(folder, read_json(folder / MANIFEST))
            files = bundle.files
            if "thumbnails.parquet" not in files:
                texts = [f"drawn image {number}" for number in range(1, len(bundle.canaries) + 1)]
                return cls(texts, lambda row: thumbnail(str(bundle.canaries[row])))
            stored = pq.ParquetFile(files["thumbnails.parquet"])
            prompts = pq.read_table(files["prompts.parquet"], columns=["prompt"])["prompt"]
            groups = [stored.metadata.row_group(number).num_rows for number in range(stored.num_row_groups)]
            starts = np.cumsum([0, *groups])

            def read(row: int) -> bytes:
                group = int(np.searchsorted(starts, row, side="right")) - 1
                with pq.ParquetFile(files["thumbnails.parquet"]) as file:  # one that is shared is not safe in threads
                    return file.read_row_group(group)["image"][row - int(starts[group])].as_py()

            return cls(prompts[: int(starts[-1])].to_pylist(), read)
        train = folder / "prepare/train.parquet"
        if not train.is_file():
            return cls([], lambda row: b"")
        table = pq.read_table(train, columns=["prompt", "image"])
        images = table["image"]
        return cls(table["prompt"].to_pylist(), lambda row: thumbnail(images[row].as_py()))

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """The number of an image by its text, the first one's where several have it."""
        return {text: row for row, text in reversed([*enumerate(self.texts)])}

    def samples(self) -> list[int]:
        """The numbers of at most SAMPLES images, evenly over all."""
        return np.linspace(0, len(self.texts), min(SAMPLES, len(self.texts)), endpoint=False).astype(int).tolist()


class Answers:
    """Answers on uploads.

    Args:
        predictor: the trained model.
        gallery: images to show with the answers.
    """

    def __init__(self, predictor: Predictor, gallery: Gallery) -> None:
        self.gallery, self.identity = gallery, predictor.identity
        self._predictor, self._words = predictor, predictor.words

    def __call__(self, uploads: Sequence[Upload]) -> list[FullAnswer]:
        """Answer uploads in their order; what cannot be decoded has its error."""
        (found,) = self._predictor.stream([upload.data for upload in uploads], len(uploads))
        answers: list[FullAnswer] = [
            answer(upload.name, None, " ".join(str(error or "").split()))
            for upload, error in zip(uploads, found.errors, strict=True)
        ]
        fine = np.array([error is None for error in found.errors])
        if not fine.any():
            return answers
        names = ["ensemble", *self._predictor.weights]
        vectors = np.stack(
            [unit(rows[fine]) for rows in (found.embeddings, *map(found.members.__getitem__, names[1:]))]
        )
        said = self._words(vectors[0], TOP)
        near = self._words.nearest(vectors.reshape(-1, vectors.shape[-1]), 1)  # model by model
        for number, row in enumerate(np.flatnonzero(fine).tolist()):
            one = answer(uploads[row].name, said[number])
            answers[row] = self._full(one, names, vectors[:, number], near[number :: len(said)])
        return answers

    def _full(
        self, one: Answer, names: Sequence[str], vectors: np.ndarray, near: Sequence[list[tuple[str, float]]]
    ) -> FullAnswer:
        """An image's answer with its models: their names, vectors (models, 384), norm 1, and nearest prompts."""
        models: list[Model] = []
        for name, cosines, ((prompt, cosine),) in zip(names, (vectors @ vectors.T).tolist(), near, strict=True):
            of_others = {other: round(value, 6) for other, value in zip(names, cosines, strict=True)}
            weight = self._predictor.weights.get(name, 1.0)
            models.append(
                {"model": name, "weight": weight, "prompt": prompt, "cosine": round(cosine, 6), "cosines": of_others}
            )
        shown = [entry["prompt"] for entry in (*one["nearest"], *models)]
        thumbnails = {text: self.address(self.gallery.rows[text]) for text in shown if text in self.gallery.rows}
        return {**one, "models": models, "thumbnails": thumbnails}

    def address(self, row: int) -> str:
        """Where an image of the gallery is, relative to the page; another model's has another address."""
        return f"thumbnails/{row}?{self.identity[:12]}"
