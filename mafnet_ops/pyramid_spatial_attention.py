"""Pyramid spatial attention (the spatial half of EDVR's TSA), put together from its parts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._checks import (
    require_convolution,
    require_count,
    require_layers,
    require_pixels,
    require_tensor,
)
from .pyramid_spatial_attention_parts import (
    conv_pool_conv,
    pointwise_conv,
    pool_concat_conv,
    require_gate,
    resize_add_conv,
    resize_conv,
    spatial_gate,
)

_OP = "pyramid_spatial_attention"
LAYERS = ("reduce", "pool_1", "level_2", "pool_2", "conv_2", "add", "mask", "feature")
"""The eight convolutions in order of use; ``weights[i]`` and ``biases[i]`` of the functional form follow it."""


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
    require_pixels(_OP, "input", input)
    layers = dict(zip(LAYERS, require_layers(_OP, LAYERS, weights, biases), strict=True))
    for name, (weight, bias) in layers.items():
        inputs = 2 * input.shape[1] if name.startswith("pool") else input.shape[1]
        kernel = 3 if name in ("pool_2", "conv_2", "mask") else 1
        shape = (input.shape[1], inputs, kernel, kernel)
        tensors = {f"weights[{name}]": weight, f"biases[{name}]": bias}
        require_convolution(_OP, input, tensors, shape, "(C_out, C_in, k, k)")
    require_gate(_OP, scale, negative_slope, mask_from)

    feature_1 = conv_pool_conv(input, layers["reduce"], layers["pool_1"], negative_slope)
    level_2 = pointwise_conv(feature_1, *layers["level_2"], negative_slope)
    level_2 = pool_concat_conv(level_2, *layers["pool_2"], negative_slope)
    level_2 = resize_conv(level_2, *layers["conv_2"], level_2.shape[2:], negative_slope)
    merged = resize_add_conv(level_2, feature_1, *layers["add"], negative_slope)
    mask = resize_conv(merged, *layers["mask"], input.shape[2:])
    return spatial_gate(input, mask, *layers["feature"], scale, negative_slope, mask_from)


class PyramidSpatialAttention(nn.Module):
    """The eight convolutions of :func:`pyramid_spatial_attention` over ``channels`` feature channels."""

    def __init__(self, channels: int, scale: float = 2.0, mask_from: str = "m") -> None:
        super().__init__()
        require_count(_OP, "channels", channels)
        require_gate(_OP, scale, 0, mask_from)
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
