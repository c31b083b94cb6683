"""Training batches out of packed data.  All randomness comes from the Generator that is passed in,
so a run that restores its Generator continues with the same batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mafnet.data.degrade import MARGIN_HR, SCALE, interior_bi
from mafnet.data.errors import DataError

ByteArray = npt.NDArray[np.uint8]
FlowArray = npt.NDArray[np.float16]

# Shares of an image batch, where there are photos: the rest are single frames of the clips.
_PHOTO_SHARE = 0.6
_VIDEO_FRAME_SHARE = 0.6
# A crop is the roughest of a few; photos whose crops stay below the threshold are drawn again.
_CROP_CANDIDATES = 3
_MIN_ROUGHNESS = 6.0
_PHOTO_ATTEMPTS = 4
# Shifts of the flow pre-training in HR pixels: standard deviations drawn from, and the limit.
_SHIFT_SPREADS = (1.5, 4.0, 7.0)
_OBJECT_SHIFT_SPREAD = 4.0
_MAX_SHIFT = 16


class ImageBatch(NamedTuple):
    """lr (n, 3, p, p) and hr (n, 3, 4p, 4p), float32 in [0, 1], RGB; lr holds 8-bit levels."""

    lr: torch.Tensor
    hr: torch.Tensor


class ClipBatch(NamedTuple):
    """lr (n, T, 3, p, p), hr (n, T, 3, 4p, 4p) float32 in [0, 1]; flow_prev, flow_next
    (n, T, p, p, 2) float32, backward flow to the frame before and after, (x, y) in LR pixels;
    valid (n, T, p, p) float32, 1 where that flow is known and visible, 0 all over real video."""

    lr: torch.Tensor
    hr: torch.Tensor
    flow_prev: torch.Tensor
    flow_next: torch.Tensor
    valid: torch.Tensor


class ShiftPairs(NamedTuple):
    """a, b (n, 3, q, q) float32 in [0, 1] and flow (n, q, q, 2) with a(p) = b(p + flow(p))."""

    a: torch.Tensor
    b: torch.Tensor
    flow: torch.Tensor


class Clip(NamedTuple):
    """One clip: frames (T, P, P, 3) uint8 and its motion, see ``ClipBatch``."""

    frames: ByteArray
    flow_prev: npt.NDArray[np.floating]
    flow_next: npt.NDArray[np.floating]
    valid: npt.NDArray[np.bool_]

    def mirrored(self) -> Clip:
        """Left and right swapped: x components change sign."""
        frames, *flows, valid = (np.flip(part, 2) for part in self)
        sign = np.array([-1, 1], dtype=np.float16)
        return Clip(frames, flows[0] * sign, flows[1] * sign, valid)

    def transposed(self) -> Clip:
        """Rows and columns swapped: x and y components change places."""
        frames, *flows, valid = (np.swapaxes(part, 1, 2) for part in self)
        return Clip(frames, flows[0][..., ::-1], flows[1][..., ::-1], valid)

    def reversed(self) -> Clip:
        """Last frame first: the flow to the next frame becomes the flow to the frame before."""
        frames, flow_prev, flow_next, valid = (np.flip(part, 0) for part in self)
        return Clip(frames, flow_next, flow_prev, valid)


def augment(rng: np.random.Generator, clip: Clip) -> Clip:
    """Transposition, both mirrorings and time reversal, each with probability 1/2."""
    transpose, mirror, upend, backwards = rng.random(4) < 0.5
    if transpose:
        clip = clip.transposed()
    if mirror:
        clip = clip.mirrored()
    if upend:
        clip = clip.transposed().mirrored().transposed()
    return clip.reversed() if backwards else clip


def _augment_image(rng: np.random.Generator, image: ByteArray) -> ByteArray:
    transpose, mirror, upend = rng.random(3) < 0.5
    if transpose:
        image = image.swapaxes(0, 1)
    if mirror:
        image = image[:, ::-1]
    return image[::-1] if upend else image


def _to_pairs(images: list[ByteArray]) -> ImageBatch:
    """(h, w, 3) crops with their margin of 8 HR pixels -> LR and HR."""
    first = images[0]
    planes = np.empty((len(images), 3, *first.shape[:2]), dtype=np.uint8)
    for plane, image in zip(planes, images, strict=True):
        plane[...] = image.transpose(2, 0, 1)
    hr = torch.from_numpy(planes).float()
    lr = interior_bi(hr).div_(255)
    inner = hr[..., MARGIN_HR:-MARGIN_HR, MARGIN_HR:-MARGIN_HR]
    return ImageBatch(lr, inner / 255)


def _roughness(crop: ByteArray) -> float:
    """A cheap measure of detail: steps of the green channel between every third pixel."""
    green = crop[::3, ::3, 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


@dataclass(frozen=True, eq=False)
class PackedData:
    """Clips and photos for training, usually mapped from files by ``pack``.

    Attributes:
        video: (n, T, P, P, 3) uint8, clips of real video, P = 4 * patch + 16.
        moving: (m, T, P, P, 3) uint8, clips made from stills.
        flow_prev, flow_next: (m, T, patch, patch, 2) float16, true motion of ``moving``.
        valid: (m, T, patch, patch) bool.
        photos: pictures (h, w, 3) uint8 for single-image crops.
    """

    video: ByteArray
    moving: ByteArray
    flow_prev: FlowArray
    flow_next: FlowArray
    valid: npt.NDArray[np.bool_]
    photos: tuple[ByteArray, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> PackedData:
        """Map the files of a folder written by ``pack``.

        Raises:
            DataError: not such a folder, or a file whose size contradicts its meta.json.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"packed data: {folder}: no readable meta.json: {error}") from error
        arrays = {
            name: _map(folder / f"{name}.bin", tuple(entry["shape"]), entry["dtype"])
            for name, entry in meta["arrays"].items()
        }
        sizes = [height * width * 3 for height, width in meta["photos"]]
        flat = _map(folder / "photos.bin", (sum(sizes),), "uint8")
        ends = np.cumsum(sizes)
        photos = tuple(
            flat[end - size : end].reshape(height, width, 3)
            for end, size, (height, width) in zip(ends, sizes, meta["photos"], strict=True)
        )
        return cls(**arrays, photos=photos)

    @property
    def frames(self) -> int:
        """Frames per clip, T."""
        return self.video.shape[1]

    @property
    def patch(self) -> int:
        """Side of the LR patches of a clip batch."""
        return self.flow_prev.shape[2]

    def image_batch(self, rng: np.random.Generator, n: int, patch: int) -> ImageBatch:
        """n single pictures: photo crops, and frames of the clips where they are large enough.

        Raises:
            DataError: nothing packed is as large as 4 * patch + 16 pixels.
        """
        side = SCALE * patch + 2 * MARGIN_HR
        photos = [k for k, photo in enumerate(self.photos) if min(photo.shape[:2]) >= side]
        clips = side <= self.video.shape[2] and len(self.video) + len(self.moving) > 0
        if not (photos or clips):
            raise DataError(f"image_batch: patch: expected one that fits the data, got {patch}")
        crops = []
        for _ in range(n):
            if photos and (not clips or rng.random() < _PHOTO_SHARE):
                crop = self._photo_crop(rng, photos, side)
            else:
                crop, _ = _detailed_crop(rng, self._frame(rng, _VIDEO_FRAME_SHARE), side)
            crops.append(_augment_image(rng, crop))
        return _to_pairs(crops)

    def clip_batch(self, rng: np.random.Generator, n: int, video_share: float = 0.4) -> ClipBatch:
        """n augmented clips, each a real video with probability ``video_share``."""
        clips = [augment(rng, self._clip(rng, video_share)) for _ in range(n)]
        lr, hr = _to_pairs([frame for clip in clips for frame in clip.frames])
        motion = [
            torch.from_numpy(np.stack([clip[part] for clip in clips]).astype(np.float32))
            for part in (1, 2, 3)
        ]
        return ClipBatch(
            lr.unflatten(0, (n, self.frames)), hr.unflatten(0, (n, self.frames)), *motion
        )

    def shift_pair_batch(self, rng: np.random.Generator, n: int) -> ShiftPairs:
        """n pairs of one picture shifted by whole HR pixels, for pre-training of the flow.

        Half of the pairs have an ellipse with another picture and another shift in front.  The
        patches are 8 LR pixels smaller than those of a clip: shifts reach 16 HR pixels.
        """
        pairs = [self._shift_pair(rng) for _ in range(n)]
        lr, _ = _to_pairs([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
        flow = torch.from_numpy(np.stack([pair[2] for pair in pairs]))
        return ShiftPairs(lr[:n], lr[n:], flow)

    def _photo_crop(self, rng: np.random.Generator, usable: list[int], side: int) -> ByteArray:
        """(side, side, 3) of a random photo, another one where it shows sky or darkness."""
        area = np.array([self.photos[k].size for k in usable], dtype=np.float64) ** 0.5
        for _ in range(_PHOTO_ATTEMPTS):
            photo = self.photos[usable[rng.choice(len(usable), p=area / area.sum())]]
            crop, roughness = _detailed_crop(rng, photo, side)
            if roughness >= _MIN_ROUGHNESS:
                break
        return crop

    def _pool(self, rng: np.random.Generator, video_share: float) -> ByteArray:
        if len(self.video) == 0 and len(self.moving) == 0:
            raise DataError("packed data: expected video or synthetic clips, found neither")
        if len(self.video) == 0 or len(self.moving) == 0:
            return self.video if len(self.video) else self.moving
        return self.video if rng.random() < video_share else self.moving

    def _frame(self, rng: np.random.Generator, video_share: float) -> ByteArray:
        pool = self._pool(rng, video_share)
        return pool[rng.integers(len(pool)), rng.integers(self.frames)]

    def _clip(self, rng: np.random.Generator, video_share: float) -> Clip:
        pool = self._pool(rng, video_share)
        k = int(rng.integers(len(pool)))
        if pool is self.video:
            still = np.zeros((self.frames, self.patch, self.patch, 2), dtype=np.float16)
            return Clip(pool[k], still, still, np.zeros(still.shape[:3], dtype=bool))
        return Clip(pool[k], self.flow_prev[k], self.flow_next[k], self.valid[k])

    def _shift_pair(
        self, rng: np.random.Generator
    ) -> tuple[ByteArray, ByteArray, npt.NDArray[np.float32]]:
        """a, b (h, h, 3) with margin, and flow (q, q, 2) in LR pixels."""
        picture = _augment_image(rng, self._frame(rng, video_share=0.0))
        shift = _random_shift(rng, float(rng.choice(_SHIFT_SPREADS)))
        a, b = _shifted(picture, np.zeros(2, dtype=int)), _shifted(picture, shift)
        q = (len(a) - 2 * MARGIN_HR) // SCALE
        flow = np.broadcast_to(_shift_flow(shift), (q, q, 2))
        if rng.random() < 0.5:
            front = _augment_image(rng, self._frame(rng, video_share=1.0))
            front_shift = _random_shift(rng, _OBJECT_SHIFT_SPREAD)
            ellipse = _random_ellipse(rng, len(a))
            every = np.arange(len(a), dtype=np.float64)
            a = np.where(ellipse.at(every, every), _shifted(front, np.zeros(2, dtype=int)), a)
            moved = (every + front_shift[0], every + front_shift[1])
            b = np.where(ellipse.at(*moved), _shifted(front, front_shift), b)
            centres = MARGIN_HR + SCALE * np.arange(q, dtype=np.float64) + (SCALE - 1) / 2
            flow = np.where(ellipse.at(centres, centres), _shift_flow(front_shift), flow)
        return a, b, np.ascontiguousarray(flow, dtype=np.float32)


class _Ellipse(NamedTuple):
    """Centre and radii (y, x) in HR pixels."""

    centre: npt.NDArray[np.float64]
    radius: npt.NDArray[np.float64]

    def at(self, ys: npt.NDArray[Any], xs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Inside or not, (len(ys), len(xs), 1)."""
        down = ((ys - self.centre[0]) / self.radius[0]) ** 2
        across = ((xs - self.centre[1]) / self.radius[1]) ** 2
        return (down[:, None] + across[None, :] < 1)[..., None]


def _random_ellipse(rng: np.random.Generator, side: int) -> _Ellipse:
    return _Ellipse(rng.uniform(0.17, 0.83, size=2) * side, rng.uniform(0.14, 0.45, size=2) * side)


def _random_shift(rng: np.random.Generator, spread: float) -> npt.NDArray[np.int64]:
    """(dy, dx) whole HR pixels."""
    drawn = np.round(rng.normal(size=2) * spread).astype(np.int64)
    return np.clip(drawn, -_MAX_SHIFT, _MAX_SHIFT)


def _shifted(picture: ByteArray, shift: npt.NDArray[np.int64]) -> ByteArray:
    """The part inside a border of 16 pixels, looked at ``shift`` further down and right."""
    y, x = _MAX_SHIFT + shift
    height, width = (n - 2 * _MAX_SHIFT for n in picture.shape[:2])
    return picture[y : y + height, x : x + width]


def _shift_flow(shift: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """b(p) = picture(p + shift) means a(p) = b(p - shift): (x, y) in LR pixels."""
    return (-shift[::-1] / SCALE).astype(np.float32)


def _detailed_crop(
    rng: np.random.Generator, picture: ByteArray, side: int
) -> tuple[ByteArray, float]:
    """The roughest of a few random (side, side, 3) crops, and its roughness."""
    room = np.array(picture.shape[:2]) - side + 1
    places = rng.integers(room, size=(_CROP_CANDIDATES if room.max() > 1 else 1, 2))
    crops = [picture[y : y + side, x : x + side] for y, x in places]
    scores = [_roughness(crop) for crop in crops]
    best = int(np.argmax(scores))
    return crops[best], scores[best]


def _map(path: Path, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        raise DataError(f"packed data: {path}: expected {expected} bytes, found {found}")
    if expected == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
