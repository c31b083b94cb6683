"""mmcv's deformable convolutions, plain and modulated (``mmcv.ops``)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import pair, require
from ..modulated_deform_conv2d import modulated_deform_conv2d as _convolution

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "deform_conv2d",
    "modulated_deform_conv2d",
]

Ints = int | tuple[int, ...]


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """mmcv's function, which is ``Function.apply`` there and takes no keywords; here it does.

    As in mmcv the dtype of ``offset`` decides: features and weight are cast to it.

    Raises:
        ValueError: ``groups`` or ``deform_groups`` contradicts the shapes, or what
            :func:`mafnet_ops.modulated_deform_conv2d` raises.
    """
    op = "modulated_deform_conv2d"
    channels, taps = input.shape[1], weight.shape[2] * weight.shape[3]
    fits = groups * weight.shape[1] == channels
    expected = f"the {channels} input channels / {weight.shape[1]} of the weight"
    require(fits, op, "groups", expected, groups)
    fits = 2 * deform_groups * taps == offset.shape[1]
    expected = f"the {offset.shape[1]} offset channels / (2 * {taps} taps)"
    require(fits, op, "deform_groups", expected, deform_groups)
    dtype = offset.dtype
    bias = None if bias is None else bias.to(dtype)
    mask = None if mask is None else mask.to(dtype)
    tensors = input.to(dtype), offset, mask, weight.to(dtype), bias
    return _convolution(*tensors, stride, padding, dilation)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """mmcv's unmodulated convolution. ``bias`` must be False, as there; ``im2col_step`` has no effect, since
    nothing is unfolded here and any batch size works."""
    require(not bias, "deform_conv2d", "bias", "False", bias)
    geometry = stride, padding, dilation, groups, deform_groups
    return modulated_deform_conv2d(input, offset, None, weight, None, *geometry)


class _DeformConv(nn.Module):
    """The attributes and parameters that mmcv's and BasicSR's modules share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        groups: int,
        deform_groups: int,
        bias: bool | str,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            require(channels % groups == 0, op, name, f"a multiple of groups = {groups}", channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(op, "kernel_size", kernel_size, 1)
        self.stride = pair(op, "stride", stride, 1)
        self.padding = pair(op, "padding", padding, 0)
        self.dilation = pair(op, "dilation", dilation, 1)
        self.groups = groups
        self.deform_groups = deform_groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None

    def _offset_head(self, channels_per_tap: int) -> nn.Conv2d:
        """A convolution like this one whose output starts as zero: 2 channels a tap are offsets, a third the mask."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        head = nn.Conv2d(
            self.in_channels,
            self.deform_groups * channels_per_tap * taps,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return head

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"deform_groups={self.deform_groups}, bias={self.bias is not None}"
        )


class DeformConv2d(_DeformConv):
    """mmcv's module: no bias, ``forward(x, offset)``; an image smaller than the kernel is padded as there."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        require(not bias, "DeformConv2d", "bias", "False", bias)
        geometry = kernel_size, stride, padding, dilation, groups, deform_groups
        super().__init__(in_channels, out_channels, *geometry, bias=False)
        self.im2col_step = im2col_step
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        missing_h = max(self.kernel_size[0] - x.shape[2], 0)
        missing_w = max(self.kernel_size[1] - x.shape[3], 0)
        if missing_h or missing_w:
            x, offset = (F.pad(t, (0, missing_w, 0, missing_h)) for t in (x, offset))
        geometry = self.stride, self.padding, self.dilation, self.groups, self.deform_groups
        out = deform_conv2d(x, offset, self.weight, *geometry)
        return out[:, :, : out.shape[2] - missing_h, : out.shape[3] - missing_w]


class DeformConv2dPack(DeformConv2d):
    """:class:`DeformConv2d` that predicts its own offsets with ``conv_offset``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = self._offset_head(2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        geometry = self.stride, self.padding, self.dilation, self.groups, self.deform_groups
        return deform_conv2d(x, self.conv_offset(x), self.weight, *geometry)


class ModulatedDeformConv2d(_DeformConv):
    """mmcv's module: ``forward(x, offset, mask)``; the bias starts at zero."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        geometry = kernel_size, stride, padding, dilation, groups, deform_groups
        super().__init__(in_channels, out_channels, *geometry, bias=bias)
        bound = 1 / math.sqrt(in_channels * self.kernel_size[0] * self.kernel_size[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups, self.deform_groups
        return modulated_deform_conv2d(x, offset, mask, self.weight, self.bias, *geometry)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """:class:`ModulatedDeformConv2d` that predicts its own offsets and mask with ``conv_offset``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = self._offset_head(3)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return convolve_by_head(self, x, self.conv_offset(x))


def convolve_by_head(module: Any, x: Tensor, raw: Tensor) -> Tensor:
    """The convolution of ``module`` with the raw output of its offset head: two thirds offsets, a third mask.

    Takes whatever has weight, bias, stride, padding and dilation, so that it also serves other libraries' modules.
    """
    third = raw.shape[1] // 3
    offset, mask = raw.split([2 * third, third], 1)
    geometry = module.stride, module.padding, module.dilation
    return _convolution(x, offset, torch.sigmoid(mask), module.weight, module.bias, *geometry)
