"""YCbCr conversion against the formulas of H.273 in float64, to half a code value."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from mafnet.video import VideoError
from mafnet.video.colour import (
    LUMA_WEIGHTS,
    ColourTags,
    PixelLayout,
    frame_to_rgb,
    repack,
    resolve_matrix,
    rgb_to_frame,
)


def rounding(depth: int) -> float:
    """Code values: eight float32 operations on numbers up to 2^depth."""
    return 8 * 2.0 ** (depth - 24)


def planes(frame: av.VideoFrame) -> list[np.ndarray]:
    deep = frame.format.components[0].bits > 8
    found = []
    for plane in frame.planes:
        rows = np.frombuffer(bytes(plane), np.uint16 if deep else np.uint8)
        found.append(rows.reshape(plane.height, -1)[:, : plane.width].astype(np.float64))
    return found


def formula(rgb: np.ndarray, tags: ColourTags, depth: int) -> list[np.ndarray]:
    """H.273 (47) to (58) for a matrix of Kr and Kb."""
    kr, kb = LUMA_WEIGHTS[tags.matrix]
    red, green, blue = rgb.astype(np.float64)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = 0.5 * (blue - luma) / (1 - kb), 0.5 * (red - luma) / (1 - kr)
    if tags.full_range:
        peak, middle = 2**depth - 1, 2 ** (depth - 1)
        return [peak * luma, peak * cb + middle, peak * cr + middle]
    unit = 2 ** (depth - 8)
    return [unit * (219 * luma + 16), unit * (224 * cb + 128), unit * (224 * cr + 128)]


@pytest.mark.parametrize("matrix", sorted(LUMA_WEIGHTS))
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(
    ("name", "depth"), [("yuv444p", 8), ("yuv444p10le", 10), ("yuv444p16le", 16)]
)
def test_codes_and_round_trip(matrix: int, full_range: bool, name: str, depth: int) -> None:
    tags = ColourTags(matrix, 1, 1, full_range)
    rgb = np.random.default_rng(1).random((3, 24, 31)).astype(np.float32)
    rgb[:, 0, :3] = 0, 1, 0.5  # black, white, grey
    frame = rgb_to_frame(torch.from_numpy(rgb), name, tags)
    want = [np.clip(plane, 0, 2**depth - 1) for plane in formula(rgb, tags, depth)]
    for got, exact in zip(planes(frame), want):
        assert np.abs(got - exact).max() <= 0.5 + rounding(depth)
    # Half a code in each of Y, Cb, Cr comes back as at most this much of each colour.
    kr, kb = LUMA_WEIGHTS[matrix]
    spans = (2**depth - 1,) * 2 if full_range else (219 * 2 ** (depth - 8), 224 * 2 ** (depth - 8))
    green = (2 * kr * (1 - kr) + 2 * kb * (1 - kb)) / (1 - kr - kb)
    swing = max(2 * (1 - kr), 2 * (1 - kb), green)
    bound = (0.5 + rounding(depth)) * (1 / spans[0] + swing / spans[1])
    if full_range:
        bound *= 2  # full-range chroma saturates: 2^n - 1/2 is clipped to 2^n - 1
    assert np.abs(frame_to_rgb(frame, tags).numpy() - rgb).max() <= bound


@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv420p10le"])
def test_chroma_siting(name: str) -> None:
    """A linear ramp survives subsampling away from the edges: no shift by a fraction of a pixel."""
    x = torch.linspace(0.2, 0.8, 64).expand(48, 64)
    y = torch.linspace(0.3, 0.7, 48)[:, None].expand(48, 64)
    rgb = torch.stack([x, y, (x + y) / 2])
    tags = ColourTags(1, 1, 1, False)
    back = frame_to_rgb(rgb_to_frame(rgb, name, tags), tags)
    unit = 2 ** (PixelLayout.of(name).depth - 8)
    bound = (0.5 + rounding(10)) * (1 / (219 * unit) + 1.8556 / (224 * unit))
    assert (back - rgb)[:, 2:-2, 2:-2].abs().max() <= bound


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (13, 11)])
@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv444p", "gray", "rgb24", "gbrp"])
def test_odd_sizes_of_one_colour(size: tuple[int, int], name: str) -> None:
    tags = ColourTags(1, 1, 1, name in ("rgb24", "gbrp"))
    rgb = torch.full((3, *size), 0.4)
    back = frame_to_rgb(rgb_to_frame(rgb, name, tags), tags)
    assert back.shape == rgb.shape
    assert (back - rgb).abs().max() <= 0.5 * (1 / 219 + 1.8556 / 224) + 1e-4


@pytest.mark.parametrize(
    ("name", "planar"),
    [
        ("nv12", "yuv420p"),
        ("p010le", "yuv420p10le"),
        ("yuyv422", "yuv422p"),
        ("yuvj420p", "yuv420p"),
        ("yuv411p", "yuv444p"),
        ("yuva420p", "yuv420p"),
        ("gray12le", "gray12le"),
        ("pal8", "rgb24"),
        ("gbrp10le", "rgb48le"),
    ],
)
def test_every_layout_has_a_planar_home(name: str, planar: str) -> None:
    assert PixelLayout.of(name).planar_name() == planar


@pytest.mark.parametrize("name", ["nv12", "p010le", "yuyv422"])
def test_repacked_formats_are_read_as_their_planar_twin(name: str) -> None:
    tags = ColourTags(1, 1, 1, False)
    rgb = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    planar = rgb_to_frame(rgb, PixelLayout.of(name).planar_name(), tags)
    packed = repack(planar, name)
    for _ in range(100):  # with threads, libswscale gets one small p010 picture in ten wrong
        assert torch.equal(frame_to_rgb(packed, tags), frame_to_rgb(planar, tags))


def test_ten_bits_are_not_flattened() -> None:
    """Neighbouring 10-bit codes stay apart; through 8 bits four of them would be one."""
    frame = av.VideoFrame(8, 1, "yuv444p10le")
    for plane, values in zip(frame.planes, (range(400, 408), [512] * 8, [512] * 8)):
        rows = np.zeros(plane.line_size // 2, np.uint16)
        rows[:8] = list(values)
        plane.update(rows.tobytes())
    row = frame_to_rgb(frame, ColourTags(9, 9, 16, False))[0, 0]
    want = (torch.arange(400, 408, dtype=torch.float64) - 64) / 876
    assert (row - want).abs().max() <= 1e-6


def test_matrix_of_untagged_and_unknown_video() -> None:
    assert resolve_matrix(2, 1280, 720, "yuv") == 1
    assert resolve_matrix(2, 720, 576, "yuv") == 6
    assert resolve_matrix(9, 64, 48, "yuv") == 9
    with pytest.raises(VideoError, match=r"colour matrix 10 \(ITU-T H.273\) is not supported"):
        resolve_matrix(10, 64, 48, "yuv")
