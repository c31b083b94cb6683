"""Decoding a video into upright float RGB frames with their exact time stamps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from torch import Tensor

from .colour import RANGE_FULL, ColourTags, PixelLayout, frame_to_rgb, resolve_matrix
from .errors import VideoError
from .stream import Frame

# Seconds by which the last packet may end before the declared end of a whole file: containers round
# and pad durations, a cut of a file is nearly always longer.
END_SLACK = 0.5
# Containers whose header states the duration of the whole file, so that a missing end shows.
DECLARING_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
SEEK_BACK = 5  # seconds before a moment, where the key frame of it is looked for first
ATTACHED_PICTURE = 1 << 10
FAR_TICKS = 1 << 62  # beyond every time stamp; libav counts in 64 bits
TRANSFERS_HDR = {16, 18}  # PQ and HLG, H.273


@dataclass(frozen=True)
class Orientation:
    """Turns a stored frame upright: transpose first, then flip rows (dim -2), columns (dim -1)."""

    transpose: bool = False
    flips: tuple[int, ...] = ()

    def apply(self, image: Tensor) -> Tensor:
        if self.transpose:
            image = image.transpose(-2, -1)
        return image.flip(self.flips) if self.flips else image.contiguous()


@dataclass(frozen=True)
class VideoInfo:
    """What the output needs to know of the source. Sizes are upright, in pixels."""

    path: Path
    width: int
    height: int
    time_base: Fraction
    rate: Fraction
    pixel_format: str
    tags: ColourTags
    sample_aspect_ratio: Fraction | None
    orientation: Orientation
    estimated_frames: int | None
    notes: tuple[str, ...]


def open_container(path: Path) -> Any:
    """An input container; raises VideoError naming the file and the cause."""
    try:
        return av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be opened as a video: {_cause(error)}") from error


def exact_seconds(value: float | Fraction | None) -> Fraction | None:
    """Decimal seconds as they were meant: 0.4 is 2/5, not the float just above it."""
    return None if value is None else Fraction(value).limit_denominator(1_000_000)


def display_orientation(matrix: bytes) -> Orientation:
    """Of a 3x3 display matrix (int32, 16.16). VideoError unless quarter turns and mirrors."""
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] / 65536.0
    if a == d == 0 and abs(b) == abs(c) == 1:  # x' = c y, y' = b x
        return Orientation(True, tuple(dim for dim, sign in ((-2, b), (-1, c)) if sign < 0))
    if b == c == 0 and abs(a) == abs(d) == 1:  # x' = a x, y' = d y
        return Orientation(False, tuple(dim for dim, sign in ((-2, d), (-1, a)) if sign < 0))
    raise VideoError(f"display matrix [{a:g} {b:g}; {c:g} {d:g}] is not a multiple of 90 degrees")


class VideoReader:
    """Iterate over `Frame`s of the first real video stream of a file, in display order.

    `start` and `end` are seconds from the beginning of the video; frames in [start, end) are
    given, with time stamps that begin anew at `start`. Damaged or missing data raises VideoError,
    or with `keep_damaged` is noted in `notes` and what can be decoded is given.
    """

    def __init__(
        self,
        path: Path,
        start: float | Fraction | None = None,
        end: float | Fraction | None = None,
        keep_damaged: bool = False,
        threads: int | None = None,
    ) -> None:
        self.path = path
        self.start, self.end = exact_seconds(start), exact_seconds(end)
        self.keep_damaged = keep_damaged
        self.notes: list[str] = []
        self._container = open_container(path)
        try:
            self._stream = self._pick_stream()
            self._stream.thread_type = "AUTO"
            if threads:
                self._stream.codec_context.thread_count = threads
            self._origin = self._find_origin()
            self._last_end = 0.0
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
            if self._first is None:
                raise VideoError(f"{path}: no video frame {self._range_text()}could be decoded")
            try:
                self.info = self._describe(self._first)
            except VideoError as error:
                raise VideoError(f"{path}: {error}") from error
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._container.close()

    @property
    def shift(self) -> Fraction:
        """Seconds subtracted from the source's time stamps."""
        return self._origin + self.start if self.start else Fraction(0)

    def __iter__(self) -> Iterator[Frame]:
        info = self.info
        step = max(1, round(1 / (info.rate * info.time_base)))
        shift = round(self.shift / info.time_base)
        last: int | None = None
        stored, self._first = self._first, None
        size = (stored.width, stored.height) if stored else None
        repaired = 0
        while stored is not None:
            if (stored.width, stored.height) != size:
                raise VideoError(
                    f"{self.path}: frame size changes from {size} to "
                    f"({stored.width}, {stored.height}) after {self._last_end:.2f} s"
                )
            pts = None if stored.pts is None else stored.pts - shift
            if pts is None or (last is not None and pts <= last):
                pts = 0 if last is None else last + (step if pts is None else 1)
                repaired += 1
            last = pts
            rgb = info.orientation.apply(frame_to_rgb(stored, info.tags))
            yield Frame(rgb, pts, stored.duration or None)
            stored = next(self._decoded, None)
        if repaired:
            self.notes.append(f"{repaired} frames had no or no rising time stamp; repaired")

    def _pick_stream(self) -> Any:
        videos = self._container.streams.video
        real = [s for s in videos if not int(s.disposition) & ATTACHED_PICTURE]
        if not real:
            what = "only a cover picture" if videos else "no video stream"
            raise VideoError(f"{self.path}: {what} in this file")
        stream = real[0]
        if stream.codec_context is None:
            raise VideoError(f"{self.path}: no decoder for its video stream")
        return stream

    def _find_origin(self) -> Fraction:
        start = self._stream.start_time
        return Fraction(0) if start is None else start * self._stream.time_base

    def _range_text(self) -> str:
        if self.start is None and self.end is None:
            return ""
        until = "the end" if self.end is None else f"{float(self.end):g} s"
        return f"between {float(self.start or 0):g} s and {until} "

    def _decode(self) -> Iterator[Any]:
        """Frames inside [start, end)."""
        first = self._origin + (self.start or 0)
        limit = None if self.end is None else self._origin + self.end
        for frame in self._decode_from(first) if self.start else self._decode_on():
            time = self._time_of(frame)
            if time is not None and limit is not None and time >= limit:
                return
            if time is None or not self.start or time >= first:
                yield frame
        self._check_end()

    def _decode_from(self, first: Fraction) -> Iterator[Any]:
        """Frames from one that is not after `first` on. A transport stream has no list of key frames: a seek may end
        behind one, and nothing before the next is decoded."""
        back = Fraction(0)
        while True:
            near = max(first - back, self._origin)
            ticks = min(int(near / self._stream.time_base), FAR_TICKS)
            self._container.seek(ticks, stream=self._stream)
            frames = self._decode_on()
            head = next(frames, None)
            time = None if head is None else self._time_of(head)
            if near == self._origin or (head is not None and (time is None or time <= first)):
                break
            back = 2 * back + SEEK_BACK
        if head is not None:
            yield head
        yield from frames

    def _decode_on(self) -> Iterator[Any]:
        """Frames from here on. All streams are demuxed, to see where the file ends."""
        try:
            for packet in self._container.demux():
                self._watch(packet)
                if packet.stream.index == self._stream.index:
                    yield from self._decode_packet(packet)
        except (av.FFmpegError, OSError) as error:
            self._damaged(f"reading stops at {self._last_end:.2f} s: {_cause(error)}")

    def _time_of(self, frame: Any) -> Fraction | None:
        return None if frame.pts is None else frame.pts * self._stream.time_base

    def _decode_packet(self, packet: Any) -> Iterator[Any]:
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            self._damaged(f"damaged data at {_seconds(packet)}: {_cause(error)}")
            return
        for frame in frames:
            if frame.is_corrupt:
                self._damaged(f"damaged frame at {frame.time or 0:.2f} s")
            yield frame

    def _watch(self, packet: Any) -> None:
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            self._last_end = max(self._last_end, end)
        if packet.is_corrupt:
            self._damaged(f"cut short or damaged at {_seconds(packet)}")

    def _check_end(self) -> None:
        container = self._container
        if container.duration is None or not DECLARING_CONTAINERS & set(
            container.format.name.split(",")
        ):
            return
        declared = container.duration / av.time_base  # counted from time 0, not from the start
        if self._last_end < declared - END_SLACK:
            self._damaged(
                f"cut short: data ends at {self._last_end:.2f} s of {declared:.2f} s declared"
            )

    def _damaged(self, what: str) -> None:
        if not self.keep_damaged:
            raise VideoError(f"{self.path}: {what} (--damaged keep upscales what can be decoded)")
        if what not in self.notes:
            self.notes.append(what)

    def _describe(self, first: Any) -> VideoInfo:
        stream, context = self._stream, self._stream.codec_context
        layout = PixelLayout.of(first.format.name)
        matrix, primaries, transfer = (
            getattr(first, name) if getattr(first, name) != 2 else getattr(context, other)
            for name, other in (
                ("colorspace", "colorspace"),
                ("color_primaries", "color_primaries"),
                ("color_trc", "color_trc"),
            )
        )
        full = RANGE_FULL in (first.color_range, context.color_range)
        full = full or first.format.name.startswith("yuvj") or layout.family == "rgb"
        matrix = resolve_matrix(int(matrix), first.width, first.height, layout.family)
        display_matrix = first.side_data.get("DISPLAYMATRIX")
        orientation = (
            Orientation() if display_matrix is None else display_orientation(bytes(display_matrix))
        )
        width, height = first.width, first.height
        aspect = stream.sample_aspect_ratio
        if orientation.transpose:
            width, height = height, width
            aspect = 1 / aspect if aspect else None
        return VideoInfo(
            path=self.path,
            width=width,
            height=height,
            time_base=stream.time_base,
            rate=stream.average_rate or stream.guessed_rate or Fraction(25),
            pixel_format=first.format.name,
            tags=ColourTags(matrix, int(primaries), int(transfer), full),
            sample_aspect_ratio=aspect,
            orientation=orientation,
            estimated_frames=self._estimate_frames(),
            notes=tuple(self._source_notes(first, int(transfer))),
        )

    def _estimate_frames(self) -> int | None:
        stream = self._stream
        if self.start is None and self.end is None and stream.frames:
            return int(stream.frames)
        seconds = None
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        elif self._container.duration is not None:
            seconds = self._container.duration / av.time_base
        if self.end is not None:
            seconds = float(self.end) if seconds is None else min(seconds, float(self.end))
        if seconds is None or not stream.average_rate:
            return None
        return max(1, round((seconds - float(self.start or 0)) * float(stream.average_rate)))

    def _source_notes(self, first: Any, transfer: int) -> Iterator[str]:
        if first.interlaced_frame:
            yield "the video is interlaced; frames are upscaled as they are, without deinterlacing"
        if transfer in TRANSFERS_HDR:
            yield "HDR video: colour tags are kept, mastering metadata is not"
        if any(component.is_alpha for component in first.format.components):
            yield "the alpha plane of the video is left out"


def _seconds(packet: Any) -> str:
    return (
        "an unknown time" if packet.pts is None else f"{float(packet.pts * packet.time_base):.2f} s"
    )


def _cause(error: BaseException) -> str:
    """The plain words of a libav error, without its number and function."""
    return str(getattr(error, "strerror", None) or error)
