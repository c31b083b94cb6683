"""Frames in, upscaled frames out, in overlapping windows: memory stays flat on any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isqrt
from typing import TypeVar

import torch
from torch import Tensor

from .errors import VideoError
from .tile import MIN_HALO, SuperResolver, alignment, round_up, upscale_window

# LR pixels (frames x height x width) computed at once when chunk or tile are chosen automatically:
# `lite` takes 5 kB for each in fp32 on a CPU (measured), so about 5 GB.
WINDOW_PIXELS = 1_000_000
# With the bundled weights, last trained on clips of 10 frames, 15 new frames and 1 of context each side measure
# 0.08 dB above 5 and 1 on Vid4's calendar, with a fifth fewer frames to compute; 2 or 3 of
# context bring nothing.
MIN_CHUNK, MAX_CHUNK = 5, 15
OUTPUT_PIXELS = 16_000_000  # LR pixels of kept frames: 192 bytes each as x4 float RGB, 3 GB in all
TILED_CHUNK = 5
DEFAULT_HALO = 32

Item = TypeVar("Item")


@dataclass
class Frame:
    """One upright frame of the source: `rgb` (3, H, W) float32 in [0, 1], times in time_base ticks.

    `alpha` is (1, H, W) float32 or None; `duration` is None where the source does not say.
    """

    rgb: Tensor
    pts: int
    duration: int | None = None
    alpha: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Window of work: `chunk` new frames, `overlap` context frames each side; LR pixels."""

    chunk: int
    overlap: int
    tile: int
    halo: int


def plan_window(
    net: SuperResolver,
    height: int,
    width: int,
    chunk: int | None = None,
    overlap: int | None = None,
    tile: int | None = None,
    halo: int | None = None,
) -> Plan:
    """Choose what is None. tile 0: whole frames. Tile and halo are rounded up to windows."""
    config = getattr(net, "config", None)
    align = alignment(getattr(config, "self_attention_window", None))
    if overlap is None:
        overlap = net.temporal_radius
    halo = DEFAULT_HALO if halo is None else halo
    if halo < MIN_HALO:
        raise VideoError(f"--tile-overlap: expected at least {MIN_HALO} pixels, got {halo}")
    halo = round_up(halo, align)
    if tile is None:
        least = (chunk or MIN_CHUNK) + 2 * overlap
        whole_fits = least * height * width <= WINDOW_PIXELS
        frames = (chunk or TILED_CHUNK) + 2 * overlap
        side = isqrt(WINDOW_PIXELS // frames) // align * align
        tile = 0 if whole_fits else max(side - 2 * halo, align)
    tile = round_up(tile, align)
    if chunk is None:
        area = (
            min(tile + 2 * halo, height) * min(tile + 2 * halo, width) if tile else height * width
        )
        fitting = min(WINDOW_PIXELS // area - 2 * overlap, OUTPUT_PIXELS // (height * width))
        chunk = min(max(fitting, 1), TILED_CHUNK if tile else MAX_CHUNK)
    return Plan(chunk, overlap, tile, halo)


def windows(items: Iterable[Item], chunk: int, overlap: int) -> Iterator[tuple[list[Item], slice]]:
    """Yield (items, keep): `items[keep]` runs once through the input, the rest is context.

    At most `chunk + 2 * overlap` items are alive, provided the caller lets go of each list.
    """
    source = iter(items)
    buffer: list[Item] = []
    past = 0
    while True:
        for item in source:
            buffer.append(item)
            if len(buffer) == past + chunk + overlap:
                break
        if len(buffer) == past:
            return
        stop = min(past + chunk, len(buffer))
        yield list(buffer), slice(past, stop)
        dropped = max(0, stop - overlap)
        del buffer[:dropped]
        past = stop - dropped


def upscale_frames(
    net: SuperResolver,
    frames: Iterable[Frame],
    plan: Plan,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Frame, Tensor]]:
    """Yield each source frame with its upscaled (3, sH, sW) float32 RGB on the CPU, not clamped."""
    device = device or torch.device("cpu")
    for items, keep in windows(frames, plan.chunk, plan.overlap):
        clip = torch.stack([frame.rgb for frame in items]).unsqueeze(0).to(device)
        with torch.inference_mode(), _autocast(device, dtype):
            upscaled = upscale_window(net, clip, keep, plan.tile, plan.halo)
        kept = items[keep]
        del items, clip
        yield from zip(kept, upscaled)
        del kept, upscaled  # before the next window is computed


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
