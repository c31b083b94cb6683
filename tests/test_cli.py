"""The command line: one clear line for what users get wrong, a traceback for what we get wrong."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from video.media import BoxNet, make_video, read_video, smooth_frame

import mafnet.demo
import mafnet.evaluate
import mafnet.train
import mafnet.video
import mafnet.video.run
import mafnet_ops
from mafnet.cli import _threads, _time, main
from mafnet.data.degrade import bd_downscale, bi_downscale
from mafnet.video import EncodeSettings, UpscaleOptions, UpscaleReport
from mafnet.video.read import VideoReader

COMMANDS = ["upscale", "demo", "train", "eval", "degrade", "metrics", "export", "doctor"]


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> BoxNet:
    """`--model` gives this network."""
    net = BoxNet(4)
    monkeypatch.setattr(mafnet.video.run, "load_model", lambda *_: net)
    return net


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert re.fullmatch(r"mafnet: error: [^\n]+\n", stderr), stderr
    return stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mafnet {mafnet_ops.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"mafnet {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["upscale", "a.mp4"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_no_more_threads_than_processors() -> None:
    assert _threads("1") == 1
    assert _threads("100000") == os.cpu_count()


@pytest.mark.usefixtures("net")
@pytest.mark.parametrize("terminal", [True, False])
def test_upscale(
    tmp_path: Path,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    clip = make_video(tmp_path / "in.mp4", count=4, size=(16, 24))
    line = ["upscale", str(tmp_path / "in.mp4"), "-o", str(tmp_path / "out.mp4"), "--dtype=bf16"]
    assert main([*line, "--device=cpu"]) == 0
    frames, _ = read_video(tmp_path / "out.mp4")
    assert len(frames) == len(clip.frames) and frames[0].shape == (64, 96, 3)
    captured = capsys.readouterr()
    assert "4 frames of 96x64" in captured.out and "bf16 on cpu" in captured.out
    assert ("in.mp4: " in captured.err) == terminal  # the progress bar


def test_every_option_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, Path, UpscaleOptions]] = []

    def record(source: Path, target: Path, options: UpscaleOptions) -> UpscaleReport:
        calls.append((source, target, options))
        return UpscaleReport(1, (4, 4), 1.0, "fp32 on cpu", ())

    monkeypatch.setattr(mafnet.video, "upscale", record)
    line = (
        "upscale a.mp4 -o b.mkv --model base --device cpu --dtype bf16 --chunk 9 --overlap 0 "
        "--tile 96 --tile-overlap 24 --start 1:02.5 --end 90 --damaged keep --overwrite -q "
        "--threads 1 --codec libx265 --crf 20.5 --preset slow --pix-fmt yuv420p10le --audio none"
    )
    assert main(line.split()) == 0
    encode = EncodeSettings("libx265", 20.5, "slow", "yuv420p10le", False, 1)
    options = UpscaleOptions(
        "base", "cpu", "bf16", 9, 0, 96, 24, 62.5, 90.0, "keep", True, False, 1, encode
    )
    assert calls == [(Path("a.mp4"), Path("b.mkv"), options)]
    main(["upscale", "a.mp4", "-o", "b.mkv"])
    assert calls[1][2] == UpscaleOptions()


@pytest.mark.usefixtures("net")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("upscale none.mp4 -o out.mp4", "none.mp4: no such file or folder"),
        ("upscale in.mp4 -o no/out.mp4", "no/out.mp4: the output folder no does not exist"),
        ("upscale in.mp4 -o out.mp4 --codec x", "--codec: unknown encoder 'x'"),
        ("upscale in.mp4 -o out.mp4 --device x", "--device: 'x' cannot be used"),
        ("upscale in.mp4 -o out.mp4 --device meta", "--device: 'meta' cannot be used"),
        ("upscale in.mp4 -o out.mp4 --start 99", "in.mp4: no video frame between 99 s and the end"),
        ("degrade none -o out", "none: no such folder"),
        ("degrade . -o out", ".: no image in this folder"),
        ("metrics none none", "none: no such folder"),
        ("export --onnx no/x.onnx", "no/x.onnx: the folder no does not exist"),
        ("eval . -o no/scores.json", "no/scores.json: the folder no does not exist"),
    ],
)
def test_one_line_for_what_users_get_wrong(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "in.mp4", count=2)
    assert main(arguments.split()) == 1
    assert message in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CheckpointError of the library, which is no VideoError."""
    make_video(tmp_path / "in.mp4", count=2)
    arguments = ["upscale", str(tmp_path / "in.mp4"), "-o", str(tmp_path / "out.mp4")]
    assert main([*arguments, "--model", "nonsense"]) == 1
    assert "nonsense" in error_line(capsys)


def test_a_bug_keeps_its_traceback(
    tmp_path: Path, net: BoxNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(net, "reconstruct", broken)
    make_video(tmp_path / "in.mp4", count=2)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["upscale", str(tmp_path / "in.mp4"), "-o", str(tmp_path / "out.mp4"), "-q"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("5", 5), ("1.25", 1.25), ("1:02.5", 62.5), ("1:00:00", 3600)]
)
def test_times(text: str, seconds: float) -> None:
    assert _time(text) == seconds


@pytest.mark.parametrize(
    "option", ["--start=-1", "--start=x", "--chunk=0", "--tile=-5", "--dtype=x"]
)
def test_bad_values(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["upscale", "a.mp4", "-o", "b.mp4", option])
    assert caught.value.code == 2
    assert f"argument {option.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "function"), [("BI", bi_downscale), ("BD", bd_downscale)])
def test_degrade(tmp_path: Path, mode: str, function: object) -> None:
    (tmp_path / "in").mkdir()
    frame = smooth_frame(40, 48, 1)
    Image.fromarray(frame).save(tmp_path / "in" / "a.png")
    arguments = ["degrade", "--mode", mode, str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert callable(function)
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "a.png")), function(frame))
    assert main(arguments) == 1


def test_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One level of grey is 219/255 levels of Y: 20 log10(255 / (219/255)) dB."""
    grey = np.full((16, 16, 3), 100, np.uint8)
    for name, value in (("sr", grey), ("gt", grey + 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(value).save(tmp_path / name / "a.png")
    assert main(["metrics", str(tmp_path / "sr"), str(tmp_path / "gt")]) == 0
    expected = 20 * np.log10(255 / (219 / 255))
    assert f"mean of 1  {expected:.3f} dB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "size", "message"),
    [("b", (16, 16), "no image named a"), ("a", (16, 20), "expected 16x20 as in")],
)
def test_metrics_of_folders_that_do_not_match(
    tmp_path: Path,
    other: str,
    size: tuple[int, int],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, name, pixels in (("sr", "a", (16, 16)), ("gt", other, size)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", pixels).save(tmp_path / folder / f"{name}.png")
    assert main(["metrics", str(tmp_path / "sr"), str(tmp_path / "gt")]) == 1
    assert message in error_line(capsys)


def test_train_eval_and_doctor_are_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def record(*arguments: object) -> None:
        calls.append(arguments)

    monkeypatch.setattr(mafnet.train, "main_train", record)
    monkeypatch.setattr(mafnet.evaluate, "main_eval", record)
    doctor = importlib.import_module("mafnet_ops.doctor")  # the package may name its function so
    monkeypatch.setattr(doctor, "main", record, raising=False)
    assert main(["train", "-c", "recipe.toml", "steps=3", "seed=1"]) == 0
    assert main(["eval", "clip", "--model", "m", "--limit", "3"]) == 0
    assert main(["doctor"]) == 0
    assert calls == [
        (Path("recipe.toml"), ["steps=3", "seed=1"]),
        ("m", ["clip"], 15, 1, "BI", False, 3, None),
        (),
    ]


class CubicNet(BoxNet):
    def __call__(self, frames: Tensor) -> Tensor:
        upscaled = torch.nn.functional.interpolate(frames[0], scale_factor=4, mode="bicubic")
        return upscaled[None]


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small pair of clips, whose truth is smooth: the scores must be high, and printed."""
    small, truth = (45, 80), (180, 320)
    make_video(tmp_path / "input.mp4", count=3, size=small, audio="aac")
    make_video(tmp_path / "truth.mp4", count=3, size=truth)
    monkeypatch.setattr(mafnet.demo, "CLIPS", tmp_path)
    monkeypatch.setattr(mafnet.demo, "SHOWN_FRAME", 1)
    monkeypatch.setattr(mafnet.demo, "DETAIL", (slice(0, 120), slice(0, 160)))
    monkeypatch.setattr(mafnet.video.run, "load_model", lambda *_: CubicNet(4))
    assert main(["demo", "-o", str(tmp_path / "out"), "--device=cpu", "--dtype=fp32"]) == 0
    printed = capsys.readouterr().out
    scores = [float(value) for value in re.findall(r"([\d.]+) dB", printed)]
    assert len(scores) == 2 and all(30 < value < 60 for value in scores)
    assert "flow_warp: " in printed and "fp32 on cpu" in printed
    frames, _ = read_video(tmp_path / "out" / "demo.mp4")
    assert len(frames) == 3 and frames[0].shape == (*truth, 3)
    sheet = np.array(Image.open(tmp_path / "out" / "comparison.png"))
    assert sheet.shape == (28 + 270 + 360, 3 * 480, 3)
    assert sheet[:28].max() > 128 and sheet[28:].std() > 10


def test_bundled_clip_is_a_pair() -> None:
    """The input is the reduced truth, frame for frame, but for its near-lossless coding."""
    with (
        VideoReader(mafnet.demo.CLIPS / "truth.mp4") as truth,
        VideoReader(mafnet.demo.CLIPS / "input.mp4") as small,
    ):
        pairs = list(zip(truth, small))
    assert len(pairs) == 25
    large, reduced = (mafnet.demo.to_picture(frame.rgb) for frame in pairs[24])
    error = (bi_downscale(large).astype(float) - reduced) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 40  # a neighbouring frame: below 30
    assert [a.pts for a, _ in pairs] == [b.pts for _, b in pairs]
