"""Modulated deformable convolution (DCNv2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _library, reference
from ._checks import (
    autocast_dtype,
    pair,
    require,
    require_same_device,
    require_same_dtype,
    require_shape,
    require_tensor,
)

_OP = "modulated_deform_conv2d"


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Modulated deformable convolution v2 (Zhu et al., "Deformable ConvNets v2", CVPR 2019, eq. 1).

    Every kernel tap k of every output pixel samples the input bilinearly at its regular position plus a
    learnt offset, times a learnt mask: ``y(p) = sum_k w_k * x(p * stride - padding + k * dilation + offset_k(p)) *
    mask_k(p)``. Outside the image the input is zero.

    Args:
        input: (N, C, H, W), floating point, any strides.
        offset: (N, 2 * G * K, H_out, W_out) with K = kernel_h * kernel_w taps and G offset groups, in input
            pixels. Channel ``2 * (g * K + k)`` is dy and the next one dx, as in torchvision and mmcv. fp32 offsets go
            with any input dtype; coordinates are always computed in fp32 (fp64 for double).
        mask: (N, G * K, H_out, W_out), or None for plain deformable convolution (v1).
        weight: (C_out, C / groups, kernel_h, kernel_w), the dtype of ``input``. ``groups`` follows from the shapes.
        bias: (C_out,) or None.
        stride, padding, dilation: ints or pairs (vertical, horizontal).

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input``.

    Gradients flow to input, offset, mask, weight and bias; in fp64 they are differentiable again, in lower
    precision the compiled kernel refuses a second derivative with a ``RuntimeError``. At an integer
    coordinate the gradient with respect to the offset is the right-hand one (of the cell [n, n + 1)).

    A NaN offset gives NaN; an infinite or far one samples zero. Under autocast features and weight run in
    autocast's dtype, offset and mask keep theirs.

    Raises:
        ValueError: a shape, stride, padding, dilation or device that does not fit.
        TypeError: a dtype that is not floating point, or weight or bias in another dtype than input.
    """
    low = autocast_dtype(input.device) if isinstance(input, Tensor) else None
    if low is not None and input.dtype != torch.float64:
        input, weight = input.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    geometry = _check(input, offset, mask, weight, bias, stride, padding, dilation)
    if input.device.type not in _NATIVE_DEVICES or input.dtype == torch.float64:
        out = reference.modulated_deform_conv2d(input, offset, mask, weight, bias, *geometry)
        return _in_format_of(input, out)
    # The kernel computes in fp32, images channels_last; what already is so is not copied. Tensor.to() would
    # take a slice of a channels_last tensor for one that already is so.
    image = input.float().contiguous(memory_format=torch.channels_last)
    planar = [None if t is None else t.float().contiguous() for t in (offset, mask, weight, bias)]
    flat = tuple(v for pair_ in geometry for v in pair_)
    return _in_format_of(input, _ModulatedDeformConv2d.apply(image, *planar, flat).to(input.dtype))


def _in_format_of(input: Tensor, output: Tensor) -> Tensor:
    """``output`` channels_last where ``input`` is, else contiguous."""
    if input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
        return output.contiguous(memory_format=torch.channels_last)
    return output.contiguous()


def _check(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    require_tensor(_OP, "input", input, 4)
    require_tensor(_OP, "offset", offset, 4)
    require_tensor(_OP, "weight", weight, 4)
    if mask is not None:
        require_tensor(_OP, "mask", mask, 4)
    if bias is not None:
        require_tensor(_OP, "bias", bias, 1)
    tensors = {"input": input, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
    require_same_device(_OP, "input", tensors)
    require_same_dtype(_OP, "input", {"input": input, "weight": weight, "bias": bias})

    stride_ = pair(_OP, "stride", stride, 1)
    padding_ = pair(_OP, "padding", padding, 0)
    dilation_ = pair(_OP, "dilation", dilation, 1)
    batch, channels, height, width = input.shape
    require(channels > 0, _OP, "input", "at least 1 channel", tuple(input.shape))
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    fits = group_channels > 0 and channels % group_channels == 0
    require(
        fits, _OP, "weight", f"shape[1] to divide the {channels} input channels", group_channels
    )
    groups = channels // group_channels
    require(
        out_channels % groups == 0,
        _OP,
        "weight",
        f"shape[0] a multiple of {groups} groups",
        out_channels,
    )
    taps = kernel_h * kernel_w
    require(taps > 0, _OP, "weight", "a kernel of at least 1 x 1", (kernel_h, kernel_w))
    # No divmod: Dynamo cannot trace it with dynamic shapes.
    offset_groups, rest = offset.shape[1] // (2 * taps), offset.shape[1] % (2 * taps)
    require(
        rest == 0 and offset_groups > 0 and channels % offset_groups == 0,
        _OP,
        "offset",
        f"2 * G * {taps} channels with G dividing the {channels} input channels",
        f"{offset.shape[1]} channels",
    )
    out_h = (height + 2 * padding_[0] - dilation_[0] * (kernel_h - 1) - 1) // stride_[0] + 1
    out_w = (width + 2 * padding_[1] - dilation_[1] * (kernel_w - 1) - 1) // stride_[1] + 1
    require(out_h > 0 and out_w > 0, _OP, "input", "an output of at least 1 x 1", (out_h, out_w))
    shape = (batch, offset.shape[1], out_h, out_w)
    require_shape(_OP, "offset", offset, shape, "(N, 2 * G * K, H_out, W_out)")
    if mask is not None:
        shape = (batch, offset_groups * taps, out_h, out_w)
        require_shape(_OP, "mask", mask, shape, "(N, G * K, H_out, W_out)")
    if bias is not None:
        require_shape(_OP, "bias", bias, (out_channels,), "(C_out,)")
    return stride_, padding_, dilation_


# ------------------------------------------------------------------------------------- schema and fake

_GEOMETRY = ", ".join(
    f"int {name}_{axis}" for name in ("stride", "padding", "dilation") for axis in "hw"
)
_library.LIBRARY.define(
    "modulated_deform_conv2d_forward(Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
    f"Tensor? bias, {_GEOMETRY}) -> Tensor"
)
_library.LIBRARY.define(
    "modulated_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, "
    f"Tensor weight, {_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_NATIVE_DEVICES = _library.register_op(
    _OP, ("modulated_deform_conv2d_forward", "modulated_deform_conv2d_backward")
)


@torch.library.register_fake("mafnet_ops::modulated_deform_conv2d_forward", lib=_library.LIBRARY)
def _(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: int,
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return _empty(input, shape, torch.channels_last)


@torch.library.register_fake("mafnet_ops::modulated_deform_conv2d_backward", lib=_library.LIBRARY)
def _(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *geometry: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask_shape = (0, *offset.shape[1:]) if mask is None else tuple(mask.shape)
    return (
        _empty(input, tuple(input.shape), torch.channels_last),
        _empty(input, tuple(offset.shape), torch.contiguous_format),
        _empty(input, mask_shape, torch.contiguous_format),
        _empty(input, tuple(weight.shape), torch.contiguous_format),
    )


def _empty(like: Tensor, shape: tuple[int, ...], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


# ------------------------------------------------------------------------------------------ autograd


class _ModulatedDeformConv2d(torch.autograd.Function):
    """(input, offset, mask, weight, bias, geometry) -> output, all fp32; once differentiable."""

    @staticmethod
    def forward(
        input: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: tuple[int, ...],
    ) -> Tensor:
        return torch.ops.mafnet_ops.modulated_deform_conv2d_forward(
            input, offset, mask, weight, bias, *geometry
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, offset, mask, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(input, offset, mask, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, offset, mask, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        # Compiled code has no second derivative, and Dynamo cannot nest Functions here.
        function = _backward if torch.compiler.is_compiling() else _OnceDifferentiable.apply
        grad_input, grad_offset, grad_mask, grad_weight = function(
            grad, input, offset, mask, weight, ctx.geometry
        )
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
        return (
            grad_input,
            grad_offset,
            None if mask is None else grad_mask,
            grad_weight,
            grad_bias,
            None,
        )


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.mafnet_ops.modulated_deform_conv2d_backward(
        grad, input, offset, mask, weight, *geometry
    )


class _OnceDifferentiable(torch.autograd.Function):
    """The raw backward op. PyTorch's ``once_differentiable`` does not see that the gradients depend on the saved
    tensors: with a constant incoming gradient a second derivative would silently be zero."""

    forward = staticmethod(_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{_OP}: input: expected dtype float64 for a second derivative, got a lower precision"
        )


class ModulatedDeformConv2d(nn.Module):
    """The weight and bias of a :func:`modulated_deform_conv2d`; offset and mask come with each call.

    Parameter names, shapes and initialisation are those of torchvision's ``DeformConv2d`` and mmcv's
    ``ModulatedDeformConv2d``, so their state dicts load.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            require(channels % groups == 0, _OP, name, f"a multiple of groups = {groups}", channels)
        self.kernel_size = pair(_OP, "kernel_size", kernel_size, 1)
        self.stride = pair(_OP, "stride", stride, 1)
        self.padding = pair(_OP, "padding", padding, 0)
        self.dilation = pair(_OP, "dilation", dilation, 1)
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return modulated_deform_conv2d(
            input, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )

    def extra_repr(self) -> str:
        out_channels, group_channels = self.weight.shape[:2]
        return (
            f"{group_channels * self.groups}, {out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )
