"""Deformable alignment: a raw offset head, base flows and a modulated deformable convolution as one op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _library, reference
from ._autograd import empty_like_input
from ._checks import number, pair, require, require_count, require_shape, require_tensor
from ._deformable import (
    GEOMETRY_SCHEMA,
    Geometry,
    as_autocast_wants,
    check_convolution,
    coordinates,
    make_functions,
    pairs,
)
from .modulated_deform_conv2d import ModulatedDeformConv2d, modulated_deform_conv2d

_OP = "deform_align"


def deform_align(
    input: Tensor,
    raw: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    flow_1: Tensor | None = None,
    flow_2: Tensor | None = None,
    max_residue_magnitude: float | None = 10.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    parts: int = 1,
) -> Tensor:
    """Flow-guided deformable alignment (Chan et al., "BasicVSR++", CVPR 2022, section 3.2).

    ``offset = max_residue_magnitude * tanh(raw_offset) + base flow``, ``mask = sigmoid(raw_mask)``, then
    :func:`modulated_deform_conv2d`.

    Args:
        input: (N, C, H, W), floating point.
        raw: (N, 3 * G * K, H_out, W_out), the output of the offset head as it is (27 * G channels for 3 x 3):
            first 2 * G * K offset channels in (dy, dx) pairs, then G * K mask channels.
        weight: (C_out, C / groups, kernel_h, kernel_w).
        bias: (C_out,) or None.
        flow_1, flow_2: base flows (N, H_out, W_out, 2) in input pixels, channel 0 = x, or None. One flow serves all G
            offset groups; of two, ``flow_1`` serves the first half of the groups and ``flow_2`` the second.
        max_residue_magnitude: bound on the learnt part of the offset, in pixels. None: there is no tanh, and the raw
            offsets are in pixels, as in EDVR.
        stride, padding, dilation: as :func:`modulated_deform_conv2d`; the default padding keeps the size at 3 x 3.
        parts: input is this many equal parts side by side, say two states of a recurrence, that are sampled at the
            same places: each is cut into the G offset groups by itself. With ``groups`` a multiple of it the parts
            stay apart. Cheaper than a call for each, as positions and masks are worked out once.

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input``. Gradients flow to input, raw, weight, bias and flows.

    Raises:
        ValueError: a shape or device that does not fit; ``flow_2`` without ``flow_1``; an odd G with two flows; a
            ``max_residue_magnitude`` that is NaN.
        TypeError: a dtype that is not floating point.
    """
    input, weight, bias = as_autocast_wants(_OP, input, weight, bias)
    geometry = _check(input, raw, weight, bias, flow_1, flow_2, parts, (stride, padding, dilation))
    raw = coordinates(_OP, "raw", raw, input)
    flow_1 = None if flow_1 is None else coordinates(_OP, "flow_1", flow_1, input)
    flow_2 = None if flow_2 is None else coordinates(_OP, "flow_2", flow_2, input)
    if flow_1 is not None and flow_2 is not None and flow_1.dtype != flow_2.dtype:
        compute = reference.coordinate_dtype(input.dtype)
        flow_1, flow_2 = flow_1.to(compute), flow_2.to(compute)
    # The raw ops know no None.
    reach = math.inf
    if max_residue_magnitude is not None:
        reach = number(_OP, "max_residue_magnitude", max_residue_magnitude)
    require(reach == reach, _OP, "max_residue_magnitude", "a number or None", reach)
    if input.device.type not in _NATIVE_DEVICES:
        # The prologue in PyTorch, then whatever runs the convolution here.
        offset, mask = _offsets(raw, flow_1, flow_2, reach, parts)
        return modulated_deform_conv2d(input, offset, mask, weight, bias, *pairs(geometry))
    options = (reach, *geometry, parts)
    return _FUNCTIONS.apply(input, raw, flow_1, flow_2, weight, bias, options)


def _check(
    input: Tensor,
    raw: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    flow_1: Tensor | None,
    flow_2: Tensor | None,
    parts: int,
    geometry: Sequence[int | Sequence[int]],
) -> Geometry:
    flows = {"flow_1": flow_1, "flow_2": flow_2}
    for name, flow in flows.items():
        if flow is not None:
            require_tensor(_OP, name, flow, 4)
    require(isinstance(parts, int) and parts > 0, _OP, "parts", "an int >= 1", parts)
    tensors = {"input": input, "raw": raw, "weight": weight, "bias": bias, **flows}
    checked = check_convolution(_OP, tensors, "raw", 3, geometry, parts)
    groups = raw.shape[1] // (3 * weight.shape[2] * weight.shape[3])
    require(
        flow_2 is None or flow_1 is not None, _OP, "flow_1", "a tensor where flow_2 is given", None
    )
    expected = "an even number of offset groups for two flows"
    require(flow_2 is None or groups % 2 == 0, _OP, "raw", expected, groups)
    shape = (raw.shape[0], *raw.shape[2:], 2)
    for name, flow in flows.items():
        if flow is not None:
            require_shape(_OP, name, flow, shape, "(N, H_out, W_out, 2)")
    return checked


def _offsets(
    raw: Tensor,
    flow_1: Tensor | None,
    flow_2: Tensor | None,
    max_residue_magnitude: float,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """Offset and mask of the plain convolution."""
    offset, mask = reference.deform_align_offsets(raw, flow_1, flow_2, max_residue_magnitude)
    return offset.repeat(1, parts, 1, 1), mask.repeat(1, parts, 1, 1)


# ------------------------------------------------------------------------------------- schema and fake

_TENSORS = ("input", "raw", "flow_1", "flow_2", "weight", "bias")
_OPTIONS = f"float max_residue_magnitude, {GEOMETRY_SCHEMA}, int parts"
_library.LIBRARY.define(
    "deform_align_forward(Tensor input, Tensor raw, Tensor? flow_1, Tensor? flow_2, Tensor weight, "
    f"Tensor? bias, {_OPTIONS}, bool allow_tf32=False) -> Tensor"
)
_library.LIBRARY.define(
    "deform_align_backward(Tensor grad_output, Tensor input, Tensor raw, Tensor? flow_1, "
    f"Tensor? flow_2, Tensor weight, {_OPTIONS}, {', '.join(f'bool need_{t}' for t in _TENSORS)}, "
    "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _backend(device_type: str) -> _library.Backend | None:
    """Where there is no kernel for raw offsets the convolution decides."""
    if device_type in _NATIVE_DEVICES:
        return None
    convolution = _library.backend("modulated_deform_conv2d", device_type)
    return _library.Backend(
        convolution.name, f"prologue in PyTorch, then modulated_deform_conv2d: {convolution.reason}"
    )


_NATIVE_DEVICES = _library.register_op(
    _OP, ("deform_align_forward", "deform_align_backward"), other=_backend
)


@torch.library.register_fake("mafnet_ops::deform_align_forward", lib=_library.LIBRARY)
def _(
    input: Tensor,
    raw: Tensor,
    flow_1: Tensor | None,
    flow_2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *options: float,
) -> Tensor:
    return empty_like_input(input, (input.shape[0], weight.shape[0], *raw.shape[2:]))


@torch.library.register_fake("mafnet_ops::deform_align_backward", lib=_library.LIBRARY)
def _(
    grad_output: Tensor,
    input: Tensor,
    raw: Tensor,
    flow_1: Tensor | None,
    flow_2: Tensor | None,
    weight: Tensor,
    *options: float,
) -> tuple[Tensor, ...]:
    needs = [bool(need) for need in options[8:14]]

    def batch(tensor: Tensor, needed: bool) -> int:
        return tensor.shape[0] if needed else 0

    def flow_like(flow: Tensor | None, needed: bool) -> Tensor:
        if flow is None:
            return raw.new_empty((0, *raw.shape[2:], 2))
        return flow.new_empty((batch(flow, needed), *flow.shape[1:]))

    return (
        empty_like_input(input, (batch(input, needs[0]), *input.shape[1:])),
        raw.new_empty((batch(raw, needs[1]), *raw.shape[1:])),
        flow_like(flow_1, needs[2]),
        flow_like(flow_2, needs[3]),
        weight.new_empty((batch(weight, needs[4]), *weight.shape[1:])),
        weight.new_empty((batch(weight, needs[5]),)),
    )


@register_flop_formula(torch.ops.mafnet_ops.deform_align_forward)
def _flops(input_shape: Any, raw_shape: Any, *args: Any, **kwargs: Any) -> int:
    """As the plain convolution's; tanh, sigmoid and positions are not counted."""
    out_channels, group_channels, kernel_h, kernel_w = args[2]
    samples = input_shape[0] * raw_shape[2] * raw_shape[3] * kernel_h * kernel_w
    return samples * (2 * out_channels * group_channels + 8 * input_shape[1])


# ------------------------------------------------------------------------------------------ autograd


def _definition(
    input: Tensor,
    raw: Tensor,
    flow_1: Tensor | None,
    flow_2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    options: Any,
) -> Tensor:
    max_residue_magnitude, geometry, parts = options[0], options[1:7], options[7]
    offset, mask = _offsets(raw, flow_1, flow_2, max_residue_magnitude, parts)
    return reference.modulated_deform_conv2d(input, offset, mask, weight, bias, *pairs(geometry))


_FUNCTIONS = make_functions(
    torch.ops.mafnet_ops.deform_align_forward,
    torch.ops.mafnet_ops.deform_align_backward,
    _definition,
)


class DeformAlign(ModulatedDeformConv2d):
    """The weight and bias of a :func:`deform_align`; raw head output and flows come with each call."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        groups: int = 1,
        max_residue_magnitude: float | None = 10.0,
        parts: int = 1,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
    ) -> None:
        """``padding``: by default half of the kernel. The others are as in :func:`deform_align`."""
        kernel = pair(_OP, "kernel_size", kernel_size, 1)
        padding = (kernel[0] // 2, kernel[1] // 2) if padding is None else padding
        require_count(_OP, "parts", parts)
        super().__init__(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias)
        self.max_residue_magnitude = max_residue_magnitude
        self.parts = parts

    def forward(
        self, input: Tensor, raw: Tensor, flow_1: Tensor | None = None, flow_2: Tensor | None = None
    ) -> Tensor:
        if self.health is not None:
            reach = math.inf if self.max_residue_magnitude is None else self.max_residue_magnitude
            self.health(_offsets(raw.detach(), flow_1, flow_2, reach, 1)[0])
        return deform_align(
            input,
            raw,
            self.weight,
            self.bias,
            flow_1,
            flow_2,
            self.max_residue_magnitude,
            self.stride,
            self.padding,
            self.dilation,
            self.parts,
        )

    @torch.no_grad()
    def init_identity(self) -> None:
        """Start near a copy: with zero raw output (mask 1/2) the bias and all but a twentieth of the drawn weight
        are gone, and each group passes its input through."""
        out_channels, group_channels, kernel_h, kernel_w = self.weight.shape
        require(
            out_channels == group_channels * self.groups,
            _OP,
            "out_channels",
            "in_channels",
            out_channels,
        )
        self.weight.mul_(0.1)
        centre = self.weight[:, :, kernel_h // 2, kernel_w // 2]
        centre += 2 * torch.eye(group_channels, device=centre.device).repeat(self.groups, 1)
        if self.bias is not None:
            self.bias.zero_()
