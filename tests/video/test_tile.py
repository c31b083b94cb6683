"""Tiles and windows reproduce the whole: exactly where the receptive field fits the context."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from video.media import BoxNet

from mafnet.video import VideoError
from mafnet.video.stream import Frame, plan_window, upscale_frames, windows
from mafnet.video.tile import BLEND, spans, upscale_window, weights

# float32 rounding of two means of up to 49x49 values and of a weighted sum of four tiles.
EXACT = 64 * torch.finfo(torch.float32).eps


def clip(frames: int = 1, height: int = 70, width: int = 90) -> Tensor:
    return torch.rand(1, frames, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [(70, 90), (64, 64), (33, 97), (16, 129), (1, 40)])
@pytest.mark.parametrize(("tile", "halo"), [(32, 16), (16, 16), (48, 32)])
def test_tiles_equal_the_whole(size: tuple[int, int], tile: int, halo: int) -> None:
    """The context beyond the cross-fade is halo - BLEND / 2: a net that sees no more is exact."""
    net = BoxNet(scale=4, radius=halo - BLEND // 2)
    frames = clip(2, *size)
    whole = net(frames)[0]
    tiled = upscale_window(net, frames, slice(0, 2), tile, halo)
    assert (tiled - whole).abs().max() <= EXACT
    assert net.most_pixels <= max(size[0] * size[1], (tile + 2 * halo) ** 2)


def test_a_wider_receptive_field_is_seen() -> None:
    """The test above can fail: one pixel more than the context, and tiles differ."""
    net = BoxNet(scale=4, radius=16 - BLEND // 2 + 3)
    frames = clip()
    tiled = upscale_window(net, frames, slice(0, 1), 32, 16)
    assert (tiled - net(frames)[0]).abs().max() > 1e-4


class PlaneNet(BoxNet):
    """Answers each tile with one constant, which differs from call to call."""

    calls = 0

    def __call__(self, frames: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(super().__call__(frames), float(self.calls % 2))


def test_seams_are_cross_faded() -> None:
    """Tiles that disagree by 1: no two neighbouring pixels differ by more than a step."""
    row = upscale_window(PlaneNet(4), clip(1, 16, 64), slice(0, 1), 32, 16)[0, 0, 8]
    assert (row[1:] - row[:-1]).abs().max() <= 1 / (BLEND * 4) + EXACT
    assert row.min() == 0 and row.max() == 1


@pytest.mark.parametrize(("size", "tile", "halo"), [(100, 32, 16), (64, 64, 32), (33, 16, 16)])
def test_spans_partition_and_are_aligned(size: int, tile: int, halo: int) -> None:
    tiles = spans(size, tile, halo)
    covered = [pixel for span in tiles for pixel in range(span.core, span.core_end)]
    assert covered == list(range(size))
    for span in tiles:
        assert span.start % 16 == 0 and (span.end % 16 == 0 or span.end == size)
        assert span.start == max(span.core - halo, 0) and span.end <= size
    total = torch.zeros(size * 4)
    for span, weight in zip(tiles, weights(tiles, halo, 4)):
        total[span.start * 4 : span.end * 4] += weight
    assert (total - 1).abs().max() <= EXACT


def test_tiles_share_the_statistics_of_the_whole_frame() -> None:
    net = BoxNet(4)
    frames = clip(3)
    upscale_window(net, frames, slice(1, 2), 32, 16)
    whole = net.channel_statistics(frames)
    assert len(net.seen_statistics) == 9
    for given in net.seen_statistics:
        assert torch.equal(given.mean, whole.mean) and torch.equal(given.max, whole.max)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 23])
@pytest.mark.parametrize(("chunk", "overlap"), [(1, 0), (1, 3), (5, 0), (5, 2), (4, 9)])
def test_windows(count: int, chunk: int, overlap: int) -> None:
    kept: list[int] = []
    for items, keep in windows(range(count), chunk, overlap):
        assert len(items) <= chunk + 2 * overlap
        assert items == list(range(items[0], items[-1] + 1))
        new = items[keep]
        assert items[0] == max(0, new[0] - overlap)
        assert items[-1] == min(count - 1, new[0] + chunk - 1 + overlap)
        kept += new
    assert kept == list(range(count))


def test_windows_draw_no_frame_early() -> None:
    """Memory is bounded only if the source is read no further than the window."""
    drawn: list[int] = []

    def source():
        for index in range(100):
            drawn.append(index)
            yield index

    next(iter(windows(source(), 5, 2)))
    assert len(drawn) == 7


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("tile", [0, 32])
def test_overlap_hides_the_windows(chunk: int, tile: int) -> None:
    """With the temporal receptive field as overlap, windows equal the whole clip."""
    net = BoxNet(scale=2, radius=1, temporal_radius=2)
    frames = clip(11, 40, 48)
    whole = net(frames)[0]
    plan = plan_window(net, 40, 48, chunk=chunk, tile=tile)
    source = (Frame(rgb, index) for index, rgb in enumerate(frames[0]))
    stamps, upscaled = zip(*((f.pts, x.clone()) for f, x in upscale_frames(net, source, plan)))
    assert list(stamps) == list(range(11))
    assert (torch.stack(upscaled) - whole).abs().max() <= EXACT


@dataclass
class Config:
    self_attention_window: int | None


def test_plan_follows_the_attention_window() -> None:
    net = BoxNet(temporal_radius=2)
    net.config = Config(64)
    plan = plan_window(net, 720, 1280, tile=100, halo=20)
    assert (plan.tile, plan.halo, plan.overlap) == (128, 64, 2)


def test_plan_bounds_memory() -> None:
    net = BoxNet(temporal_radius=2)
    small = plan_window(net, 180, 320)
    assert small.tile == 0
    assert (small.chunk + 2 * small.overlap) * 180 * 320 <= 1_000_000
    large = plan_window(net, 1080, 1920)
    assert large.tile > 0
    pixels = (large.chunk + 2 * large.overlap) * (large.tile + 2 * large.halo) ** 2
    assert pixels <= 1_000_000
    assert plan_window(net, 1080, 1920, tile=0).tile == 0
    assert plan_window(net, 4320, 7680).chunk >= 1


def test_overlap_too_small_to_blend() -> None:
    with pytest.raises(VideoError, match="--tile-overlap: expected at least 4 pixels, got 1"):
        plan_window(BoxNet(), 90, 90, tile=32, halo=1)
