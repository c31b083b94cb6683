"""The raw ops of the parts of pyramid spatial attention: schema, fake, FLOPs, and what autograd needs of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _library, _native, reference
from ._autograd import empty_like_input

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
    "resize_add_conv_forward(Tensor input, Tensor other, Tensor weight, Tensor? bias, "
    "float negative_slope) -> Tensor",
    "conv_pool_conv_forward(Tensor input, Tensor first_weight, Tensor? first_bias, Tensor weight, "
    "Tensor? bias, float negative_slope) -> Tensor",
    f"spatial_gate_forward({_GATE}, float scale, float negative_slope, bool from_feature) -> Tensor",
    f"spatial_gate_backward(Tensor grad_output, {_GATE}, float scale, float negative_slope, "
    "bool from_feature, bool need_input, bool need_mask, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    _library.LIBRARY.define(_schema)
_NATIVE_DEVICES = _library.register_op(
    "pyramid_spatial_attention",
    tuple(s.partition("(")[0] for s in _SCHEMAS),
    parts=("pool_concat", "pool_concat_conv", "resize_add", "spatial_gate"),
)


def is_native(input: Tensor) -> bool:
    return input.device.type in _NATIVE_DEVICES


def saves_launches(input: Tensor) -> bool:
    """Whether two steps are one op where they can be: on CUDA, where a launch and a map in memory cost more than what
    backward makes again. The CPU keeps the map."""
    return input.is_cuda and is_native(input)


def has_conv_pool_conv(input: Tensor, first_weight: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel that also saves the first map, see csrc/pyramid_spatial_attention/conv_pool_conv.cu."""
    sizes = input.shape[1], first_weight.shape[0], weight.shape[0]
    half = input.dtype in (torch.float16, torch.bfloat16)
    return saves_launches(input) and half and all(n <= 64 and n % 8 == 0 for n in sizes)


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


@_fake("resize_add_conv_forward")
def _(
    input: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    return empty_like_input(other, (other.shape[0], weight.shape[0], *other.shape[2:]))


@_fake("conv_pool_conv_forward")
def _(
    input: Tensor,
    first_weight: Tensor,
    first_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    negative_slope: float,
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *_pooled_size(input))
    last = first_weight.shape[0] > 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


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
    taps = weight_shape[2] * weight_shape[3]
    return 2 * taps * weight_shape[0] * weight_shape[1] * input_shape[0] * pixels


@register_flop_formula(torch.ops.mafnet_ops.resize_conv_forward)
def _(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Of the products at the size of the input, see csrc/pyramid_spatial_attention/resize_conv.h."""
    pixels = input_shape[0] * input_shape[2] * input_shape[3]
    return 2 * 9 * weight_shape[0] * weight_shape[1] * pixels


@register_flop_formula(torch.ops.mafnet_ops.resize_add_conv_forward)
def _(input_shape: Any, other_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * weight_shape[0] * weight_shape[1] * other_shape[0] * other_shape[2] * other_shape[3]


@register_flop_formula(torch.ops.mafnet_ops.conv_pool_conv_forward)
def _(
    input_shape: Any, first_shape: Any, bias: Any, weight_shape: Any, *args: Any, **kwargs: Any
) -> int:
    batch, _, height, width = input_shape
    pooled = ((height + 1) // 2) * ((width + 1) // 2)
    first, second = (shape[0] * shape[1] for shape in (first_shape, weight_shape))
    return 2 * batch * (first * height * width + second * pooled)


@register_flop_formula(torch.ops.mafnet_ops.spatial_gate_forward)
def _(input_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * input_shape[0] * input_shape[1] ** 2 * input_shape[2] * input_shape[3]


# ------------------------------------------------------------------------------------------ autograd

_Grads = tuple[Tensor, ...]


def _convolution_backward(name: str) -> Any:
    """The slope is the first option of pointwise_conv, the last of resize_conv."""
    raw = getattr(torch.ops.mafnet_ops, f"{name}_backward")
    at = 2 if name == "resize_conv" else 0

    def backward(grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any) -> _Grads:
        input, weight, _ = tensors
        return raw(grad, input, weight, output, options[at], *needs)

    return backward


def _pool_concat_conv_backward(
    grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any
) -> _Grads:
    """Of a 3 x 3 kernel in two steps: the pooled map, which forward does not keep, is made again."""
    input, weight, _ = tensors
    if weight.shape[-1] == 1:
        raw = torch.ops.mafnet_ops.pool_concat_conv_backward
        return raw(grad, input, weight, output, *options, *needs)
    pooled = torch.ops.mafnet_ops.pool_concat_forward(input)
    grad_pooled, *rest = torch.ops.mafnet_ops.resize_conv_backward(
        grad, pooled, weight, output, *options, *needs
    )
    if not needs[0]:
        return input.new_empty((0, *input.shape[1:])), *rest
    return torch.ops.mafnet_ops.pool_concat_backward(grad_pooled, input), *rest


def _pool_backward(grad: Tensor, tensors: Any, output: None, options: Any, needs: Any) -> _Grads:
    return (torch.ops.mafnet_ops.pool_concat_backward(grad, tensors[0]),)


def _resize_backward(grad: Tensor, tensors: Any, output: None, options: Any, needs: Any) -> _Grads:
    input, other = tensors
    height, width = input.shape[2:]
    if needs[0]:
        grad_input = torch.ops.mafnet_ops.resize_add_backward(grad, height, width)
    else:
        grad_input = grad.new_empty((0, *input.shape[1:]))
    return grad_input, grad.new_empty((0, *other.shape[1:]))


def _resize_add_conv_backward(
    grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any
) -> _Grads:
    """The sum, which forward does not keep, is made again."""
    input, other, weight, _ = tensors
    total = torch.ops.mafnet_ops.resize_add_forward(input, other)
    grad_total, *rest = torch.ops.mafnet_ops.pointwise_conv_backward(
        grad, total, weight, output, *options, needs[0] or needs[1], *needs[2:]
    )
    grad_input = _resize_backward(grad_total, tensors[:2], None, (), needs)[0]
    return grad_input, grad_total, *rest


def _conv_pool_conv_backward(
    grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any
) -> _Grads:
    """The map between, which forward does not keep, is made again."""
    input, first_weight, first_bias, weight, _ = tensors
    middle = torch.ops.mafnet_ops.pointwise_conv_forward(
        input, first_weight, first_bias, *options, True
    )
    grad_middle, *rest = torch.ops.mafnet_ops.pool_concat_conv_backward(
        grad, middle, weight, output, *options, True, *needs[3:]
    )
    first = torch.ops.mafnet_ops.pointwise_conv_backward(
        grad_middle, input, first_weight, middle, *options, *needs[:3]
    )
    return *first, *rest


def _gate_backward(grad: Tensor, tensors: Any, output: None, options: Any, needs: Any) -> _Grads:
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


def _resize_add_conv_reference(
    input: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    return reference.pointwise_conv(
        reference.resize_add(input, other), weight, bias, negative_slope
    )


def _conv_pool_conv_reference(
    input: Tensor,
    first_weight: Tensor,
    first_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    negative_slope: float,
) -> Tensor:
    middle = reference.pointwise_conv(input, first_weight, first_bias, negative_slope)
    return reference.pool_concat_conv(middle, weight, bias, negative_slope)


_PARTS: tuple[tuple[str, Any, Any, int, tuple[int, ...], tuple[int, ...]], ...] = (
    ("pool_concat", _pool_backward, reference.pool_concat, 1, (0,), ()),
    ("resize_add", _resize_backward, reference.resize_add, 2, (0, 1), (1,)),
    ("resize_add_conv", _resize_add_conv_backward, _resize_add_conv_reference, 4, (0, 1), ()),
    ("conv_pool_conv", _conv_pool_conv_backward, _conv_pool_conv_reference, 5, (0,), ()),
    ("spatial_gate", _gate_backward, _gate_reference, 4, (0, 1), ()),
    ("pointwise_conv", _convolution_backward("pointwise_conv"), _pointwise_reference, 3, (0,), ()),
    ("pool_concat_conv", _pool_concat_conv_backward, reference.pool_concat_conv, 3, (0,), ()),
    ("resize_conv", _convolution_backward("resize_conv"), reference.resize_conv, 3, (0,), ()),
)
for _op, _backward, _reference, _count, _images, _added in _PARTS:
    _native.OPS[_op] = _native.NativeOp(
        getattr(torch.ops.mafnet_ops, f"{_op}_forward"),
        _backward,
        _reference,
        _count,
        _images,
        _added,
        keeps_output=_op not in ("pool_concat", "resize_add", "spatial_gate"),
    )
