"""The section `ensemble` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from img2prompt.core.params import Section, Share


class EnsembleParams(Section):
    """Which models of which CLIPs are in the ensemble, and the share of the weights that Model A's family has."""

    members: Annotated[list[Literal["model_a", "linear", "ridge", "model_b", "constant"]], Field(min_length=2)]
    clips: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["all"]
    alpha: Share | Literal["search"]

    @model_validator(mode="after")
    def _both_families(self) -> Self:
        if len(set(self.members)) < len(self.members):
            raise ValueError("members names a model twice")
        if self.clips != "all" and len(set(self.clips)) < len(self.clips):
            raise ValueError("clips names a CLIP twice")
        if "model_b" not in self.members or not set(self.members) - {"model_b", "constant"}:
            raise ValueError("members needs model_b and a model of Model A's family: alpha weighs these against it")
        return self
