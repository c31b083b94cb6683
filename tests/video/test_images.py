"""Single images and folders of frames: names, order, depth, alpha, refusals."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video.media import BoxNet, smooth_frame

from mafnet.video import UpscaleOptions, VideoError, upscale
from mafnet.video.images import Picture, list_frames, load_picture, save_picture

QUIET = UpscaleOptions(progress=False)


def write(path: Path, index: int = 0, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    frame = smooth_frame(*size, index)
    Image.fromarray(frame).save(path)
    return frame


def repeated(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(4, 0).repeat(4, 1)


def test_folder(tmp_path: Path) -> None:
    """Same names, natural order (context must come from the true neighbours), nothing else."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    frames = {f"f{index}": write(source / f"f{index}.png", index) for index in (1, 2, 9, 10, 11)}
    (source / "notes.txt").write_text("no image")
    seen: list[int] = []
    report = upscale(
        source,
        target,
        QUIET,
        BoxNet(4),
        lambda frame, _: seen.append(int(frame.rgb[0, 0, 0] * 255 + 0.5)),
    )
    assert report.frames == 5
    assert seen == [int(frame[0, 0, 0]) for frame in frames.values()]
    assert sorted(os.listdir(target)) == sorted(f"{name}.png" for name in frames)
    for name, frame in frames.items():
        assert np.array_equal(np.array(Image.open(target / f"{name}.png")), repeated(frame))


def test_folder_into_existing_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for folder in (source, target):
        folder.mkdir()
    write(source / "a.png")
    (target / "other.txt").write_text("kept")
    with pytest.raises(VideoError, match="out: exists; give --overwrite"):
        upscale(source, target, QUIET, BoxNet(4))
    upscale(source, target, UpscaleOptions(progress=False, overwrite=True), BoxNet(4))
    assert sorted(os.listdir(target)) == ["a.png", "other.txt"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_folder_failure_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write(source / "a.png")
    write(source / "b.png", size=(12, 20))
    with pytest.raises(VideoError, match=r"b\.png: expected 16x12 as in a\.png, got 20x12"):
        upscale(source, tmp_path / "out", UpscaleOptions(progress=False, chunk=1), BoxNet(4))
    assert os.listdir(tmp_path) == ["in"]


def test_order_is_natural(tmp_path: Path) -> None:
    for name in ("10", "9", "1", "a2", "a10"):
        (tmp_path / f"{name}.png").touch()
    assert [path.stem for path in list_frames(tmp_path)] == ["1", "9", "10", "a2", "a10"]


def test_two_images_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.jpg").touch()
    with pytest.raises(VideoError, match=r"a\.jpg and a\.png share one name"):
        list_frames(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_single_image(tmp_path: Path, suffix: str) -> None:
    frame = write(tmp_path / "in.png")
    report = upscale(tmp_path / "in.png", tmp_path / f"out{suffix}", QUIET, BoxNet(4))
    assert report.size == (64, 48)
    got = np.array(Image.open(tmp_path / f"out{suffix}").convert("RGB")).astype(int)
    error = np.abs(got - repeated(frame))
    assert error.max() == 0 if suffix == ".png" else error.mean() < 4


def test_sixteen_bits(tmp_path: Path) -> None:
    """Every one of the 65536 levels counts: a picture through the tool is bit-equal."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65536, (9, 7, 3)).astype(np.float32) / 65535
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    save_picture(tmp_path / "in.png", Picture(planes, None, 16, False), ".png")
    loaded = load_picture(tmp_path / "in.png")
    assert loaded.depth == 16 and torch.equal(loaded.rgb, planes)
    upscale(tmp_path / "in.png", tmp_path / "out.png", QUIET, BoxNet(4))
    with av.open(str(tmp_path / "out.png")) as container:
        stored = next(container.decode(video=0))
    assert stored.format.name == "rgb48be"
    want = planes.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(load_picture(tmp_path / "out.png").rgb, want)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("depth", [8, 16])
def test_alpha(tmp_path: Path, grey: bool, depth: int) -> None:
    rgb = torch.full((3, 8, 8), 0.6)
    alpha = torch.full((1, 8, 8), 0.25)
    save_picture(tmp_path / "in.png", Picture(rgb, alpha, depth, grey), ".png")
    upscale(tmp_path / "in.png", tmp_path / "out.png", QUIET, BoxNet(4))
    got = load_picture(tmp_path / "out.png")
    assert got.depth == depth and got.alpha is not None and got.alpha.shape == (1, 32, 32)
    step = 1 / (2**depth - 1)
    assert (got.alpha - 0.25).abs().max() <= step and (got.rgb - 0.6).abs().max() <= step
    with pytest.raises(VideoError, match=r"out\.jpg: in\.png has alpha, JPEG holds none"):
        upscale(tmp_path / "in.png", tmp_path / "out.jpg", QUIET, BoxNet(4))


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_stays_grey(tmp_path: Path, depth: int) -> None:
    picture = Picture(torch.full((3, 4, 4), 0.5), None, depth, True)
    save_picture(tmp_path / "in.png", picture, ".png")
    upscale(tmp_path / "in.png", tmp_path / "out.png", QUIET, BoxNet(4))
    got = load_picture(tmp_path / "out.png")
    assert got.grey and got.depth == depth and got.alpha is None


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    frame = smooth_frame(12, 16, 0)
    Image.fromarray(frame).save(tmp_path / "in.png", exif=exif)
    upscale(tmp_path / "in.png", tmp_path / "out.png", QUIET, BoxNet(4))
    got = np.array(Image.open(tmp_path / "out.png"))
    assert np.array_equal(got, repeated(np.rot90(frame, -1)))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("bad.png", "out.png", r"bad\.png: cannot be read as an image"),
        ("cut.png", "out.png", r"cut\.png: cannot be read as an image"),
        ("deep.tif", "out.png", r"deep\.tif: F pixels are read from PNG only"),
        ("huge.png", "out.png", r"huge\.png: cannot be read as an image: .* exceeds limit"),
        ("good.png", "out.mp4", r"out\.mp4: an image is written as \.jpeg, \.jpg, \.png, \.webp"),
        ("empty", "out", "empty: no image in this folder"),
        ("full", "out.mp4", r"out\.mp4: a folder of frames is written to a folder"),
        ("full", "good.png", r"good\.png: a folder of frames needs a folder"),
    ],
)
def test_refusals(tmp_path: Path, source: str, target: str, message: str) -> None:
    (tmp_path / "bad.png").write_text("no image")
    write(tmp_path / "good.png", size=(60, 60))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    header = struct.pack(">II5B", 20000, 20000, 8, 2, 0, 0, 0)
    start = whole[:12] + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "huge.png").write_bytes(start + whole[33:])
    Image.new("F", (8, 6)).save(tmp_path / "deep.tif")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "a.png")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(VideoError, match=message) as caught:
        upscale(tmp_path / source, tmp_path / target, QUIET, BoxNet(4))
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
