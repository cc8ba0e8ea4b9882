"""Selects rows that are no near-duplicates of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np

from img2prompt.sample.scenes import PromptedScene

_CHUNK = 2048  # candidates embedded at once
_BLOCK = 8192  # rows of a matrix compared at once: 4,096 x 8,192 cosines are 128 MiB


def _largest(queries: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """(q,) float32: the largest cosine of each of `queries` (q, d) with any row of `others`; -1 without any."""
    largest = np.full(len(queries), -1.0, np.float32)
    for other in others:
        for start in range(0, len(other), _BLOCK):
            np.maximum(largest, (queries @ other[start : start + _BLOCK].T).max(axis=1), out=largest)
    return largest


def apart(
    rows: Iterable[PromptedScene],
    n: int,
    others: Sequence[np.ndarray],
    encode: Callable[[list[str]], np.ndarray],
    threshold: float = 0.85,
    distinct: bool = True,
) -> tuple[list[PromptedScene], np.ndarray]:
    """The first `n` of `rows` that are no near-duplicates of `others`, nor (`distinct`) of one another.

    Returns them with their prompts' embeddings, (n, d) float32, rows of norm 1.

    `others` are matrices (m, d) float32 with rows of norm 1, and `encode` gives such a matrix for texts. A row is
    kept if the cosines of both its prompt and its visible text are at most `threshold`.

    Raises ValueError if `rows` end, or 20 n of them were compared, before n are kept.
    """
    kept: list[PromptedScene] = []
    embeddings: list[np.ndarray] = []
    known = list(others)
    candidates = islice(rows, 20 * n)
    while len(kept) < n:
        # More than are wanted, as some are refused; the encoder is fastest with many texts at once.
        chunk = list(islice(candidates, min(_CHUNK, 2 * (n - len(kept)))))
        if not chunk:
            raise ValueError(
                f"only {len(kept)} of {n} rows were found that have no cosine above {threshold} with another row: "
                "ask for fewer rows, or raise the threshold or enlarge the vocabulary"
            )
        # (2c, d): a row's prompt and, below it, its visible text
        texts = np.asarray(encode([text for row in chunk for text in (row.prompt, row.visible)]), np.float32)
        free = _largest(texts, known).reshape(-1, 2).max(axis=1) <= threshold
        chosen = np.flatnonzero(free).tolist()
        if distinct:
            near = (texts @ texts.T).reshape(len(chunk), 2, len(chunk), 2).max(axis=(1, 3)) > threshold
            wanted, chosen = chosen, []
            for index in wanted:
                if not near[index, chosen].any():
                    chosen.append(index)
            known.append(texts.reshape(len(chunk), 2, texts.shape[1])[chosen].reshape(-1, texts.shape[1]))
        kept += [chunk[index] for index in chosen]
        embeddings.append(texts[::2][chosen])
    return kept[:n], np.concatenate(embeddings)[:n]
