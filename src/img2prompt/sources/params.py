"""The section `prepare` of params.yaml."""

from __future__ import annotations

import os
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from img2prompt.core.params import Count, Section, Seed, Share


class Sample(Section):
    """The generated sample competition; train, test and CLIP pairs are drawn from separate streams of the seed."""

    n_train: Count
    n_test: Count
    seed: Seed


def _path_alone(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Source(Section):
    """`sample`, a folder or a file, and the columns of its table where their names are not the usual ones."""

    path: Annotated[str, Field(min_length=1)]
    image: str | None = None
    prompt: str | None = None
    fold: str | None = None

    @model_validator(mode="after")
    def _sample_has_no_columns(self) -> Self:
        if self.path == "sample" and (self.image or self.prompt or self.fold):
            raise ValueError("`sample` has no columns to name; a folder of that name is ./sample")
        return self


class PrepareParams(Section):
    """Where images and prompts come from."""

    train: Annotated[list[Annotated[Source, BeforeValidator(_path_alone)]], Field(min_length=1)]
    test: Annotated[Source, BeforeValidator(_path_alone)]
    max_quarantined: Share
    sample: Sample

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({os.path.normpath(source.path) for source in self.train}) < len(self.train):
            raise ValueError("train names a source twice")
        return self
