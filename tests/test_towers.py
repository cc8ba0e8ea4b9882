"""Towers of every family in layers: the same function, and what trains of them."""

import copy

import pytest
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn

from img2prompt.clip import features
from img2prompt.clip.towers import checkpointed, frozen, groups, is_cut, project, tower, unfrozen

VIT = dict(img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=0)
VIT_STEM = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")
OPEN = dict(image_size=32, patch_size=16, width=32, layers=3, heads=2, mlp_ratio=2.0, output_dim=16)
OPEN_STEM = ("class_embedding", "positional_embedding", "conv1", "ln_pre")
CONVNEXT = dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), num_classes=0)


class Plain(nn.Module):
    """A tower whose groups nobody names."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(12)])
        self.norm = nn.LayerNorm(4)

    def forward(self, images):
        x = self.stem_norm(self.stem(images)).flatten(2).mean(2) + self.token
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


class OtherForward(timm.models.VisionTransformer):
    """A subclass that the cut of its parent would get wrong."""

    def forward(self, x, **how):
        return -super().forward(x, **how)


def blocks(*counts):
    return [f"stages.{stage}.blocks.{block}." for stage, count in enumerate(counts) for block in range(count)]


THREE = [f"blocks.{number}." for number in range(3)]
# How to make each, the side of its images, its blocks in order (what is neither theirs nor the stem's is the way out),
# and what begins the names of the stem.
CUT = {
    "open_clip": (lambda: VisionTransformer(**OPEN), 32, [f"transformer.resblocks.{i}." for i in range(3)], OPEN_STEM),
    "open_clip, attentional pool": (
        lambda: VisionTransformer(**OPEN, attentional_pool=True, attn_pooler_heads=2),
        32, [f"transformer.resblocks.{i}." for i in range(3)], OPEN_STEM,
    ),
    "open_clip, mean": (
        lambda: VisionTransformer(**OPEN, pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
        32, [f"transformer.resblocks.{i}." for i in range(3)], OPEN_STEM,
    ),
    "ModifiedResNet": (
        lambda: ModifiedResNet([1, 2, 1, 2], output_dim=16, heads=4, image_size=64, width=8),
        64, [f"layer{i}.{j}." for i, j in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (4, 1))],
        ("conv", "bn"),
    ),
    "SigLIP": (lambda: timm.create_model("vit_base_patch16_siglip_224", **VIT), 32, THREE, VIT_STEM),
    "ViT, norm before": (lambda: timm.create_model("vit_base_patch16_clip_224", **VIT), 32, THREE, VIT_STEM),
    "ViT, mean": (lambda: timm.create_model("vit_medium_patch16_gap_256", **VIT), 32, THREE, VIT_STEM),
    "ViT, registers": (
        lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **VIT | {"img_size": 28}), 28, THREE, VIT_STEM
    ),
    "ViT, projection": (
        lambda: timm.create_model("vit_base_patch16_224", **VIT | {"num_classes": 8}), 32, THREE, VIT_STEM
    ),
    "EVA02": (
        lambda: timm.create_model("eva02_base_patch16_clip_224", **VIT | {"num_classes": 8}), 32, THREE, VIT_STEM
    ),
    "PE": (
        lambda: timm.create_model("vit_pe_core_base_patch16_224", **VIT, attn_pool_num_heads=2), 32, THREE, VIT_STEM
    ),
    "EVA": (lambda: timm.create_model("eva_giant_patch14_clip_224", **VIT | {"img_size": 28}), 28, THREE, VIT_STEM),
    "ConvNeXt": (lambda: timm.create_model("convnext_base", **CONVNEXT), 64, blocks(1, 1, 2, 1), ("stem",)),
    "ConvNeXt, norm first": (
        lambda: timm.create_model("convnext_base", **CONVNEXT, head_norm_first=True, use_grn=True),
        64, blocks(1, 1, 2, 1), ("stem",),
    ),
}  # fmt: skip
WHOLE = {
    "Swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2),
            num_classes=8,
        ),
        56, [f"layers.{i}." for i in range(4)], ("patch_embed",),
    ),
    "mixed rotary embedding": (
        lambda: timm.create_model("vit_small_patch16_rope_mixed_224", **VIT), 32, THREE, VIT_STEM
    ),
    "a subclass": (lambda: OtherForward(**VIT, patch_size=16), 32, THREE, VIT_STEM),
    "CaiT": (
        lambda: timm.create_model("cait_xxs24_224", **VIT | {"num_classes": 8}, depth_token_only=1),
        32, THREE, ("cls_token", "pos_embed", "patch_embed"),
    ),
    "no groups": (Plain, 32, [f"blocks.{i}." for i in range(12)], ("token", "stem")),
}  # fmt: skip
ALL = CUT | WHOLE


def made(family):
    torch.manual_seed(0)
    trunk, (_, side, names, stem) = ALL[family][0]().eval(), ALL[family]
    with torch.no_grad():
        for parameter in trunk.parameters():  # no block is near the identity, no embedding zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    visual = trunk
    if not isinstance(trunk, (VisionTransformer, ModifiedResNet)):
        visual = nn.Module()
        visual.trunk, visual.head = trunk, nn.Linear(2, 2)
    return visual, trunk, torch.randn(2, 3, side, side), names, stem


def expected(trunk, names, stem, count):
    """The names of the parameters of the last blocks, with the way out."""
    if count > len(names):
        return set(dict(trunk.named_parameters()))
    others = (*stem, *names[: len(names) - count])
    downsamples = tuple(f"{name.split('.blocks')[0]}.downsample." for name in others if name.endswith("blocks.0."))
    return {name for name, _ in trunk.named_parameters() if not name.startswith((*others, *downsamples))}


def trainable(trunk, layers, count):
    """The names in the trunk of what trains, and the layers that do."""
    last = unfrozen(layers, count)
    shared = layers[len(frozen(layers, count)) :]
    name = {id(parameter): name for name, parameter in trunk.named_parameters()}
    pairs = zip(shared.parameters(), last.parameters(), strict=True)
    return [name[id(mine)] for mine, copied in pairs if copied.requires_grad], last


@pytest.mark.parametrize("family", ALL)
def test_the_layers_are_the_tower(family):
    visual, trunk, images, names, _ = made(family)
    layers = tower(visual)
    assert len(layers) == (1 + len(names) if family in CUT else 1)
    assert is_cut(layers) == (family in CUT)
    assert len(groups(layers)) == 1 + len(names)
    with torch.no_grad():
        found = layers(images)
        found = project(visual, found) if visual is trunk else found
        assert torch.allclose(found, trunk(images), atol=1e-5)
        for count in (0, 1, 2):
            before = frozen(layers, count)(images)
            assert torch.equal(unfrozen(layers, count)(before), layers(images))


@pytest.mark.parametrize("family", ALL)
def test_unfreezing_n_trains_n_blocks_and_the_way_out(family):
    visual, trunk, images, names, stem = made(family)
    layers = tower(visual)
    if hasattr(visual, "proj"):
        trunk = copy.copy(trunk)
        trunk._parameters = {name: value for name, value in trunk._parameters.items() if name != "proj"}
    for count in (1, 2, 1 + len(names)):
        found, last = trainable(trunk, layers, count)
        assert len(set(found)) == len(found)
        assert set(found) == expected(trunk, names, stem, count)
        last(frozen(layers, count)(images).detach()).square().sum().backward()
        assert all((value.grad is not None) == value.requires_grad for value in last.parameters())
    assert all(parameter.requires_grad for parameter in trunk.parameters())
    assert list(unfrozen(layers, 0)) == []
    with pytest.raises(ValueError, match=rf"model_a\.unfreeze: {2 + len(names)}.* {1 + len(names)} layers"):
        unfrozen(layers, 2 + len(names))


@pytest.mark.parametrize("family", ALL)
def test_checkpoints_change_no_gradient(family):
    visual, _, images, _, _ = made(family)
    layers = tower(visual)
    if family == "no groups":
        with pytest.raises(ValueError, match=r"model_a\.grad_checkpointing"):
            checkpointed(layers, images)
        return
    gradients = []
    for run in (lambda last, x: last(x), checkpointed):
        last = unfrozen(layers, 2)
        x = frozen(layers, 2)(images).detach()
        run(last, x).square().sum().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in last.parameters() if value.requires_grad]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("family", ALL)
def test_bfloat16_gives_nearly_the_same_features_and_convolutions_stay_as_they_are(family, monkeypatch):
    visual, _, images, _, _ = made(family)
    layers = tower(visual)
    before = {}
    for bfloat16 in (False, True):
        monkeypatch.setattr(features, "has_bfloat16", lambda device, has=bfloat16: has)
        found = [features.Fixed(frozen(layers, count), "cpu")(images) for count in (0, 1, 2)]
        last = features.Fixed(layers[len(frozen(layers, 1)) :], "cpu")
        assert torch.equal(last(found[1]), found[0])  # wherever the tower is cut
        before[bfloat16] = [x.float().flatten(1) for x in found]
    for exact, near in zip(before[False], before[True], strict=True):
        if family in ("ModifiedResNet", "no groups"):
            assert torch.equal(exact, near)
        else:
            assert nn.functional.cosine_similarity(exact, near).min() > 0.999
            assert not is_cut(layers) or not torch.equal(exact, near)
