"""Pyramid spatial attention (the spatial half of EDVR's TSA) and the parts it is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from . import _library, reference
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
    return reference.pool_concat(input)


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
    out = F.conv2d(reference.pool_concat(input), weight, bias, padding=kernel // 2)
    return F.leaky_relu(out, negative_slope)


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
    return reference.resize_add(input, other)


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
    return reference.spatial_gate(input, mask, weight, bias, scale, negative_slope, mask_from)


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
    w = dict(zip(LAYERS, weights, strict=True))
    b = dict(zip(LAYERS, biases, strict=True))

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, w[name], b[name], padding=w[name].shape[-1] // 2)

    def conv_lrelu(name: str, x: Tensor) -> Tensor:
        return F.leaky_relu(conv(name, x), negative_slope)

    feature_1 = pool_concat_conv(
        conv_lrelu("reduce", input), w["pool_1"], b["pool_1"], negative_slope
    )
    level_2 = conv_lrelu("level_2", feature_1)
    level_2 = pool_concat_conv(level_2, w["pool_2"], b["pool_2"], negative_slope)
    level_2 = conv_lrelu("conv_2", level_2)
    merged = conv_lrelu("add", resize_add(level_2, feature_1))
    size = (input.shape[-2], input.shape[-1])
    merged = F.interpolate(merged, size=size, mode="bilinear", align_corners=False)
    mask = conv("mask", merged)
    return spatial_gate(input, mask, w["feature"], b["feature"], scale, negative_slope, mask_from)


_library.register_op(_OP)


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
