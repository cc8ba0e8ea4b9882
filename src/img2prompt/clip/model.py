"""CLIP as one open_clip folder, whatever its source."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import Compose, InterpolationMode
from torchvision.transforms.v2 import functional

from img2prompt.core.storage import read_json, resume_folder, room


@dataclass(frozen=True)
class Clip:
    """A CLIP model in evaluation mode, with the tokenizer and the transform that belong to its weights.

    `tokenizer` turns n prompts into (n, context length) int64 tokens. `transform` turns an RGB image of any
    size into a normalised (3, size, size) float32 tensor. `folder` is where it was loaded from, and is pickled for it.
    """

    model: nn.Module
    tokenizer: Callable[[Sequence[str]], Tensor]
    transform: Callable[[Image.Image], Tensor]
    folder: Path

    def __reduce__(self) -> tuple[Callable[[Path, str], Clip], tuple[Path, str]]:
        """What loads it again, on the same device."""
        return load_clip, (self.folder, str(next(self.model.parameters()).device))


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
        raise ValueError(f"clip.model: its {type(tokenizer).__name__} cannot be saved; use the model's `hf-hub:` name")


def settle_hub() -> None:
    """Where the hub does not answer, read its cache alone: the hub's own client would try five times a file."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        constants.HF_HUB_OFFLINE = True


def fetched_folder(models: Sequence[tuple[str, str | None, int | None]]) -> Path:
    """Where the stage fetch leaves CLIPs for the stage clip, each in a folder of its number.

    models: of each the name, the tag and the image size; what lies at a path counts with its contents.
    """
    named = [Path(name) for names in models for name in names[:2] if name and Path(name).exists()]
    return resume_folder("fetch", repr(models), room("core"), room("clip"), *named)


def materialise(model: str, pretrained: str | None, image_size: int | None, folder: Path) -> None:
    """Load any CLIP that open_clip knows and write it as an open_clip folder.

    Args:
        model: an open_clip name, `hf-hub:org/name`, or a local open_clip folder.
        pretrained: the tag (or weights file) that goes with an open_clip name.
        image_size: side of the input in pixels; None keeps the model's own.
        folder: where to write.

    Raises:
        ValueError: the name or the tag is unknown, a folder is none of open_clip's, or the weights cannot be had.
    """
    name = model
    if Path(model).is_dir():
        if not (Path(model) / "open_clip_config.json").is_file():
            raise ValueError(f"clip.model: {model} is no open_clip folder: it has no open_clip_config.json")
        name = f"local-dir:{model}"
    elif ":" not in model and model not in open_clip.list_models():
        near = ", ".join(get_close_matches(model, open_clip.list_models()))
        near = f" (as {near})" if near else ""
        raise ValueError(
            f"clip.model: {model!r} is neither `sample`, an open_clip name{near}, hf-hub:org/name nor a folder"
        )
    elif ":" not in model and not (
        pretrained and (open_clip.is_pretrained_cfg(model, pretrained) or Path(pretrained).is_file())
    ):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none known"
        raise ValueError(f"clip.pretrained: {pretrained or 'null'} is no file and no tag of {model}'s weights ({tags})")
    # By its tag open_clip knows the activation that weights were trained with, but only warns where a name has another.
    quick_gelu = bool(pretrained) and open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
    try:
        loaded, _, _ = open_clip.create_model_and_transforms(
            name, pretrained, force_quick_gelu=quick_gelu, force_image_size=image_size
        )
        config, tokenizer = open_clip.get_model_config(name), open_clip.get_tokenizer(name)
    except Exception as error:  # whatever the libraries raise that read hubs, configurations and weights
        cause = str(error).strip().splitlines()[0]
        raise ValueError(f"clip.model: {model} cannot be loaded: {_remedy(model, pretrained) or cause}") from error
    if image_size:
        config["vision_cfg"]["image_size"] = image_size
    if quick_gelu:
        config["quick_gelu"] = True
    save_clip(loaded, tokenizer, config, folder)


def _remedy(model: str, pretrained: str | None) -> str:
    """What to do where a hub has the weights and this machine has not; empty where that is not the trouble."""
    wanted = model.removeprefix("hf-hub:")
    if wanted == model:
        wanted = (open_clip.get_pretrained_cfg(model, pretrained or "") or {}).get("hf_hub", "").rpartition("/")[0]
    place = f"models--{wanted.replace('/', '--')}"
    if not wanted or (Path(constants.HF_HUB_CACHE) / place / "snapshots").is_dir():
        return ""
    return (
        f"the hub's {wanted} is not on this machine, and the hub does not answer; where there is a network, run "
        f"`hf download {wanted}`, then copy {place} from its ~/.cache/huggingface/hub to {constants.HF_HUB_CACHE} here"
    )


def load_clip(folder: Path, device: str) -> Clip:
    """Load an open_clip folder, in evaluation mode and float32."""
    name = f"local-dir:{folder}"
    model, _, _ = open_clip.create_model_and_transforms(name, device=device)
    # A convolutional tower runs 1.6 times faster on CPU with channels last; other towers run as fast either way.
    model = model.eval().to(memory_format=torch.channels_last)
    transform = image_transform(PreprocessCfg(**model.visual.preprocess_cfg))
    return Clip(model, open_clip.get_tokenizer(name), transform, folder)


def image_transform(preprocess: PreprocessCfg) -> Callable[[Image.Image], Tensor]:
    """open_clip's own transform, of an RGB image to (3, height, width) float32, with torch to resize in Pillow's place.

    Both filter in the same way, and torch twice as fast: an image is the same to one grey level of 255 (Pillow from 13
    on may scale the height before the width, which tells on noise). Images that are padded, or cropped to other than a
    square, are left to Pillow.
    """
    size = [preprocess.size] * 2 if isinstance(preprocess.size, int) else list(preprocess.size)
    squash = preprocess.resize_mode == "squash"
    if not squash and (preprocess.resize_mode == "longest" or size[0] != size[1]):
        return image_transform_v2(preprocess, is_train=False)
    bilinear = preprocess.interpolation == "bilinear"  # what else a configuration names is bicubic to open_clip
    interpolation = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
    side, mean, std = size if squash else size[:1], list(preprocess.mean), list(preprocess.std)

    def transform(image: Image.Image) -> Tensor:
        pixels = functional.resize(functional.pil_to_tensor(image), side, interpolation)
        return functional.normalize(functional.center_crop(pixels, size).float().div_(255), mean, std, inplace=True)

    return transform


def image_only(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An open_clip folder's configuration and weights without its text tower, which images do not need.

    What stands in its place is a tower of one layer and one word, all zeros, so that open_clip loads it like any CLIP.
    """
    config = read_json(folder / "open_clip_config.json")
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    model = {name: value for name, value in config["model_cfg"].items() if name != "multimodal_cfg"}
    model |= {"text_cfg": text, "custom_text": True}
    if "timm_model_name" in model["vision_cfg"]:
        model["vision_cfg"]["timm_model_pretrained"] = False
    empty = open_clip.CustomTextCLIP(**{name: value for name, value in model.items() if name != "custom_text"})
    weights = {name: torch.zeros_like(value) for name, value in empty.state_dict().items()}
    with safe_open(folder / "open_clip_model.safetensors", "pt") as file:
        weights |= {name: file.get_tensor(name) for name in weights if name.startswith("visual.")}
    return config | {"model_cfg": model}, weights


def view(clip: Clip, name: str) -> Callable[[Image.Image], Tensor]:
    """CLIP's transform with one change, for test-time augmentation.

    Args:
        clip: the CLIP whose transform is changed.
        name: `plain`: none; `flip`: the mirror image; `smaller`, `larger`: three or five quarters of the side, in whole
            patches (of 32 pixels in a convolutional tower); `renormalised`: mean and standard deviation 0.5 in place of
            OpenAI's for CLIP, or the reverse.

    Returns:
        What turns an RGB image into (3, side, side) float32.

    Raises:
        ValueError: the tower takes images of one size only, and the view has another.
    """
    visual = clip.model.visual
    preprocess = PreprocessCfg(**visual.preprocess_cfg)
    if name == "flip":
        return Compose([ImageOps.mirror, clip.transform])
    if name == "renormalised":
        half = (0.5, 0.5, 0.5)
        mean, std = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) if tuple(preprocess.mean) == half else (half, half)
        return image_transform(replace(preprocess, mean=mean, std=std))
    if name in ("smaller", "larger"):
        vision = isinstance(visual, VisionTransformer)
        if not vision and (not hasattr(visual, "trunk") or hasattr(visual.trunk, "patch_embed")):
            raise ValueError(
                f"model_a.tta: {name}: this CLIP's tower takes images of one size only; leave the view out"
            )
        step = visual.patch_size[0] if vision else 32
        patches = visual.image_size[0] / step
        side = step * (math.floor(0.75 * patches) if name == "smaller" else math.ceil(1.25 * patches))
        return image_transform(replace(preprocess, size=(side, side)))
    return clip.transform
