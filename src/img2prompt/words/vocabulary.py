"""The words that an embedding says, as applied: a linear map to the logits of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The commonest words of the prompts, and how to tell their probabilities from an embedding.

    counts: of the distinct prompts with each of the w words. weight (w, d), bias (w,): float32.
    """

    words: Sequence[str]
    counts: Sequence[int]
    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, embeddings: np.ndarray) -> np.ndarray:
        """The probability (m, w) of each word, for embeddings (m, d) float32, norm 1."""
        return 1 / (1 + np.exp(-np.clip(embeddings @ self.weight.T + self.bias, -50, 50)))

    def most_probable(self, embeddings: np.ndarray, top: int) -> list[list[tuple[str, float]]]:
        """For each embedding at most `top` words with their probabilities, most probable first."""
        found = self.probabilities(embeddings)
        order = np.argsort(-found, axis=1, kind="stable")[:, :top]
        return [[(self.words[i], float(row[i])) for i in places] for row, places in zip(found, order, strict=True)]

    def save(self, folder: Path) -> None:
        """Write vocabulary.parquet (word, count) and vocabulary.npy (w, d + 1), whose last column is the bias."""
        columns = {"word": pa.array(self.words, pa.string()), "count": pa.array(self.counts, pa.int64())}
        pq.write_table(pa.table(columns), folder / "vocabulary.parquet")
        np.save(folder / "vocabulary.npy", np.concatenate([self.weight, self.bias[:, None]], axis=1))

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Read what `save` wrote."""
        table, found = pq.read_table(folder / "vocabulary.parquet").to_pydict(), np.load(folder / "vocabulary.npy")
        return cls(table["word"], table["count"], found[:, :-1], found[:, -1])
