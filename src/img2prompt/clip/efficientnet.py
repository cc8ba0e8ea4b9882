"""timm's EfficientNet with frozen batch norm statistics, fast to train on a CPU: same weights, names and function."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, pad_same
from timm.models import EfficientNet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn
from torch.nn import functional

# The modules of a block in order: each convolution, its batch norm, and what comes before the next convolution.
BLOCKS = {
    DepthwiseSeparableConv: (("conv_dw", "bn1", "aa", "se"), ("conv_pw", "bn2")),
    InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2", "aa", "se"), ("conv_pwl", "bn3")),
}
SMALL = 100  # positions of a feature map; on larger maps the pairs of positions cost more than oneDNN's gradient


def layers(trunk: EfficientNet) -> list[nn.Module]:
    """The trunk's layers in order, from the image (n, 3, size, size) to the output (n, d): stem, blocks, head.

    They share the trunk's weights. Batch norms always use their running statistics, in training mode also.
    """
    blocks = [block for stage in trunk.blocks for block in stage]
    return [
        _Row(trunk.conv_stem, trunk.bn1),
        *(_Block(block) if _known(block) else block for block in blocks),
        _Row(trunk.conv_head, trunk.bn2, trunk.global_pool, trunk.classifier),
    ]


def _known(block: nn.Module) -> bool:
    if type(block) not in BLOCKS or block.conv_s2d is not None:
        return False
    return all(type(getattr(block, norm)) is BatchNormAct2d for _, norm, *_ in BLOCKS[type(block)])


class _Row(nn.Sequential):
    """A convolution, its batch norm, and any further modules."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, *after = self
        if type(norm) is not BatchNormAct2d:
            return super().forward(x)
        x = _convolve(x, conv, norm)
        for module in after:
            x = module(x)
        return x


class _Block(nn.Module):
    """A block of one of the types in BLOCKS, whose batch norms are folded into its convolutions."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, module in block.named_children():
            setattr(self, name, module)
        self.order, self.has_skip = BLOCKS[type(block)], block.has_skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for conv, norm, *after in self.order:
            x = _convolve(x, getattr(self, conv), getattr(self, norm))
            for name in after:
                x = getattr(self, name)(x)
        return self.drop_path(x) + shortcut if self.has_skip else x


def _convolve(x: Tensor, conv: nn.Conv2d, norm: BatchNormAct2d) -> Tensor:
    """norm(conv(x)) with the batch norm folded into the convolution: two passes over x and two over its gradient less.

    The gradients of all weights are the same as those of the convolution followed by the batch norm.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    if isinstance(conv, Conv2dSame):
        x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
    if _slow(x, conv):
        x = _Depthwise.apply(x, weight, bias)
    elif _pointwise(conv) and torch.get_float32_matmul_precision() == "medium":
        # In bfloat16, within `half_products`, oneDNN's convolution takes twice as long as the same as a matrix product.
        x = functional.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    else:
        x = functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return norm.act(norm.drop(x))


def _pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _slow(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `_Depthwise` is faster for this convolution; at 3 x 3, oneDNN itself is fast."""
    kernel = conv.kernel_size[0]
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.kernel_size == (kernel, kernel)
    same = conv.stride == conv.dilation == (1, 1) and conv.padding == (kernel // 2, kernel // 2) and kernel % 2
    return depthwise and same and kernel > 3 and x.device.type == "cpu" and x.shape[2] * x.shape[3] <= SMALL


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose weights' gradient is a matrix product over pairs of positions.

    oneDNN's own gradient takes two fifths of a training step: on 4 x 4 feature maps, some thirty times as long as this.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(n, c, h, w), (c, 1, k, k), (c,) -> (n, c, h, w)."""
        ctx.save_for_backward(x, weight)
        return functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """gradient (n, c, h, w) -> the gradients of x (None where it needs none), weight and bias."""
        x, weight = ctx.saved_tensors
        kernel, (c, h, w) = weight.shape[-1], x.shape[1:]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = functional.conv2d(gradient, weight.flip(2, 3), padding=kernel // 2, groups=c)
        out, into = (t.contiguous().flatten(2).permute(1, 2, 0) for t in (gradient, x))  # (c, positions, n)
        pairs = torch.bmm(out, into.mT).flatten(1)
        # One-hot: the kernel's weight that connects an output position to an input position, if there is one.
        rows, columns = (_steps(size, kernel).to(x.dtype) for size in (h, w))
        leads = torch.einsum("oia,pjb->opijab", rows, columns).reshape(-1, kernel * kernel)
        return of_x, (pairs @ leads).view_as(weight), gradient.sum((0, 2, 3))


def _steps(size: int, kernel: int) -> Tensor:
    """(size, size, kernel) bool: along one axis, the kernel's element that connects output o to input i."""
    positions = torch.arange(size)
    return (positions - positions[:, None] + kernel // 2)[:, :, None] == torch.arange(kernel)
