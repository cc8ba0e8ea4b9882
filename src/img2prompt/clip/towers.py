"""CLIP's image tower as a sequence of layers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import ClassVar

import open_clip.transformer
import torch
from open_clip.modified_resnet import ModifiedResNet
from timm import models
from timm.layers import RotaryEmbeddingCat, resample_abs_pos_embed
from timm.models import group_parameters
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from img2prompt.clip import efficientnet


class _Part(nn.Module):
    """Some of a tower's parts under the tower's own names, so that the methods of its class run on them."""

    NAMES: ClassVar[tuple[str, ...]]

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.family = type(of)
        for name in self.NAMES:
            setattr(self, name, getattr(of, name, None))


class _Embed(_Part):
    """Before the blocks of open_clip's ViT: patch, class and position embeddings, and the first LayerNorm."""

    NAMES = ("conv1", "patch_dropout", "ln_pre", "class_embedding", "positional_embedding", "grid_size")

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) -> (n, 1 + patches, width); position embeddings are interpolated for another size."""
        patches = self.conv1(images)
        position = resample_abs_pos_embed(self.positional_embedding[None], patches.shape[-2:], self.grid_size)
        first = self.class_embedding.expand(len(patches), 1, -1).to(patches.dtype)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        return self.ln_pre(self.patch_dropout(tokens + position.to(tokens.dtype)))


class _Pool(_Part):
    """Behind the blocks of open_clip's ViT: pooling and the last LayerNorm."""

    NAMES = (
        "attn_pool", "ln_post", "attn_pool_contrastive", "attn_pool_type", "final_ln_after_pool", "pool_type",
    )  # fmt: skip
    _global_pool = open_clip.transformer.VisionTransformer._global_pool

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, 1 + patches, width) -> (n, width)."""
        return self.family._pool(self, tokens)[0]


class _TimmEmbed(_Part):
    """Before the blocks of timm's ViT: patches, prefix tokens, position embeddings, and a norm."""

    NAMES = (
        "patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre", "no_embed_class",
        "dynamic_img_size",
    )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) -> (n, tokens, width)."""
        return self.norm_pre(self.patch_drop(self.family._pos_embed(self, self.patch_embed(images))))


class _EvaEmbed(_TimmEmbed):
    """As before the blocks of timm's ViT; Eva's rotary embedding is the blocks' own."""

    rope = None

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) -> (n, tokens, width)."""
        return self.norm_pre(self.family._pos_embed(self, self.patch_embed(images))[0])


class _EvaBlock(nn.Module):
    """A block of Eva's with the rotary embedding, which is the same for every image."""

    def __init__(self, block: nn.Module, rope: nn.Module) -> None:
        super().__init__()
        self.block, self.rope = block, rope

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, width) -> the same shape."""
        return self.block(tokens, rope=self.rope.get_embed())


class _TimmPool(_Part):
    """Behind the blocks of timm's ViT and Eva: norms, pooling, and a last linear layer where there is one."""

    NAMES = (
        "norm", "attn_pool", "fc_norm", "head_drop", "head", "global_pool", "num_prefix_tokens", "pool_include_prefix",
    )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, width) -> (n, d)."""
        return self.head(self.head_drop(self.fc_norm(self.family.pool(self, self.norm(tokens)))))


def _vit(visual: nn.Module) -> list[nn.Module]:
    return [_Embed(visual), *_closed(visual.transformer.resblocks, _Pool(visual))]


def _resnet(visual: nn.Module) -> list[nn.Module]:
    stem = [getattr(visual, f"{name}{number}") for number in (1, 2, 3) for name in ("conv", "bn", "act")]
    blocks = [*visual.layer1, *visual.layer2, *visual.layer3, *visual.layer4]
    return [nn.Sequential(*stem, visual.avgpool), *_closed(blocks, visual.attnpool)]


def _timm_vit(trunk: nn.Module) -> list[nn.Module]:
    return [_TimmEmbed(trunk), *_closed(trunk.blocks, _TimmPool(trunk))]


def _eva(trunk: nn.Module) -> list[nn.Module]:
    blocks = trunk.blocks
    if trunk.rope is not None:
        if type(trunk.rope) is not RotaryEmbeddingCat or trunk.dynamic_img_size:
            return [Whole(trunk)]
        blocks = [_EvaBlock(block, trunk.rope) for block in blocks]
    return [_EvaEmbed(trunk), *_closed(blocks, _TimmPool(trunk))]


def _convnext(trunk: nn.Module) -> list[nn.Module]:
    blocks = []
    for stage in trunk.stages:
        first, *others = stage.blocks
        blocks += [nn.Sequential(stage.downsample, first), *others]
    return [trunk.stem, *_closed(blocks, trunk.norm_pre, trunk.head)]


def _closed(blocks: nn.Sequential | nn.ModuleList | list[nn.Module], *out: nn.Module) -> list[nn.Module]:
    """The blocks as layers, the last one with the way out, which alone is next to nothing to train."""
    return [*blocks[:-1], nn.Sequential(blocks[-1], *out)]


# By exact type: the forward pass of a subclass may be another.
CUTS: dict[type[nn.Module], Callable[[nn.Module], list[nn.Module]]] = {
    open_clip.transformer.VisionTransformer: _vit,
    ModifiedResNet: _resnet,
    models.VisionTransformer: _timm_vit,
    models.Eva: _eva,
    models.ConvNeXt: _convnext,
    models.EfficientNet: efficientnet.layers,
}


class Whole(nn.Module):
    """A tower that cannot be cut: one layer, of which the last groups of parameters can train."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) -> (n, d)."""
        return self.tower(images)

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """The parameters by name in groups, from the image on: timm's, else the members of lists of modules in order.

        What belongs to no group goes with the one before it: the way out with the last block.
        """
        numbered = group_parameters(self.tower, _matcher(self.tower))
        return [{name: self.tower.get_parameter(name) for name in numbered[number]} for number in sorted(numbered)]


def _matcher(tower: nn.Module) -> dict[str, object] | Callable[[str], object]:
    """timm's rule for the group of a parameter, by its name, with a place for the names that it leaves out."""
    if not hasattr(tower, "group_matcher"):
        members = {
            name: [(rf"{re.escape(name)}\.(\d+)\.", None), (rf"{re.escape(name)}\.", MATCH_PREV_GROUP)]
            for name, _ in tower.named_children()
        }
        return {"": r"[^.]+$", **members}  # its own parameters come first
    given = tower.group_matcher()
    if isinstance(given, dict):
        return {**given, "rest": [(".", MATCH_PREV_GROUP)]}
    return lambda name: (math.inf, *MATCH_PREV_GROUP) if given(name) == math.inf else given(name)


def tower(visual: nn.Module) -> nn.Sequential:
    """The image tower as layers in order, from pixels to the pooled output V(x) before CLIP's projection.

    The same order serves freezing, caching the outputs of frozen layers, and layer-wise learning rates. The layers
    are shared with `visual`, not copied, and are for evaluation mode. Those of the families in CUTS are the stem and
    each block, the last one with all that is behind it; any other tower is a single layer, a `Whole`.

    Returns:
        A `nn.Sequential` that maps (n, 3, size, size) to (n, d).
    """
    trunk = getattr(visual, "trunk", visual)
    return nn.Sequential(*CUTS.get(type(trunk), lambda whole: [Whole(whole)])(trunk))


def is_cut(layers: nn.Sequential) -> bool:
    """Whether a tower is cut into layers, so that the output of frozen ones can be stored."""
    return not any(isinstance(layer, Whole) for layer in layers)


def project(visual: nn.Module, pooled: Tensor) -> Tensor:
    """CLIP's projection of V(x): (n, d) pooled -> (n, embed_dim), not normalised."""
    if type(visual) is open_clip.transformer.VisionTransformer:
        return pooled if visual.proj is None else pooled @ visual.proj
    return visual.head(pooled) if hasattr(visual, "trunk") else pooled


@torch.no_grad()
def projection(visual: nn.Module, width: int) -> Tensor:
    """The matrix of `project`, without its bias: (width, embed_dim) float32.

    Raises:
        ValueError: the projection is not linear.
    """
    zero, ones = torch.zeros(1, width), torch.ones(1, width)
    matrix = project(visual, torch.eye(width)) - project(visual, zero)
    if not torch.allclose(ones @ matrix, project(visual, ones) - project(visual, zero), rtol=1e-3, atol=1e-3):
        raise ValueError("model_a.pretrain: this CLIP's projection is not linear; set it to false")
    return matrix


def frozen(layers: nn.Sequential, count: int) -> nn.Sequential:
    """The layers before the last `count`, shared; before a tower that is not cut there is none.

    Raises:
        ValueError: the tower has fewer layers or, not cut, groups of parameters.
    """
    depth = len(groups(layers))
    if count > depth:
        raise ValueError(f"model_a.unfreeze: {count}, but this tower has {depth} layers; take 0..{depth}")
    return layers[: depth - count] if is_cut(layers) or not count else layers[:0]


def unfrozen(layers: nn.Sequential, count: int) -> nn.Sequential:
    """A copy of the last `count` layers, to train; of a tower that is not cut, its last groups of parameters train.

    Raises:
        ValueError: as `frozen`.
    """
    last = copy.deepcopy(layers[len(frozen(layers, count)) :])
    for group in groups(last)[:-count]:
        for parameter in group.values():
            parameter.requires_grad_(False)
    return last


def groups(layers: nn.Sequential) -> list[dict[str, nn.Parameter]]:
    """The parameters by name, layer by layer; of a tower that is not cut, group by group."""
    parts = (layer.groups() if isinstance(layer, Whole) else [dict(layer.named_parameters())] for layer in layers)
    return [group for part in parts for group in part]


def checkpointed(layers: nn.Sequential, x: Tensor) -> Tensor:
    """layers(x), for which the gradients' pass computes each layer anew instead of holding all that is inside.

    Raises:
        ValueError: the tower is not cut, and has no checkpoints of its own.
    """
    if is_cut(layers):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x
    try:
        layers[0].tower.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        raise ValueError("model_a.grad_checkpointing: this CLIP's tower has none; set it to false") from None
    return layers(x)
