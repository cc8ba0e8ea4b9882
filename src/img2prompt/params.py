"""The schema of params.yaml: every key with its type and range, checked before anything runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Cosine = Annotated[float, Field(gt=0, lt=1)]
Layers = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys and quiet conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Sample(Section):
    """The embedded competition; train, test and CLIP pairs draw from separate streams of the seed."""

    n_train: Count
    n_test: Count
    seed: Seed


def _path_alone(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Source(Section):
    """`sample`, a folder or a file; and the columns of its table, where they have other names than the usual."""

    path: Annotated[str, Field(min_length=1)]
    picture: str | None = None
    prompt: str | None = None
    fold: str | None = None

    @model_validator(mode="after")
    def _sample_has_no_columns(self) -> Self:
        if self.path == "sample" and (self.picture or self.prompt or self.fold):
            raise ValueError("`sample` has no columns to name; a folder of that name is ./sample")
        return self


class Prepare(Section):
    """Where pictures and prompts come from."""

    train: Annotated[list[Annotated[Source, BeforeValidator(_path_alone)]], Field(min_length=1)]
    test: Annotated[Source, BeforeValidator(_path_alone)]
    max_quarantined: Share
    sample: Sample

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({os.path.normpath(source.path) for source in self.train}) < len(self.train):
            raise ValueError("train names a source twice")
        return self


class EmbedPrompts(Section):
    """The targets' sentence encoder, and the augmented copies of the prompts."""

    model: str
    augmented: Annotated[int, Field(ge=0)]
    replace: Share
    shuffle: Share


class Dedup(Section):
    """Cosine above which of two prompts one is dropped: from training (at 1, none is), and from scoring.

    `at_random` trains on as many rows drawn at random: the filter's control.
    """

    threshold: Annotated[float, Field(gt=0, le=1)]
    scored: Cosine
    at_random: bool


class Folds(Section):
    """Group k-fold: the folds' ids and the cosine at which prompts share a group."""

    ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    threshold: Cosine
    seed: Seed

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("ids repeat: name each fold once")
        return self


class SampleClip(Section):
    """How the sample's small CLIP is trained."""

    pairs: Annotated[int, Field(ge=64)]
    epochs: Count
    seed: Seed


class Clip(Section):
    """Which CLIP, or several; of `pretrained` and `image_size` one for all or one each."""

    model: str | Annotated[list[str], Field(min_length=1)]
    pretrained: str | list[str | None] | None
    image_size: Count | list[Count | None] | None
    sample: SampleClip

    @property
    def models(self) -> list[tuple[str, str | None, int | None]]:
        """Name, tag of the weights and size of every CLIP, in order: number 0, 1, ... in outputs."""
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
        if len(set(self.models)) < count:
            raise ValueError("model names a CLIP twice")
        return self


class EmbedImages(Section):
    """How CLIP is run over pictures and prompts."""

    batch_size: Count


class Rates(Section):
    """One head's schedule: epochs of the head alone, then of tower and head, with their learning rates."""

    head_epochs: Annotated[int, Field(ge=0)]
    tower_epochs: Annotated[int, Field(ge=0)]
    lr_head: Positive
    lr_tower: Positive

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if self.head_epochs + self.tower_epochs == 0:
            raise ValueError("head_epochs and tower_epochs are both 0: nothing would be trained")
        return self


class Augmentation(Section):
    """Augmentation of the pictures; all zero: off, and frozen layers run once instead of once an epoch."""

    crop: Annotated[float, Field(ge=0, lt=1)]
    rotation: Annotated[float, Field(ge=0, le=180)]
    flip: Share

    @property
    def on(self) -> bool:
        """Whether any augmentation is switched on."""
        return self.crop > 0 or self.rotation > 0 or self.flip > 0


class ModelA(Rates):
    """Training of the paper's head (the inherited keys) and of the baseline head (`baseline`).

    `unfreeze` is one for all CLIPs or one each: `layers`.
    """

    seed: Seed
    unfreeze: Layers | list[Layers]
    batch_size: Count
    accumulate: Count
    weight_decay: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    clip_grad: Positive
    pretrain: bool
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    mse: Annotated[float, Field(ge=0)]
    hidden: Annotated[int, Field(ge=0)]
    ema: Share
    wise: Share
    tta: list[Literal["flip", "smaller", "larger", "renormalised"]]
    any_picture: bool
    baseline: Rates
    augmentation: Augmentation

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.tta)) < len(self.tta):
            raise ValueError("tta names a view twice")
        return self

    def layers(self, clip: int) -> int:
        """How many layers of a CLIP's tower train, by its number."""
        return self.unfreeze[clip] if isinstance(self.unfreeze, list) else self.unfreeze


class Knn(Section):
    """Model B: which keys, how many neighbours, and how their weight falls with the distance."""

    keys: Literal["text", "image", "both"]
    k: Count | Literal["search"]
    distance_dim: Annotated[float, Field(ge=0)] | Literal["search"]
    eps: Positive
    coef: Positive


class Ensemble(Section):
    """Who is in the mix, of which CLIPs, and what share of the weights Model A's family has."""

    members: Annotated[list[Literal["model_a", "clip", "ridge", "model_b"]], Field(min_length=2)]
    clips: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["all"]
    alpha: Share | Literal["search"]

    @model_validator(mode="after")
    def _both_families(self) -> Self:
        if len(set(self.members)) < len(self.members):
            raise ValueError("members names one twice")
        if self.clips != "all" and len(set(self.clips)) < len(self.clips):
            raise ValueError("clips names one twice")
        if "model_b" not in self.members:
            raise ValueError("members lacks model_b: alpha weighs the others, Model A's family, against it")
        return self


class Params(Section):
    """All of params.yaml."""

    prepare: Prepare
    embed_prompts: EmbedPrompts
    dedup: Dedup
    folds: Folds
    clip: Clip
    embed_images: EmbedImages
    model_a: ModelA
    knn: Knn
    ensemble: Ensemble

    @model_validator(mode="after")
    def _matching(self) -> Self:
        count, unfreeze, clips = len(self.clip.models), self.model_a.unfreeze, self.ensemble.clips
        if isinstance(unfreeze, list) and len(unfreeze) != count:
            raise ValueError(
                f"model_a.unfreeze lists {len(unfreeze)} values for the {count} of clip.model: one each, or one for all"
            )
        if clips != "all" and max(clips) >= count:
            raise ValueError(f"ensemble.clips: {clips}: clip.model has the numbers 0 to {count - 1}")
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check the whole of params.yaml.

    Raises:
        ValueError: names the file and every key that is unknown, missing, of the wrong type or out of range.
    """
    # YAML 1.1 reads 1e-3 as text; a number written so is still a number.
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Params.model_validate(_numbers(values))
    except ValidationError as error:
        lines = [
            f"  {_key(e['loc'])}: {e['msg']} (got {e['input']!r:.80})" if e["loc"] else f"  {e['msg']}"
            for e in error.errors()
        ]
        raise ValueError(f"{path}: fix these keys\n" + "\n".join(lines)) from None


def _numbers(value: object) -> object:
    """Turn text such as `1e-3` into the float that its author meant."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _key(location: tuple[str | int, ...]) -> str:
    """`('knn', 'k', 'constrained-int')` -> `knn.k`: pydantic adds the names of a union's branches."""
    keys = [str(part) for part in location if isinstance(part, int) or part.isidentifier()]
    return ".".join(keys[:2]) if location and location[0] in {"clip", "knn", "ensemble"} else ".".join(keys)
