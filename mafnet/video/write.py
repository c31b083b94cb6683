"""Encoding upscaled frames beside the untouched audio and subtitles of the source."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from torch import Tensor

from .colour import MATRIX_BT709, MATRIX_RGB, ColourTags, PixelLayout, rgb_to_frame
from .errors import VideoError
from .read import VideoInfo, open_container

DEFAULT_ENCODERS = {".webm": "libvpx-vp9"}
# Visually lossless without absurd files; other encoders keep their own default quality.
DEFAULT_CRF = {"libx264": "16", "libx264rgb": "16", "libx265": "18", "libvpx-vp9": "20"}
# MP4 keeps the start of a stream in movie ticks, 1 ms by default: too coarse for exact times.
MOV_FAMILY = {".mp4", ".mov", ".m4v"}
MAX_MOVIE_TIMESCALE = 1_000_000
# The first packet of AAC or Opus lies before time 0, for which their muxer would move all streams.
MATROSKA_FAMILY = {".mkv", ".webm"}
TIMES_NONSTRICT = 1 << 17  # AVFMT_TS_NONSTRICT: equal DTS are right
COPIED_KINDS = {"audio", "subtitle"}
# Described by the muxer itself, or true of the source file only.
OWN_METADATA = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}


@dataclass(frozen=True)
class EncodeSettings:
    """What the user may choose; None takes the default that fits the source and the container."""

    codec: str | None = None
    crf: float | None = None
    preset: str | None = None
    pixel_format: str | None = None
    copy_audio: bool = True
    threads: int | None = None


def choose_pixel_format(encoder: Any, wanted: str | None, source: str) -> str:
    """The encoder's format nearest to the source's subsampling and depth, never fewer samples."""
    offered = [pixels.name for pixels in encoder.video_formats or []]
    if wanted is not None:
        if offered and wanted not in offered:
            raise VideoError(
                f"--pix-fmt: {encoder.name} takes {', '.join(offered)}, got {wanted!r}"
            )
        return wanted
    layout = PixelLayout.of(source)
    chroma = 0 if layout.family == "rgb" else 2 if layout.family == "grey" else _chroma(layout)
    depth = 8 if layout.depth <= 8 else 10 if layout.depth <= 10 else 12
    candidates = [
        _planar(subsampling, bits) for bits in (depth, 10, 8) for subsampling in (chroma, 2)
    ]
    for name in [*candidates, "yuv420p", "yuv422p10le", *offered]:
        if not offered or name in offered:
            return name
    raise VideoError(f"--codec: {encoder.name} has no pixel format")


def find_encoder(name: str) -> Any:
    try:
        encoder = av.codec.Codec(name, "w")
    except ValueError as error:
        raise VideoError(f"--codec: unknown encoder {name!r}") from error
    if encoder.type != "video":
        raise VideoError(f"--codec: {name!r} is an encoder for {encoder.type}, not for video")
    return encoder


class VideoWriter:
    """Write `path`, a temporary name for `target`. `finish` completes and checks the file.

    Time stamps are in `info.time_base` ticks less `shift` seconds. Copied packets come from a
    second, independent reading of the source, kept in step with the video by time.
    """

    def __init__(
        self,
        path: Path,
        target: Path,
        info: VideoInfo,
        size: tuple[int, int],
        settings: EncodeSettings,
        shift: Fraction = Fraction(0),
        end: Fraction | None = None,
    ) -> None:
        self.path, self.target = path, target
        self.notes: list[str] = []
        self._info = info
        self._written: array[int] = array("q")  # PTS of every frame given: 8 bytes each
        self._durations: dict[int, int] = {}
        self._output = _open_output(path, target, info.time_base)
        self._copied: CopiedStreams | None = None
        try:
            self._stream = self._add_video(size, settings)
            self._copied = CopiedStreams(
                info.path, target, self._output, settings.copy_audio, shift, end
            )
            self.notes += self._copied.notes
            self._start()
        except BaseException:
            self.abandon()
            raise

    def write(self, rgb: Tensor, pts: int, duration: int | None) -> None:
        """Encode one (3, H, W) float frame, and copy everything else that is due by then."""
        frame = rgb_to_frame(rgb, self.pixel_format, self.tags)
        frame.pts, frame.time_base = pts, self._info.time_base
        if duration:
            self._durations[pts] = duration
        self._written.append(pts)
        assert self._copied is not None
        try:
            self._mux(self._stream.encode(frame))
            self._copied.advance(float(pts * self._info.time_base))
        except (av.FFmpegError, OSError) as error:
            raise self._write_error(error) from error

    def finish(self) -> None:
        """Flush, close, and check that the file holds exactly the frames that were given."""
        assert self._copied is not None
        try:
            self._mux(self._stream.encode(None))
            self._copied.advance(None)
            self._output.close()
        except (av.FFmpegError, OSError) as error:
            raise self._write_error(error) from error
        self._copied.close()
        self.notes += self._copied.repairs()
        self._check_frames()

    def abandon(self) -> None:
        """Close without caring for the content, after a failure."""
        if self._copied is not None:
            self._copied.close()
        with suppress(av.FFmpegError, OSError):  # the failure that led here is the one to report
            self._output.close()

    def _add_video(self, size: tuple[int, int], settings: EncodeSettings) -> Any:
        info = self._info
        name = settings.codec or DEFAULT_ENCODERS.get(self.target.suffix.lower(), "libx264")
        encoder = find_encoder(name)
        self.pixel_format = choose_pixel_format(encoder, settings.pixel_format, info.pixel_format)
        self.tags = output_tags(info.tags, self.pixel_format)
        self._options: dict[str, str] = {}
        if settings.crf is not None:
            self._options["crf"] = f"{settings.crf:g}"
        elif name in DEFAULT_CRF:
            self._options["crf"] = DEFAULT_CRF[name]
        if settings.preset is not None:
            self._options["preset"] = settings.preset
        try:
            stream = self._output.add_stream(name, rate=info.rate, options=dict(self._options))
        except ValueError as error:
            raise VideoError(f"{self.target}: {error}") from error
        context = stream.codec_context
        stream.time_base = context.time_base = info.time_base
        context.width, context.height = size
        context.pix_fmt = self.pixel_format
        context.colorspace, context.color_primaries = self.tags.matrix, self.tags.primaries
        context.color_trc = self.tags.transfer
        context.color_range = 2 if self.tags.full_range else 1
        if info.sample_aspect_ratio:
            context.sample_aspect_ratio = info.sample_aspect_ratio
        if settings.threads:
            context.thread_count = settings.threads
        if not self._knows_negative_times():
            context.max_b_frames = 0  # their decoding begins before time 0; AVI has no other order
        return stream

    def _knows_negative_times(self) -> bool:
        return self.target.suffix.lower() in MOV_FAMILY | MATROSKA_FAMILY

    def _start(self) -> None:
        context = self._stream.codec_context
        chosen = ", ".join(f"{k}={v}" for k, v in self._options.items())
        asked = (
            f"{context.name} refuses {context.width}x{context.height} {self.pixel_format} {chosen}"
        )
        try:
            context.open()  # a context that fails to is not touched again: PyAV 19 then crashes
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.target}: {asked}: {_reason(error)}") from error
        try:
            self._output.start_encoding()
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.target}: {_reason(error)}") from error
        unused = [name for name in self._options if name in context.options]
        if unused:
            raise VideoError(f"--{unused[0]}: encoder {context.name} has no such option")

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            duration = self._durations.pop(packet.pts, None)
            if duration:
                packet.duration = duration
            self._output.mux(packet)

    def _write_error(self, error: BaseException) -> VideoError:
        return VideoError(f"{self.target}: writing fails: {_reason(error)}")

    def _check_frames(self) -> None:
        """frames out == frames in, each within one tick of its time stamp."""
        with open_container(self.path) as container:
            stream = container.streams.video[0]
            packets = [p.pts for p in container.demux(stream) if p.size]
            tick = stream.time_base
        if len(packets) != len(self._written):
            raise VideoError(
                f"{self.target}: {len(self._written)} frames went in, {len(packets)} came out"
            )
        if None in packets:
            raise VideoError(f"{self.target}: this container holds no time stamps")
        found = sorted(packets)
        given_tick = self._info.time_base
        later = Fraction(0)
        if not self._knows_negative_times():
            later = found[0] * tick - self._written[0] * given_tick
        if later > max(tick, given_tick):
            self.notes.append(
                f"all streams begin {float(later):.3f} s later: this container knows no time before 0"
            )
        for index, (given, kept) in enumerate(zip(self._written, found)):
            before, after = given * given_tick, kept * tick - later
            if abs(before - after) > max(tick, given_tick):
                raise VideoError(
                    f"{self.target}: frame {index} moved from {float(before):.6f} s "
                    f"to {float(after):.6f} s; this container cannot hold its time stamps"
                )


class CopiedStreams:
    """Audio and subtitle packets of the source, muxed bit by bit into the output."""

    def __init__(
        self,
        source: Path,
        target: Path,
        output: Any,
        copy_audio: bool,
        shift: Fraction,
        end: Fraction | None,
    ) -> None:
        self.notes: list[str] = []
        self._output, self._shift, self._end = output, shift, end
        self._input = open_container(source)
        self._streams: dict[int, Any] = {}
        # Ticks from one packet to the next, at least; two subtitles may begin together.
        self._step = 0 if output.format.flags & TIMES_NONSTRICT else 1
        self._last: dict[int, int] = {}  # DTS of the last packet
        self._repaired: dict[int, int] = {}  # how many packets got another time stamp
        try:
            for stream in self._input.streams:
                if stream.type == "video" or (stream.type == "audio" and not copy_audio):
                    continue
                self._add(stream, target)
        except BaseException:
            self.close()
            raise
        self._copy_description()
        self._packets = self._demux()
        self._next = next(self._packets, None)

    def advance(self, seconds: float | None) -> None:
        """Mux every packet that is due by `seconds`; None: all that is left."""
        while self._next is not None:
            packet = self._next
            if seconds is not None and packet.dts * packet.time_base > seconds:
                return
            self._make_rising(packet)
            packet.stream = self._streams[packet.stream_index]
            self._output.mux(packet)
            self._next = next(self._packets, None)

    def repairs(self) -> list[str]:
        """What was repaired, for the notes."""
        return [
            f"stream {index}: {count} packets had no rising time stamp; repaired"
            for index, count in self._repaired.items()
        ]

    def _make_rising(self, packet: Any) -> None:
        """Muxers refuse a DTS before the last one's, some an equal one too."""
        index = packet.stream_index
        least = self._last.get(index, packet.dts - self._step) + self._step
        if packet.dts < least:
            packet.dts = least
            if packet.pts is not None:
                packet.pts = max(packet.pts, packet.dts)
            self._repaired[index] = self._repaired.get(index, 0) + 1
        self._last[index] = packet.dts

    def close(self) -> None:
        self._input.close()

    def _add(self, stream: Any, target: Path) -> None:
        try:
            if stream.type not in COPIED_KINDS:
                raise ValueError(f"{stream.type} streams are not copied")
            copy = self._output.add_stream_from_template(stream)
        except ValueError as error:
            if stream.type == "audio":
                raise VideoError(
                    f"{target}: this container cannot hold the source's audio "
                    f"({stream.codec_context.name if stream.codec_context else 'unknown codec'}); "
                    "use another one, such as .mkv, or --audio none"
                ) from error
            self.notes.append(f"stream {stream.index} is left out: {error}")
            return
        copy.metadata.update(stream.metadata)
        copy.disposition = int(stream.disposition)
        self._streams[stream.index] = copy

    def _copy_description(self) -> None:
        kept = {k: v for k, v in self._input.metadata.items() if k.lower() not in OWN_METADATA}
        self._output.metadata.update(kept)
        if not self._shift and self._end is None and self._input.chapters():
            self._output.set_chapters(self._input.chapters())

    def _demux(self) -> Iterator[Any]:
        """Packets with a time stamp inside the wanted range, moved to the output's clock."""
        copied = [self._input.streams[index] for index in self._streams]
        if not copied:
            return
        if self._shift:
            self._input.seek(int(self._shift * av.time_base))
        for packet in self._input.demux(copied):
            if packet.dts is None:
                continue
            if self._shift or self._end is not None:
                shift = round(self._shift / packet.time_base)
                packet.dts -= shift
                if packet.pts is not None:
                    packet.pts -= shift
                time = packet.dts * packet.time_base
                if (self._shift and time < 0) or (self._end is not None and time >= self._end):
                    continue
            yield packet


def output_tags(source: ColourTags, pixel_format: str) -> ColourTags:
    """The source's tags; where RGB becomes YCbCr or the reverse, what that needs."""
    if PixelLayout.of(pixel_format).family == "rgb":
        return ColourTags(MATRIX_RGB, source.primaries, source.transfer, True)
    if source.matrix == MATRIX_RGB:
        return ColourTags(MATRIX_BT709, source.primaries, source.transfer, False)
    return source


def _open_output(path: Path, target: Path, time_base: Fraction) -> Any:
    options = {}
    if target.suffix.lower() in MATROSKA_FAMILY:
        options["avoid_negative_ts"] = "disabled"
    if target.suffix.lower() in MOV_FAMILY and time_base.denominator <= MAX_MOVIE_TIMESCALE:
        options["movie_timescale"] = str(time_base.denominator)
    try:
        return av.open(str(path), "w", options=options)
    except ValueError as error:
        raise VideoError(
            f"{target}: no container is known for the name ending {target.suffix!r}"
        ) from error
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{target}: cannot be written: {_reason(error)}") from error


def _chroma(layout: PixelLayout) -> int:
    return layout.sub_x + layout.sub_y


def _planar(subsampling: int, bits: int) -> str:
    name = ("yuv444p", "yuv422p", "yuv420p")[subsampling]
    return name if bits == 8 else f"{name}{bits}le"


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
