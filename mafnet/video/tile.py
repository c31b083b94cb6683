"""Upscaling a window of frames in tiles whose seams cannot be seen.

The cores of the tiles partition the frame. Each tile is computed with a halo on every side, starts
and ends on a multiple of the attention window (so that windows fall where they fall in the whole
frame), and is given the channel-attention statistics of the whole frame. Around the border of two
cores the tiles are cross-faded over `BLEND` pixels; the rest of the halo is context only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

BLEND = 16  # LR pixels of cross-fade between two tiles; a halo of 32 leaves 24 of pure context
MIN_HALO = 4
POOLING_GRID = 16  # pyramids halve the frame up to four times: keeps their grids in place


class SuperResolver(Protocol):
    """What the video tool needs of a network."""

    scale: int
    temporal_radius: int

    def reconstruct(self, frames: Tensor, select: Sequence[int] | None, statistics: Any) -> Any:
        """(1, T, 3, H, W) -> an object whose `frames` are (1, S, 3, sH, sW), those selected."""

    def channel_statistics(self, frames: Tensor) -> Any:
        """A named tuple of tensors (1, T, C), to be handed to `reconstruct`."""


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in LR pixels: it owns [core, core_end), it sees [start, end)."""

    core: int
    core_end: int
    start: int
    end: int


def alignment(attention_window: int | None) -> int:
    """LR pixels that tile origins and halos are multiples of."""
    return attention_window or POOLING_GRID


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def spans(size: int, tile: int, halo: int) -> list[Span]:
    """Tiles that cover an axis of `size` pixels."""
    return [
        Span(core, min(core + tile, size), max(core - halo, 0), min(core + tile + halo, size))
        for core in range(0, size, tile)
    ]


def weights(tiles: list[Span], halo: int, scale: int) -> list[Tensor]:
    """Per tile its cross-fade weights over [start, end), in HR pixels. They sum to 1 everywhere."""
    reach = min(BLEND, halo) * scale / 2  # the ramp goes from -reach to +reach around a border
    size = tiles[-1].core_end * scale
    centres = torch.arange(size, dtype=torch.float64) + 0.5
    ramps = []
    for tile in tiles:
        rise = torch.ones(size, dtype=torch.float64)
        if tile.core > 0:
            rise = ((centres - tile.core * scale) / (2 * reach) + 0.5).clamp(0, 1)
        fall = torch.ones(size, dtype=torch.float64)
        if tile.core_end * scale < size:
            fall = ((tile.core_end * scale - centres) / (2 * reach) + 0.5).clamp(0, 1)
        inside = (centres >= tile.start * scale) & (centres < tile.end * scale)
        ramps.append(torch.minimum(rise, fall) * inside)
    total = torch.stack(ramps).sum(0)
    return [
        (ramp / total)[tile.start * scale : tile.end * scale].float()
        for tile, ramp in zip(tiles, ramps)
    ]


def upscale_window(
    net: SuperResolver, clip: Tensor, keep: slice, tile: int = 0, halo: int = 32
) -> Tensor:
    """(1, T, 3, H, W) in [0, 1] -> (kept T, 3, sH, sW) float32 on the CPU, not clamped.

    `tile` and `halo` are LR pixels, multiples of the network's attention window; tile 0 is the
    whole frame at once. Activations take the memory of `tile + 2 * halo` pixels a side.
    """
    height, width = clip.shape[-2:]
    select = range(*keep.indices(clip.shape[1]))
    if not tile or (tile >= height and tile >= width):
        return net.reconstruct(clip, select, None).frames[0].float().cpu()
    scale = net.scale
    statistics = _statistics(net, clip)
    rows, columns = spans(height, tile, halo), spans(width, tile, halo)
    row_weights, column_weights = weights(rows, halo, scale), weights(columns, halo, scale)
    output = torch.zeros(len(select), 3, height * scale, width * scale)
    for row, row_weight in zip(rows, row_weights):
        for column, column_weight in zip(columns, column_weights):
            part = clip[..., row.start : row.end, column.start : column.end]
            upscaled = net.reconstruct(part, select, statistics).frames[0].float().cpu()
            output[
                ...,
                row.start * scale : row.end * scale,
                column.start * scale : column.end * scale,
            ] += upscaled * (row_weight[:, None] * column_weight[None, :])
    return output


def _statistics(net: SuperResolver, clip: Tensor) -> Any:
    """Of whole frames, one at a time: the features of a large frame alone fill much memory."""
    parts = [net.channel_statistics(clip[:, index : index + 1]) for index in range(clip.shape[1])]
    return type(parts[0])(*(torch.cat(fields, 1) for fields in zip(*parts)))
