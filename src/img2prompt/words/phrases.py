"""Prompts as phrases: taken apart, counted, and put together again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COMMONEST = 20_000  # phrases that are kept: the stage embeds each, and a prediction is compared with all of them
SHORT = 4  # words of a clause behind the subject that stays whole: "trending on artstation"

# A clause ends at punctuation with a space or the end behind it (not in "1.5"), at brackets and at bars.
_END = re.compile(r"[,.;:!?]+(?=\s|$)|[()\[\]{}|\n]|(?:^|\s)[-–—]+(?=\s|$)")
_OPENING = (
    "above|across|against|amid|among|around|as|at|before|behind|beneath|beside|between|by|during|for|from|in|inside|"
    "into|near|on|onto|outside|over|through|towards|under|underneath|while|with|without"
)
_OPENS = re.compile(rf"(?:{_OPENING})\s")
_CONNECTIVE = re.compile(rf"\s+(?=(?:{_OPENING})\s)")
_MEDIUM = re.compile(r"(.{2,60}?\sof)\s+(?=\S)")

KINDS = ("medium", "subject", "modifier")
Kind = Literal["medium", "subject", "modifier"]


class Phrase(NamedTuple):
    """A part of a prompt, in lower case: "an oil painting of", "a cat", and "in the rain" or "highly detailed"."""

    kind: Kind
    text: str

    @property
    def opens(self) -> bool:
        """Whether it begins with a connective, so that it needs no comma before it."""
        return bool(_OPENS.match(self.text))


def split(prompt: str) -> list[Phrase]:
    """The phrases of a prompt, in its order.

    It is cut into clauses at punctuation, and these before connectives; clauses of up to SHORT words behind the subject
    stay whole. The first phrase that begins with no connective is the subject, all behind it are modifiers. What ends
    in "of" at the beginning is the medium, even if it says "a bowl of": it goes before a subject as well.
    """
    found: list[Phrase] = []
    for clause in _END.split(prompt.lower()):
        words = clause.split()
        behind = any(phrase.kind == "subject" for phrase in found)
        for text in _CONNECTIVE.split(" ".join(words)) if len(words) > SHORT or not behind else [" ".join(words)]:
            lead = None if found else _MEDIUM.match(text)
            if lead:
                found.append(Phrase("medium", lead[1]))
                text = text[lead.end() :]
            behind = any(phrase.kind == "subject" for phrase in found)
            if text:
                found.append(Phrase("modifier" if behind or _OPENS.match(text) else "subject", text))
    return found


def join(phrases: Sequence[Phrase]) -> str:
    """The phrases as a prompt: a comma goes before each that begins with no connective and follows no medium."""
    text = ""
    for before, phrase in zip([None, *phrases], phrases, strict=False):
        bound = phrase.opens or (before is not None and before.kind == "medium")
        text += ("" if before is None else " " if bound else ", ") + phrase.text
    return text


@dataclass(frozen=True, eq=False)
class Phrases:
    """Phrases with their counts and embeddings (n, d) float32, norm 1, the commonest first."""

    phrases: Sequence[Phrase]
    counts: Sequence[int]
    embeddings: np.ndarray

    def save(self, folder: Path) -> None:
        """Write phrases.parquet and phrases.npy."""
        kinds, texts = ([phrase[place] for phrase in self.phrases] for place in (0, 1))
        columns = {"kind": pa.array(kinds, pa.string()), "phrase": pa.array(texts, pa.string())}
        pq.write_table(pa.table(columns | {"count": pa.array(self.counts, pa.int64())}), folder / "phrases.parquet")
        np.save(folder / "phrases.npy", self.embeddings)

    @classmethod
    def load(cls, folder: Path) -> Phrases:
        """Read what `save` wrote."""
        table = pq.read_table(folder / "phrases.parquet").to_pydict()
        phrases = [Phrase(*both) for both in zip(table["kind"], table["phrase"], strict=True)]
        return cls(phrases, table["count"], np.load(folder / "phrases.npy"))


def mine(prompts: Iterable[str]) -> list[tuple[Phrase, int]]:
    """The COMMONEST phrases of the prompts, each with the number of prompts that it is in, the commonest first."""
    return Counter(phrase for prompt in prompts for phrase in dict.fromkeys(split(prompt))).most_common(COMMONEST)
