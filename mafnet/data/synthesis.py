"""Moving clips with known motion, made from still pictures.

A layer is a picture seen by a camera that pans, zooms and turns.  Points are complex numbers
x + iy in HR pixels from the middle of the clip; frame t shows at z the picture's material point
a_t z + b_t.  So the backward flow between two frames is exact:
frame_t(z) = frame_s(z + flow) with flow = (a_t z + b_t - b_s) / a_s - z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mafnet.data.degrade import MARGIN_HR, SCALE
from mafnet.data.errors import DataError
from mafnet.data.sources import detail

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

# Layers are rendered at twice the HR size and area-averaged, so that edges move without aliasing.
SUPERSAMPLE = 2
MAX_SPEED = 7.0
OCCLUDER_SHARE = 0.3
# Source pixels per HR pixel: photos of 8-15 MP are soft at their own pixels and crisp at half size.
_SOURCE_SCALE = (1.6, 3.2)
_MIN_SOURCE_SCALE = 0.8
_MIN_LAYER_DETAIL = 3.0
_ATTEMPTS = 50
# HR pixels around an occluder within which a LR pixel mixes both layers.
_OCCLUDER_FRINGE = 4.0

# Draws one still picture (H, W, 3) uint8 to build a layer from.
PictureSource = Callable[[np.random.Generator], ByteArray]


class MovingClip(NamedTuple):
    """A clip of T frames with its motion.

    clip (T, P, P, 3) uint8; flow_prev, flow_next (T, p, p, 2) float16: backward flow to the frame
    before and after, x then y, in LR pixels, zero where there is no such frame; valid (T, p, p)
    bool: false on the borders of an occluder and where a neighbouring frame hides the point.
    """

    clip: ByteArray
    flow_prev: npt.NDArray[np.float16]
    flow_next: npt.NDArray[np.float16]
    valid: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Motion:
    """Per frame the similarity z -> turn * z + shift, identity in the middle frame; both (T,)."""

    turn: ComplexArray
    shift: ComplexArray

    def material(self, points: ComplexArray, frame: int) -> ComplexArray:
        """The picture's points seen at ``points`` in ``frame``, HR pixels."""
        return self.turn[frame] * points + self.shift[frame]

    def flow(self, points: ComplexArray, frame: int, other: int) -> ComplexArray:
        """Backward flow at ``points`` of ``frame`` to the frame ``other``, HR pixels."""
        there = (self.material(points, frame) - self.shift[other]) / self.turn[other]
        return there - points


def random_motion(rng: np.random.Generator, frames: int, max_speed: float = MAX_SPEED) -> Motion:
    """A pan of up to ``max_speed`` HR px a frame, mostly slow, with jitter, a turn and a zoom."""
    direction = np.exp(2j * np.pi * rng.random())
    velocity = direction * max_speed * rng.random() ** 1.5
    jitter = 0.3 * rng.random() * (rng.normal(size=frames) + 1j * rng.normal(size=frames))
    shift = np.cumsum(velocity + jitter)
    angle = np.cumsum(0.006 * rng.normal() + 0.001 * rng.normal(size=frames))
    log_zoom = np.cumsum(np.full(frames, 0.006 * rng.normal()))
    middle = frames // 2
    turn = np.exp(log_zoom - log_zoom[middle] + 1j * (angle - angle[middle]))
    return Motion(turn=turn, shift=shift - shift[middle])


@dataclass(frozen=True)
class Layer:
    """A picture (H, W, 3) uint8, the pixel at the clip's middle, pixels per HR pixel (its argument
    is a fixed rotation) and the motion."""

    picture: ByteArray
    centre: complex
    scale: complex
    motion: Motion


@dataclass(frozen=True)
class Occluder:
    """A smooth blob in the material coordinates of its layer: |u|**power + |v|**power < 1."""

    centre: complex
    radius: complex
    angle: float
    power: int

    def inside(self, material: ComplexArray, grow: float = 0.0) -> FloatArray:
        """1 inside, 0 outside, with a soft edge of about a pixel; ``grow`` enlarges it, HR px."""
        local = (material - self.centre) * np.exp(-1j * self.angle)
        across = np.abs(local.real / (self.radius.real + grow)) ** self.power
        along = np.abs(local.imag / (self.radius.imag + grow)) ** self.power
        return np.clip(20.0 * (1.0 - across - along), 0.0, 1.0)


def _grid(count: int, step: float) -> ComplexArray:
    """(count, count) points, ``step`` HR pixels apart, centred on 0."""
    axis = (np.arange(count) - (count - 1) / 2) * step
    return axis[None, :] + 1j * axis[:, None]


def render(layer: Layer, side: int) -> torch.Tensor:
    """The layer's frames at ``SUPERSAMPLE`` times the size: (T, 3, S, S) float32, levels 0..255."""
    points = _grid(side * SUPERSAMPLE, 1 / SUPERSAMPLE)
    frames = range(len(layer.motion.turn))
    where = np.stack([layer.motion.material(points, t) for t in frames])
    where = layer.centre + layer.scale * where
    x0, y0, x1, y1 = _bounds(where, layer.picture.shape)
    region = torch.from_numpy(layer.picture[y0:y1, x0:x1].astype(np.float32)).permute(2, 0, 1)
    # grid_sample with align_corners=True: -1 and 1 are the centres of the outermost pixels.
    grid = np.stack(
        [
            (where.real - x0) * (2 / max(x1 - x0 - 1, 1)) - 1,
            (where.imag - y0) * (2 / max(y1 - y0 - 1, 1)) - 1,
        ],
        axis=-1,
    ).astype(np.float32)
    flat = torch.from_numpy(grid).reshape(1, -1, points.shape[1], 2)
    out = F.grid_sample(region[None], flat, padding_mode="reflection", align_corners=True)
    return out[0].reshape(3, len(where), *points.shape).transpose(0, 1)


def _bounds(where: ComplexArray, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Part of a picture of ``shape`` that bilinear sampling at ``where`` reads: x0, y0, x1, y1."""
    height, width = shape[:2]
    x0 = int(np.clip(np.floor(where.real.min()), 0, width - 2))
    y0 = int(np.clip(np.floor(where.imag.min()), 0, height - 2))
    x1 = int(np.clip(np.floor(where.real.max()) + 2, x0 + 2, width))
    y1 = int(np.clip(np.floor(where.imag.max()) + 2, y0 + 2, height))
    return x0, y0, x1, y1


def random_layer(
    rng: np.random.Generator, pictures: PictureSource, side: int, frames: int
) -> Layer:
    """A layer around the most detailed of three random places of a random picture.

    Raises:
        DataError: ``pictures`` gives nothing with enough detail.
    """
    for _ in range(_ATTEMPTS):
        picture = pictures(rng)
        shortest = min(picture.shape[:2])
        scale = min(rng.uniform(*_SOURCE_SCALE), (shortest - 40) / (1.7 * side))
        scale = max(scale, _MIN_SOURCE_SCALE)
        motion = random_motion(rng, frames)
        # 1.25 leaves room for turning and zooming.
        reach = scale * (0.625 * side + np.abs(motion.shift).max()) + 8
        reach = min(reach, shortest / 2 - 1)
        places = [_random_place(rng, picture.shape, reach) for _ in range(3)]
        scores = [detail(_seen_at(picture, place, scale, side)) for place in places]
        if max(scores) >= _MIN_LAYER_DETAIL:
            tilt = rng.uniform(-0.2, 0.2) if rng.random() < 0.3 else 0.0
            centre = places[int(np.argmax(scores))]
            return Layer(picture, centre, scale * np.exp(1j * tilt), motion)
    raise DataError(f"synthetic clips: {_ATTEMPTS} pictures in a row have too little detail")


def _random_place(rng: np.random.Generator, shape: tuple[int, ...], reach: float) -> complex:
    y = rng.uniform(reach, shape[0] - reach)
    x = rng.uniform(reach, shape[1] - reach)
    return complex(x, y)


def _seen_at(picture: ByteArray, place: complex, scale: float, side: int) -> ByteArray:
    """About what a clip around ``place`` shows, by taking every ``scale``-th pixel."""
    x, y, half = int(place.real), int(place.imag), int(scale * side / 2)
    step = max(1, round(scale))
    return picture[max(0, y - half) : y + half : step, max(0, x - half) : x + half : step]


def random_occluder(rng: np.random.Generator, side: int) -> Occluder:
    return Occluder(
        centre=complex(*rng.uniform(-0.35, 0.35, size=2)) * side,
        radius=complex(*rng.uniform(0.075, 0.3, size=2)) * side,
        angle=rng.uniform(0, np.pi),
        power=int(rng.choice([2, 4])),
    )


def moving_clip(
    rng: np.random.Generator, pictures: PictureSource, side: int, frames: int
) -> MovingClip:
    """A clip of a random layer, with an occluder of its own motion in 30 % of the cases."""
    background = random_layer(rng, pictures, side, frames)
    if rng.random() >= OCCLUDER_SHARE:
        return compose(background, side)
    return compose(
        background, side, random_layer(rng, pictures, side, frames), random_occluder(rng, side)
    )


def compose(
    background: Layer,
    side: int,
    foreground: Layer | None = None,
    occluder: Occluder | None = None,
) -> MovingClip:
    """Render one layer, or two of which the occluder shows the foreground, with the true flow.

    ``side``: HR pixels of the clip; the motion covers the (side - 16) / 4 LR pixels inside its
    margin of 8 HR pixels.
    """
    frames = len(background.motion.turn)
    canvas = render(background, side)
    points = _grid((side - 2 * MARGIN_HR) // SCALE, float(SCALE))
    shown = np.zeros((frames, *points.shape), dtype=bool)
    valid = np.ones((frames, *points.shape), dtype=bool)
    if foreground is not None and occluder is not None:
        fine = _grid(side * SUPERSAMPLE, 1 / SUPERSAMPLE)
        cover = np.stack(
            [occluder.inside(foreground.motion.material(fine, t)) for t in range(frames)]
        )
        alpha = torch.from_numpy(cover.astype(np.float32))[:, None]
        canvas = torch.lerp(canvas, render(foreground, side), alpha)
        here = np.stack(
            [occluder.inside(foreground.motion.material(points, t)) for t in range(frames)]
        )
        shown = here > 0.5
        valid = _valid(background.motion, foreground.motion, occluder, points)
    levels = F.avg_pool2d(canvas, SUPERSAMPLE).add_(0.5).floor_().clamp_(0, 255)
    clip = levels.byte().permute(0, 2, 3, 1).contiguous().numpy()
    return MovingClip(
        clip,
        _flow(background, foreground, shown, points, step=-1),
        _flow(background, foreground, shown, points, step=1),
        valid,
    )


def _valid(
    background: Motion, foreground: Motion, occluder: Occluder, points: ComplexArray
) -> npt.NDArray[np.bool_]:
    """(T, p, p): LR pixels of one layer only whose point the occluder hides in no neighbour."""
    frames = len(background.turn)
    valid = []
    for t in range(frames):
        material = foreground.material(points, t)
        object_only = occluder.inside(material, grow=-_OCCLUDER_FRINGE) == 1.0
        seen = occluder.inside(material, grow=_OCCLUDER_FRINGE) == 0.0
        for s in (t - 1, t + 1):
            if 0 <= s < frames:
                moved = points + background.flow(points, t, s)
                there = foreground.material(moved, s)
                seen &= occluder.inside(there, grow=_OCCLUDER_FRINGE) == 0.0
        valid.append(object_only | seen)
    return np.stack(valid)


def _flow(
    background: Layer,
    foreground: Layer | None,
    shown: npt.NDArray[np.bool_],
    points: ComplexArray,
    step: int,
) -> npt.NDArray[np.float16]:
    """(T, p, p, 2) flow in LR pixels to the frame ``step`` away; ``shown`` is the foreground."""
    frames = len(shown)
    flow = np.zeros((frames, *points.shape), dtype=np.complex128)
    for t in range(frames):
        s = t + step
        if not 0 <= s < frames:
            continue
        flow[t] = background.motion.flow(points, t, s)
        if foreground is not None:
            flow[t] = np.where(shown[t], foreground.motion.flow(points, t, s), flow[t])
    return (np.stack([flow.real, flow.imag], axis=-1) / SCALE).astype(np.float16)
