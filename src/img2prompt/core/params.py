"""The base class of the sections of params.yaml, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Cosine = Annotated[float, Field(gt=0, lt=1)]
Layers = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys and implicit conversions of types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def with_numbers(value: object) -> object:
    """Turn text such as `1e-3`, which YAML does not read as a number, into a float; also inside dicts and lists."""
    if isinstance(value, dict):
        return {key: with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def key_of(location: tuple[str | int, ...]) -> str:
    """The params.yaml key of a pydantic error: `('knn', 'k', 'constrained-int')` -> `knn.k`, without union branches."""
    keys = [str(part) for part in location if isinstance(part, int) or part.isidentifier()]
    return ".".join(keys[:2]) if location and location[0] in {"clip", "knn", "ensemble"} else ".".join(keys)
