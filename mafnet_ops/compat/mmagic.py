"""mmagic's warp and the alignments of BasicVSR++ and EDVR."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require
from ..temporal_spatial_attention import TemporalSpatialAttention, fuse
from . import basicsr, mmcv

__all__ = [
    "ModulatedDCNPack",
    "PCDAlignment",
    "SecondOrderDeformableAlignment",
    "TSAFusion",
    "flow_warp",
]

_LEAKY_RELU = {"type": "LeakyReLU", "negative_slope": 0.1}


def flow_warp(
    x: Tensor,
    flow: Tensor,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = True,
) -> Tensor:
    """As :func:`mafnet_ops.compat.basicsr.flow_warp`."""
    return basicsr.flow_warp(x, flow, interpolation, padding_mode, align_corners)


class ModulatedDCNPack(mmcv.ModulatedDeformConv2d):
    """A modulated deformable convolution that predicts offsets and mask from other features."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = self._offset_head(3)

    def forward(self, x: Tensor, extra_feat: Tensor) -> Tensor:  # type: ignore[override]
        return mmcv.convolve_by_head(self, x, self.conv_offset(extra_feat))


class SecondOrderDeformableAlignment(mmcv.ModulatedDeformConv2d):
    """BasicVSR++'s alignment by two flows, (N, 2, H, W) each; ``deform_groups`` is even."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.max_residue_magnitude = kwargs.pop("max_residue_magnitude", 10)
        super().__init__(*args, **kwargs)
        self.conv_offset = basicsr.alignment_head(self.out_channels, self.deform_groups)

    forward = basicsr.SecondOrderDeformableAlignment.forward  # type: ignore[assignment]


class _ConvModule(nn.Module):
    """A 3 x 3 convolution under mmcv's name ``conv``, and a LeakyReLU unless the slope is None."""

    def __init__(self, in_channels: int, out_channels: int, slope: float | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.slope = slope
        # As mmcv initialises a ConvModule.
        kind: Literal["relu", "leaky_relu"] = "relu" if slope is None else "leaky_relu"
        nn.init.kaiming_normal_(self.conv.weight, slope or 0, "fan_out", kind)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.slope is None else F.leaky_relu(x, self.slope)


class PCDAlignment(nn.Module):
    """EDVR's alignment over three pyramid levels, coarse to fine, and once more at the finest.

    ``act_cfg`` is a LeakyReLU of any slope, as mmagic's default; other activations are refused.
    """

    def __init__(
        self,
        mid_channels: int = 64,
        deform_groups: int = 8,
        act_cfg: dict[str, Any] = _LEAKY_RELU,
    ) -> None:
        super().__init__()
        known = act_cfg.get("type") == "LeakyReLU"
        require(known, "PCDAlignment", "act_cfg", "type LeakyReLU", act_cfg)
        slope = act_cfg.get("negative_slope", 0.01)
        channels = mid_channels

        def pack() -> ModulatedDCNPack:
            return ModulatedDCNPack(channels, channels, 3, padding=1, deform_groups=deform_groups)

        self.offset_conv1 = nn.ModuleDict()
        self.offset_conv2 = nn.ModuleDict()
        self.offset_conv3 = nn.ModuleDict()
        self.dcn_pack = nn.ModuleDict()
        self.feat_conv = nn.ModuleDict()
        for level in ("l3", "l2", "l1"):
            inputs = channels if level == "l3" else 2 * channels
            self.offset_conv1[level] = _ConvModule(2 * channels, channels, slope)
            self.offset_conv2[level] = _ConvModule(inputs, channels, slope)
            self.dcn_pack[level] = pack()
            if level != "l3":
                self.offset_conv3[level] = _ConvModule(channels, channels, slope)
                last = None if level == "l1" else slope
                self.feat_conv[level] = _ConvModule(2 * channels, channels, last)
        self.cas_offset_conv1 = _ConvModule(2 * channels, channels, slope)
        self.cas_offset_conv2 = _ConvModule(channels, channels, slope)
        self.cas_dcnpack = pack()

    def forward(self, neighbor_feats: list[Tensor], ref_feats: list[Tensor]) -> Tensor:
        """Three levels each, (N, C, H, W), (N, C, H / 2, W / 2) and (N, C, H / 4, W / 4) -> (N, C, H, W)."""
        levels = len(neighbor_feats), len(ref_feats)
        require(
            levels == (3, 3), "PCDAlignment", "neighbor_feats and ref_feats", "3 levels", levels
        )
        offset = feature = None
        for i in (2, 1, 0):
            level = f"l{i + 1}"
            neighbor = neighbor_feats[i]
            both = self.offset_conv1[level](torch.cat([neighbor, ref_feats[i]], 1))
            if offset is None or feature is None:
                offset = self.offset_conv2[level](both)
                feature = F.leaky_relu(self.dcn_pack[level](neighbor, offset), 0.1)
                continue
            # Offsets are in pixels of their level: twice as many on the next.
            coarse = 2 * F.interpolate(offset, scale_factor=2, mode="bilinear")
            offset = self.offset_conv2[level](torch.cat([both, coarse], 1))
            offset = self.offset_conv3[level](offset)
            coarse = F.interpolate(feature, scale_factor=2, mode="bilinear")
            aligned = self.dcn_pack[level](neighbor, offset)
            feature = self.feat_conv[level](torch.cat([aligned, coarse], 1))
        assert feature is not None
        both = torch.cat([feature, ref_feats[0]], 1)
        offset = self.cas_offset_conv2(self.cas_offset_conv1(both))
        return F.leaky_relu(self.cas_dcnpack(feature, offset), 0.1)


class TSAFusion(nn.Module):
    """EDVR's temporal and spatial attention: (N, T, C, H, W) -> (N, C, H, W), any H and W (mmagic: multiples of 4).

    ``act_cfg`` is a LeakyReLU of any slope, as mmagic's default; other activations are refused.
    """

    def __init__(
        self,
        mid_channels: int = 64,
        num_frames: int = 5,
        center_frame_idx: int = 2,
        act_cfg: dict[str, Any] = _LEAKY_RELU,
    ) -> None:
        super().__init__()
        require(
            act_cfg.get("type") == "LeakyReLU", "TSAFusion", "act_cfg", "type LeakyReLU", act_cfg
        )
        slope = act_cfg.get("negative_slope", 0.01)
        self.center_frame_idx = center_frame_idx
        convs = TemporalSpatialAttention(mid_channels, num_frames, center_frame_idx)
        plain = ("temporal_attn1", "temporal_attn2", "spatial_attn5", "spatial_attn_add2")
        for name, conv in convs.named_children():
            # As in mmcv's ConvModule, where the slope is read from.
            wrapper = nn.ModuleDict({"conv": conv, "activate": nn.LeakyReLU(slope)})
            self.add_module(name, conv if name in plain else wrapper)

    def forward(self, aligned_feat: Tensor) -> Tensor:
        activation = self.spatial_attn1.activate  # type: ignore[union-attr]
        return fuse(self, aligned_feat, activation.negative_slope)  # type: ignore[union-attr, arg-type]
