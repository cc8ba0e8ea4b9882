"""The section `knn` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from img2prompt.core.params import Count, Positive, Section


class KnnParams(Section):
    """Model B: which keys, how many neighbours, and how their weight falls with the distance."""

    keys: Literal["text", "image", "both"]
    k: Count | Literal["search"]
    distance_dim: Annotated[float, Field(ge=0)] | Literal["search"]
    eps: Positive
    coef: Positive
