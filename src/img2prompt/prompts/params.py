"""The sections `embed_prompts`, `dedup` and `folds` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from img2prompt.core.params import Cosine, Section, Seed, Share


class EmbedPromptsParams(Section):
    """The targets' sentence encoder, and the augmented copies of the prompts."""

    model: str
    augmented: Annotated[int, Field(ge=0)]
    thesaurus: Literal["built-in", "wordnet"]
    replace: Share
    shuffle: Share


class DedupParams(Section):
    """Cosines above which one of two prompts is dropped: from training (at 1, none is) and, `scored`, from scoring.

    `at_random` trains on rows drawn at random instead, as many as the filter keeps: a control for the filter.
    """

    threshold: Annotated[float, Field(gt=0, le=1)]
    scored: Cosine
    at_random: bool


class FoldsParams(Section):
    """Group k-fold: the folds' ids and the cosine at which prompts share a group."""

    ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    threshold: Cosine
    seed: Seed

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("ids repeat: name each fold once")
        return self
