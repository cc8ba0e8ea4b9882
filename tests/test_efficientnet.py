"""The fast EfficientNet against timm's own modules, which run one after another as torch has them."""

import copy

import pytest
import timm
import torch
from torch import nn

from img2prompt.clip import efficientnet
from img2prompt.core import device


def trunk(name: str = "tf_efficientnet_lite0") -> nn.Module:
    """One with statistics, scales and shifts that an untrained norm does not have."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    return [block for stage in model.blocks for block in stage]


# Of lite0: 5 x 5 at small and at larger maps, 3 x 3, stride 2 with TensorFlow's padding, no expansion.
@pytest.mark.parametrize(
    ("number", "side"), [(0, 16), (1, 15), (3, 8), (4, 10), (4, 11), (8, 3), (13, 4), (13, 7), (15, 1)]
)
@pytest.mark.parametrize("half", [False, True])
def test_a_block_and_its_gradients_are_timms(number, side, half, monkeypatch):
    """Also by the way of half precision, which float64 goes in full."""
    monkeypatch.setattr(device, "has_bfloat16", lambda _: half)
    model = trunk()
    reference = copy.deepcopy(blocks(model)[number]).double()
    block = efficientnet.layers(model.double())[1 + number]
    assert type(block) is not type(reference)
    x = torch.randn(3, reference.get_submodule("bn1").num_features, side, side, dtype=torch.double)
    first = next(m for m in reference.modules() if isinstance(m, nn.Conv2d))
    x = x[:, : first.in_channels].contiguous(memory_format=torch.channels_last).requires_grad_()
    with device.half_products("cpu"):
        found = block(x)
    wanted = reference(x)
    assert torch.allclose(found, wanted, atol=1e-10)
    seed = torch.randn_like(found)
    (of_found,) = torch.autograd.grad(found, x, seed, retain_graph=True)
    (of_wanted,) = torch.autograd.grad(wanted, x, seed, retain_graph=True)
    assert torch.allclose(of_found, of_wanted, atol=1e-10)
    found.backward(seed)
    wanted.backward(seed)
    for (name, a), (same, b) in zip(block.named_parameters(), reference.named_parameters(), strict=True):
        assert name == same
        assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-9), name


def test_the_whole_tower_keeps_its_names_its_weights_and_its_norms_statistics():
    model = trunk()
    plain = [nn.Sequential(model.conv_stem, model.bn1), *blocks(model)]
    plain.append(nn.Sequential(model.conv_head, model.bn2, model.global_pool))
    fast = nn.Sequential(*efficientnet.layers(model))
    names = list(nn.Sequential(*plain).state_dict())
    assert list(fast.state_dict()) == names
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    images = torch.randn(2, 3, 64, 64)
    before = model.bn1.running_mean.clone()
    fast.train()
    fast(images).sum().backward()
    assert torch.equal(model.bn1.running_mean, before)
    fast.eval()
    with torch.no_grad():
        assert torch.allclose(fast(images), model(images), atol=1e-4)


def test_in_half_precision_the_gradients_are_near():
    block = efficientnet.layers(trunk())[14]
    x = torch.randn(8, 192, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for where in ("cpu", "meta"):  # a device whose products stay as they are
        with device.half_products(where):
            block(x).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in block.parameters()]))
        block.zero_grad()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnetv2_rw_t", "mobilenetv2_100", "mnasnet_100"])
def test_other_networks_of_the_family_give_what_timm_gives(name):
    model = trunk(name).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        assert torch.allclose(nn.Sequential(*efficientnet.layers(model))(images), model(images), atol=1e-8)


def test_a_projection_behind_the_pooling_is_the_last_layers():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=8).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(nn.Sequential(*efficientnet.layers(model))(images), model(images), atol=1e-4)


def test_the_first_layer_that_trains_asks_for_no_gradient_of_its_input():
    block = efficientnet.layers(trunk())[14]
    block(torch.randn(2, 192, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
