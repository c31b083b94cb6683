"""Small videos made on the spot, and networks whose output is known exactly."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TICK = Fraction(1, 12800)
# x264 without loss has no B-frames; at qp 1 it has, and errs by one code at most.
REORDERED = {"qp": "1", "x264-params": "bframes=2:b-adapt=0"}


class Statistics(NamedTuple):
    mean: Tensor
    max: Tensor


class Reconstruction(NamedTuple):
    frames: Tensor


class BoxNet:
    """x`scale` by repetition after a box blur of `radius` pixels and `temporal_radius` frames.

    Its receptive field is exact, so windows and tiles must reproduce it to rounding. `live` watches
    how many frames it is given at once.
    """

    def __init__(self, scale: int = 4, radius: int = 0, temporal_radius: int = 0) -> None:
        self.scale, self.radius, self.temporal_radius = scale, radius, temporal_radius
        self.most_frames = 0
        self.most_pixels = 0
        self.seen_statistics: list[Statistics | None] = []

    def reconstruct(
        self, frames: Tensor, select: Sequence[int] | None, statistics: Statistics | None
    ) -> Reconstruction:
        self.seen_statistics.append(statistics)
        upscaled = self(frames)
        return Reconstruction(upscaled if select is None else upscaled[:, list(select)])

    def __call__(self, frames: Tensor) -> Tensor:
        self.most_frames = max(self.most_frames, frames.shape[1])
        self.most_pixels = max(self.most_pixels, frames.shape[-1] * frames.shape[-2])
        x = frames.transpose(1, 2)
        size = (2 * self.temporal_radius + 1, 2 * self.radius + 1, 2 * self.radius + 1)
        padding = [radius for radius in reversed(size) for radius in (radius // 2, radius // 2)]
        inside = F.avg_pool3d(F.pad(torch.ones_like(x), padding), size, 1)
        x = (F.avg_pool3d(F.pad(x, padding), size, 1) / inside).transpose(1, 2)
        return x.repeat_interleave(self.scale, -2).repeat_interleave(self.scale, -1)

    def channel_statistics(self, frames: Tensor) -> Statistics:
        return Statistics(frames.mean((-2, -1)), frames.amax((-2, -1)))


@dataclass(frozen=True)
class Clip:
    """What `make_video` wrote: 8-bit RGB frames and their time stamps in ticks."""

    frames: list[np.ndarray]
    pts: list[int]


def smooth_frame(height: int, width: int, index: int) -> np.ndarray:
    """Colours that vary slowly, so that chroma subsampling loses little, and differ by frame."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase = 0.35 * index
    planes = [np.sin(2.5 * x + phase), np.cos(2 * y + phase), np.sin(2 * (x + y) - phase)]
    return np.stack([np.round(110 + 90 * plane) for plane in planes], -1).astype(np.uint8)


def code_values(frame: np.ndarray, matrix: int, colour_range: int) -> np.ndarray:
    """(h, w, 3) RGB -> (3, h, w) Y'CbCr by H.273, 8.1.4; libswscale knows BT.2020 only since PyAV 18."""
    kr, kb = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    offset, luma_span, chroma_span = (16, 219, 224) if colour_range == 1 else (0, 255, 255)
    red, green, blue = np.moveaxis(frame / 255, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))
    planes = [offset + luma_span * luma, 128 + chroma_span * cb, 128 + chroma_span * cr]
    return np.round(np.stack(planes)).clip(0, 255).astype(np.uint8)


def make_video(
    path: Path,
    count: int = 10,
    size: tuple[int, int] = (48, 64),
    pts: list[int] | None = None,
    audio: str | None = None,
    codec: str = "libx264",
    pixel_format: str = "yuv444p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    colour: tuple[int, int] = (1, 1),
    last_duration: int | None = None,
) -> Clip:
    """Encode `count` frames of (height, width) `size`, losslessly unless `options` says otherwise.

    `pts` are in 1/12800 s, 25 frames a second by default; `colour` is (matrix, range).
    """
    pts = pts if pts is not None else [512 * index for index in range(count)]
    frames = [smooth_frame(*size, index) for index in range(count)]
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        default = {"qp": "0"} if codec == "libx264" else {}
        stream.options = default if options is None else options
        context = stream.codec_context
        stream.time_base = context.time_base = TICK
        context.height, context.width = size
        context.pix_fmt = pixel_format
        context.colorspace, context.color_range = colour
        sound = container.add_stream(audio, rate=48000) if audio else None
        container.start_encoding()
        for frame, stamp in zip(frames, pts):
            picture = av.VideoFrame.from_ndarray(code_values(frame, *colour), "yuv444p")
            if pixel_format != "yuv444p":
                picture = picture.reformat(format=pixel_format, interpolation=0x42000 | 4)
            picture.pts, picture.time_base = stamp, TICK
            container.mux(stream.encode(picture))
        rest = stream.encode(None)
        for packet in rest:
            if last_duration and packet.pts == pts[-1]:
                packet.duration = last_duration
        container.mux(rest)
        if sound is not None:
            _add_tone(container, sound, count / 25)
    return Clip(frames, pts)


def _add_tone(container: object, stream: object, seconds: float) -> None:
    samples = np.arange(round(48000 * seconds)) / 48000
    tone = np.stack([np.sin(2764.6 * samples), np.sin(4146.9 * samples)]).astype(np.float32) / 4
    frame = av.AudioFrame.from_ndarray(tone, "fltp", "stereo")
    frame.sample_rate, frame.pts = 48000, 0
    layout = stream.codec_context  # type: ignore[attr-defined]
    resampler = av.AudioResampler(layout.format, layout.layout, 48000, layout.frame_size or 1024)
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(part))  # type: ignore[attr-defined]
    container.mux(stream.encode(None))  # type: ignore[attr-defined]


def rotate_mp4(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write the display matrix (a, b, c, d) into the first track header of an MP4."""
    data = bytearray(path.read_bytes())
    where = data.index(b"tkhd") + 4
    assert data[where] == 0, "version 0 track header"
    a, b, c, d = (value * 65536 for value in matrix)
    struct.pack_into(">9i", data, where + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def delay_matroska_packet(path: Path, packet: bytes, milliseconds: int) -> None:
    """Add to the time stamp in front of a packet: 16 bits and a byte of flags."""
    data = bytearray(path.read_bytes())
    where = data.index(packet) - 3
    (stamp,) = struct.unpack_from(">h", data, where)
    struct.pack_into(">h", data, where, stamp + milliseconds)
    path.write_bytes(data)


def read_video(path: Path) -> tuple[list[np.ndarray], list[Fraction]]:
    """RGB frames, decoded without the tool's own colour conversion, and times in seconds."""
    frames, times = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            rgb = frame.reformat(format="rgb24", interpolation=0x42000 | 4)
            frames.append(rgb.to_ndarray())
            times.append(frame.pts * frame.time_base)
    return frames, times


def packets(path: Path, kind: str) -> list[tuple[bytes, Fraction]]:
    """Content and time of every packet of one kind of stream."""
    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        return [
            (bytes(packet), packet.pts * packet.time_base)
            for packet in (container.demux(streams) if streams else ())
            if packet.size
        ]


def tensor(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255
