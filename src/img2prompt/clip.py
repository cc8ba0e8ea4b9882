"""CLIP as one open_clip folder, whatever its source, and its image tower as an ordered row of layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image, ImageOps
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision.transforms import Compose

from img2prompt import efficientnet
from img2prompt.progress import progress
from img2prompt.storage import grow


@dataclass(frozen=True)
class Clip:
    """A CLIP in evaluation mode, with what must travel with its weights.

    `transform` turns an RGB picture of any size into a normalised (3, size, size) float32 tensor.
    """

    model: nn.Module
    tokenizer: Callable[[Sequence[str]], Tensor]
    transform: Callable[[Image.Image], Tensor]


def save_clip(
    model: nn.Module,
    tokenizer: Callable[[Sequence[str]], Tensor],
    model_config: dict[str, object],
    folder: Path,
) -> None:
    """Write a model as an open_clip folder: configuration, safetensors weights, tokenizer files if it has any.

    Raises:
        ValueError: the tokenizer cannot be saved with the model.
    """
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    config = {
        "model_cfg": model_config,
        "preprocess_cfg": {
            name: getattr(preprocess, name) for name in ("mean", "std", "interpolation", "resize_mode", "fill_color")
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.tokenizer.save_pretrained(folder)
    elif not isinstance(tokenizer, SimpleTokenizer):
        raise ValueError(f"clip.model: its {type(tokenizer).__name__} cannot be stored; take its `hf-hub:` name")


def materialise(model: str, pretrained: str | None, image_size: int | None, folder: Path) -> None:
    """Load any CLIP that open_clip knows and write it as an open_clip folder.

    Args:
        model: an open_clip name, `hf-hub:org/name`, or a local open_clip folder.
        pretrained: the tag (or weights file) that goes with an open_clip name.
        image_size: side of the input in pixels; None keeps the model's own.
        folder: where to write.

    Raises:
        ValueError: the name is unknown, or an open_clip name comes without weights.
    """
    if Path(model).is_dir():
        model = f"local-dir:{model}"
    if ":" not in model:
        if model not in open_clip.list_models():
            raise ValueError(f"clip.model: {model!r} is neither `sample`, an open_clip name, hf-hub: nor a folder")
        if not pretrained:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none known"
            raise ValueError(f"clip.pretrained: {model} needs the tag of its weights ({tags})")
    loaded, _, _ = open_clip.create_model_and_transforms(model, pretrained, force_image_size=image_size)
    config = open_clip.get_model_config(model)
    if image_size:
        config["vision_cfg"]["image_size"] = image_size
    if pretrained == "openai":
        config["quick_gelu"] = True  # open_clip decides so by the tag, which the folder no longer has
    save_clip(loaded, open_clip.get_tokenizer(model), config, folder)


def load_clip(folder: Path, device: str) -> Clip:
    """Load an open_clip folder, in evaluation mode and float32."""
    name = f"local-dir:{folder}"
    model, _, _ = open_clip.create_model_and_transforms(name, device=device)
    # A convolutional tower runs 1.6 times faster on CPU with channels last; others do not care.
    model = model.eval().to(memory_format=torch.channels_last)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return Clip(model, open_clip.get_tokenizer(name), transform)


class _Embed(nn.Module):
    """A vision transformer's way into its blocks."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        for name in ("conv1", "patch_dropout", "ln_pre"):
            setattr(self, name, getattr(visual, name))
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.grid = visual.grid_size

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 3, size, size) -> (n, 1 + patches, width); for another size, positions are interpolated."""
        patches = self.conv1(pictures)
        position = resample_abs_pos_embed(self.positional_embedding[None], patches.shape[-2:], self.grid)
        first = self.class_embedding.expand(len(patches), 1, -1).to(patches.dtype)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        return self.ln_pre(self.patch_dropout(tokens + position.to(tokens.dtype)))


class _Pool(nn.Module):
    """A vision transformer's way out of its blocks."""

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

    One order serves freezing, caching what frozen layers give, and layer-wise rates. The layers are shared with
    `visual`, not copied. Vision transformers and timm's EfficientNets come apart block by block; any other
    tower is a single layer.

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
    """The matrix (width, embed_dim) of `project`, without its constant.

    Raises:
        ValueError: the projection is not linear.
    """
    zero, ones = torch.zeros(1, width), torch.ones(1, width)
    matrix = project(visual, torch.eye(width)) - project(visual, zero)
    if not torch.allclose(ones @ matrix, project(visual, ones) - project(visual, zero), rtol=1e-3, atol=1e-3):
        raise ValueError("model_a.pretrain: this CLIP's projection is not linear; set it to false")
    return matrix


def view(clip: Clip, name: str) -> Callable[[Image.Image], Tensor]:
    """CLIP's transform with one change, for test-time augmentation.

    Args:
        clip: whose transform.
        name: `plain`: none; `flip`: the mirror image; `smaller`, `larger`: three or five quarters of the side, in whole
            patches; `renormalised`: ImageNet's usual 0.5 in place of CLIP's mean and deviation, or the reverse.

    Raises:
        ValueError: the tower takes pictures of one size only, and the view has another.
    """
    visual = clip.model.visual
    preprocess = PreprocessCfg(**visual.preprocess_cfg)
    if name == "flip":
        return Compose([ImageOps.mirror, clip.transform])
    if name == "renormalised":
        half = (0.5, 0.5, 0.5)
        mean, std = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) if tuple(preprocess.mean) == half else (half, half)
        return image_transform_v2(replace(preprocess, mean=mean, std=std), is_train=False)
    if name in ("smaller", "larger"):
        vision = isinstance(visual, VisionTransformer)
        if not vision and (not hasattr(visual, "trunk") or hasattr(visual.trunk, "patch_embed")):
            raise ValueError(
                f"model_a.tta: {name}: this CLIP's tower takes pictures of one size only; leave the view out"
            )
        step = visual.patch_size[0] if vision else 32
        patches = visual.image_size[0] / step
        side = step * (math.floor(0.75 * patches) if name == "smaller" else math.ceil(1.25 * patches))
        return image_transform_v2(replace(preprocess, size=(side, side)), is_train=False)
    return clip.transform


def unfrozen(layers: nn.Sequential, count: int) -> nn.Sequential:
    """The last `count` layers of a tower.

    Raises:
        ValueError: the tower has fewer layers.
    """
    if count > len(layers):
        raise ValueError(f"model_a.unfreeze: {count}, but this tower has {len(layers)} layers; take 0..{len(layers)}")
    return layers[len(layers) - count :]


def embed_texts(clip: Clip, prompts: Sequence[str], batch_size: int, device: str, folder: Path) -> Path:
    """CLIP text embeddings C(p), batch by batch; a killed run goes on from what is in `folder`.

    Returns the .npy file, (n, embed_dim) float32, rows of norm 1.
    """

    @torch.no_grad()
    def run(left: Sequence[Sequence[str]]) -> Iterator[dict[str, np.ndarray]]:
        for batch in progress(left, "CLIP on prompts", unit="batch"):
            tokens = clip.tokenizer(list(batch)).to(device)
            yield {"text": clip.model.encode_text(tokens, normalize=True).float().cpu().numpy()}

    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    if batches:
        return grow(folder, batches, run)["text"]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "text.npy", next(run([["no prompt"]]))["text"][:0])
    return folder / "text.npy"
