"""Words for any predicted embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from img2prompt.core.blocks import blocks
from img2prompt.core.device import device as default_device
from img2prompt.core.progress import progress
from img2prompt.core.storage import read_json
from img2prompt.model_b.neighbours import nearest
from img2prompt.prompts.encoder import Encoder
from img2prompt.words.contest import Contest
from img2prompt.words.phrases import Phrases
from img2prompt.words.vocabulary import Vocabulary

TOGETHER = 256  # rows whose candidates are embedded at once


@dataclass(frozen=True)
class Said:
    """What an embedding says.

    prompt: composed, with the cosine of its own embedding. words: with their probabilities, most probable first.
    nearest: training prompts with their cosines, nearest first.
    """

    prompt: str
    prompt_cosine: float
    words: list[tuple[str, float]]
    nearest: list[tuple[str, float]]


class Words:
    """Puts predicted embeddings into words.

    Args:
        prompts: n distinct ones, those of the training.
        embeddings: (n, 384) float32, norm 1: theirs.
        phrases, vocabulary: mined from them.
        encode: embeds texts to (m, 384) float32, norm 1.
        device: a torch device, where the nearest prompts are looked for.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        embeddings: np.ndarray,
        phrases: Phrases,
        vocabulary: Vocabulary,
        encode: Callable[[Sequence[str]], np.ndarray],
        device: str = "cpu",
    ) -> None:
        self._prompts, self._embeddings, self._vocabulary, self._device = prompts, embeddings, vocabulary, device
        self._contest = Contest(phrases, encode)

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> Words:
        """Read the folder that the stage `words` wrote; device: a torch device, None for the default one.

        Raises:
            OSError, ValueError: something is missing, or the parts do not go together.
        """
        folder, device = Path(folder), device or default_device()
        prompts = pq.read_table(folder / "prompts.parquet")["prompt"]
        embeddings = np.load(folder / "prompts.npy", mmap_mode="r")
        phrases, vocabulary = Phrases.load(folder), Vocabulary.load(folder)
        for name, texts, rows in (
            ("prompts", prompts, embeddings),
            ("phrases", phrases.phrases, phrases.embeddings),
            ("vocabulary", vocabulary.words, vocabulary.weight),
        ):
            if len(texts) != len(rows):
                raise ValueError(
                    f"{folder / name}.parquet has {len(texts)} rows and {name}.npy {len(rows)}: make them anew with "
                    "`dvc repro words`"
                )
        encoder = read_json(folder / "words.json")["encoder"]
        local = folder / encoder
        encode = Encoder(str(local) if local.is_dir() else encoder, device, quiet=True, exact=False)
        return cls(prompts, embeddings, phrases, vocabulary, encode, device)

    def __call__(self, embeddings: np.ndarray, top: int = 5) -> list[Said]:
        """Put embeddings (m, 384) float32, norm 1, into words: for each its prompt and at most `top` words and prompts.

        The composed prompt is never farther from the embedding than the nearest prompt.
        """
        found = []
        for rows in progress([*blocks(len(embeddings), TOGETHER)], "putting into words", unit="block"):
            found += self._say(embeddings[rows], top)
        return found

    def nearest(self, embeddings: np.ndarray, top: int) -> list[list[tuple[str, float]]]:
        """For each of embeddings (m, 384) float32 at most `top` prompts with their cosines, nearest first."""
        return self._nearest(embeddings, top)[1]

    def _nearest(self, embeddings: np.ndarray, top: int) -> tuple[np.ndarray, list[list[tuple[str, float]]]]:
        """The rows (m,) of the nearest prompts, and `nearest`."""
        near = nearest(embeddings, self._embeddings, min(max(top, 1), len(self._prompts)), self._device)
        cosines = 1 - np.square(near.distance, dtype=np.float64) / 2
        prompts = [[str(self._prompts[i]) for i in row] for row in near.index.tolist()]
        found = [list(zip(*row, strict=True))[:top] for row in zip(prompts, cosines.tolist(), strict=True)]
        return near.index[:, 0], found

    def _say(self, embeddings: np.ndarray, top: int) -> list[Said]:
        rows, near = self._nearest(embeddings, max(top, 1))
        composed = self._contest(embeddings, [found[0][0] for found in near], self._embeddings[rows])
        words = self._vocabulary.most_probable(embeddings, top)
        return [Said(*composed[row], words[row], near[row][:top]) for row in range(len(embeddings))]
