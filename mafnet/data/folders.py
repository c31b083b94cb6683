"""Readers of evaluation sets: folders of frames, ground truth with low-resolution twins, Vimeo-90K.

A reader lists clips and checks that they are complete; pictures are read when a clip is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mafnet.data.degrade import SCALE, bd_downscale, bi_downscale, crop_to_multiple
from mafnet.data.errors import DataError

ByteArray = npt.NDArray[np.uint8]
Degradation = Literal["BI", "BD"]

FRAME_SUFFIXES = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")

_VIMEO_FRAMES = 7


@dataclass(frozen=True)
class EvalClip:
    """The frames of one clip in order.

    Attributes:
        name: the clip's folder, as tables call it.
        gt_paths: ground truth.
        lr_paths: low-resolution frames, or ``None`` when they are to be made from the ground truth.
        scored: which frames count in the metrics.
    """

    name: str
    gt_paths: tuple[Path, ...]
    lr_paths: tuple[Path, ...] | None
    scored: tuple[int, ...]

    def gt(self) -> ByteArray:
        """(T, H, W, 3) uint8 RGB, cropped to multiples of 4.

        Raises:
            DataError: an unreadable frame, or frames of different sizes, named.
        """
        frames = read_frames(self.gt_paths)
        return np.stack([crop_to_multiple(frame) for frame in frames])

    def lr(self, degradation: Degradation = "BI") -> ByteArray:
        """(T, H / 4, W / 4, 3) uint8 RGB, read, or where there are no files made from ``gt``.

        Raises:
            DataError: as ``gt``, or a size that is not a quarter of the ground truth's.
        """
        if self.lr_paths is None:
            downscale = {"BI": bi_downscale, "BD": bd_downscale}[degradation]
            return np.stack([downscale(frame) for frame in read_frames(self.gt_paths)])
        frames = read_frames(self.lr_paths)
        height, width = (n // SCALE for n in _size(self.gt_paths[0]))
        if frames.shape[1:3] != (height, width):
            raise DataError(
                f"{self.lr_paths[0]}: expected {width}x{height} pixels, a quarter of "
                f"{self.gt_paths[0]}, got {frames.shape[2]}x{frames.shape[1]}"
            )
        return frames


def read_frames(paths: Sequence[Path]) -> ByteArray:
    """(T, H, W, 3) uint8 RGB.

    Raises:
        DataError: no paths, an unreadable picture, or one of another size than the first.
    """
    if not paths:
        raise DataError("frames: expected at least one path, got none")
    frames = []
    for path in paths:
        try:
            with Image.open(path) as image:
                frames.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise DataError(f"{path}: cannot be read as a picture: {error}") from error
        if frames[-1].shape != frames[0].shape:
            (height, width), (h, w) = frames[0].shape[:2], frames[-1].shape[:2]
            raise DataError(f"{path}: expected {width}x{height} pixels as {paths[0]}, got {w}x{h}")
    return np.stack(frames)


def list_frames(folder: Path) -> tuple[Path, ...]:
    """The pictures of a folder in natural order: 2 before 10.

    Raises:
        DataError: no such folder, no pictures, or a gap in their numbers.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of frames, found none")
    frames = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    if not frames:
        raise DataError(f"{folder}: expected pictures ({' '.join(FRAME_SUFFIXES)}), found none")
    ordered = tuple(sorted(frames, key=_natural))
    _check_numbers(ordered)
    return ordered


def frame_folder(folder: str | Path) -> EvalClip:
    """One clip: the pictures of a folder."""
    folder = Path(folder)
    return _clip(folder.name, list_frames(folder), None)


def folder_of_clips(root: str | Path) -> list[EvalClip]:
    """A clip for every folder in ``root`` (REDS4, SPMC), in natural order of their names."""
    return [frame_folder(folder) for folder in _clip_folders(Path(root))]


def paired_folders(root: str | Path, gt: str = "GT", lr: str = "BIx4") -> list[EvalClip]:
    """Vid4's layout: ``root/GT/<clip>/*`` and ``root/BIx4/<clip>/*`` with the same frame names.

    ``root/GT/*`` and ``root/BIx4/*`` without clip folders are one clip called after ``root``.

    Raises:
        DataError: a clip or a frame that one side lacks, named.
    """
    root = Path(root)
    if not (root / gt).is_dir():
        raise DataError(f"{root / gt}: expected the folder of ground truth, found none")
    if not (root / lr).is_dir():
        raise DataError(f"{root / lr}: expected the folder of low-resolution frames, found none")
    if any(path.suffix.lower() in FRAME_SUFFIXES for path in (root / gt).iterdir()):
        return [_paired(root.name, root / gt, root / lr)]
    return [_paired(c.name, c, root / lr / c.name) for c in _clip_folders(root / gt)]


def vimeo_septuplets(
    root: str | Path, list_file: str | Path | None = None, frames: int = 5
) -> list[EvalClip]:
    """Vimeo-90K septuplets: ``root/sequences/00001/0001/im1.png`` to ``im7.png``.

    Args:
        root: the folder that holds ``sequences``.
        list_file: lines such as ``00001/0001`` (``sep_testlist.txt``); all septuplets by default.
        frames: how many frames around the fourth are used: 7, 5 (im2 to im6), 3 or 1.

    Returns:
        Clips of which only the middle frame, im4, is scored.

    Raises:
        DataError: a list entry without its folder, or a frame that is missing, named.
    """
    if frames not in (1, 3, 5, 7):
        raise DataError(f"vimeo_septuplets: frames: expected 1, 3, 5 or 7, got {frames}")
    sequences = Path(root) / "sequences"
    if not sequences.is_dir():
        raise DataError(f"{sequences}: expected the folder of Vimeo-90K septuplets, found none")
    first = (_VIMEO_FRAMES - frames) // 2 + 1
    clips = []
    for name in _septuplet_names(sequences, list_file):
        paths = tuple(sequences / name / f"im{k}.png" for k in range(first, first + frames))
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: expected a frame of septuplet {name}, found none")
        clips.append(EvalClip(name, paths, None, scored=(frames // 2,)))
    return clips


def _septuplet_names(sequences: Path, list_file: str | Path | None) -> list[str]:
    if list_file is None:
        names = [str(path.relative_to(sequences)) for path in sequences.glob("*/*")]
        names = sorted(name for name in names if (sequences / name).is_dir())
    else:
        try:
            lines = Path(list_file).read_text().splitlines()
        except OSError as error:
            raise DataError(f"{list_file}: cannot be read: {error}") from error
        names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"{list_file or sequences}: expected septuplets, found none")
    return names


def _clip(name: str, gt: tuple[Path, ...], lr: tuple[Path, ...] | None) -> EvalClip:
    return EvalClip(name, gt, lr, scored=tuple(range(len(gt))))


def _paired(name: str, gt_folder: Path, lr_folder: Path) -> EvalClip:
    gt, lr = list_frames(gt_folder), list_frames(lr_folder)
    for has, lacks, folder in ((gt, lr, lr_folder), (lr, gt, gt_folder)):
        names = {path.stem for path in lacks}
        missing = [path.stem for path in has if path.stem not in names]
        if missing:
            raise DataError(
                f"{folder}: expected a frame {missing[0]} as in {has[0].parent}, found none "
                f"({len(missing)} missing)"
            )
    return _clip(name, gt, lr)


def _clip_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of clips, found none")
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=_natural)
    if not folders:
        raise DataError(f"{root}: expected a folder for each clip, found none")
    return folders


def _natural(path: Path) -> list[tuple[int, str]]:
    """Digits compare as numbers, the rest as text; either part may come first."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _check_numbers(frames: Sequence[Path]) -> None:
    """Numbered frames must be evenly spaced: a hole would break the motion between neighbours."""
    numbers = [re.search(r"(\d+)$", path.stem) for path in frames]
    values = [int(match.group(1)) for match in numbers if match]
    if len(values) < len(frames) or len(values) < 3:
        return
    steps = np.diff(values)
    step = int(steps.min())
    if step < 1:
        return
    hole = np.flatnonzero(steps != step)
    if len(hole):
        before = frames[int(hole[0])]
        raise DataError(
            f"{before.parent}: expected frames numbered in steps of {step}, found none for "
            f"{values[int(hole[0])] + step} after {before.name}"
        )


def _size(path: Path) -> tuple[int, int]:
    """Height and width without decoding the picture."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from error
