"""The sections `clip`, `embed_images` and `freeze` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from img2prompt.core.params import Count, Positive, Section, Seed

SAMPLES = ("lite0", "lite1", "lite2")  # towers of the sample's CLIPs: timm's tf_efficientnet_*, each in a pip package


def sample_tower(model: str) -> str | None:
    """The tower of a sample's CLIP by its name in params.yaml (`sample` is `sample:lite0`); None for any other model.

    Raises:
        ValueError: the sample has no such tower.
    """
    family, _, name = model.partition(":")
    if family != "sample":
        return None
    if (name or SAMPLES[0]) not in SAMPLES:
        raise ValueError(f"clip.model: {model!r}: the sample's towers are {', '.join(SAMPLES)}")
    return name or SAMPLES[0]


class SampleClip(Section):
    """How the sample's small CLIP is trained."""

    pairs: Annotated[int, Field(ge=64)]
    epochs: Count
    seed: Seed


class ClipParams(Section):
    """Which CLIP models are used; `pretrained` and `image_size` hold one value for all of them, or one for each."""

    model: str | Annotated[list[str], Field(min_length=1)]
    pretrained: str | list[str | None] | None
    image_size: Count | list[Count | None] | None
    sample: SampleClip

    @property
    def models(self) -> list[tuple[str, str | None, int | None]]:
        """Name, tag of the weights and image size of every CLIP; its place from 0 is its number in outputs/."""
        names = self.model if isinstance(self.model, list) else [self.model]
        tags, sizes = (
            value if isinstance(value, list) else [value] * len(names) for value in (self.pretrained, self.image_size)
        )
        return list(zip(names, tags, sizes, strict=True))

    @model_validator(mode="after")
    def _matching(self) -> Self:
        count = len(self.model) if isinstance(self.model, list) else 1
        for key in ("pretrained", "image_size"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != count:
                raise ValueError(f"{key} lists {len(value)} values for {count} models: one each, or one for all")
        for name, _, _ in self.models:
            sample_tower(name)
        if len(set(self.models)) < count:
            raise ValueError("model names a CLIP twice")
        return self


class EmbedImagesParams(Section):
    """How CLIP is run over images and prompts."""

    batch_size: Count


class FreezeParams(Section):
    """Whether the output of frozen layers is stored; `auto`: where a CLIP's takes at most `limit` GB (10^9 bytes)."""

    store: bool | Literal["auto"]
    limit: Positive
