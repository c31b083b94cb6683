"""Training data: motion that is true, clips without cuts, augmentation, packing and its cache."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mafnet.data import DataConfig, DataError, PackedData, VideoSource, pack, packing, sources
from mafnet.data.degrade import bi_downscale, interior_bi
from mafnet.data.graphics import graphics_sheet
from mafnet.data.sampler import Clip, augment
from mafnet.data.synthesis import (
    Layer,
    Motion,
    MovingClip,
    Occluder,
    compose,
    moving_clip,
    random_motion,
)

PATCH, FRAMES = 16, 3
SIDE = 4 * PATCH + 16


def texture(rng: np.random.Generator, height: int, width: int, period: int) -> np.ndarray:
    """Smooth coloured noise whose detail is about ``period`` pixels wide."""
    coarse = rng.integers(0, 256, size=(height // period + 2, width // period + 2, 3))
    image = Image.fromarray(coarse.astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def low_resolution(frames: np.ndarray) -> torch.Tensor:
    """(T, P, P, 3) uint8 -> (T, 3, p, p) levels 0..255."""
    return interior_bi(torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float())


def warped(image: torch.Tensor, flow: np.ndarray) -> torch.Tensor:
    """image(p + flow(p)) for (N, C, h, w) and (N, h, w, 2): the convention, spelled out."""
    height, width = image.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack([xs, ys], -1) + torch.from_numpy(flow.astype(np.float32))
    grid = 2 * points / torch.tensor([width - 1, height - 1]) - 1
    return F.grid_sample(image, grid, "bicubic", "border", align_corners=True)


def neighbours(clip: MovingClip | Clip) -> list[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    """(frame, neighbour, flow from frame to neighbour), for both directions."""
    lr = low_resolution(clip[0])
    return [(lr[1:], lr[:-1], clip[1][1:]), (lr[:-1], lr[1:], clip[2][:-1])]


def integer_clip(dx: int, dy: int) -> Clip:
    """Frames that move by whole LR pixels: the flow reconstructs them exactly."""
    still = np.random.default_rng(5).integers(0, 256, size=(160, 160, 3), dtype=np.uint8)
    corners = [(40 + 4 * t * dy, 40 + 4 * t * dx) for t in range(FRAMES)]
    frames = np.stack([still[y : y + SIDE, x : x + SIDE] for y, x in corners])
    flow = np.zeros((FRAMES, PATCH, PATCH, 2), dtype=np.float16)
    flow_prev, flow_next = flow.copy(), flow.copy()
    # The window moves by +d, so the content moves by -d.
    flow_prev[1:], flow_next[:-1] = (dx, dy), (-dx, -dy)
    return Clip(frames, flow_prev, flow_next, np.ones(flow.shape[:3], dtype=bool))


def assert_exact(clip: Clip | MovingClip) -> None:
    reach = int(max(np.abs(clip[1]).max(), np.abs(clip[2]).max()))
    assert reach > 0
    ys, xs = np.mgrid[reach : PATCH - reach, reach : PATCH - reach]
    for frame, neighbour, flow in neighbours(clip):
        for a, b, f in zip(frame.numpy(), neighbour.numpy(), flow.astype(int), strict=True):
            dx, dy = f[ys, xs, 0], f[ys, xs, 1]
            np.testing.assert_array_equal(a[:, ys, xs], b[:, ys + dy, xs + dx])


def pan(step: complex) -> np.ndarray:
    """(FRAMES,) complex: ``step`` per frame, 0 in the middle one."""
    return step * (np.arange(FRAMES) - FRAMES // 2).astype(np.complex128)


def test_flow_finds_the_same_material_point() -> None:
    rng = np.random.default_rng(0)
    motion = random_motion(rng, 5)
    points = rng.normal(size=50) * 100 + 1j * rng.normal(size=50) * 100
    for t, s in itertools.product(range(5), repeat=2):
        moved = points + motion.flow(points, t, s)
        np.testing.assert_allclose(motion.material(moved, s), motion.material(points, t), atol=1e-9)
    assert np.abs(motion.flow(points, 2, 3)).max() > 0.01


def test_motion_is_mostly_slow_and_bounded() -> None:
    rng = np.random.default_rng(1)
    origin = np.zeros(1, dtype=complex)
    speed = [abs(random_motion(rng, 5).flow(origin, 2, 3)[0]) for _ in range(400)]
    # 7 px of pan, and jitter of sigma 0.3 per axis: 6 sigma are never passed.
    assert max(speed) < 7 + 6 * 0.3
    assert 1.0 < np.median(speed) < 3.5
    assert max(speed) > 5


def test_rendered_whole_pixel_pan_is_exact() -> None:
    """Render, flow and LR of one integer pan; multiples of 4 leave no rounding tie to decide."""
    rng = np.random.default_rng(2)
    picture = (rng.integers(0, 64, size=(420, 420, 3)) * 4).astype(np.uint8)
    motion = Motion(np.ones(FRAMES, dtype=complex), pan(8 - 4j))
    # Two source pixels per HR pixel and a centre between pixels: samples fall on source pixels.
    clip = compose(Layer(picture, 209.5 + 209.5j, 2.0 + 0j, motion), SIDE)
    assert clip.clip.shape == (FRAMES, SIDE, SIDE, 3) and clip.valid.all()
    assert (clip.flow_prev[1:] == (2, -1)).all() and (clip.flow_next[:-1] == (-2, 1)).all()
    assert not clip.flow_prev[0].any() and not clip.flow_next[-1].any()
    assert_exact(clip)


def turning_clip(occluded: bool) -> MovingClip:
    """40 LR pixels wide: a camera that turns and zooms, an object that moves against it."""
    rng, side = np.random.default_rng(3), 176
    camera = Motion(np.exp(pan(0.005 + 0.01j)), pan(5.0 + 3.0j))
    runner = Motion(np.exp(pan(-0.005j)), pan(-7.0 + 2.0j))
    background = Layer(texture(rng, 620, 620, 40), 310 + 310j, 2.0 + 0j, camera)
    if not occluded:
        return compose(background, side)
    foreground = Layer(texture(rng, 620, 620, 40), 300 + 320j, 2.0 + 0j, runner)
    return compose(background, side, foreground, Occluder(4 + 2j, 45 + 36j, 0.4, 2))


@pytest.mark.parametrize("occluded", [False, True])
def test_warping_by_the_true_flow_reconstructs_the_frame(occluded: bool) -> None:
    """Also turning and zooming, and with an object that moves against the background."""
    clip = turning_clip(occluded)
    # Bicubic interpolation reads 2 pixels around: stay that far from the border and from pixels
    # that mix two layers.
    mixed = F.max_pool2d(torch.from_numpy(~clip.valid).float()[:, None], 5, 1, 2)[:, 0] > 0
    inside = np.s_[..., 3:-3, 3:-3]
    for frame, neighbour, flow, known in (
        (*neighbours(clip)[0], ~mixed[1:] & ~mixed[:-1]),
        (*neighbours(clip)[1], ~mixed[1:] & ~mixed[:-1]),
    ):
        error = (warped(neighbour, flow) - frame).abs().amax(1)[inside][known[inside]]
        still = (neighbour - frame).abs().amax(1)[inside][known[inside]]
        # The texture is 5 LR pixels wide, where bicubic interpolation keeps all but a few per cent
        # of the contrast; a wrong flow errs like the still neighbour.
        assert len(error) > 500
        assert error.mean() < 0.06 * still.mean()
        assert error.max() < 10 < still.mean()


def test_validity_hides_borders_and_occlusions_only() -> None:
    clip = turning_clip(occluded=True)
    assert 0.6 < clip.valid.mean() < 0.95
    frame, neighbour, flow = neighbours(clip)[0]
    error = (warped(neighbour, flow) - frame).abs().amax(1).numpy()
    inside = np.s_[:, 3:-3, 3:-3]
    hidden = error[inside][~clip.valid[1:][inside]]
    shown = error[inside][clip.valid[1:][inside]]
    assert hidden.max() > 30 > shown.max()
    # The middle of the object is valid and moves its own way.
    assert clip.valid[1, 20, 20]
    assert clip.flow_prev[1, 20, 20, 0] < 0 < clip.flow_prev[1, 1, 1, 0]


def test_moving_clips_differ_and_repeat_by_seed() -> None:
    pictures = [texture(np.random.default_rng(k), 300, 340, 7) for k in range(2)]

    def source(rng: np.random.Generator) -> np.ndarray:
        return pictures[rng.integers(2)]

    clips = [moving_clip(np.random.default_rng(k), source, SIDE, FRAMES) for k in (0, 0, 1)]
    for one, two in zip(clips[0], clips[1], strict=True):
        np.testing.assert_array_equal(one, two)
    assert (clips[0].clip != clips[2].clip).any()
    assert [part.dtype for part in clips[0]] == [np.uint8, np.float16, np.float16, bool]


def test_pictures_without_detail_are_refused() -> None:
    flat = np.full((300, 300, 3), 90, dtype=np.uint8)
    with pytest.raises(DataError, match="too little detail"):
        moving_clip(np.random.default_rng(0), lambda rng: flat, SIDE, FRAMES)


def test_graphics_sheets_have_detail_and_cover_the_photo_in_part() -> None:
    sheets = [graphics_sheet(np.random.default_rng(k), 400) for k in range(4)]
    assert all(sheet.shape == (400, 400, 3) and sheet.dtype == np.uint8 for sheet in sheets)
    assert min(sources.detail(sheet) for sheet in sheets) > 1
    photo = texture(np.random.default_rng(9), 400, 400, 20)
    mixed = graphics_sheet(np.random.default_rng(1), 400, photo)
    assert 0.02 < max((np.rot90(mixed, k) == photo).all(-1).mean() for k in range(4)) < 0.98


def test_every_augmentation_keeps_the_flow_true() -> None:
    clip = integer_clip(2, -1)
    assert_exact(clip)
    for single in (clip.mirrored(), clip.transposed(), clip.reversed()):
        assert (single.frames != clip.frames).any()
        assert_exact(single)
    rng = np.random.default_rng(6)
    red = np.bincount(clip.frames[..., 0].ravel())
    seen = {}
    for _ in range(100):
        changed = augment(rng, clip)
        seen[changed.frames.tobytes()] = changed
    for changed in seen.values():
        assert_exact(changed)
        # Red stays red: only the places of pixels change.
        assert (np.bincount(changed.frames[..., 0].ravel()) == red).all()
    assert len(seen) == 16


def write_video(path: Path, frames: np.ndarray) -> None:
    """Lossless RGB."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def two_scenes(count: int = 24, cut: int = 11, side: int = 2 * SIDE) -> np.ndarray:
    """Textured frames; blue is 2 x the frame number, red 40 before the cut and 200 after it."""
    green = texture(np.random.default_rng(7), side, side, 6)[..., 1]
    frames = np.zeros((count, side, side, 3), dtype=np.uint8)
    frames[..., 1] = green
    frames[..., 2] = 2 * np.arange(count)[:, None, None]
    frames[:cut, ..., 0], frames[cut:, ..., 0] = 40, 200
    frames[cut:, ..., 1] = green[::-1]
    return frames


def cut(path: Path, **options: object) -> np.ndarray:
    source = VideoSource(str(path), **options)  # type: ignore[arg-type]
    config = DataConfig(patch=PATCH, frames=FRAMES)
    return sources.cut_clips(source, config, np.random.default_rng(0))


def test_clips_hold_no_cut_and_no_excluded_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", two_scenes())
    clips = cut(tmp_path / "a.mkv", clips=40, stride=2, exclude=((4, 6), (20, 99)))
    assert clips.shape == (40, FRAMES, SIDE, SIDE, 3)
    numbers = clips[:, :, 0, 0, 2] // 2
    assert (np.diff(numbers.astype(int), axis=1) == 2).all()
    assert (clips[..., 0] == clips[:, :1, :1, :1, 0]).all(), "a clip holds both scenes"
    # Every run of five frames that is allowed, and no other, is drawn.
    assert set(numbers[:, 0].tolist()) == {6, 11, 12, 13, 14, 15}


def test_reduction_rows_and_position(tmp_path: Path) -> None:
    frames = two_scenes(count=8, cut=99, side=4 * SIDE)
    write_video(tmp_path / "a.mkv", frames)
    clips = cut(tmp_path / "a.mkv", clips=3, reduce=2, rows=(SIDE, 3 * SIDE))
    clip = clips[0]
    k = int(clip[0, 0, 0, 2]) // 2
    band = frames[k, SIDE : 3 * SIDE].astype(float).reshape(SIDE, 2, 2 * SIDE, 2, 3).mean((1, 3))
    at = [x for x in range(SIDE + 1) if np.abs(band[:, x : x + SIDE] - clip[0]).max() <= 0.5]
    assert len(at) == 1


def test_small_steps_are_cuts_only_when_isolated() -> None:
    steady = np.full(40, 9.0)
    assert not sources._is_cut(steady).any()
    assert not sources._is_cut(np.full(40, 20.0)).any()
    for step, is_cut in ((30.0, True), (21.0, True), (19.0, False)):
        steps = steady.copy()
        steps[20] = step
        assert sources._is_cut(steps).tolist() == [k == 20 and is_cut for k in range(40)]


def test_flat_crops_are_rejected(tmp_path: Path) -> None:
    """One frame of the video has texture, the others are flat."""
    frames = np.full((9, SIDE, SIDE, 3), 120, dtype=np.uint8)
    frames[4] = texture(np.random.default_rng(8), SIDE, SIDE, 5) // 4 + 88
    write_video(tmp_path / "a.mkv", frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clips = cut(tmp_path / "a.mkv", clips=4)
    assert (clips[:, 1].std(axis=(1, 2)) > 1).all() and (clips[:, 0] == 120).all()
    write_video(tmp_path / "flat.mkv", frames[:4])
    with pytest.raises(DataError, match=r"flat\.mkv: no crop has enough detail"):
        cut(tmp_path / "flat.mkv")


def test_too_few_clips_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.full((9, SIDE, SIDE, 3), 120, dtype=np.uint8)
    frames[4] = texture(np.random.default_rng(8), SIDE, SIDE, 5) // 4 + 88
    write_video(tmp_path / "a.mkv", frames)
    monkeypatch.setattr(sources, "_SELECTION_ROUNDS", 1)
    with pytest.warns(UserWarning, match=r"a\.mkv: (\d+) of 40 clips found"):
        clips = cut(tmp_path / "a.mkv", clips=40)
    assert 0 < len(clips) < 40


def test_unusable_videos_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "short.mkv", two_scenes(count=2))
    write_video(tmp_path / "small.mkv", two_scenes(count=6, side=SIDE - 2))
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for name, words in (
        ("text.mp4", "cannot be read"),
        ("short.mkv", "run of 3 frames"),
        ("small.mkv", rf"at least {SIDE}x{SIDE} .* got {SIDE - 2}x{SIDE - 2}"),
        ("sound.wav", "expected a video stream"),
    ):
        with pytest.raises(DataError, match=rf"{name}: .*{words}"):
            cut(tmp_path / name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    (root / "photos").mkdir()
    rng = np.random.default_rng(10)
    for k in range(2):
        Image.fromarray(texture(rng, 260, 340, 7)).save(root / "photos" / f"{k}.png")
    write_video(root / "a.mkv", two_scenes())
    return root


def small_config(inputs: Path, cache: Path, **changes: object) -> DataConfig:
    config = DataConfig(
        photos=(str(inputs / "photos"),),
        videos=(VideoSource(str(inputs / "a.mkv"), clips=5),),
        cache=str(cache),
        synthetic_clips=4,
        graphics_clips=2,
        patch=PATCH,
        frames=FRAMES,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def packed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    return pack(small_config(inputs, tmp_path_factory.mktemp("cache")), progress=False)


def contents(data: PackedData) -> list[bytes]:
    clips = [data.video, data.moving, data.flow_prev, data.flow_next, data.valid]
    return [np.asarray(array).tobytes() for array in [*clips, *data.photos]]


def test_pack_holds_what_was_asked(packed: PackedData) -> None:
    assert packed.video.shape == (5, FRAMES, SIDE, SIDE, 3)
    assert packed.moving.shape == (6, FRAMES, SIDE, SIDE, 3)
    assert packed.flow_prev.shape == packed.flow_next.shape == (6, FRAMES, PATCH, PATCH, 2)
    assert packed.valid.shape == (6, FRAMES, PATCH, PATCH)
    assert [photo.shape for photo in packed.photos] == [
        (130, 170, 3), (87, 114, 3), (130, 170, 3), (87, 114, 3)
    ]  # fmt: skip
    assert packed.patch == PATCH and packed.frames == FRAMES
    assert np.abs(packed.flow_prev[:, 1:]).max() > 0.1


def test_pack_is_built_once_and_keyed_by_content(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(inputs, tmp_path / "cache", videos=(), graphics_clips=0)
    first = contents(pack(config, progress=False))
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / "scratch").exists()

    builds = []

    def refuse(config: DataConfig, *_: object) -> None:
        builds.append(config)
        raise RuntimeError("built again")

    monkeypatch.setattr(packing, "_build", refuse)
    assert contents(pack(config, progress=False)) == first
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for photo in (inputs / "photos").iterdir():
        (moved / photo.name).write_bytes(photo.read_bytes())
    assert contents(pack(replace(config, photos=(str(moved),)), progress=False)) == first
    (moved / "0.png").write_bytes((moved / "1.png").read_bytes() + b"x")
    for changed in (
        replace(config, seed=1),
        replace(config, synthetic_clips=3),
        replace(config, photos=(str(moved),)),
    ):
        with pytest.raises(RuntimeError, match="built again"):
            pack(changed, progress=False)
    assert len(builds) == 3
    # The failed builds left nothing behind.
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_packing_does_not_depend_on_the_number_of_threads(
    inputs: Path, packed: PackedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_WORKERS", 1)
    again = pack(small_config(inputs, tmp_path), progress=False)
    assert contents(again) == contents(packed)


def test_pack_restores_the_thread_count(inputs: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    config = small_config(inputs, tmp_path, videos=(), synthetic_clips=1, graphics_clips=0)
    pack(config, progress=False)
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == 3


def test_damaged_packs_are_named(inputs: Path, tmp_path: Path) -> None:
    config = small_config(inputs, tmp_path, videos=(), synthetic_clips=1, graphics_clips=0)
    pack(config, progress=False)
    (folder,) = tmp_path.iterdir()
    with (folder / "moving.bin").open("ab") as file:
        file.write(b"x")
    size = FRAMES * SIDE * SIDE * 3
    with pytest.raises(DataError, match=rf"moving\.bin: expected {size} bytes, found {size + 1}"):
        pack(config, progress=False)
    (folder / "moving.bin").unlink()
    with pytest.raises(DataError, match=r"moving\.bin: expected .* found None"):
        PackedData.load(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"no readable meta\.json"):
        PackedData.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"photos": ("{}/none",)}, "photos: .*none: .*found none"),
        ({"videos": (VideoSource("{}/none.mp4"),)}, r"videos: .*none\.mp4: expected a file"),
        ({"photos": ()}, "4 synthetic clips from, or synthetic_clips = 0, got none"),
        ({"photos": (), "videos": (), "synthetic_clips": 0, "graphics_clips": 0}, "none of them"),
        ({"photos": ("{}/bad.png",)}, r"bad\.png: cannot be read"),
        ({"photos": ("{}/tiny.png",)}, rf"tiny\.png: .* at least {2 * SIDE} .* got 170x159"),
        ({"patch": 8}, "patch: expected >= 16, got 8"),
        ({"frames": 1}, "frames: expected >= 2, got 1"),
        ({"synthetic_clips": -1}, "synthetic_clips: expected >= 0, got -1"),
    ],
)
def test_bad_configurations_are_named(
    inputs: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("RGB", (170, 2 * SIDE - 1)).save(tmp_path / "tiny.png")
    if "photos" in changes:
        changes = {**changes, "photos": tuple(p.format(tmp_path) for p in changes["photos"])}  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=words):
        pack(small_config(inputs, tmp_path / "cache", **changes), progress=False)
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_bad_video_source_is_named() -> None:
    with pytest.raises(DataError, match=r"VideoSource a\.mp4: stride: expected >= 1, got 0"):
        VideoSource("a.mp4", stride=0)


def assert_pair(lr: torch.Tensor, hr: torch.Tensor) -> None:
    """lr is BI of hr: equal where the 16-pixel support stays inside hr, and on 8-bit levels."""
    assert lr.dtype == hr.dtype == torch.float32
    assert hr.shape[-1] == 4 * lr.shape[-1] and hr.shape[-2] == 4 * lr.shape[-2]
    for small, large in zip(lr.flatten(0, -4), hr.flatten(0, -4), strict=True):
        levels = [(image * 255).permute(1, 2, 0).numpy() for image in (small, large)]
        eight_bit = [np.round(level).astype(np.uint8) for level in levels]
        for level, whole in zip(levels, eight_bit, strict=True):
            # level / 255 * 255 in float32 is off by two roundings at most.
            assert np.abs(level - whole).max() <= 255 * 2**-23
        inside = np.s_[2:-2, 2:-2]
        np.testing.assert_array_equal(eight_bit[0][inside], bi_downscale(eight_bit[1])[inside])


@pytest.mark.parametrize("patch", [12, 16])
def test_image_batches_pair_lr_with_hr(packed: PackedData, patch: int) -> None:
    batch = packed.image_batch(np.random.default_rng(0), 8, patch)
    assert batch.lr.shape == (8, 3, patch, patch)
    assert_pair(batch.lr, batch.hr)


def test_image_batches_larger_than_clips_come_from_photos(packed: PackedData) -> None:
    batch = packed.image_batch(np.random.default_rng(0), 6, 20)
    assert batch.hr.shape == (6, 3, 80, 80)
    with pytest.raises(DataError, match=r"image_batch: patch: .* got 64"):
        packed.image_batch(np.random.default_rng(0), 1, 64)


def test_clip_batches(packed: PackedData) -> None:
    batch = packed.clip_batch(np.random.default_rng(1), 6, video_share=0.0)
    assert batch.lr.shape == (6, FRAMES, 3, PATCH, PATCH)
    assert_pair(batch.lr, batch.hr)
    assert batch.flow_prev.shape == batch.flow_next.shape == (6, FRAMES, PATCH, PATCH, 2)
    assert batch.valid.dtype == torch.float32 and batch.valid.max() == 1
    video = packed.clip_batch(np.random.default_rng(1), 6, video_share=1.0)
    assert not video.valid.any() and not video.flow_prev.any() and not video.flow_next.any()
    assert_pair(video.lr, video.hr)


def test_video_share_is_kept(packed: PackedData) -> None:
    rng = np.random.default_rng(2)
    known = [packed.clip_batch(rng, 20, 0.4).valid.amax((1, 2, 3)).sum() for _ in range(20)]
    # 400 draws of probability 0.6: four standard deviations are 39.
    assert abs(float(sum(known)) - 240) < 39


def test_flow_of_clip_batches_reconstructs_frames(packed: PackedData) -> None:
    batch = packed.clip_batch(np.random.default_rng(3), 12, video_share=0.0)
    right = wrong = still = 0.0
    for b in range(12):
        for t in range(1, FRAMES):
            frame, before = batch.lr[b, t], batch.lr[b, t - 1]
            known = batch.valid[b, t] * F.pad(torch.ones(PATCH - 6, PATCH - 6), [3] * 4)
            for sign in (1, -1, 0):
                flow = sign * batch.flow_prev[b, t].numpy()[None]
                error = ((warped(before[None], flow)[0] - frame).abs().mean(0) * known).sum()
                right, wrong, still = (
                    right + error.item() * (sign == 1),
                    wrong + error.item() * (sign == -1),
                    still + error.item() * (sign == 0),
                )
    assert right < 0.5 * still < still < wrong


def test_shift_pairs(packed: PackedData) -> None:
    """Pairs without an object and of a whole LR shift are equal pixel for pixel."""
    rng = np.random.default_rng(4)
    size = PATCH - 8
    exact = objects = 0
    for _ in range(30):
        pairs = packed.shift_pair_batch(rng, 8)
        assert pairs.a.shape == pairs.b.shape == (8, 3, size, size)
        assert pairs.flow.shape == (8, size, size, 2) and pairs.flow.dtype == torch.float32
        assert pairs.flow.abs().max() <= 4
        for a, b, flow in zip(*pairs, strict=True):
            uniform = bool((flow == flow[0, 0]).all())
            objects += not uniform
            dx, dy = flow[0, 0].tolist()
            if uniform and dx % 1 == dy % 1 == 0 and (dx or dy) and max(abs(dx), abs(dy)) < 4:
                shifted = torch.roll(b, (-int(dy), -int(dx)), (1, 2))
                inside = np.s_[:, 3:-3, 3:-3]
                # An ellipse may cover the whole patch: then its own shift is the uniform one.
                exact += 1
                assert torch.equal(shifted[inside], a[inside])
    assert exact > 3
    assert 0.2 < objects / 240 < 0.5


def test_objects_of_shift_pairs_move_by_their_flow() -> None:
    """Flat colours: the background of a and b is 50, the object 200, and the flow tells which."""
    shape = (1, FRAMES, 4 * 48 + 16, 4 * 48 + 16, 3)
    flow = np.zeros((1, FRAMES, 48, 48, 2), dtype=np.float16)
    data = PackedData(
        video=np.full(shape, 200, np.uint8),
        moving=np.full(shape, 50, np.uint8),
        flow_prev=flow,
        flow_next=flow,
        valid=np.ones(flow.shape[:-1], dtype=bool),
    )
    pairs = data.shift_pair_batch(np.random.default_rng(5), 40)
    checked = 0
    for a, b, flow_ab in zip(*pairs, strict=True):
        background = flow_ab[(a[0] * 255 < 60)]
        front = flow_ab[(a[0] * 255 > 190)]
        if len(front) < 20 or len(background) < 20:
            continue
        checked += 1
        # Object pixels have one flow and b shows the object there.
        assert (front == front[0]).all() and (background == background[0]).all()
        moved = warped(b[None], front[0].expand(1, *b.shape[1:], 2).numpy())[0, 0]
        centre = (a[0] * 255 > 199)[6:-6, 6:-6]
        assert (moved[6:-6, 6:-6][centre] * 255 > 150).all()
    assert checked > 10


def test_batches_follow_the_generator_alone(packed: PackedData) -> None:
    """A restored generator continues with the same batches: what exact resume needs."""
    rng = np.random.default_rng(6)
    packed.clip_batch(rng, 3)
    saved = copy.deepcopy(rng.bit_generator.state)

    def draw(generator: np.random.Generator) -> list[torch.Tensor]:
        return [
            *packed.clip_batch(generator, 3),
            *packed.image_batch(generator, 3, PATCH),
            *packed.shift_pair_batch(generator, 3),
        ]

    np.random.seed(0)
    torch.manual_seed(0)
    first = draw(rng)
    np.random.seed(1)
    torch.manual_seed(1)
    resumed = np.random.default_rng(999)
    resumed.bit_generator.state = saved
    for one, two in zip(first, draw(resumed), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first[0], packed.clip_batch(rng, 3).lr)


def test_empty_pools(packed: PackedData) -> None:
    rng = np.random.default_rng(0)
    only_video = replace(packed, moving=packed.moving[:0])
    assert not only_video.clip_batch(rng, 4, video_share=0.0).valid.any()
    only_moving = replace(packed, video=packed.video[:0])
    assert only_moving.clip_batch(rng, 4, video_share=1.0).valid.amax((1, 2, 3)).all()
    with pytest.raises(DataError, match="found neither"):
        replace(only_video, video=packed.video[:0]).clip_batch(rng, 1)


def test_photo_crops_avoid_emptiness(packed: PackedData) -> None:
    photo = packed.photos[0]
    data = replace(packed, photos=(np.zeros_like(photo), photo))
    batch = data.image_batch(np.random.default_rng(0), 80, 20)
    dark = int((batch.hr.amax((1, 2, 3)) == 0).sum())
    # Four draws in a row must meet the black photo: 5 of 80 expected, 4 standard deviations are 9.
    assert dark < 5 + 9
