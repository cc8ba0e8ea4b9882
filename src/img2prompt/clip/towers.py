"""CLIP's image tower as a sequence of layers."""

from __future__ import annotations

import timm
import torch
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from img2prompt.clip import efficientnet


class _Embed(nn.Module):
    """A vision transformer's layer before its blocks: patch, class and position embeddings, and the first LayerNorm."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        for name in ("conv1", "patch_dropout", "ln_pre"):
            setattr(self, name, getattr(visual, name))
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.grid = visual.grid_size

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) -> (n, 1 + patches, width); position embeddings are interpolated for another size."""
        patches = self.conv1(images)
        position = resample_abs_pos_embed(self.positional_embedding[None], patches.shape[-2:], self.grid)
        first = self.class_embedding.expand(len(patches), 1, -1).to(patches.dtype)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        return self.ln_pre(self.patch_dropout(tokens + position.to(tokens.dtype)))


class _Pool(nn.Module):
    """A vision transformer's layer after its blocks: pooling and the last LayerNorm."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.attn_pool, self.ln_post = visual.attn_pool, visual.ln_post
        for name in ("attn_pool_contrastive", "attn_pool_type", "final_ln_after_pool", "pool_type"):
            setattr(self, name, getattr(visual, name, None))

    _global_pool = VisionTransformer._global_pool

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, 1 + patches, width) -> (n, width)."""
        return VisionTransformer._pool(self, tokens)[0]


def tower(visual: nn.Module) -> nn.Sequential:
    """The image tower as layers in order, from pixels to the pooled output V(x) before CLIP's projection.

    The same order serves freezing, caching the outputs of frozen layers, and layer-wise learning rates. The layers
    are shared with `visual`, not copied. Vision transformers and timm's EfficientNets are split block by block; any
    other tower is a single layer.

    Returns:
        A `nn.Sequential` that maps (n, 3, size, size) to (n, d).
    """
    if isinstance(visual, VisionTransformer):
        return nn.Sequential(_Embed(visual), *visual.transformer.resblocks, _Pool(visual))
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, timm.models.EfficientNet):
        return nn.Sequential(*efficientnet.layers(trunk))
    return nn.Sequential(trunk if trunk is not None else visual)


def project(visual: nn.Module, pooled: Tensor) -> Tensor:
    """CLIP's projection of V(x): (n, d) pooled -> (n, embed_dim), not normalised."""
    if isinstance(visual, VisionTransformer):
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


def unfrozen(layers: nn.Sequential, count: int) -> nn.Sequential:
    """The last `count` layers of a tower.

    Raises:
        ValueError: the tower has fewer layers.
    """
    if count > len(layers):
        raise ValueError(f"model_a.unfreeze: {count}, but this tower has {len(layers)} layers; take 0..{len(layers)}")
    return layers[len(layers) - count :]
