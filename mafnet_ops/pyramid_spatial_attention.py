"""Pyramid spatial attention (the spatial half of EDVR's TSA) and the parts it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import _library, _native, reference
from ._autograd import empty_like_input
from ._checks import (
    autocast_dtype,
    require,
    require_same_device,
    require_same_dtype,
    require_shape,
    require_tensor,
)

_OP = "pyramid_spatial_attention"
LAYERS = ("reduce", "pool_1", "level_2", "pool_2", "conv_2", "add", "mask", "feature")
"""The eight convolutions in order of use; ``weights[i]`` and ``biases[i]`` of the functional form follow it."""


def _require_pixels(op: str, argument: str, value: Tensor) -> None:
    height_and_width = min(value.shape[2:]) > 0
    require(height_and_width, op, argument, "H and W of at least 1", tuple(value.shape))


def _require_convolution(
    op: str, input: Tensor, tensors: dict[str, Tensor | None], shape: Sequence[int], form: str
) -> None:
    """Raise unless ``tensors``, a weight of ``shape`` and its bias or None, go with ``input``."""
    (weight_name, weight), (bias_name, bias) = tensors.items()
    require_tensor(op, weight_name, weight, 4)
    if bias is not None:
        require_tensor(op, bias_name, bias, 1)
    require_same_device(op, "input", {"input": input, **tensors})
    if autocast_dtype(input.device) is None:
        require_same_dtype(op, "input", {"input": input, **tensors})
    assert weight is not None
    require_shape(op, weight_name, weight, shape, form)
    if bias is not None:
        require_shape(op, bias_name, bias, shape[:1], "(C_out,)")


def _require_slope(op: str, negative_slope: float) -> None:
    require(negative_slope >= 0, op, "negative_slope", "at least 0", negative_slope)


def _low(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants the arguments of a convolution: all but fp64 in its dtype."""
    first = tensors[0]
    assert first is not None
    dtype = autocast_dtype(first.device)
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _is_native(input: Tensor) -> bool:
    return input.device.type in _NATIVE_DEVICES


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
    _require_pixels("pool_concat", "input", input)
    if not _is_native(input):
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
    _require_pixels(op, "input", input)
    require_tensor(op, "weight", weight, 4)
    out_channels, kernel = weight.shape[0], weight.shape[-1]
    shape = (out_channels, 2 * input.shape[1], kernel, kernel)
    tensors = {"weight": weight, "bias": bias}
    _require_convolution(op, input, tensors, shape, "(C_out, 2 * C, k, k)")
    require(kernel % 2 == 1, op, "weight", "an odd kernel size", kernel)
    _require_slope(op, negative_slope)
    if not _is_native(input):
        return reference.pool_concat_conv(input, weight, bias, negative_slope)
    if kernel == 1:
        return _native.call(op, _low(input, weight, bias), (float(negative_slope),))
    pooled = pool_concat(input)
    if kernel == 3:
        return _resize_conv(pooled, weight, bias, pooled.shape[2:], negative_slope)
    return F.leaky_relu(F.conv2d(pooled, weight, bias, padding=kernel // 2), negative_slope)


def _pointwise_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """LeakyReLU of a 1 x 1 convolution. Native, the result is channels_last, which the other parts are fastest on."""
    if not _is_native(input):
        return reference.pointwise_conv(input, weight, bias, negative_slope)
    options = float(negative_slope), input.shape[1] > 1
    return _native.call("pointwise_conv", _low(input, weight, bias), options)


def _resize_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    negative_slope: float = 1.0,
) -> Tensor:
    """LeakyReLU of a 3 x 3 convolution of ``input`` resized bilinearly, without the resized map in memory."""
    height, width = size
    if not _is_native(input):
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
    _require_pixels("resize_add", "input", input)
    _require_pixels("resize_add", "other", other)
    require_same_device("resize_add", "input", {"input": input, "other": other})
    shape = (*other.shape[:2], *input.shape[2:])
    require_shape("resize_add", "input", input, shape, "N and C of other")
    if not _is_native(input):
        return reference.resize_add(input, other)
    dtype = torch.promote_types(input.dtype, other.dtype)
    return _native.call("resize_add", (input.to(dtype), other.to(dtype)))


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
    _require_convolution(op, mask, {"weight": weight, "bias": bias}, shape, "(C, C, 1, 1)")
    require(mask_from in ("m", "feature"), op, "mask_from", "'m' or 'feature'", repr(mask_from))
    _require_slope(op, negative_slope)
    if not _is_native(input):
        return reference.spatial_gate(input, mask, weight, bias, scale, negative_slope, mask_from)
    tensors: Any = (input, *_low(mask, weight, bias))
    wide, narrow = input.dtype, tensors[1].dtype
    if wide != narrow and (wide != torch.float32 or narrow == torch.float64):
        dtype = torch.promote_types(wide, narrow)
        tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
    options = float(scale), float(negative_slope), mask_from == "feature"
    return _native.call(op, tensors, options)


def pyramid_spatial_attention(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scale: float = 2.0,
    negative_slope: float = 0.1,
    mask_from: str = "m",
) -> Tensor:
    """Pyramid spatial attention: the spatial half of EDVR's TSA (Wang et al., CVPR Workshops 2019, section 3.3)
    without its second mask convolution, as MAFnet's Fig. 2b draws it.

    Every resize goes to an exact size, so any H and W of at least 1 works.

    Args:
        input: (N, C, H, W), floating point.
        weights, biases: the eight convolutions in the order of ``LAYERS``:
            ``reduce`` (C, C, 1, 1), ``pool_1`` (C, 2C, 1, 1), ``level_2`` (C, C, 1, 1), ``pool_2`` (C, 2C, 3, 3),
            ``conv_2`` (C, C, 3, 3), ``add`` (C, C, 1, 1), ``mask`` (C, C, 3, 3), ``feature`` (C, C, 1, 1);
            biases (C,) or None.
        scale, mask_from: as :func:`spatial_gate`. negative_slope: of every LeakyReLU.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that is not floating point, or a
            weight or bias in another dtype than input.
    """
    require_tensor(_OP, "input", input, 4)
    _require_pixels(_OP, "input", input)
    require(
        len(weights) == len(LAYERS), _OP, "weights", f"{len(LAYERS)} tensors {LAYERS}", len(weights)
    )
    require(
        len(biases) == len(LAYERS), _OP, "biases", f"{len(LAYERS)} tensors or None", len(biases)
    )
    for name, weight, bias in zip(LAYERS, weights, biases, strict=True):
        inputs = 2 * input.shape[1] if name.startswith("pool") else input.shape[1]
        kernel = 3 if name in ("pool_2", "conv_2", "mask") else 1
        shape = (input.shape[1], inputs, kernel, kernel)
        tensors = {f"weights[{name}]": weight, f"biases[{name}]": bias}
        _require_convolution(_OP, input, tensors, shape, "(C_out, C_in, k, k)")
    _require_slope(_OP, negative_slope)
    layers = dict(zip(LAYERS, zip(weights, biases, strict=True), strict=True))

    def pointwise(name: str, x: Tensor) -> Tensor:
        return _pointwise_conv(x, *layers[name], negative_slope)

    feature_1 = pool_concat_conv(pointwise("reduce", input), *layers["pool_1"], negative_slope)
    level_2 = pointwise("level_2", feature_1)
    level_2 = pool_concat_conv(level_2, *layers["pool_2"], negative_slope)
    level_2 = _resize_conv(level_2, *layers["conv_2"], level_2.shape[2:], negative_slope)
    merged = pointwise("add", resize_add(level_2, feature_1))
    mask = _resize_conv(merged, *layers["mask"], input.shape[2:])
    return spatial_gate(input, mask, *layers["feature"], scale, negative_slope, mask_from)


# ------------------------------------------------------------------------------------- schema and fake

_CONVOLUTION = "Tensor input, Tensor weight, Tensor? bias"
_NEEDS = "bool need_input, bool need_weight, bool need_bias"
_GATE = "Tensor input, Tensor mask, Tensor weight, Tensor? bias"
_SCHEMAS = (
    "pool_concat_forward(Tensor input) -> Tensor",
    "pool_concat_backward(Tensor grad_output, Tensor input) -> Tensor",
    f"pointwise_conv_forward({_CONVOLUTION}, float negative_slope, bool channels_last) -> Tensor",
    f"pool_concat_conv_forward({_CONVOLUTION}, float negative_slope) -> Tensor",
    f"resize_conv_forward({_CONVOLUTION}, SymInt height, SymInt width, float negative_slope) -> Tensor",
    *(
        f"{op}_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output, "
        f"float negative_slope, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
        for op in ("pointwise_conv", "pool_concat_conv", "resize_conv")
    ),
    "resize_add_forward(Tensor input, Tensor other) -> Tensor",
    "resize_add_backward(Tensor grad_output, SymInt height, SymInt width) -> Tensor",
    f"spatial_gate_forward({_GATE}, float scale, float negative_slope, bool from_feature) -> Tensor",
    f"spatial_gate_backward(Tensor grad_output, {_GATE}, float scale, float negative_slope, "
    "bool from_feature, bool need_input, bool need_mask, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    _library.LIBRARY.define(_schema)
_NATIVE_DEVICES = _library.register_op(_OP, tuple(s.partition("(")[0] for s in _SCHEMAS))


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"mafnet_ops::{name}", lib=_library.LIBRARY)


def _pooled_size(input: Tensor) -> tuple[int, int]:
    return (input.shape[2] + 1) // 2, (input.shape[3] + 1) // 2


@_fake("pool_concat_forward")
def _(input: Tensor) -> Tensor:
    batch, channels = input.shape[:2]
    return empty_like_input(input, (batch, 2 * channels, *_pooled_size(input)))


@_fake("pool_concat_backward")
def _(grad_output: Tensor, input: Tensor) -> Tensor:
    return empty_like_input(input, tuple(input.shape))


@_fake("pointwise_conv_forward")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    negative_slope: float,
    channels_last: bool,
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *input.shape[2:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


@_fake("pool_concat_conv_forward")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float) -> Tensor:
    return empty_like_input(input, (input.shape[0], weight.shape[0], *_pooled_size(input)))


@_fake("resize_conv_forward")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    negative_slope: float,
) -> Tensor:
    return empty_like_input(input, (input.shape[0], weight.shape[0], height, width))


def _fake_gradient(tensor: Tensor, needed: bool) -> Tensor:
    return empty_like_input(tensor, (tensor.shape[0] if needed else 0, *tensor.shape[1:]))


def _fake_parameters(weight: Tensor, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor]:
    outputs = weight.shape[0]
    grad_weight = weight.new_empty((outputs if need_weight else 0, *weight.shape[1:]))
    return grad_weight, weight.new_empty((outputs if need_bias else 0,))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    negative_slope: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _fake_parameters(weight, need_weight, need_bias)
    return _fake_gradient(input, need_input), *grads


for _op in ("pointwise_conv", "pool_concat_conv", "resize_conv"):
    _fake(f"{_op}_backward")(_fake_backward)


@_fake("resize_add_forward")
def _(input: Tensor, other: Tensor) -> Tensor:
    return empty_like_input(other, tuple(other.shape))


@_fake("resize_add_backward")
def _(grad_output: Tensor, height: int, width: int) -> Tensor:
    return empty_like_input(grad_output, (*grad_output.shape[:2], height, width))


@_fake("spatial_gate_forward")
def _(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    negative_slope: float,
    from_feature: bool,
) -> Tensor:
    return empty_like_input(input, tuple(input.shape))


@_fake("spatial_gate_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    negative_slope: float,
    from_feature: bool,
    need_input: bool,
    need_mask: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _fake_parameters(weight, need_weight, need_bias)
    return _fake_gradient(input, need_input), _fake_gradient(mask, need_mask), *grads


# FLOPs are those of the products; pooling, resizing and gating are not counted.


@register_flop_formula(torch.ops.mafnet_ops.pointwise_conv_forward)
def _(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * weight_shape[0] * weight_shape[1] * input_shape[0] * input_shape[2] * input_shape[3]


@register_flop_formula(torch.ops.mafnet_ops.pool_concat_conv_forward)
def _(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    pixels = ((input_shape[2] + 1) // 2) * ((input_shape[3] + 1) // 2)
    return 2 * weight_shape[0] * weight_shape[1] * input_shape[0] * pixels


@register_flop_formula(torch.ops.mafnet_ops.resize_conv_forward)
def _(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Of the products at the size of the input, see csrc/pyramid_spatial_attention/cpu_resize_conv.cpp."""
    pixels = input_shape[0] * input_shape[2] * input_shape[3]
    return 2 * 9 * weight_shape[0] * weight_shape[1] * pixels


@register_flop_formula(torch.ops.mafnet_ops.spatial_gate_forward)
def _(input_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * input_shape[0] * input_shape[1] ** 2 * input_shape[2] * input_shape[3]


# ------------------------------------------------------------------------------------------ autograd

_Grads = tuple[Tensor, ...]


def _convolution_backward(name: str) -> Any:
    """The slope is the first option of pointwise_conv and pool_concat_conv, the last of resize_conv."""
    raw = getattr(torch.ops.mafnet_ops, f"{name}_backward")
    at = 2 if name == "resize_conv" else 0

    def backward(grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any) -> _Grads:
        input, weight, _ = tensors
        return raw(grad, input, weight, output, options[at], *needs)

    return backward


def _pool_backward(grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any) -> _Grads:
    return (torch.ops.mafnet_ops.pool_concat_backward(grad, tensors[0]),)


def _resize_backward(
    grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any
) -> _Grads:
    input, other = tensors
    height, width = input.shape[2:]
    if needs[0]:
        grad_input = torch.ops.mafnet_ops.resize_add_backward(grad, height, width)
    else:
        grad_input = grad.new_empty((0, *input.shape[1:]))
    # A result of its own: an op must not return its argument.
    return grad_input, grad.clone() if needs[1] else grad.new_empty((0, *other.shape[1:]))


def _gate_backward(grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any) -> _Grads:
    return torch.ops.mafnet_ops.spatial_gate_backward(grad, *tensors, *options, *needs)


def _gate_reference(
    input: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    scale, negative_slope, from_feature = options
    mask_from = "feature" if from_feature else "m"
    return reference.spatial_gate(input, mask, weight, bias, scale, negative_slope, mask_from)


def _pointwise_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float, channels_last: bool
) -> Tensor:
    return reference.pointwise_conv(input, weight, bias, negative_slope)


_CONVOLUTIONS: dict[str, Any] = {
    "pointwise_conv": _pointwise_reference,
    "pool_concat_conv": reference.pool_concat_conv,
    "resize_conv": reference.resize_conv,
}
_PARTS: tuple[tuple[str, Any, Any, int, tuple[int, ...]], ...] = (
    ("pool_concat", _pool_backward, reference.pool_concat, 1, (0,)),
    ("resize_add", _resize_backward, reference.resize_add, 2, (0, 1)),
    ("spatial_gate", _gate_backward, _gate_reference, 4, (0, 1)),
    *((op, _convolution_backward(op), define, 3, (0,)) for op, define in _CONVOLUTIONS.items()),
)
for _op, _backward, _reference, _count, _images in _PARTS:
    _forward = getattr(torch.ops.mafnet_ops, f"{_op}_forward")
    _native.OPS[_op] = _native.NativeOp(_forward, _backward, _reference, _count, _images)


class PyramidSpatialAttention(nn.Module):
    """The eight convolutions of :func:`pyramid_spatial_attention` over ``channels`` feature channels."""

    def __init__(self, channels: int, scale: float = 2.0, mask_from: str = "m") -> None:
        super().__init__()
        require(
            mask_from in ("m", "feature"), _OP, "mask_from", "'m' or 'feature'", repr(mask_from)
        )
        self.scale = scale
        self.mask_from = mask_from
        self.reduce = nn.Conv2d(channels, channels, 1)
        self.pool_1 = nn.Conv2d(2 * channels, channels, 1)
        self.level_2 = nn.Conv2d(channels, channels, 1)
        self.pool_2 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.add = nn.Conv2d(channels, channels, 1)
        self.mask = nn.Conv2d(channels, channels, 3, padding=1)
        self.feature = nn.Conv2d(channels, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        convs = [self.get_submodule(name) for name in LAYERS]
        weights = [conv.weight for conv in convs]
        biases = [conv.bias for conv in convs]
        return pyramid_spatial_attention(
            input,
            weights,  # type: ignore[arg-type]
            biases,  # type: ignore[arg-type]
            self.scale,
            mask_from=self.mask_from,
        )
