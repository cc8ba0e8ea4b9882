"""timm's EfficientNet with frozen statistics, made fast to train on a CPU: same weights, same names, same function."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, pad_same
from timm.models import EfficientNet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn
from torch.nn import functional

# In which order a block's parts follow one another: convolution, norm, and what comes before the next convolution.
BLOCKS = {
    DepthwiseSeparableConv: (("conv_dw", "bn1", "aa", "se"), ("conv_pw", "bn2")),
    InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2", "aa", "se"), ("conv_pwl", "bn3")),
}
SMALL = 100  # positions; on larger maps their pairs cost more than oneDNN's gradient


def layers(trunk: EfficientNet) -> list[nn.Module]:
    """Its layers in order, from pixels to the pooled output: stem, blocks, head. They share the trunk's weights.

    Norms always use their running statistics, in training mode also.
    """
    blocks = [block for stage in trunk.blocks for block in stage]
    return [
        _Row(trunk.conv_stem, trunk.bn1),
        *(_Block(block) if _known(block) else block for block in blocks),
        _Row(trunk.conv_head, trunk.bn2, trunk.global_pool),
    ]


def _known(block: nn.Module) -> bool:
    if type(block) not in BLOCKS or block.conv_s2d is not None:
        return False
    return all(type(getattr(block, norm)) is BatchNormAct2d for _, norm, *_ in BLOCKS[type(block)])


class _Row(nn.Sequential):
    """A convolution, its norm, and anything."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, *after = self
        if type(norm) is not BatchNormAct2d:
            return super().forward(x)
        x = _convolve(x, conv, norm)
        for module in after:
            x = module(x)
        return x


class _Block(nn.Module):
    """One of BLOCKS."""

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
    """norm(conv(x)), the norm folded into the convolution's weights: two passes over x less, and two over its gradient.

    The gradients of all weights are those of the two in turn.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    if isinstance(conv, Conv2dSame):
        x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
    if _slow(x, conv):
        x = _Depthwise.apply(x, weight, bias)
    else:
        x = functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return norm.act(norm.drop(x))


def _slow(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `_Depthwise` is for it: oneDNN is fast at 3 x 3."""
    kernel = conv.kernel_size[0]
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.kernel_size == (kernel, kernel)
    same = conv.stride == conv.dilation == (1, 1) and conv.padding == (kernel // 2, kernel // 2) and kernel % 2
    return depthwise and same and kernel > 3 and x.device.type == "cpu" and x.shape[2] * x.shape[3] <= SMALL


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose weights' gradient is a matrix product over pairs of positions.

    oneDNN's own takes two fifths of a training step: on maps of 4 x 4, some thirty times as long as this.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(n, c, h, w), (c, 1, k, k), (c,) -> (n, c, h, w)."""
        ctx.save_for_backward(x, weight)
        return functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        kernel, (c, h, w) = weight.shape[-1], x.shape[1:]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = functional.conv2d(gradient, weight.flip(2, 3), padding=kernel // 2, groups=c)
        out, into = (t.contiguous().flatten(2).permute(1, 2, 0) for t in (gradient, x))  # (c, positions, n)
        pairs = torch.bmm(out, into.mT).flatten(1)
        # Which of the kernel's weights leads from one position to the other: none, or one.
        rows, columns = (_steps(size, kernel).to(x.dtype) for size in (h, w))
        leads = torch.einsum("oia,pjb->opijab", rows, columns).reshape(-1, kernel * kernel)
        return of_x, (pairs @ leads).view_as(weight), gradient.sum((0, 2, 3))


def _steps(size: int, kernel: int) -> Tensor:
    """(size, size, kernel) bool: from output o and input i, which of a row of weights is between them."""
    positions = torch.arange(size)
    return (positions - positions[:, None] + kernel // 2)[:, :, None] == torch.arange(kernel)
