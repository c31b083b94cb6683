"""The parts of pyramid spatial attention: poolings, resizes and the gate, each with the convolution beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, reference
from ._checks import (
    autocast_dtype,
    number,
    require,
    require_convolution,
    require_pixels,
    require_same_device,
    require_shape,
    require_tensor,
)
from .pyramid_spatial_attention_kernels import has_conv_pool_conv, is_native, saves_launches


def require_slope(op: str, negative_slope: float) -> None:
    require(
        number(op, "negative_slope", negative_slope) >= 0,
        op,
        "negative_slope",
        "at least 0",
        negative_slope,
    )


def require_gate(op: str, scale: float, negative_slope: float, mask_from: str) -> None:
    """Raise for options that :func:`spatial_gate` does not have."""
    number(op, "scale", scale)
    require_slope(op, negative_slope)
    require(mask_from in ("m", "feature"), op, "mask_from", "'m' or 'feature'", repr(mask_from))


def _low(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants the arguments of a convolution: all but fp64 in its dtype."""
    first = tensors[0]
    assert first is not None
    dtype = autocast_dtype(first.device)
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def pool_concat(input: Tensor) -> Tensor:
    """Max pooling and average pooling 3 x 3, stride 2, padding 1, side by side.

    Args:
        input: (N, C, H, W), floating point, H and W at least 1. The average counts the padding, as
            ``F.avg_pool2d`` does by default and EDVR with it.

    Returns:
        (N, 2 * C, ceil(H / 2), ceil(W / 2)): C max-pooled channels, then C averaged ones.

    Raises:
        ValueError: not 4 dimensions, or no pixels. TypeError: not floating point.
    """
    require_tensor("pool_concat", "input", input, 4)
    require_pixels("pool_concat", "input", input)
    if not is_native(input):
        return reference.pool_concat(input)
    return _native.call("pool_concat", (input,))


def pool_concat_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, negative_slope: float = 0.1
) -> Tensor:
    """LeakyReLU of a convolution over :func:`pool_concat`, without the 2C-channel map in memory where fused.

    Args:
        input: (N, C, H, W), floating point.
        weight: (C_out, 2 * C, k, k) with odd k, padding k // 2.
        bias: (C_out,) or None.
        negative_slope: of the LeakyReLU.

    Returns:
        (N, C_out, ceil(H / 2), ceil(W / 2)).

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that is not floating point, or a
            weight or bias in another dtype than input.
    """
    op = "pool_concat_conv"
    require_tensor(op, "input", input, 4)
    require_pixels(op, "input", input)
    require_tensor(op, "weight", weight, 4)
    out_channels, kernel = weight.shape[0], weight.shape[-1]
    shape = (out_channels, 2 * input.shape[1], kernel, kernel)
    tensors = {"weight": weight, "bias": bias}
    require_convolution(op, input, tensors, shape, "(C_out, 2 * C, k, k)")
    require(kernel % 2 == 1, op, "weight", "an odd kernel size", kernel)
    require_slope(op, negative_slope)
    if not is_native(input):
        return reference.pool_concat_conv(input, weight, bias, negative_slope)
    if kernel == 1 or (kernel == 3 and saves_launches(input)):
        return _native.call(op, _low(input, weight, bias), (float(negative_slope),))
    pooled = pool_concat(input)
    if kernel == 3:
        return resize_conv(pooled, weight, bias, pooled.shape[2:], negative_slope)
    # Padded here: on fewer rows than its own padding oneDNN's gradient of a bf16 weight is garbage.
    pooled = F.pad(pooled, (kernel // 2,) * 4)
    return F.leaky_relu(F.conv2d(pooled, weight, bias), negative_slope)


def pointwise_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """LeakyReLU of a 1 x 1 convolution. Native, the result is channels_last, which the other parts are fastest on."""
    if not is_native(input):
        return reference.pointwise_conv(input, weight, bias, negative_slope)
    options = float(negative_slope), input.shape[1] > 1
    return _native.call("pointwise_conv", _low(input, weight, bias), options)


_Layer = tuple[Tensor, Tensor | None]  # weight, bias


def conv_pool_conv(input: Tensor, first: _Layer, second: _Layer, negative_slope: float) -> Tensor:
    """:func:`pool_concat_conv` of :func:`pointwise_conv`, on CUDA in half precision without the map between them."""
    tensors: Any = _low(input, *first, *second)
    x, first_weight, first_bias, weight, bias = tensors
    if has_conv_pool_conv(x, first_weight, weight):
        return _native.call("conv_pool_conv", tensors, (float(negative_slope),))
    middle = pointwise_conv(x, first_weight, first_bias, negative_slope)
    return pool_concat_conv(middle, weight, bias, negative_slope)


def resize_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    negative_slope: float = 1.0,
) -> Tensor:
    """LeakyReLU of a 3 x 3 convolution of ``input`` resized bilinearly, without the resized map in memory."""
    height, width = size
    if not is_native(input):
        return reference.resize_conv(input, weight, bias, height, width, negative_slope)
    options = height, width, float(negative_slope)
    return _native.call("resize_conv", _low(input, weight, bias), options)


def resize_add(input: Tensor, other: Tensor) -> Tensor:
    """``input`` resized bilinearly (half-pixel centres) to the exact size of ``other``, plus ``other``.

    Args:
        input: (N, C, h, w), floating point. other: (N, C, H, W).

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: N, C or device differ. TypeError: not floating point.
    """
    require_tensor("resize_add", "input", input, 4)
    require_tensor("resize_add", "other", other, 4)
    require_pixels("resize_add", "input", input)
    require_pixels("resize_add", "other", other)
    require_same_device("resize_add", "input", {"input": input, "other": other})
    shape = (*other.shape[:2], *input.shape[2:])
    require_shape("resize_add", "input", input, shape, "N and C of other")
    if not is_native(input):
        return reference.resize_add(input, other)
    dtype = torch.promote_types(input.dtype, other.dtype)
    return _native.call("resize_add", (input.to(dtype), other.to(dtype)))


def resize_add_conv(
    input: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """LeakyReLU of a 1 x 1 convolution of :func:`resize_add`, on CUDA without the sum in memory."""
    if not saves_launches(input):
        return pointwise_conv(resize_add(input, other), weight, bias, negative_slope)
    tensors = _low(input, other, weight, bias)
    return _native.call("resize_add_conv", tensors, (float(negative_slope),))


def spatial_gate(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 2.0,
    negative_slope: float = 0.1,
    mask_from: str = "m",
) -> Tensor:
    """``input * sigmoid(mask) * scale + feature`` with ``feature = leaky_relu(conv1x1(mask))``.

    Args:
        input, mask: (N, C, H, W), floating point.
        weight: (C, C, 1, 1). bias: (C,) or None.
        scale: factor on the gate; 2 in EDVR, which makes an untrained gate neutral.
        mask_from: ``"m"`` gates by sigmoid(mask), ``"feature"`` by sigmoid(feature).

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: a shape, device or ``mask_from`` that does not fit. TypeError: as :func:`pool_concat_conv`.
    """
    op = "spatial_gate"
    require_tensor(op, "input", input, 4)
    require_tensor(op, "mask", mask, 4)
    require_same_device(op, "input", {"input": input, "mask": mask})
    require_shape(op, "mask", mask, input.shape, "the shape of input")
    shape = (input.shape[1], input.shape[1], 1, 1)
    require_convolution(op, mask, {"weight": weight, "bias": bias}, shape, "(C, C, 1, 1)", "mask")
    require_gate(op, scale, negative_slope, mask_from)
    if not is_native(input):
        return reference.spatial_gate(input, mask, weight, bias, scale, negative_slope, mask_from)
    tensors: Any = (input, *_low(mask, weight, bias))
    wide, narrow = input.dtype, tensors[1].dtype
    if wide != narrow and (wide != torch.float32 or narrow == torch.float64):
        dtype = torch.promote_types(wide, narrow)
        tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
    options = float(scale), float(negative_slope), mask_from == "feature"
    return _native.call(op, tensors, options)
