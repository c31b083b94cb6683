"""Modulated deformable convolution (DCNv2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import _library, reference
from ._autograd import empty_like_input, memory_format_of
from ._checks import pair, require, require_count, require_shape, require_tensor
from ._deformable import (
    GEOMETRY_SCHEMA,
    Geometry,
    as_autocast_wants,
    check_convolution,
    coordinates,
    make_functions,
    pairs,
)
from .offset_health import OffsetHealth

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
            pixels. Channel ``2 * (g * K + k)`` is dy and the next one dx, as in torchvision and mmcv. Its dtype, like
            that of mask, is that of ``input``, a lower one, or fp32; coordinates are computed in fp32 (fp64 for
            double).
        mask: (N, G * K, H_out, W_out), or None for plain deformable convolution (v1).
        weight: (C_out, C / groups, kernel_h, kernel_w), the dtype of ``input``. ``groups`` follows from the shapes.
        bias: (C_out,) or None.
        stride, padding, dilation: ints or pairs (vertical, horizontal).

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input``, channels_last where ``input`` is.

    Gradients flow to input, offset, mask, weight and bias, any number of times (compiled code: once); forward
    mode, ``torch.func`` and vmap work. Second derivatives and forward mode go through PyTorch code in fp64. At an
    integer coordinate the gradient with respect to the offset is the right-hand one (of the cell [n, n + 1)).
    On the CPU all gradients have the same bits on every run and with any number of threads.

    A NaN offset gives NaN; an infinite or far one samples exactly zero, whatever the edge of the image holds. Under
    autocast features and weight run in autocast's dtype, offset and mask keep theirs.

    The CPU is deterministic. On CUDA the gradient of ``input`` is summed by atomics in no fixed order; under
    ``torch.use_deterministic_algorithms(True)`` its terms are rounded to integers of one scale, whose sums have
    none, with 8 bytes of workspace per element of ``input`` (16 in fp64).

    fp32 products on CUDA's tensor cores (channels_last) have the error of fp32, or that of TF32 where torch allows it
    for matrix products (``torch.backends.cuda.matmul``).

    Raises:
        ValueError: a shape, stride, padding, dilation or device that does not fit.
        TypeError: a dtype that is not floating point, weight or bias in another dtype than input, or fp64 offset or
            mask beside an input of lower precision, which would be rounded silently.
    """
    input, weight, bias = as_autocast_wants(_OP, input, weight, bias)
    geometry = _check(input, offset, mask, weight, bias, stride, padding, dilation)
    offset = coordinates(_OP, "offset", offset, input)
    mask = None if mask is None else coordinates(_OP, "mask", mask, input)
    if input.device.type not in _NATIVE_DEVICES:
        out = _definition(input, offset, mask, weight, bias, geometry)
        return out.contiguous(memory_format=memory_format_of(input))
    return _FUNCTIONS.apply(input, offset, mask, weight, bias, geometry)


def _check(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: int | Sequence[int],
) -> Geometry:
    if mask is not None:
        require_tensor(_OP, "mask", mask, 4)
    tensors = {"input": input, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
    checked = check_convolution(_OP, tensors, "offset", 2, geometry)
    if mask is not None:
        shape = (offset.shape[0], offset.shape[1] // 2, *offset.shape[2:])
        require_shape(_OP, "mask", mask, shape, "(N, G * K, H_out, W_out)")
    return checked


# ------------------------------------------------------------------------------------- schema and fake

_ARGUMENTS = ("input", "offset", "mask", "weight", "bias")
_library.LIBRARY.define(
    "modulated_deform_conv2d_forward(Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
    f"Tensor? bias, {GEOMETRY_SCHEMA}, bool allow_tf32=False) -> Tensor"
)
_library.LIBRARY.define(
    "modulated_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, "
    f"Tensor weight, {GEOMETRY_SCHEMA}, {', '.join(f'bool need_{name}' for name in _ARGUMENTS)}, "
    "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    *options: int,
) -> Tensor:
    return empty_like_input(input, (input.shape[0], weight.shape[0], *offset.shape[2:]))


@torch.library.register_fake("mafnet_ops::modulated_deform_conv2d_backward", lib=_library.LIBRARY)
def _(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *options: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, needed: bool) -> tuple[int, ...]:
        return (tensor.shape[0] if needed else 0, *tensor.shape[1:])

    need_input, need_offset, need_mask, need_weight, need_bias = options[6:11]
    masked = offset if mask is None else mask
    return (
        empty_like_input(input, like(input, bool(need_input))),
        offset.new_empty(like(offset, bool(need_offset))),
        masked.new_empty(like(masked, mask is not None and bool(need_mask))),
        weight.new_empty(like(weight, bool(need_weight))),
        weight.new_empty((weight.shape[0] if need_bias else 0,)),
    )


@register_flop_formula(torch.ops.mafnet_ops.modulated_deform_conv2d_forward)
def _flops(
    input_shape: Any,
    offset_shape: Any,
    mask_shape: Any,
    weight_shape: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The matrix product, and eight operations per sample and channel; positions are not counted."""
    out_channels, group_channels, kernel_h, kernel_w = weight_shape
    samples = input_shape[0] * offset_shape[2] * offset_shape[3] * kernel_h * kernel_w
    return samples * (2 * out_channels * group_channels + 8 * input_shape[1])


# ------------------------------------------------------------------------------------------ autograd


def _definition(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    return reference.modulated_deform_conv2d(input, offset, mask, weight, bias, *pairs(geometry))


_FUNCTIONS = make_functions(
    torch.ops.mafnet_ops.modulated_deform_conv2d_forward,
    torch.ops.mafnet_ops.modulated_deform_conv2d_backward,
    _definition,
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
        require_count(_OP, "groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            require_count(_OP, name, channels)
            require(channels % groups == 0, _OP, name, f"a multiple of groups = {groups}", channels)
        self.kernel_size = pair(_OP, "kernel_size", kernel_size, 1)
        self.stride = pair(_OP, "stride", stride, 1)
        self.padding = pair(_OP, "padding", padding, 0)
        self.dilation = pair(_OP, "dilation", dilation, 1)
        self.groups = groups
        self.health: OffsetHealth | None = None
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.health is not None:
            self.health(offset)
        return modulated_deform_conv2d(
            input, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )

    def extra_repr(self) -> str:
        out_channels, group_channels = self.weight.shape[:2]
        return (
            f"{group_channels * self.groups}, {out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )


def watch_offsets(model: nn.Module, threshold: float = 50.0) -> dict[str, OffsetHealth]:
    """Give every deformable module of ``model`` counters of its own, by the module's name.

    Counting passes over the offsets a few times more, and where kernels take a head's raw output it makes the offsets
    for that. ``module.health = None`` ends it.
    """
    watched = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulatedDeformConv2d):
            module.health = watched[name] = OffsetHealth(threshold).to(module.weight.device)
    return watched
