"""Where training pictures come from: photo files, and sharp, cut-free clips out of videos."""

from __future__ import annotations

import glob
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Colorspace
from PIL import Image

from mafnet.data.degrade import MARGIN_HR, SCALE
from mafnet.data.errors import DataError

ByteArray = npt.NDArray[np.uint8]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Mean absolute luma step between neighbouring thumbnails, 8-bit levels.  Steps above CUT_STEP are
# taken for cuts whatever surrounds them, smaller ones when they stand out from their surroundings.
_CUT_STEP, _CUT_STEP_ISOLATED, _CUT_RATIO, _CUT_WINDOW = 25.0, 10.0, 2.2, 6
_THUMBNAIL_REDUCTION = 8
# YUV matrices a stream can name (ITU-T H.273 numbers); of the others the frame's height decides.
_MATRICES = {1: Colorspace.ITU709, 5: Colorspace.ITU601, 6: Colorspace.ITU601, 9: 9}
# Least ``detail`` of a crop: below it are sky, walls and blur.
_MIN_VIDEO_DETAIL = 2.0
_CROP_CANDIDATES = 3
_SELECTION_ROUNDS = 4


@dataclass(frozen=True)
class VideoSource:
    """One video file and what to take from it.

    Attributes:
        path: the file.
        reduce: area reduction before cropping; 2 hides the codec artefacts of a 1080p file.
        stride: a clip takes every ``stride``-th frame.
        clips: how many clips to cut out.
        exclude: ``(first, stop)`` frame ranges, 0-based and half open, that no clip may touch.
        rows: ``(top, bottom)`` rows of the file to use, before ``reduce``; ``None`` for all.
    """

    path: str
    reduce: int = 1
    stride: int = 1
    clips: int = 100
    exclude: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("reduce", "stride", "clips"):
            if getattr(self, name) < 1:
                raise DataError(
                    f"VideoSource {self.path}: {name}: expected >= 1, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class DataConfig:
    """What to pack for training.

    Attributes:
        photos: folders, files or glob patterns of large photos.
        videos: the videos.
        cache: folder under which packed data are kept, one folder per configuration.
        synthetic_clips: moving clips made from the photos, with their true flow.
        graphics_clips: moving clips made from rendered text and line art, with their true flow.
        patch: side of a training patch in LR pixels.
        frames: frames per clip.
        seed: seed of everything random while packing.
    """

    photos: tuple[str, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    cache: str = "cache"
    synthetic_clips: int = 1100
    graphics_clips: int = 350
    patch: int = 48
    frames: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("synthetic_clips", 0), ("graphics_clips", 0), ("patch", 16)):
            if getattr(self, name) < least:
                raise DataError(
                    f"DataConfig: {name}: expected >= {least}, got {getattr(self, name)}"
                )
        if self.frames < 2:
            raise DataError(f"DataConfig: frames: expected >= 2, got {self.frames}")

    @property
    def side(self) -> int:
        """Side of a stored clip in HR pixels: the patch and the margin ``interior_bi`` drops."""
        return SCALE * self.patch + 2 * MARGIN_HR


def photo_files(patterns: tuple[str, ...]) -> list[Path]:
    """Every picture file named by folders, files and glob patterns: sorted, without repeats."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        matches = list(path.iterdir()) if path.is_dir() else [Path(p) for p in glob.glob(pattern)]
        pictures = {p for p in matches if p.suffix.lower() in PHOTO_SUFFIXES}
        if not pictures:
            raise DataError(
                f"photos: {pattern}: expected a folder, file or pattern of "
                f"{'/'.join(PHOTO_SUFFIXES)} files, found none"
            )
        found |= pictures
    return sorted(found)


def read_photo(path: Path) -> Image.Image:
    """The photo as RGB; raises DataError naming a file that is not a readable picture."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"photos: {path}: cannot be read: {error}") from error


def detail(image: npt.NDArray[np.generic]) -> float:
    """Mean distance of the grey pixels from the mean of their 4x4 block, in 8-bit levels.

    That is about what a reduction by 4 loses: large for texture and edges, small for sky and for
    pictures out of focus, however contrasty.  ``image`` is (H, W, 3), sides at least 4.
    """
    grey = image.astype(np.float32).mean(axis=-1)
    height, width = (n // SCALE for n in grey.shape)
    blocks = grey[: SCALE * height, : SCALE * width].reshape(height, SCALE, width, SCALE)
    return float(np.abs(blocks - blocks.mean(axis=(1, 3), keepdims=True)).mean())


def _video_frames(path: str) -> Iterator[av.VideoFrame]:
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DataError(f"videos: {path}: expected a video stream, found none")
            container.streams.video[0].thread_type = "AUTO"
            yield from container.decode(video=0)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"videos: {path}: cannot be read: {error}") from error


def find_cuts(path: str) -> npt.NDArray[np.bool_]:
    """(frames - 1,) bool: entry i is true when a scene cut lies between frames i and i + 1."""
    steps: list[float] = []
    last: npt.NDArray[np.int16] | None = None
    for frame in _video_frames(path):
        small = frame.reformat(
            width=max(1, frame.width // _THUMBNAIL_REDUCTION),
            height=max(1, frame.height // _THUMBNAIL_REDUCTION),
            format="gray",
        )
        thumbnail = small.to_ndarray().astype(np.int16)
        if last is not None:
            steps.append(float(np.abs(thumbnail - last).mean()))
        last = thumbnail
    return _is_cut(np.array(steps))


def _is_cut(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    around = [
        np.median(steps[max(0, i - _CUT_WINDOW) : i + _CUT_WINDOW + 1]) for i in range(len(steps))
    ]
    isolated = (steps > _CUT_STEP_ISOLATED) & (steps > _CUT_RATIO * np.array(around))
    return (steps > _CUT_STEP) | isolated


def admissible_starts(
    cuts: npt.NDArray[np.bool_], span: int, exclude: tuple[tuple[int, int], ...] = ()
) -> npt.NDArray[np.int64]:
    """First frames of the runs of ``span`` frames without a cut or an excluded frame inside."""
    frames = len(cuts) + 1
    excluded = np.zeros(frames, dtype=bool)
    for first, stop in exclude:
        excluded[first:stop] = True
    starts = range(frames - span + 1)
    good = [s for s in starts if not (cuts[s : s + span - 1].any() or excluded[s : s + span].any())]
    return np.array(good, dtype=np.int64)


def _as_rgb(frame: av.VideoFrame, source: VideoSource) -> ByteArray:
    """The frame as (H, W, 3) uint8, cut to the source's rows and area-reduced."""
    guess = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    matrix = _MATRICES.get(int(frame.colorspace), guess)
    image: ByteArray = np.asarray(
        frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray(), dtype=np.uint8
    )
    if source.rows is not None:
        image = image[source.rows[0] : source.rows[1]]
    if source.reduce > 1:
        image = np.asarray(Image.fromarray(image).reduce(source.reduce))
    return image


def _windows(source: VideoSource, starts: set[int], span: int) -> Iterator[tuple[int, ByteArray]]:
    """Decode once and yield ``(start, (frames, H, W, 3))`` in time order; holds ``span`` frames."""
    wanted = {start + k for start in starts for k in range(0, span, source.stride)}
    recent: deque[ByteArray | None] = deque(maxlen=span)
    for index, frame in enumerate(_video_frames(source.path)):
        recent.append(_as_rgb(frame, source) if index in wanted else None)
        start = index - span + 1
        if start in starts:
            taken = list(recent)[:: source.stride]
            yield start, np.stack([image for image in taken if image is not None])


def _best_crop(window: ByteArray, side: int, corners: npt.NDArray[np.float64]) -> ByteArray | None:
    """The crop (frames, side, side, 3) with most detail, or None when even that one is flat.

    ``corners`` (candidates, 2) in [0, 1): the candidates' positions as fractions of the free play.
    """
    middle = window[len(window) // 2]
    free = np.array(middle.shape[:2]) - side + 1
    places = (corners * free).astype(int)
    scores = [detail(middle[y : y + side, x : x + side]) for y, x in places]
    best = int(np.argmax(scores))
    if scores[best] < _MIN_VIDEO_DETAIL:
        return None
    y, x = places[best]
    return window[:, y : y + side, x : x + side].copy()


def cut_clips(source: VideoSource, config: DataConfig, rng: np.random.Generator) -> ByteArray:
    """Clips (n, frames, side, side, 3) of one video: sharp enough, no cut or excluded frame inside.

    n is ``source.clips``, or less, with a warning, when the video holds too little detail.

    Raises:
        DataError: unreadable file, frames too small for a crop, no admissible clip.
    """
    span = (config.frames - 1) * source.stride + 1
    starts = admissible_starts(find_cuts(source.path), span, source.exclude)
    if len(starts) == 0:
        raise DataError(
            f"videos: {source.path}: expected a run of {span} frames without a cut or an excluded "
            "frame, found none"
        )
    clips: list[ByteArray] = []
    for _ in range(_SELECTION_ROUNDS):
        missing = source.clips - len(clips)
        if missing > 0:
            clips += _selection_round(source, config, starts, missing, rng)
    if not clips:
        raise DataError(f"videos: {source.path}: no crop has enough detail to train on")
    if len(clips) < source.clips:
        warnings.warn(
            f"videos: {source.path}: {len(clips)} of {source.clips} clips found", stacklevel=2
        )
    return np.stack(clips)


def _selection_round(
    source: VideoSource,
    config: DataConfig,
    starts: npt.NDArray[np.int64],
    count: int,
    rng: np.random.Generator,
) -> list[ByteArray]:
    """Up to ``count`` clips at random places; a few more are drawn, as some will be flat."""
    span = (config.frames - 1) * source.stride + 1
    drawn = rng.choice(starts, size=count + count // 4 + 2)
    corners = rng.random((len(drawn), _CROP_CANDIDATES, 2))
    found: dict[int, ByteArray] = {}
    for start, window in _windows(source, set(drawn.tolist()), span):
        height, width = window.shape[1:3]
        if min(height, width) < config.side:
            raise DataError(
                f"videos: {source.path}: expected frames of at least {config.side}x{config.side} "
                f"after reduce={source.reduce}, got {width}x{height}"
            )
        for number in np.flatnonzero(drawn == start):
            clip = _best_crop(window, config.side, corners[number])
            if clip is not None:
                found[int(number)] = clip
    # In order of drawing, so that keeping the first ones favours no part of the video.
    return [found[number] for number in sorted(found)][:count]
