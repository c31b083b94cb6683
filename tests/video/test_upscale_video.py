"""`upscale` on whole files: all frames, times and sound arrive; failures leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video.media import (
    REORDERED,
    TICK,
    BoxNet,
    delay_matroska_packet,
    make_video,
    packets,
    read_video,
    rotate_mp4,
    smooth_frame,
)

from mafnet.video import EncodeSettings, UpscaleOptions, VideoError, upscale
from mafnet.video.read import VideoReader, display_orientation
from mafnet.video.run import pick_dtype

LOSSLESS = EncodeSettings(crf=0, preset="ultrafast")
QUIET = UpscaleOptions(progress=False, encode=LOSSLESS)
VFR = [0, 512, 700, 701, 2000, 4000, 4100, 9000, 9512, 12000]

WORDS = ("Hello", "together")

# Two float conversions and two roundings to 8 bits lie between source and result; each code of Y is
# worth 255/219 levels of RGB and each of Cb, Cr up to 1.8556 * 255/224 (BT.709 blue).
ONE_CODE = 255 / 219 + 1.8556 * 255 / 224
ROUND_TRIP = 0.5 * ONE_CODE + 0.5
# The test's own decoding by swscale adds its integer arithmetic on top.
SWSCALE = 1.0


def run(source: Path, target: Path, net: BoxNet | None = None, **changes: object) -> object:
    return upscale(source, target, replace(QUIET, **changes), net or BoxNet(scale=1))


@pytest.mark.parametrize("container", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("pts", [None, VFR, [7000 + 512 * i for i in range(10)]])
def test_frames_and_times_arrive(tmp_path: Path, container: str, pts: list[int] | None) -> None:
    source, target = tmp_path / f"in.{container}", tmp_path / f"out.{container}"
    if container == "mkv" and pts == VFR:
        pts = [16 * stamp for stamp in VFR]  # Matroska counts in milliseconds, 12.8 ticks each
    exact = {} if container == "mkv" else {"movie_timescale": "12800"}
    clip = make_video(source, pts=pts, container_options=exact, options=REORDERED)
    report = run(source, target, chunk=4, overlap=1)
    frames, times = read_video(target)
    _, expected = read_video(source)
    assert report.frames == len(frames) == len(clip.frames)
    assert times == expected
    if container != "mkv":
        assert times == [stamp * TICK for stamp in clip.pts]
    for got, want in zip(frames, clip.frames):
        assert np.abs(got.astype(int) - want).max() <= ROUND_TRIP + 2 * SWSCALE + ONE_CODE


def test_source_has_b_frames(tmp_path: Path) -> None:
    """The fixtures must reorder, or the tests above prove nothing about it."""
    make_video(tmp_path / "in.mp4", options=REORDERED)
    with av.open(str(tmp_path / "in.mp4")) as container:
        stamps = [p.pts for p in container.demux(video=0) if p.size]
    assert stamps != sorted(stamps)


def test_the_last_frame_stays_as_long(tmp_path: Path) -> None:
    """Its duration cannot be read off the next time stamp."""
    make_video(tmp_path / "in.mp4", pts=VFR, last_duration=9000)
    run(tmp_path / "in.mp4", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base == (VFR[-1] + 9000) * TICK


@pytest.mark.parametrize(
    ("source", "target", "codec"),
    [
        ("in.mp4", "out.mp4", "aac"),
        ("in.mp4", "out.mkv", "aac"),
        ("in.mkv", "out.mkv", "libopus"),
        ("in.mkv", "out.mp4", "ac3"),
        ("in.ts", "out.mkv", "mp2"),
    ],
)
def test_sound_is_copied_bit_by_bit(tmp_path: Path, source: str, target: str, codec: str) -> None:
    make_video(tmp_path / source, count=30, audio=codec)
    run(tmp_path / source, tmp_path / target, chunk=4)
    before, after = packets(tmp_path / source, "audio"), packets(tmp_path / target, "audio")
    assert len(before) > 10
    assert [data for data, _ in after] == [data for data, _ in before]
    _, video_before = read_video(tmp_path / source)
    _, video_after = read_video(tmp_path / target)
    drift = [
        (a - va) - (b - vb)
        for (_, a), (_, b), va, vb in zip(
            after, before, [video_after[0]] * len(after), [video_before[0]] * len(before)
        )
    ]
    assert max(map(abs, drift)) <= Fraction(1, 1000) + Fraction(1, 48000)


@pytest.mark.parametrize("target", ["out.mkv", "out.mp4"])
def test_audio_times_that_do_not_rise_are_repaired(tmp_path: Path, target: str) -> None:
    """Muxers refuse them."""
    make_video(tmp_path / "in.mkv", count=30, audio="aac")
    before = packets(tmp_path / "in.mkv", "audio")
    delay_matroska_packet(tmp_path / "in.mkv", before[7][0], -50)
    report = run(tmp_path / "in.mkv", tmp_path / target)
    after = packets(tmp_path / target, "audio")
    assert [data for data, _ in after] == [data for data, _ in before]
    late = Fraction(2, 1000) + Fraction(1, 48000)
    assert all(
        abs(a - b) <= late for (_, a), (_, b) in zip(after[:7] + after[8:], before[:7] + before[8:])
    )
    assert report.notes == ("stream 1: 1 packets had no rising time stamp; repaired",)


def test_container_that_knows_no_time_before_0(tmp_path: Path) -> None:
    """The first packet of AAC lies there: MPEG-TS lets all streams begin later, by the same time."""
    make_video(tmp_path / "in.mkv", count=30, audio="aac", pixel_format="yuv420p")
    report = run(tmp_path / "in.mkv", tmp_path / "out.ts")
    (note,) = report.notes
    assert note.startswith("all streams begin 0.021 s later")
    starts = []
    for name in ("in.mkv", "out.ts"):
        _, times = read_video(tmp_path / name)
        assert len(times) == 30
        starts.append(times[0] - packets(tmp_path / name, "audio")[0][1])
    assert abs(starts[1] - starts[0]) <= Fraction(2, 1000)


def test_file_without_time_stamps(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", count=3)
    with pytest.raises(VideoError, match=r"out\.h264: this container holds no time stamps$"):
        run(tmp_path / "in.mp4", tmp_path / "out.h264")
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_audio_none_leaves_it_out(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", audio="aac")
    run(tmp_path / "in.mp4", tmp_path / "out.mp4", encode=replace(LOSSLESS, copy_audio=False))
    assert packets(tmp_path / "out.mp4", "audio") == []


def test_audio_that_the_container_cannot_hold(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", audio="aac")
    with pytest.raises(VideoError, match=r"out\.webm: this container cannot hold .*aac.*--audio"):
        run(tmp_path / "in.mp4", tmp_path / "out.webm", encode=EncodeSettings())
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_subtitles_chapters_and_metadata(tmp_path: Path) -> None:
    make_video(tmp_path / "plain.mkv")
    lines = (f"{i}\n00:00:00,100 --> 00:00:00,300\n{word}\n\n" for i, word in enumerate(WORDS))
    (tmp_path / "text.srt").write_text("".join(lines))
    with (
        av.open(str(tmp_path / "plain.mkv")) as given,
        av.open(str(tmp_path / "text.srt")) as text,
        av.open(str(tmp_path / "in.mkv"), "w") as made,
    ):
        copy = made.add_stream_from_template(given.streams.video[0], opaque=True)
        words = made.add_stream_from_template(text.streams.subtitles[0])
        made.metadata["title"] = "a title"
        made.set_chapters(
            [{"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {}}]
        )
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                made.mux(packet)
        for packet in text.demux():
            if packet.dts is not None:
                packet.stream = words
                made.mux(packet)
    assert run(tmp_path / "in.mkv", tmp_path / "out.mkv").notes == ()
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.metadata["title"] == "a title"
        assert len(container.chapters()) == 1
    assert packets(tmp_path / "out.mkv", "subtitle") == [
        (word.encode(), Fraction(1, 10)) for word in WORDS
    ]
    report = run(tmp_path / "in.mkv", tmp_path / "out.mp4")
    assert any("left out" in note and "does not support" in note for note in report.notes)


@pytest.mark.parametrize("size", [(47, 63), (2, 2), (17, 30)])
def test_odd_sizes_and_one_frame(tmp_path: Path, size: tuple[int, int]) -> None:
    clip = make_video(tmp_path / "in.mp4", count=1, size=size)
    run(tmp_path / "in.mp4", tmp_path / "out.mp4", BoxNet(scale=4))
    (frame,), _ = read_video(tmp_path / "out.mp4")
    want = clip.frames[0].repeat(4, 0).repeat(4, 1)
    assert frame.shape == want.shape
    assert np.abs(frame.astype(int) - want).max() <= ROUND_TRIP + 2 * SWSCALE


@pytest.mark.parametrize("odd", [(47, 63), (33, 64)])
def test_odd_size_with_subsampled_chroma(tmp_path: Path, odd: tuple[int, int]) -> None:
    make_video(tmp_path / "in.mkv", size=odd, codec="ffv1", pixel_format="yuv420p", options={})
    run(tmp_path / "in.mkv", tmp_path / "out.mkv", BoxNet(scale=4))
    frames, _ = read_video(tmp_path / "out.mkv")
    assert frames[0].shape == (odd[0] * 4, odd[1] * 4, 3)


ROTATIONS = {  # display matrix (a, b, c, d): what numpy does to the stored frame
    "clockwise": ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
    "upside down": ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
    "anticlockwise": ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotated_video_comes_out_upright(tmp_path: Path, name: str) -> None:
    matrix, turn = ROTATIONS[name]
    clip = make_video(tmp_path / "in.mp4", count=3)
    rotate_mp4(tmp_path / "in.mp4", matrix)
    run(tmp_path / "in.mp4", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0
    frames, _ = read_video(tmp_path / "out.mp4")
    want = turn(clip.frames[1])
    assert frames[1].shape == want.shape
    assert np.abs(frames[1].astype(int) - want).max() <= ROUND_TRIP + 2 * SWSCALE


def test_clockwise_agrees_with_libav(tmp_path: Path) -> None:
    """The sign convention is libav's: its angle is anticlockwise."""
    make_video(tmp_path / "in.mp4", count=1)
    rotate_mp4(tmp_path / "in.mp4", ROTATIONS["clockwise"][0])
    with av.open(str(tmp_path / "in.mp4")) as container:
        assert next(container.decode(video=0)).rotation == -90


def test_slanted_display_matrix_is_refused() -> None:
    matrix = np.array([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30], np.int32)
    with pytest.raises(VideoError, match="not a multiple of 90 degrees"):
        display_orientation(matrix.tobytes())


def test_memory_is_flat(tmp_path: Path) -> None:
    """The number of decoded frames alive never depends on the length of the video."""
    net = BoxNet(scale=1, temporal_radius=2)
    most = []
    for count in (20, 60):
        source = tmp_path / f"{count}.mp4"
        make_video(source, count=count, size=(16, 16))
        run(source, tmp_path / f"{count}-out.mp4", net, chunk=5)
        most.append(net.most_frames)
    assert most == [5 + 2 * 2, 5 + 2 * 2]


def test_start_and_end(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "in.mp4", count=50, audio="aac")
    run(tmp_path / "in.mp4", tmp_path / "out.mp4", start=0.4, end=1.2)
    frames, times = read_video(tmp_path / "out.mp4")
    assert times == [512 * i * TICK for i in range(20)]
    assert np.abs(frames[0].astype(int) - clip.frames[10]).max() <= ROUND_TRIP + 2 * SWSCALE
    sound = packets(tmp_path / "out.mp4", "audio")
    whole = packets(tmp_path / "in.mp4", "audio")
    assert [d for d, _ in sound] == [d for d, t in whole if 0.4 <= t < 1.2]
    assert 0 <= sound[0][1] < Fraction(1024, 48000)


@pytest.mark.parametrize("container", ["ts", "mp4", "mkv", "avi"])
def test_start_loses_no_frame(tmp_path: Path, container: str) -> None:
    """MPEG-TS has no list of key frames, of which there is one in 25 here."""
    source, target = tmp_path / f"in.{container}", tmp_path / "out.mp4"
    make_video(source, count=60, options={"g": "25", "bf": "0"}, pixel_format="yuv420p")
    for start, expected in ((0.2, 15), (1.6, 15)):
        run(source, target, start=start, end=start + 0.6, overwrite=True)
        assert len(read_video(target)[0]) == expected, start


class FailingNet(BoxNet):
    """Breaks after `calls` windows."""

    def __init__(self, error: BaseException, calls: int) -> None:
        super().__init__(scale=1)
        self.error, self.calls = error, calls

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return super().__call__(frames)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), MemoryError()])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    make_video(tmp_path / "in.mp4", count=12, audio="aac")
    expected = VideoError if isinstance(error, MemoryError) else type(error)
    with pytest.raises(expected):
        run(tmp_path / "in.mp4", tmp_path / "out.mp4", FailingNet(error, calls=2), chunk=3)
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_failure_keeps_the_file_it_would_have_replaced(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", count=12)
    (tmp_path / "out.mp4").write_bytes(b"precious")
    net = FailingNet(ValueError("broken"), calls=2)
    with pytest.raises(ValueError, match="broken"):
        run(tmp_path / "in.mp4", tmp_path / "out.mp4", net, chunk=3, overwrite=True)
    assert (tmp_path / "out.mp4").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]


def test_output_appears_at_the_very_end(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", count=12)
    target = tmp_path / "out.mp4"
    seen = []
    upscale(
        tmp_path / "in.mp4",
        target,
        QUIET,
        BoxNet(1),
        observe=lambda *_: seen.append(target.exists()),
    )
    assert seen == [False] * 12 and target.exists()


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = sys.argv[1:3]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from pathlib import Path
from video.media import BoxNet
from mafnet.video import UpscaleOptions, VideoError, upscale
try:
    upscale(Path(sys.argv[3]), Path(sys.argv[4]), UpscaleOptions(progress=False), BoxNet(4))
except VideoError as error:
    sys.exit(str(error))
"""


def test_full_disk(tmp_path: Path) -> None:
    """A file that may not grow stands for a disk that is full."""
    make_video(tmp_path / "in.mp4", count=25)
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", FULL_DISK, tests, tests.parent, "in.mp4", "out.mp4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.strip() == "out.mp4: writing fails: File too large"
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_start_beyond_all_time_stamps(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", count=3)
    with pytest.raises(VideoError, match=r"in\.mp4: no video frame between 1e\+20 s and the end"):
        run(tmp_path / "in.mp4", tmp_path / "out.mp4", start=1e20)


def test_long_names(tmp_path: Path) -> None:
    """As long as the file system lets them be; the temporary name must not be longer."""
    make_video(tmp_path / "in.mp4", count=2)
    run(tmp_path / "in.mp4", tmp_path / f"{'a' * 250}.mp4")
    with pytest.raises(VideoError, match=r"aa\.mp4: File name too long"):
        run(tmp_path / "in.mp4", tmp_path / f"{'a' * 260}.mp4")


@pytest.mark.parametrize("container", ["mp4", "mkv", "webm", "avi"])
def test_truncated_video_is_an_error(tmp_path: Path, container: str) -> None:
    source, target = tmp_path / f"in.{container}", tmp_path / "out.mp4"
    webm = container == "webm"
    make_video(
        source,
        count=40,
        codec="libvpx-vp9" if webm else "libx264",
        options={"cpu-used": "8", "deadline": "realtime"} if webm else None,
        container_options={"movflags": "faststart"} if container == "mp4" else None,
    )
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(VideoError, match=rf"in\.{container}: .*cut short.*--damaged keep"):
        run(source, target)
    assert not target.exists()
    report = run(source, target, damaged="keep")
    assert 10 <= report.frames < 40
    assert any("cut short" in note for note in report.notes)
    assert len(read_video(target)[0]) == report.frames


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    make_video(source, count=40)
    data = bytearray(source.read_bytes())
    where = data.index(b"mdat") + len(data) // 3
    data[where : where + 2000] = bytes(2000)
    source.write_bytes(data)
    with pytest.raises(VideoError, match=r"in\.mp4: damaged"):
        run(source, tmp_path / "out.mp4")


def test_whole_file_must_not_look_truncated(tmp_path: Path) -> None:
    """Sound that is longer than the picture is no missing picture."""
    make_video(tmp_path / "in.mkv", count=3, pts=[0, 512, 20000], audio="aac")
    assert run(tmp_path / "in.mkv", tmp_path / "out.mkv").frames == 3


def bad_inputs(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mp4").touch()
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        tone = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        tone.sample_rate = 48000
        container.mux(stream.encode(tone))
        container.mux(stream.encode(None))
    make_video(folder / "headless.mp4", count=5)
    data = (folder / "headless.mp4").read_bytes()
    (folder / "headless.mp4").write_bytes(data[: data.index(b"moov")])
    with av.open(str(folder / "ictcp.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = 14
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    return {
        "missing": (folder / "nothing.mp4", "no such file"),
        "text": (folder / "text.mp4", "cannot be opened as a video"),
        "empty": (folder / "empty.mp4", "cannot be opened as a video"),
        "sound": (folder / "sound.mp4", "no video stream"),
        "headless": (folder / "headless.mp4", "cannot be opened as a video"),
        "ictcp": (folder / "ictcp.mp4", "colour matrix 14 .* is not supported"),
    }


@pytest.mark.parametrize("name", ["missing", "text", "empty", "sound", "headless", "ictcp"])
def test_bad_input(tmp_path: Path, name: str) -> None:
    source, message = bad_inputs(tmp_path)[name]
    with pytest.raises(VideoError, match=rf"{source.name}: {message}") as caught:
        run(source, tmp_path / "out.mp4")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("target", "encode", "message"),
    [
        ("nowhere/out.mp4", {}, "nowhere does not exist"),
        ("in.mp4", {}, "output and input are the same"),
        ("there.mp4", {}, "exists; give --overwrite"),
        ("folder", {}, "is a folder"),
        ("out.png", {}, "a video cannot be written as one image"),
        ("out.unknown", {}, "no container is known for the name ending '.unknown'"),
        ("out.mp4", {"codec": "nonsense"}, "--codec: unknown encoder 'nonsense'"),
        ("out.mp4", {"codec": "aac"}, "--codec: 'aac' is an encoder for audio"),
        (
            "out.mp4",
            {"pixel_format": "yuv999p"},
            "--pix-fmt: libx264 takes yuv420p.* got 'yuv999p'",
        ),
        ("out.mp4", {"preset": "warp"}, "libx264 refuses 256x192 yuv444p crf=16, preset=warp"),
        ("out.mkv", {"codec": "ffv1", "crf": 3}, "--crf: encoder ffv1 has no such option"),
        ("out.webm", {"codec": "libx264"}, r"out\.webm: .*does not support 'libx264'"),
    ],
)
def test_bad_output(tmp_path: Path, target: str, encode: dict[str, object], message: str) -> None:
    make_video(tmp_path / "in.mp4", count=3)
    (tmp_path / "there.mp4").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(VideoError, match=message) as caught:
        run(tmp_path / "in.mp4", tmp_path / target, BoxNet(4), encode=EncodeSettings(**encode))
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_same_file_under_another_name(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", count=3)
    (tmp_path / "alias.mp4").hardlink_to(tmp_path / "in.mp4")
    with pytest.raises(VideoError, match="output and input are the same"):
        run(tmp_path / "in.mp4", tmp_path / "alias.mp4", overwrite=True)


def test_frame_size_that_changes(tmp_path: Path) -> None:
    for name, size in (("a.h264", (48, 64)), ("b.h264", (32, 64))):
        make_video(tmp_path / name, count=12, size=size)
    both = (tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes()
    (tmp_path / "both.h264").write_bytes(both)
    with pytest.raises(VideoError, match=r"frame size changes from \(64, 48\) to \(64, 32\)"):
        run(tmp_path / "both.h264", tmp_path / "out.mp4")


def test_missing_time_stamps_are_repaired(tmp_path: Path) -> None:
    """A raw stream has none: frames are spaced by the rate, and the repair is told."""
    make_video(tmp_path / "in.h264", options={"qp": "0", "bf": "0"})
    report = run(tmp_path / "in.h264", tmp_path / "out.mp4")
    _, times = read_video(tmp_path / "out.mp4")
    assert times == [Fraction(i, 25) for i in range(10)]
    assert report.frames == 10


def test_interrupt_by_signal(tmp_path: Path) -> None:
    """Ctrl-C in a real process: status 130, one line, nothing left."""
    make_video(tmp_path / "in.mp4", count=40)
    tests = Path(__file__).parents[1]
    script = (
        "import os, sys, signal; sys.path[:0] = sys.argv[1:3]\n"
        "import mafnet.cli, mafnet.video.run as tool\n"
        "from video.media import BoxNet\n"
        # The tests may run in the background of a shell, whose children ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Net(BoxNet):\n"
        "    def __call__(self, *a, **k):\n"
        f"        os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "        return super().__call__(*a, **k)\n"
        "tool.load_model = lambda *_: Net(1)\n"
        "sys.exit(mafnet.cli.main(['upscale', 'in.mp4', '-o', 'out.mp4', '-q']))\n"
    )
    command = [sys.executable, "-c", script, tests, tests.parent]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1 and "interrupted" in done.stderr
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_reader_converts_by_the_tags(tmp_path: Path) -> None:
    """The same RGB, stored by another matrix or range, is read as the same RGB."""
    for colour in ((1, 1), (6, 1), (9, 1), (1, 2)):
        path = tmp_path / f"{colour}.mkv"
        make_video(path, count=1, colour=colour)
        with VideoReader(path) as reader:
            assert (reader.info.tags.matrix, reader.info.tags.full_range) == (
                colour[0],
                colour[1] == 2,
            )
            (frame,) = reader
        want = smooth_frame(48, 64, 0).transpose(2, 0, 1)
        error = np.abs(frame.rgb.numpy() * 255 - want).max()
        assert error <= ROUND_TRIP


def test_tags_are_written(tmp_path: Path) -> None:
    make_video(tmp_path / "in.mp4", count=2, colour=(6, 1))
    run(tmp_path / "in.mp4", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (6, 1)


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_automatic_arithmetic(
    capabilities: dict[str, bool], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_dtype("auto", torch.device("cpu")) == chosen
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert pick_dtype("fp32", torch.device("cpu")) == torch.float32


def test_automatic_arithmetic_of_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
