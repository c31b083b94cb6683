"""Build the training data once and keep them as flat files that are memory-mapped afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from mafnet.data.errors import DataError
from mafnet.data.graphics import graphics_sheet
from mafnet.data.sampler import PackedData
from mafnet.data.sources import DataConfig, VideoSource, cut_clips, photo_files, read_photo
from mafnet.data.synthesis import MovingClip, PictureSource, moving_clip

ByteArray = npt.NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")

# Part of the cache key: raise it whenever the same configuration would pack something else.
FORMAT = 1
_WORKERS = 2
_PHOTO_REDUCTIONS = (2, 3, 4)
_SHEET_SIDE = 1100
_SHEET_ON_PHOTO_SHARE = 0.25
# First words of the seeds, so that no two kinds of items share a random stream.
_VIDEO, _SYNTHETIC, _GRAPHICS = 1, 2, 3


def pack(config: DataConfig, *, progress: bool = True) -> PackedData:
    """Packed data of ``config``: built on the first call, memory-mapped from the cache afterwards.

    The folder is ``cache/<key>``, the key a hash of the configuration and of the names and sizes of
    the files it finds.  It is built under a temporary name and renamed when whole, so an
    interrupted run leaves no folder that looks packed.  Every clip has its own random stream: the
    result does not depend on the number of threads.

    Args:
        config: what to pack.
        progress: show a progress bar on stderr.

    Raises:
        DataError: a photo or video is missing, unreadable, too small or without detail, or the
            configuration names nothing to train on.
    """
    photos = photo_files(config.photos) if config.photos else []
    _check(config, photos)
    folder = Path(config.cache) / _key(config, photos)
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
        try:
            _build(config, photos, partial, progress)
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return PackedData.load(folder)


def _check(config: DataConfig, photos: list[Path]) -> None:
    for source in config.videos:
        if not Path(source.path).is_file():
            raise DataError(f"videos: {source.path}: expected a file, found none")
    if config.synthetic_clips and not photos:
        raise DataError(
            f"DataConfig: photos: expected photos to make {config.synthetic_clips} synthetic clips "
            "from, or synthetic_clips = 0, got none"
        )
    if not (photos or config.videos or config.graphics_clips):
        raise DataError("DataConfig: expected photos, videos or graphics_clips, got none of them")


def _key(config: DataConfig, photos: list[Path]) -> str:
    """Depends on the names and sizes of the files, not on the folders they lie in."""
    content = asdict(config)
    del content["cache"]
    content["photos"] = [(path.name, path.stat().st_size) for path in photos]
    for video in content["videos"]:
        path = Path(video["path"])
        video["path"] = (path.name, path.stat().st_size)
    content["format"] = FORMAT
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _publish(partial: Path, folder: Path) -> None:
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.exists():
            raise
        # Another process packed the same configuration meanwhile: its folder is as good.


class _ArrayFile:
    """Appends equal-sized items to a flat file; ``entry`` describes it for ``PackedData.load``."""

    def __init__(self, folder: Path, name: str, item: tuple[int, ...], dtype: str) -> None:
        self._file = (folder / f"{name}.bin").open("wb")
        self.name, self._item, self._dtype, self._count = name, item, dtype, 0

    def append(self, items: npt.NDArray[np.generic]) -> None:
        """``items``: (n, *item)."""
        if items.shape[1:] != self._item or items.dtype != np.dtype(self._dtype):
            raise ValueError(f"{self.name}: cannot append {items.shape}, {items.dtype}")
        np.ascontiguousarray(items).tofile(self._file)
        self._count += len(items)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"shape": [self._count, *self._item], "dtype": self._dtype}


def _build(config: DataConfig, photos: list[Path], folder: Path, progress: bool) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    steps = len(photos) + len(config.videos) + config.synthetic_clips + config.graphics_clips
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tqdm(total=steps, desc="packing", unit="item", disable=not progress) as bar:
            full, levels = _pack_photos(config, photos, folder, scratch, bar)
            arrays = {
                **_pack_videos(config, folder, bar),
                **_pack_moving(config, full, folder, bar),
            }
    finally:
        torch.set_num_threads(threads)
    del full
    shutil.rmtree(scratch)
    meta = {"arrays": arrays, "photos": levels, "side": config.side}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], bar: tqdm[Any]
) -> Iterator[Result]:
    """Results in order.  Threads suffice: decoding, sampling and pooling release the GIL."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        # In slices, so that an error or Ctrl-C does not wait for everything already queued.
        for first in range(0, len(items), 4 * _WORKERS):
            for result in pool.map(work, items[first : first + 4 * _WORKERS]):
                yield result
                bar.update()


def _pack_photos(
    config: DataConfig, photos: list[Path], folder: Path, scratch: Path, bar: tqdm[Any]
) -> tuple[list[ByteArray], list[list[int]]]:
    """Photos mapped at full size from ``scratch``, and the reduced ones in photos.bin: [h, w] each.

    Full-size photos live in files so that memory does not grow with their number.
    """

    def prepare(path: Path) -> tuple[Path, list[ByteArray]]:
        image = read_photo(path)
        smallest = _PHOTO_REDUCTIONS[0] * config.side
        if min(image.size) < smallest:
            raise DataError(
                f"photos: {path}: expected sides of at least {smallest} pixels, "
                f"got {image.width}x{image.height}"
            )
        stored = scratch / f"{photos.index(path)}.npy"
        np.save(stored, np.asarray(image))
        factors = [f for f in _PHOTO_REDUCTIONS if min(image.size) >= f * config.side]
        return stored, [np.asarray(image.reduce(factor)) for factor in factors]

    full: list[ByteArray] = []
    sizes: list[list[int]] = []
    with (folder / "photos.bin").open("wb") as file:
        for stored, reduced in _in_threads(prepare, photos, bar):
            full.append(np.load(stored, mmap_mode="r"))
            for picture in reduced:
                picture.tofile(file)
                sizes.append([picture.shape[0], picture.shape[1]])
    return full, sizes


def _pack_videos(config: DataConfig, folder: Path, bar: tqdm[Any]) -> dict[str, Any]:
    side = config.side
    file = _ArrayFile(folder, "video", (config.frames, side, side, 3), "uint8")

    def cut(numbered: tuple[int, VideoSource]) -> ByteArray:
        number, source = numbered
        return cut_clips(source, config, np.random.default_rng([config.seed, _VIDEO, number]))

    for clips in _in_threads(cut, list(enumerate(config.videos)), bar):
        file.append(clips)
    return {file.name: file.close()}


def _pack_moving(
    config: DataConfig, photos: list[ByteArray], folder: Path, bar: tqdm[Any]
) -> dict[str, Any]:
    """Synthetic and graphics clips, in this order, with their flow."""
    frames, side, patch = config.frames, config.side, config.patch
    files = (
        _ArrayFile(folder, "moving", (frames, side, side, 3), "uint8"),
        _ArrayFile(folder, "flow_prev", (frames, patch, patch, 2), "float16"),
        _ArrayFile(folder, "flow_next", (frames, patch, patch, 2), "float16"),
        _ArrayFile(folder, "valid", (frames, patch, patch), "bool"),
    )

    def photo(rng: np.random.Generator) -> ByteArray:
        return photos[rng.integers(len(photos))]

    def sheet(rng: np.random.Generator) -> ByteArray:
        ground = None
        if photos and rng.random() < _SHEET_ON_PHOTO_SHARE:
            ground = _crop(rng, photo(rng), _SHEET_SIDE)
        return graphics_sheet(rng, _SHEET_SIDE, ground)

    def make(numbered: tuple[int, int, PictureSource]) -> MovingClip:
        kind, number, pictures = numbered
        rng = np.random.default_rng([config.seed, kind, number])
        return moving_clip(rng, pictures, side, frames)

    jobs = [(_SYNTHETIC, k, photo) for k in range(config.synthetic_clips)]
    jobs += [(_GRAPHICS, k, sheet) for k in range(config.graphics_clips)]
    for clip in _in_threads(make, jobs, bar):
        for file, part in zip(files, clip, strict=True):
            file.append(np.asarray(part)[None])
    return {file.name: file.close() for file in files}


def _crop(rng: np.random.Generator, picture: ByteArray, side: int) -> ByteArray:
    """A random (side, side, 3) part, after enlarging a picture that is too small."""
    if min(picture.shape[:2]) < side:
        factor = side / min(picture.shape[:2])
        size = (round(picture.shape[1] * factor) + 1, round(picture.shape[0] * factor) + 1)
        picture = np.asarray(Image.fromarray(picture).resize(size))
    y = int(rng.integers(picture.shape[0] - side + 1))
    x = int(rng.integers(picture.shape[1] - side + 1))
    return np.ascontiguousarray(picture[y : y + side, x : x + side])
