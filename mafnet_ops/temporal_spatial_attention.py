"""EDVR's fusion of aligned frames: temporal attention, then spatial attention from the fused parts of this package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import require, require_count, require_tensor
from ._state_dict import RenameOnLoad
from .pyramid_spatial_attention_parts import (
    pointwise_conv,
    pool_concat_conv,
    resize_add_conv,
    resize_conv,
)

_OP = "TemporalSpatialAttention"
_Layer = tuple[Tensor, Tensor | None]
_SLOPE = 0.1  # of EDVR's LeakyReLUs


class TemporalSpatialAttention(nn.Module):
    """EDVR's TSA (Wang et al., CVPR Workshops 2019, section 3.3): (N, T, C, H, W) aligned frames -> (N, C, H, W).

    Beside :class:`PyramidSpatialAttention` it has ``spatial_attn3`` after the first pooling, and what it adds comes
    from two convolutions of the mask. Any H and W of at least 1; EDVR's own code needs multiples of 4.
    The parameters have BasicSR's names; state dicts of mmagic (``spatial_attn1.conv.weight``) load, too.

    Args:
        channels: C. frames: T. center: index of the frame that the others are compared with.

    Raises:
        ValueError: a center outside the frames; at a call, a shape that does not fit.
    """

    def __init__(self, channels: int = 64, frames: int = 5, center: int = 2) -> None:
        super().__init__()
        require_count(_OP, "channels", channels)
        require(0 <= center < frames, _OP, "center", f"an index of {frames} frames", center)
        self.center_frame_idx = center

        def conv(inputs: int, kernel: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, channels, kernel, padding=kernel // 2)

        self.temporal_attn1 = conv(channels, 3)
        self.temporal_attn2 = conv(channels, 3)
        self.feat_fusion = conv(frames * channels, 1)
        self.spatial_attn1 = conv(frames * channels, 1)
        self.spatial_attn2 = conv(2 * channels, 1)
        self.spatial_attn3 = conv(channels, 3)
        self.spatial_attn4 = conv(channels, 1)
        self.spatial_attn5 = conv(channels, 3)
        self.spatial_attn_l1 = conv(channels, 1)
        self.spatial_attn_l2 = conv(2 * channels, 3)
        self.spatial_attn_l3 = conv(channels, 3)
        self.spatial_attn_add1 = conv(channels, 1)
        self.spatial_attn_add2 = conv(channels, 1)
        self.register_load_state_dict_pre_hook(
            RenameOnLoad([(r"((?:spatial_attn|feat_fusion)\w*)\.conv\.(weight|bias)", r"\1.\2")])
        )

    def forward(self, aligned_feat: Tensor) -> Tensor:
        return fuse(self, aligned_feat)


def fuse(module: nn.Module, aligned: Tensor, negative_slope: float = _SLOPE) -> Tensor:
    """What ``module``, with the attributes of :class:`TemporalSpatialAttention`, makes of (N, T, C, H, W).

    The convolutions may be wrapped, as mmagic's are: then ``conv`` of the wrapper is taken.
    """
    require_tensor(_OP, "input", aligned, 5)

    def layer(name: str) -> _Layer:
        conv = getattr(module, name)
        conv = getattr(conv, "conv", conv)
        return conv.weight, conv.bias

    def pointwise(name: str, x: Tensor, slope: float = negative_slope) -> Tensor:
        return pointwise_conv(x, *layer(name), slope)

    def conv_3x3(name: str, x: Tensor) -> Tensor:
        return resize_conv(x, *layer(name), x.shape[2:], negative_slope)

    def pooled(name: str, x: Tensor) -> Tensor:
        return pool_concat_conv(x, *layer(name), negative_slope)

    center = aligned[:, module.center_frame_idx]  # type: ignore[index]
    weighed = _weigh_frames(aligned, center, layer("temporal_attn1"), layer("temporal_attn2"))
    half = pooled("spatial_attn2", pointwise("spatial_attn1", weighed))
    quarter = pooled("spatial_attn_l2", pointwise("spatial_attn_l1", half))
    quarter = conv_3x3("spatial_attn_l3", quarter)
    half = conv_3x3("spatial_attn3", half)
    merged = resize_add_conv(quarter, half, *layer("spatial_attn4"), negative_slope)
    mask = resize_conv(merged, *layer("spatial_attn5"), aligned.shape[3:])
    added = pointwise("spatial_attn_add2", pointwise("spatial_attn_add1", mask), 1.0)
    return torch.addcmul(added, pointwise("feat_fusion", weighed), torch.sigmoid(mask), value=2)


def _weigh_frames(aligned: Tensor, center: Tensor, for_center: _Layer, for_each: _Layer) -> Tensor:
    """Each frame by its likeness to the center at each pixel, side by side: (N, T * C, H, W)."""
    middle = F.conv2d(center, *for_center, padding=1).unsqueeze(1)
    each = F.conv2d(aligned.flatten(0, 1), *for_each, padding=1)
    each = each.unflatten(0, aligned.shape[:2])
    likeness = torch.sigmoid((each * middle).sum(2, keepdim=True))  # (N, T, 1, H, W)
    return (aligned * likeness).flatten(1, 2)
