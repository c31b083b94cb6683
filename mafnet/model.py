"""MAFnet: x4 video super-resolution with multi-attention and two-stage alignment (optical flow, deformable LSTM).

Shapes in comments: B clips, T frames, C feature channels, K = channels at the LSTM, H and W the LR size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mafnet_ops import (
    ChannelAttention,
    ChannelStatistics,
    PyramidSpatialAttention,
    SelfAttention,
    channel_statistics,
    flow_warp,
)

from . import checkpoint
from .config import PRESETS, ConfigError, ModelConfig
from .layers import (
    DeformableConvLSTM,
    FeatureExtractor,
    FeaturePyramidFlow,
    ResidualBlock,
    SpyNet,
    bicubic_upscale_x4,
    conv,
    lrelu,
)


class Reconstruction(NamedTuple):
    """What :meth:`MAFnet.reconstruct` returns."""

    frames: Tensor  # (B, S, 3, 4H, 4W), S the number of selected frames
    flow_previous: (
        Tensor | None
    )  # (B, T - 1, H, W, 2) in LR pixels, from frame t + 1 back to frame t
    flow_next: Tensor | None  # (B, T - 1, H, W, 2), from frame t to frame t + 1


class MAFnet(nn.Module):
    """The network of ``config``; :meth:`from_preset` and :meth:`from_pretrained` build one by name."""

    scale = 4

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or ModelConfig()
        self.features = FeatureExtractor(
            c.channels, c.blocks, c.block_layers, c.growth, c.global_fusion
        )
        self.attention = MultiAttention(c)
        self.flow_branch = AttentionFlow(c) if c.flow_branch else None
        build = HighResolutionHead if c.lstm_at == "hr" else LowResolutionHead
        self.head: HighResolutionHead | LowResolutionHead = build(c)
        self.degradation = "BI"  # what the weights were trained for; checkpoints carry it

    @classmethod
    def from_preset(cls, name: str) -> MAFnet:
        """An untrained network: ``paper``, ``base``, ``lite`` or ``large``."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
        return cls(PRESETS[name])

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, device: str | torch.device = "cpu"
    ) -> MAFnet:
        """A trained network in eval mode: the name of bundled weights, a .safetensors file or its folder.

        Raises:
            CheckpointError: no such weights, an unreadable file, or tensors that do not fit the model.
        """
        loaded = checkpoint.load(name_or_path)
        net = cls(loaded.config)
        checkpoint.load_strict(net, loaded)
        net.degradation = loaded.degradation
        return net.to(device).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights, config and degradation to one .safetensors file."""
        checkpoint.save(path, self.state_dict(), self.config, self.degradation)

    @property
    def temporal_radius(self) -> int:
        """Frames of context each side that are worth having at the ends of a window.

        With a recurrence one is measured to bring what two do (``mafnet/weights/README.md``).
        """
        return 1 if self.config.lstm != "none" or self.config.flow_branch else 0

    def forward(
        self,
        frames: Tensor,
        statistics: ChannelStatistics | None = None,
        center_only: bool = False,
    ) -> Tensor:
        """Upscale clips.

        Args:
            frames: (B, T, 3, H, W), RGB in [0, 1], any H, W and T of at least 1.
            statistics: channel statistics (B, T, C) from outside, so that the tiles of a frame share those of the
                whole frame; see :meth:`channel_statistics`.
            center_only: reconstruct frame T // 2 alone.

        Returns:
            (B, T, 3, 4H, 4W), or (B, 1, 3, 4H, 4W) with ``center_only``; the dtype of ``frames``, not clamped.

        Raises:
            ValueError: a shape that does not fit. TypeError: frames that are not floating point.
        """
        select = [frames.shape[1] // 2] if center_only else None
        return self.reconstruct(frames, select, statistics).frames

    @torch.no_grad()
    def channel_statistics(self, frames: Tensor) -> ChannelStatistics:
        """The statistics that channel attention takes from (B, T, 3, H, W): mean and max, each (B, T, C)."""
        self._check(frames)
        stats = channel_statistics(self._features(frames))
        size = frames.shape[:2]
        return ChannelStatistics(stats.mean.unflatten(0, size), stats.max.unflatten(0, size))

    def reconstruct(
        self,
        frames: Tensor,
        select: Sequence[int] | None = None,
        statistics: ChannelStatistics | None = None,
    ) -> Reconstruction:
        """As :meth:`forward` for the selected frames, and the flows, which training supervises."""
        self._check(frames)
        batch, count = frames.shape[:2]
        size = (batch, count)
        x = self._features(frames)  # (BT, C, H, W)
        if statistics is None:
            stats = channel_statistics(x)
        else:
            stats = ChannelStatistics(statistics.mean.flatten(0, 1), statistics.max.flatten(0, 1))
            expected = (batch * count, self.config.channels)
            if tuple(stats.mean.shape) != expected:
                raise ValueError(
                    f"MAFnet: statistics: expected (B, T, C) = {(*size, expected[1])}, "
                    f"got {tuple(statistics.mean.shape)}"
                )
        flows = None
        if self.flow_branch is None:
            aligned = attended = self.attention(x, stats)
        else:
            attended, parallel = self._attend(x, stats)
            aligned, flows = self.flow_branch(parallel, frames)
        residual = self.head(attended, aligned, flows, size, select)

        kept = frames if select is None else frames[:, list(select)]
        out = residual.float() if residual.dtype != torch.float64 else residual
        skip = self._skip(kept.flatten(0, 1))
        if skip is not None:
            out = out + skip
        out = out.unflatten(0, kept.shape[:2]).to(frames.dtype)
        if flows is None:
            return Reconstruction(out, None, None)
        return Reconstruction(out, flows.previous[:, 1:], flows.next[:, :-1])

    def flow_features(self, frames: Tensor) -> Tensor:
        """What the flow branch derives its guide from: (B, T, 3, H, W) -> (BT, 2C, H, W)."""
        if self.flow_branch is None:
            raise ConfigError("flow_features: this network has flow_branch = false")
        x = self._features(frames)
        attention = self.flow_branch.attention or self.attention
        return attention.in_parallel(x, channel_statistics(x))

    def _attend(self, x: Tensor, statistics: ChannelStatistics) -> tuple[Tensor, Tensor]:
        """What both branches begin with: (BT, C, H, W) of the first, (BT, 2C, H, W) of the flow branch."""
        assert self.flow_branch is not None
        own = self.flow_branch.attention
        if own is None:
            return self.attention.for_both_branches(x, statistics)
        return self.attention(x, statistics), own.in_parallel(x, statistics)

    def _features(self, frames: Tensor) -> Tensor:
        """Features of all frames, (BT, C, H, W). Zero padding at the borders then means mid-grey."""
        x = frames.flatten(0, 1).to(self.features.conv_0.weight.dtype) - 0.5
        if self.features.conv_1.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return self.features(x)

    def _skip(self, frames: Tensor) -> Tensor | None:
        """The interpolated frames that the network adds to, in at least fp32."""
        if self.config.skip == "none":
            return None
        if self.config.skip == "bicubic":
            return bicubic_upscale_x4(frames)
        frames = frames.float() if frames.dtype != torch.float64 else frames
        return F.interpolate(frames, scale_factor=4, mode="bilinear", align_corners=False)

    def _check(self, frames: Tensor) -> None:
        if not isinstance(frames, Tensor) or not frames.is_floating_point():
            got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
            raise TypeError(
                f"MAFnet: frames: expected a floating-point tensor in [0, 1], got {got}"
            )
        if frames.dim() != 5 or frames.shape[2] != 3 or 0 in frames.shape[1:]:
            raise ValueError(
                f"MAFnet: frames: expected (B, T, 3, H, W) with T, H, W >= 1, got {tuple(frames.shape)}"
            )


class MultiAttention(nn.Module):
    """The multi-attention branch: channel, then pyramid spatial, then self-attention."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.channel = (
            ChannelAttention(c.channels, c.ca_reduction, c.ca_kernel)
            if c.channel_attention
            else None
        )
        self.spatial = (
            PyramidSpatialAttention(c.channels, c.sa_scale, c.sa_mask_from)
            if c.spatial_attention
            else None
        )
        self.self_attention = (
            SelfAttention(c.channels, c.self_attention_reduction, c.self_attention_window)
            if c.self_attention
            else None
        )

    def forward(self, x: Tensor, statistics: ChannelStatistics) -> Tensor:
        x = self.by_channel(x, statistics)
        x = self.by_position(x)
        return x if self.self_attention is None else self.self_attention(x)

    def in_parallel(self, x: Tensor, statistics: ChannelStatistics) -> Tensor:
        """Spatial and channel attention of the same features, side by side: (N, 2C, H, W)."""
        return torch.cat([self.by_position(x), self.by_channel(x, statistics)], 1)

    def for_both_branches(self, x: Tensor, statistics: ChannelStatistics) -> tuple[Tensor, Tensor]:
        """:meth:`forward` and :meth:`in_parallel` with one set of weights: channel attention is computed once, and
        spatial attention of its two inputs as one batch."""
        gated = self.by_channel(x, statistics)
        if self.spatial is None:
            first, second = gated, x
        else:
            first, second = self.spatial(torch.cat([gated, x])).chunk(2)
        parallel = torch.cat([second, gated], 1)
        return (first if self.self_attention is None else self.self_attention(first)), parallel

    def by_channel(self, x: Tensor, statistics: ChannelStatistics) -> Tensor:
        return x if self.channel is None else self.channel(x, statistics)

    def by_position(self, x: Tensor) -> Tensor:
        return x if self.spatial is None else self.spatial(x)


class Flows(NamedTuple):
    """Flow from every frame to its neighbours, (B, T, H, W, 2) in LR pixels, zero where there is none."""

    previous: Tensor
    next: Tensor


class AttentionFlow(nn.Module):
    """The attention-flow branch, stage-1 alignment: flow from attended features, neighbours warped and fused."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        channels = c.channels
        self.causal = c.direction == "causal"
        self.attention = (
            None if c.share_attention else MultiAttention(replace(c, self_attention=False))
        )
        self.mix = conv(2 * channels, channels, 1)
        self.guide: nn.Conv2d | None = None
        self.net: FeaturePyramidFlow | SpyNet
        if c.flow_net == "featpyr":
            self.guide = conv(2 * channels, c.flow_channels, 1)
            self.net = FeaturePyramidFlow(
                c.flow_channels, c.flow_width, c.flow_levels, c.flow_shared
            )
        else:
            self.net = SpyNet()
        self.fuse = conv(3 * channels, channels, 1)

    def forward(self, both: Tensor, frames: Tensor) -> tuple[Tensor, Flows]:
        """``both``: spatial and channel attention of the features, (BT, 2C, H, W)."""
        size = (frames.shape[0], frames.shape[1])
        source = (
            frames.to(both.dtype) if self.guide is None else self.guide(both).unflatten(0, size)
        )
        flows = self._flows(source)
        mixed = self.mix(both).unflatten(0, size)  # (B, T, C, H, W)
        previous = _warp_neighbour(mixed, flows.previous, -1)
        following = mixed if self.causal else _warp_neighbour(mixed, flows.next, 1)
        fused = self.fuse(torch.cat([mixed, previous, following], 2).flatten(0, 1))
        return fused, flows

    def _flows(self, source: Tensor) -> Flows:
        """Flow between adjacent frames of (B, T, c, H, W), both ways in one batch; past the ends zero."""
        batch, count = source.shape[:2]
        height, width = source.shape[-2:]
        none = source.new_zeros(batch, 1, height, width, 2, dtype=torch.float32)
        if count == 1:
            return Flows(none, none)
        later, earlier = source[:, 1:].flatten(0, 1), source[:, :-1].flatten(0, 1)
        if self.causal:
            previous = self.net(later, earlier).unflatten(0, (batch, count - 1))
            return Flows(torch.cat([none, previous], 1), torch.cat([none] * count, 1))
        pairs = self.net(torch.cat([later, earlier]), torch.cat([earlier, later]))
        previous, following = pairs.unflatten(0, (2, batch, count - 1)).unbind(0)
        return Flows(torch.cat([none, previous], 1), torch.cat([following, none], 1))


def _warp_neighbour(x: Tensor, flow: Tensor, step: int) -> Tensor:
    """Each frame's neighbour (step -1: previous, 1: next) warped onto it; the end frame stands in for its own.

    x (B, T, C, H, W), flow (B, T, H, W, 2).
    """
    count = x.shape[1]
    if count == 1:
        return x
    if step < 0:
        source, motion, end = x[:, :-1], flow[:, 1:], x[:, :1]
    else:
        source, motion, end = x[:, 1:], flow[:, :-1], x[:, -1:]
    warped = flow_warp(source.flatten(0, 1), motion.flatten(0, 1), "bilinear", "border")
    warped = warped.unflatten(0, (x.shape[0], count - 1))
    return torch.cat([end, warped] if step < 0 else [warped, end], 1)


class Recurrence(nn.Module):
    """Stage-2 alignment: the deformable ConvLSTM, run forward and, unless causal, backward with the same weights."""

    def __init__(self, c: ModelConfig, channels: int, offset_stride: int) -> None:
        super().__init__()
        self.both_ways = c.direction == "bidirectional"
        self.skip = c.lstm_skip
        self.lstm = DeformableConvLSTM(
            channels, c.deform_groups, c.max_residue, c.lstm == "deform", offset_stride
        )
        self.fuse = conv(2 * channels, channels, 1) if self.both_ways else None

    def forward(self, y1: Tensor, y2: Tensor, flows: Flows) -> Tensor:
        """y1, y2 (B, T, K, h, w) and flows in their pixels -> (B, T, K, h, w)."""
        if self.fuse is None:
            state = self.lstm(y1, y2, flows.previous)
        else:
            batch = y1.shape[0]
            states = self.lstm(
                torch.cat([y1, y1.flip(1)]),
                torch.cat([y2, y2.flip(1)]),
                torch.cat([flows.previous, flows.next.flip(1)]),
            )
            merged = torch.cat([states[:batch], states[batch:].flip(1)], 2)
            state = self.fuse(merged.flatten(0, 1)).unflatten(0, y1.shape[:2])
        return y1 + state if self.skip else state


class _Head(nn.Module):
    """What both heads share: recurrence over the two branches at the resolution they hand it."""

    def __init__(self, c: ModelConfig, channels: int, offset_stride: int) -> None:
        super().__init__()
        self.flow_scale = 4 if c.lstm_at == "hr" else 1
        self.uses_flow_branch = c.flow_branch
        self.recurrence = None if c.lstm == "none" else Recurrence(c, channels, offset_stride)
        # Without the recurrence the two branches are merged by its input convolution alone.
        merge = self.recurrence is None and c.flow_branch
        self.merge = conv(2 * channels, channels, 1) if merge else None
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(c.recon_blocks)))

    def combine(
        self,
        y1: Tensor,
        y2: Tensor,
        flows: Flows | None,
        size: tuple[int, int],
        select: Sequence[int] | None,
    ) -> Tensor:
        """y1, y2 (BT, K, h, w) -> (BS, K, h, w) for the S selected frames."""
        if self.recurrence is not None:
            state = self.recurrence(
                y1.unflatten(0, size), y2.unflatten(0, size), self._flows(y1, flows, size)
            )
        elif self.merge is not None:
            state = (y1 + self.merge(torch.cat([y1, y2], 1))).unflatten(0, size)
        else:
            state = y1.unflatten(0, size)
        if select is not None:
            state = state[:, list(select)]
        return self.blocks(state.flatten(0, 1))

    def _flows(self, y1: Tensor, flows: Flows | None, size: tuple[int, int]) -> Flows:
        """The flows in the pixels of y1."""
        if flows is None:
            none = y1.new_zeros(*size, *y1.shape[-2:], 2, dtype=torch.float32)
            return Flows(none, none)
        return Flows(*(_upscale_flow(f, self.flow_scale) for f in flows))


def _upscale_flow(flow: Tensor, scale: int) -> Tensor:
    """(B, T, H, W, 2) -> (B, T, scale * H, scale * W, 2) in the finer pixels."""
    if scale == 1:
        return flow
    planes = flow.flatten(0, 1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, scale_factor=scale, mode="bilinear", align_corners=False)
    return scale * planes.permute(0, 2, 3, 1).unflatten(0, flow.shape[:2])


class HighResolutionHead(_Head):
    """The paper's order: upsample both branches by 4, then the LSTM at high resolution."""

    def __init__(self, c: ModelConfig) -> None:
        width = c.hr_channels
        super().__init__(c, width, offset_stride=4 if c.offset_at == "lr" else 1)
        self.attended_in, self.attended_out = conv(c.channels, 16 * width), conv(width, width)
        needs_aligned = c.flow_branch
        self.aligned_in = conv(c.channels, 16 * width) if needs_aligned else None
        self.aligned_out = conv(width, width) if needs_aligned else None
        self.out = _small_output(width)

    def forward(
        self,
        attended: Tensor,
        aligned: Tensor,
        flows: Flows | None,
        size: tuple[int, int],
        select: Sequence[int] | None,
    ) -> Tensor:
        y1 = y2 = self.attended_out(F.pixel_shuffle(self.attended_in(attended), 4))
        if self.aligned_in is not None and self.aligned_out is not None:
            y2 = self.aligned_out(F.pixel_shuffle(self.aligned_in(aligned), 4))
        return self.out(self.combine(y1, y2, flows, size, select))


class LowResolutionHead(_Head):
    """The light order: the LSTM at low resolution, then two (convolution, PixelShuffle 2)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__(c, c.channels, offset_stride=1)
        self.up_1 = conv(c.channels, 4 * c.channels)
        self.up_2 = conv(c.channels, 4 * c.hr_channels)
        self.out = _small_output(c.hr_channels)

    def forward(
        self,
        attended: Tensor,
        aligned: Tensor,
        flows: Flows | None,
        size: tuple[int, int],
        select: Sequence[int] | None,
    ) -> Tensor:
        x = self.combine(attended, aligned, flows, size, select)
        x = lrelu(F.pixel_shuffle(self.up_1(x), 2))
        x = lrelu(F.pixel_shuffle(self.up_2(x), 2))
        return self.out(x)


def _small_output(channels: int) -> nn.Conv2d:
    """The last convolution (Hc6), started small: an untrained network gives about the interpolated frames."""
    out = conv(channels, 3)
    with torch.no_grad():
        out.weight.mul_(0.1)
        assert out.bias is not None
        out.bias.zero_()
    return out
