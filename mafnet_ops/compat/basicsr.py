"""BasicSR's deformable convolutions, warp and TSA fusion (``basicsr.ops.dcn``, ``basicsr.archs``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require
from ..deform_align import deform_align
from ..flow_warp import flow_warp as _flow_warp
from ..temporal_spatial_attention import TemporalSpatialAttention
from . import mmcv

__all__ = [
    "DCNv2Pack",
    "ModulatedDeformConv",
    "ModulatedDeformConvPack",
    "SecondOrderDeformableAlignment",
    "TSAFusion",
    "deform_conv",
    "flow_warp",
    "modulated_deform_conv",
]

Ints = mmcv.Ints


def flow_warp(
    x: Tensor,
    flow: Tensor,
    interp_mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = True,
) -> Tensor:
    """:func:`mafnet_ops.flow_warp`: x (N, C, H, W), flow (N, H, W, 2) in pixels, channel 0 = x.

    ``align_corners=True`` is the pixel convention. With False the library samples up to half a pixel beside the flow;
    that is kept, by ``F.grid_sample`` in fp32.
    """
    size = tuple(x.shape[2:])
    require(
        tuple(flow.shape[1:3]) == size, "flow_warp", "flow", f"H, W = {size}", tuple(flow.shape)
    )
    if align_corners:
        return _flow_warp(x, flow, interp_mode, padding_mode)
    image = x if x.dtype == torch.float64 else x.float()
    rows = torch.arange(size[0], device=x.device, dtype=image.dtype)
    columns = torch.arange(size[1], device=x.device, dtype=image.dtype)
    grid_x = 2 * (columns + flow[..., 0]) / max(size[1] - 1, 1) - 1
    grid_y = 2 * (rows[:, None] + flow[..., 1]) / max(size[0] - 1, 1) - 1
    grid = torch.stack([grid_x, grid_y], 3)
    return F.grid_sample(image, grid, interp_mode, padding_mode, align_corners=False).to(x.dtype)


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """As :func:`mafnet_ops.compat.mmcv.modulated_deform_conv2d`."""
    geometry = stride, padding, dilation, groups, deformable_groups
    return mmcv.modulated_deform_conv2d(input, offset, mask, weight, bias, *geometry)


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    im2col_step: int = 64,
) -> Tensor:
    """As :func:`mafnet_ops.compat.mmcv.deform_conv2d`; any batch size, whatever ``im2col_step``."""
    geometry = stride, padding, dilation, groups, deformable_groups
    return mmcv.deform_conv2d(input, offset, weight, *geometry)


class ModulatedDeformConv(mmcv.ModulatedDeformConv2d):
    """BasicSR's module: ``forward(x, offset, mask)``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        geometry = kernel_size, stride, padding, dilation, groups, deformable_groups
        super().__init__(in_channels, out_channels, *geometry, bias=bias)
        self.deformable_groups = deformable_groups


class ModulatedDeformConvPack(ModulatedDeformConv):
    """Predicts its own offsets and mask from ``x``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset: nn.Module = self._offset_head(3)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return mmcv.convolve_by_head(self, x, self.conv_offset(x))


class DCNv2Pack(ModulatedDeformConvPack):
    """Predicts offsets and mask from other features: EDVR's alignment.

    BasicSR logs a warning where the mean offset is above 50 pixels, for which it waits for the device on every call;
    this does not.
    """

    def forward(self, x: Tensor, feat: Tensor) -> Tensor:  # type: ignore[override]
        return mmcv.convolve_by_head(self, x, self.conv_offset(feat))


class SecondOrderDeformableAlignment(ModulatedDeformConvPack):
    """BasicVSR++'s alignment by two flows, (N, 2, H, W) each; ``deformable_groups`` is even."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.max_residue_magnitude = kwargs.pop("max_residue_magnitude", 10)
        super().__init__(*args, **kwargs)
        self.conv_offset = alignment_head(self.out_channels, self.deformable_groups)

    def forward(  # type: ignore[override]
        self, x: Tensor, extra_feat: Tensor, flow_1: Tensor, flow_2: Tensor
    ) -> Tensor:
        raw = self.conv_offset(torch.cat([extra_feat, flow_1, flow_2], 1))
        flows = flow_1.permute(0, 2, 3, 1), flow_2.permute(0, 2, 3, 1)
        geometry = self.stride, self.padding, self.dilation
        magnitude = self.max_residue_magnitude
        return deform_align(x, raw, self.weight, self.bias, *flows, magnitude, *geometry)


def alignment_head(channels: int, deform_groups: int) -> nn.Sequential:
    """Three features and two flows -> raw offsets and masks, zero at the start."""
    layers: list[nn.Module] = []
    for inputs in (3 * channels + 4, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, 1, 1), nn.LeakyReLU(0.1)]
    last = nn.Conv2d(channels, 27 * deform_groups, 3, 1, 1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(*layers, last)


class TSAFusion(TemporalSpatialAttention):
    """EDVR's temporal and spatial attention: (N, T, C, H, W) -> (N, C, H, W), any H and W (BasicSR: multiples of 4)."""

    def __init__(self, num_feat: int = 64, num_frame: int = 5, center_frame_idx: int = 2) -> None:
        super().__init__(num_feat, num_frame, center_frame_idx)
