"""embed_prompts: sentence embeddings of prompts against sentence-transformers' own `encode`.

A prompt is two of the sample's joined, 32 tokens in the mean: as long as people's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.harness import Task, Work, from_right
from img2prompt.core.storage import read_json, write_json
from img2prompt.prompts.encoder import EMBEDDED, Encoder, folder_of
from img2prompt.sample.wording import generate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHECKED = 256  # prompts


@cache
def library() -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder_of(EMBEDDED)), device="cpu")


def encode(prompts: list[str]) -> np.ndarray:
    return library().encode(prompts, batch_size=32, normalize_embeddings=True)


@cache
def encoder(exact: bool) -> Encoder:
    return Encoder(EMBEDDED, "cpu", quiet=True, exact=exact)


def ours(prompts: list[str]) -> np.ndarray:
    return encoder(exact=True)(prompts)


def ours_as_features(prompts: list[str]) -> np.ndarray:
    return encoder(exact=False)(prompts)


def make(folder: Path, rows: int) -> Work:
    """prompts.json, and right.npy: the first ones' embeddings by the library. The work: every token's products."""
    drawn = [row.prompt for row in generate(2 * rows, seed=0)]
    prompts = [", ".join(drawn[place : place + 2]) for place in range(0, len(drawn), 2)]
    write_json(folder / "prompts.json", prompts)
    np.save(folder / "right.npy", encode(prompts[:CHECKED]))
    model = library()
    lengths = model.preprocess(prompts)["attention_mask"].sum(1).double()
    config = model[0].auto_model.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    a_token = layers * (4 * width**2 + 2 * width * inner)
    attention = layers * 2 * width
    return Work(operations=2 * float((lengths * a_token + lengths**2 * attention).sum()))


def load(folder: Path, rows: int) -> tuple[list[str]]:
    return (read_json(folder / "prompts.json")[:rows],)


def check(found: np.ndarray, folder: Path) -> str:
    return from_right(found, np.load(folder / "right.npy"))


TASKS = [
    Task(
        "embed_prompts",
        make,
        load,
        {
            "ours": ours,
            "ours, where a vector is only a feature": ours_as_features,
            "sentence-transformers' encode": encode,
        },
        check,
        growth={"": 1},
        most=10_000,
        warm=256,
        by_flag=("ours, where a vector is only a feature",),
    )
]
