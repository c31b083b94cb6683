"""Channel attention: a gate per channel from the mean and the maximum of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _library, _native, reference
from ._autograd import empty_like_input
from ._checks import (
    require,
    require_convolution,
    require_count,
    require_layers,
    require_pixels,
    require_same_device,
    require_shape,
    require_tensor,
)

_OP = "channel_attention"
LAYERS = ("mean_in", "mean_out", "max_in", "max_out")
"""The four layers; ``weights[i]`` and ``biases[i]`` of the functional form follow this order."""


class ChannelStatistics(NamedTuple):
    """Mean and maximum of every channel over the pixels, each (N, C) or with more dimensions in front of C."""

    mean: Tensor
    max: Tensor


def channel_statistics(input: Tensor) -> ChannelStatistics:
    """Mean and maximum of every channel, in one pass over the map where there are kernels.

    Args:
        input: (N, C, H, W), floating point, H and W at least 1.

    Returns:
        mean and max, (N, C) each, in the dtype of ``input``; sums are at least fp32. The gradient of a maximum goes
        to all pixels that attain it, in equal shares, as that of ``torch.amax``. NaN propagates to both.

    Raises:
        ValueError: not 4 dimensions, or no pixels. TypeError: not floating point.
    """
    require_tensor("channel_statistics", "input", input, 4)
    require_pixels("channel_statistics", "input", input)
    if not _is_native(input):
        return ChannelStatistics(*reference.channel_statistics(input).unbind(1))
    return ChannelStatistics(*_native.call("channel_statistics", (input,)).unbind(1))


def channel_attention(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """``input * sigmoid(f(mean) + g(max))`` with f and g two layers each and a ReLU between, on a map of one pixel.

    Args:
        input: (N, C, H, W), floating point.
        weights, biases: the layers in the order of ``LAYERS``: ``mean_in`` and ``max_in`` (R, C, k, k), ``mean_out``
            and ``max_out`` (C, R, k, k), any R and any odd k; biases (R,), (C,) or None. Of a kernel on a padded map
            of one pixel the centre is all that counts.
        statistics: (N, C) each, from outside: tiles of one frame share those of the frame. Default: those of ``input``.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that is not floating point, or a
            weight or bias in another dtype than input.
    """
    require_tensor(_OP, "input", input, 4)
    require_pixels(_OP, "input", input)
    pairs = require_layers(_OP, LAYERS, weights, biases)
    for i, name in enumerate(LAYERS):
        _require_layer(input, name, *pairs[i], None if i % 2 == 0 else pairs[i - 1][0])
    if statistics is None:
        statistics = channel_statistics(input)
    else:
        both = isinstance(statistics, (tuple, list)) and len(statistics) == 2
        require(both, _OP, "statistics", "(mean, max)", type(statistics).__name__)
        for name, value in zip(("mean", "max"), statistics, strict=True):
            argument = f"statistics[{name}]"
            require_tensor(_OP, argument, value, 2)
            require_same_device(_OP, "input", {"input": input, argument: value})
            require_shape(_OP, argument, value, input.shape[:2], "(N, C)")
    compute = reference.coordinate_dtype(
        input.dtype
    )  # a few numbers: half precision would save nothing
    layers = [_on_one_pixel(w, b, compute) for w, b in pairs]
    mean, maximum = (_as_dtype(value, compute) for value in statistics)
    from_mean = F.linear(torch.relu(F.linear(mean, *layers[0])), *layers[1])
    from_max = F.linear(torch.relu(F.linear(maximum, *layers[2])), *layers[3])
    return _channel_scale(input, torch.sigmoid(from_mean + from_max))


def _require_layer(
    input: Tensor, name: str, weight: Tensor, bias: Tensor | None, before: Tensor | None
) -> None:
    """``before`` is the weight whose outputs this layer reads; without, it reads the statistics."""
    argument = f"weights[{name}]"
    require_tensor(_OP, argument, weight, 4)
    kernel = weight.shape[-1]
    if before is None:
        shape, form = (weight.shape[0], input.shape[1], kernel, kernel), "(R, C, k, k)"
    else:
        shape, form = (input.shape[1], before.shape[0], kernel, kernel), "(C, R, k, k)"
    tensors = {argument: weight, f"biases[{name}]": bias}
    require_convolution(_OP, input, tensors, shape, form)
    require(kernel % 2 == 1, _OP, argument, "an odd kernel size", kernel)


def _on_one_pixel(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The layer of a convolution that reads one pixel and zeros around it."""
    centre = weight.shape[-1] // 2
    matrix = weight[:, :, centre, centre] if centre else weight.flatten(1)
    return _as_dtype(matrix, dtype), None if bias is None else _as_dtype(bias, dtype)


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _channel_scale(input: Tensor, gate: Tensor) -> Tensor:
    """(N, C, H, W) times (N, C), in the dtype of ``input``."""
    gate = gate.to(input.dtype)
    if not _is_native(input):
        return reference.channel_scale(input, gate)
    return _native.call("channel_scale", (input, gate))


def _is_native(input: Tensor) -> bool:
    return input.device.type in _NATIVE_DEVICES


class ChannelAttention(nn.Module):
    """:func:`channel_attention` over ``channels`` channels.

    Args:
        reduction: ``channels // reduction``, at least 1, are between two layers.
        kernel: of the convolutions, odd. They see one pixel: all but the centre of a larger one stays as it begins.
    """

    def __init__(self, channels: int, reduction: int = 16, kernel: int = 1) -> None:
        super().__init__()
        require_count("ChannelAttention", "channels", channels)
        require_count("ChannelAttention", "reduction", reduction)
        require_count("ChannelAttention", "kernel", kernel)
        require(kernel % 2 == 1, "ChannelAttention", "kernel", "an odd int", kernel)
        inner = max(channels // reduction, 1)

        def layers() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, inner, kernel, padding=kernel // 2),
                nn.ReLU(),
                nn.Conv2d(inner, channels, kernel, padding=kernel // 2),
            )

        self.from_mean, self.from_max = layers(), layers()

    def forward(self, input: Tensor, statistics: ChannelStatistics | None = None) -> Tensor:
        (mean_in, _, mean_out), (max_in, _, max_out) = self.from_mean, self.from_max
        convs = mean_in, mean_out, max_in, max_out
        weights: Any = [conv.weight for conv in convs]
        biases: Any = [conv.bias for conv in convs]
        return channel_attention(input, weights, biases, statistics)


# ------------------------------------------------------------------------------------- schema and fake

_SCHEMAS = (
    "channel_statistics_forward(Tensor input) -> Tensor",
    "channel_statistics_backward(Tensor grad_output, Tensor input, Tensor statistics) -> Tensor",
    "channel_scale_forward(Tensor input, Tensor gate) -> Tensor",
    "channel_scale_backward(Tensor grad_output, Tensor input, Tensor gate, bool need_input, bool need_gate) "
    "-> (Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    _library.LIBRARY.define(_schema)
_NATIVE_DEVICES = _library.register_op(
    _OP, tuple(s.partition("(")[0] for s in _SCHEMAS), parts=("channel_statistics",)
)


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"mafnet_ops::{name}", lib=_library.LIBRARY)


@_fake("channel_statistics_forward")
def _(input: Tensor) -> Tensor:
    """(N, 2, C): means, then maxima."""
    return input.new_empty((input.shape[0], 2, input.shape[1]))


@_fake("channel_statistics_backward")
def _(grad_output: Tensor, input: Tensor, statistics: Tensor) -> Tensor:
    return empty_like_input(input, tuple(input.shape))


@_fake("channel_scale_forward")
def _(input: Tensor, gate: Tensor) -> Tensor:
    return empty_like_input(input, tuple(input.shape))


@_fake("channel_scale_backward")
def _(
    grad_output: Tensor, input: Tensor, gate: Tensor, need_input: bool, need_gate: bool
) -> tuple[Tensor, Tensor]:
    batch = input.shape[0]
    grad_input = empty_like_input(input, (batch if need_input else 0, *input.shape[1:]))
    return grad_input, gate.new_empty((batch if need_gate else 0, input.shape[1]))


# ------------------------------------------------------------------------------------------ autograd

_Grads = tuple[Tensor, ...]


def _statistics_backward(
    grad: Tensor, tensors: Any, output: Tensor, options: Any, needs: Any
) -> _Grads:
    return (torch.ops.mafnet_ops.channel_statistics_backward(grad, tensors[0], output),)


def _scale_backward(grad: Tensor, tensors: Any, output: None, options: Any, needs: Any) -> _Grads:
    return torch.ops.mafnet_ops.channel_scale_backward(grad, *tensors, *needs)


_native.OPS["channel_statistics"] = _native.NativeOp(
    torch.ops.mafnet_ops.channel_statistics_forward,
    _statistics_backward,
    reference.channel_statistics,
    1,
    (0,),
)
_native.OPS["channel_scale"] = _native.NativeOp(
    torch.ops.mafnet_ops.channel_scale_forward,
    _scale_backward,
    reference.channel_scale,
    2,
    (0, 1),
    keeps_output=False,
)
