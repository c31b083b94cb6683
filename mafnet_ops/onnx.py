"""The ops in ONNX's own operators: what stands in for the kernels while a network is exported.

::

    with mafnet_ops.onnx.standard_ops():
        program = torch.export.export(net, (frames,))
        torch.onnx.export(program, f="net.onnx", opset_version=20)

| op | ONNX |
|---|---|
| flow_warp | GridSample |
| modulated_deform_conv2d | DeformConv (opset 19), or GridSample, Mul, Conv |
| deform_align | Tanh, Sigmoid, Add, then the one above |
| self_attention | MatMul, Softmax; all scores at once |
| pyramid_spatial_attention and its parts | Conv, MaxPool, AveragePool, Resize, ... |
| channel_attention | ReduceMean, ReduceMax, Gemm, ... |
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import deform_align as _deform_align
from . import flow_warp as _flow_warp
from . import modulated_deform_conv2d as _modulated_deform_conv2d
from . import reference
from . import self_attention as _self_attention
from ._checks import pair, require
from ._exchange import exchange, stand_in

OLDEST_OPSET = 19
"""The first with DeformConv."""


@contextmanager
def standard_ops(deform_conv: bool = True) -> Iterator[None]:
    """Within the block the public functions, in all modules and threads, are made of what ONNX has.

    Args:
        deform_conv: False writes deformable convolutions with GridSample, for runtimes without DeformConv.
    """
    convolution = modulated_deform_conv2d if deform_conv else sampled_deform_conv2d

    def aligned(input: Tensor, raw: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return deform_align(convolution, input, raw, *args, **kwargs)

    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (_flow_warp, stand_in(flow_warp)),
        (_modulated_deform_conv2d, stand_in(convolution)),
        (_deform_align, stand_in(aligned)),
        (_self_attention, stand_in(self_attention)),
    ]
    # The other ops run their definition, which is made of standard operators, where they have no kernels.
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(f"{__package__}.")]
    native = [
        (vars(m), vars(m)["_NATIVE_DEVICES"]) for m in modules if "_NATIVE_DEVICES" in vars(m)
    ]
    try:
        for names, _ in native:
            names["_NATIVE_DEVICES"] = frozenset()
        for public, standard in pairs:
            exchange(public, standard)
        yield
    finally:
        for public, standard in pairs:
            exchange(standard, public)
        for names, devices in native:
            names["_NATIVE_DEVICES"] = devices


def flow_warp(
    input: Tensor,
    flow: Tensor,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mafnet_ops.flow_warp` as one GridSample. Its coordinates are relative to the size of the image, so that
    they carry the rounding of that: 1e-4 px at 1080p."""
    # The taps beyond the edge are laid elsewhere by GridSample's cubic mode.
    cubic = interpolation == "bicubic" and padding_mode != "zeros"
    require(not cubic, "flow_warp", "padding_mode", "zeros with bicubic in ONNX", padding_mode)
    height, width = input.shape[2:]
    rows = torch.arange(flow.shape[1], device=flow.device, dtype=flow.dtype)
    columns = torch.arange(flow.shape[2], device=flow.device, dtype=flow.dtype)
    x, y = columns + flow[..., 0], rows[:, None] + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if padding_mode == "reflection":
        # About the centres of the edge pixels; GridSample as called here would take their outer edges.
        x, y = _reflect(x, width), _reflect(y, height)
        padding_mode = "border"
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 3)
    output = F.grid_sample(input, grid, interpolation, padding_mode, align_corners=False)
    return (output, inside[:, None].to(input.dtype)) if return_mask else output


def _reflect(coordinate: Tensor, size: int) -> Tensor:
    """Into [0, size - 1] for a size of at least 2, by floor() since a remainder has no symbolic divisor in ONNX."""
    period = 2 * (size - 1)
    phase = coordinate - torch.floor(coordinate / period) * period
    return torch.minimum(phase, period - phase)


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
    """:func:`mafnet_ops.modulated_deform_conv2d` as one DeformConv, which lays out offsets and weight alike."""
    op = "modulated_deform_conv2d"
    top, left = pair(op, "padding", padding, 0)
    kernel = list(weight.shape[2:])
    attributes: dict[str, int | list[int]] = {
        "kernel_shape": kernel,
        "strides": list(pair(op, "stride", stride, 1)),
        "pads": [top, left, top, left],
        "dilations": list(pair(op, "dilation", dilation, 1)),
        "group": input.shape[1] // weight.shape[1],
        "offset_group": offset.shape[1] // (2 * kernel[0] * kernel[1]),
    }
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    output: Tensor = torch.onnx.ops.symbolic(
        "DeformConv",
        [input, weight, offset, bias, mask],
        attributes,  # type: ignore[arg-type]
        dtype=input.dtype,
        shape=shape,
        version=OLDEST_OPSET,
    )
    return output


def sampled_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """:func:`mafnet_ops.modulated_deform_conv2d` as one GridSample of all taps and a convolution of 1 x 1."""
    op = "modulated_deform_conv2d"
    strides, pads = pair(op, "stride", stride, 1), pair(op, "padding", padding, 0)
    steps = pair(op, "dilation", dilation, 1)
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    taps, (out_h, out_w) = kernel_h * kernel_w, offset.shape[2:]
    groups = offset.shape[1] // (2 * taps)

    def positions(size: int, axis: int) -> Tensor:
        regular = torch.arange(size, device=offset.device, dtype=offset.dtype)
        return regular * strides[axis] - pads[axis]

    tap = torch.arange(taps, device=offset.device)
    tap_y, tap_x = tap // kernel_w * steps[0], tap % kernel_w * steps[1]
    offset = offset.reshape(batch * groups, taps, 2, out_h, out_w)
    y = offset[:, :, 0] + tap_y[:, None, None] + positions(out_h, 0)[:, None]
    x = offset[:, :, 1] + tap_x[:, None, None] + positions(out_w, 1)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 4)
    sampled = F.grid_sample(
        input.reshape(batch * groups, channels // groups, height, width),
        grid.reshape(batch * groups, taps * out_h, out_w, 2),
        align_corners=False,
    ).reshape(batch, groups, channels // groups, taps, out_h, out_w)
    if mask is not None:
        sampled = sampled * mask.reshape(batch, groups, 1, taps, out_h, out_w)
    flat = weight.reshape(out_channels, group_channels * taps, 1, 1)
    columns = sampled.reshape(batch, channels * taps, out_h, out_w)
    return F.conv2d(columns, flat, bias, groups=channels // group_channels)


def deform_align(
    convolution: Callable[..., Tensor],
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
    """:func:`mafnet_ops.deform_align` by one of the convolutions above."""
    reach = math.inf if max_residue_magnitude is None else max_residue_magnitude
    offset, mask = reference.deform_align_offsets(raw, flow_1, flow_2, reach)
    if parts > 1:
        offset, mask = offset.repeat(1, parts, 1, 1), mask.repeat(1, parts, 1, 1)
    return convolution(input, offset, mask, weight, bias, stride, padding, dilation)


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    window: int | None = None,
    image_size: Sequence[int] | None = None,
) -> Tensor:
    """:func:`mafnet_ops.self_attention` for any size at run time: windows that the frame cuts are filled up, and the
    filling gets no weight."""
    if window is None:
        return _attend(query, key, value, scale, None)
    require(image_size is not None, "self_attention", "image_size", "(H, W) with window", None)
    assert image_size is not None
    batch, heads, _, depth = value.shape
    height, width = image_size
    # Plain expressions of H and W: torch proves what it can of each of them, and takes long over involved ones.
    rows, columns = (height + window - 1) // window, (width + window - 1) // window

    def windows(tokens: Tensor) -> Tensor:
        """(N, heads, L, D) -> (N, heads, rows, columns, window * window, D)."""
        image = tokens.reshape(*tokens.shape[:2], height, width, tokens.shape[3])
        image = F.pad(image, (0, 0, 0, columns * window - width, 0, rows * window - height))
        image = image.unflatten(2, (rows, window)).unflatten(4, (columns, window))
        return image.transpose(3, 4).flatten(4, 5)

    there = windows(torch.ones_like(query[:1, :1, :, :1])) > 0
    keys = there.transpose(4, 5)
    out = _attend(windows(query), windows(key), windows(value), scale, keys)
    out = out.unflatten(4, (window, window)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return out[:, :, :height, :width].reshape(batch, heads, height * width, depth)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, keys: Tensor | None) -> Tensor:
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if keys is not None:
        scores = scores.masked_fill(~keys, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1), value)
