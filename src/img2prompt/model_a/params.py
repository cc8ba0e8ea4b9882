"""The section `model_a` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from img2prompt.core.params import Count, Layers, Positive, Section, Seed, Share


class Rates(Section):
    """One head's schedule: epochs of tower and head together, with their learning rates."""

    epochs: Count
    lr_head: Positive
    lr_tower: Positive


class Augmentation(Section):
    """Augmentation of the images; with all values 0 it is off, and frozen layers run once instead of once an epoch.

    `crop` is the largest share of the area cut away, `rotation` the largest angle in degrees, `flip` a probability.
    """

    crop: Annotated[float, Field(ge=0, lt=1)]
    rotation: Annotated[float, Field(ge=0, le=180)]
    flip: Share

    @property
    def on(self) -> bool:
        """Whether any augmentation is switched on."""
        return self.crop > 0 or self.rotation > 0 or self.flip > 0


class ModelAParams(Rates):
    """Training of the paper's head (the inherited keys) and of the linear baseline (`linear`).

    `heads` says which of the two train. `unfreeze` holds one number of layers for all CLIPs, or one for each.
    """

    seed: Seed
    heads: Annotated[list[Literal["linear", "model_a"]], Field(min_length=1, max_length=2)]
    unfreeze: Layers | list[Layers]
    batch_size: Count
    accumulate: Count
    weight_decay: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    steps: Annotated[int, Field(ge=0)]
    validation: Annotated[int, Field(ge=2)]
    pull: Annotated[float, Field(ge=0)]
    cross_fit: Annotated[int, Field(ge=0)]
    clip_grad: Positive
    grad_checkpointing: bool
    pretrain: bool
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    mse: Annotated[float, Field(ge=0)]
    hidden: Annotated[int, Field(ge=0)]
    ema: Share
    tta: list[Literal["flip", "smaller", "larger", "renormalised"]]
    any_image: bool
    linear: Rates
    augmentation: Augmentation

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.heads)) < len(self.heads):
            raise ValueError("heads names a head twice")
        if len(set(self.tta)) < len(self.tta):
            raise ValueError("tta names a view twice")
        if self.cross_fit == 1:
            raise ValueError("cross_fit: 1 part leaves no other rows: give 2 or more, or 0")
        return self

    def stored(self, clip: int) -> int:
        """Before how many last layers of a CLIP's tower its output is stored, by its number; 0: nowhere.

        With augmentation the frozen layers see other images in every epoch: there is nothing to store.
        """
        return 0 if self.augmentation.on else self.layers(clip)

    def layers(self, clip: int) -> int:
        """How many layers of a CLIP's tower train, by its number."""
        return self.unfreeze[clip] if isinstance(self.unfreeze, list) else self.unfreeze
