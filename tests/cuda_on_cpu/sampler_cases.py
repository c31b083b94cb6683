"""Calls of common/sampler.h on the emulator, with what must come out.

What a sample is: an image that goes on for ever as its padding says, convolved with the kernel of the interpolation.
Weights and slopes are added up by pixel and must be right to the bit: positions are multiples of 1/4, so that nothing
is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cuda_on_cpu.emulator import Check, Kernels

PADDINGS = ("zeros", "border", "reflection")
SIZES = (1, 2, 5)
OUTSIDE = -1


def pixel_of(index: int, size: int, padding: str) -> int | None:
    """What an image holds at an index that may lie outside; None: zero."""
    if 0 <= index < size:
        return index
    if padding == "zeros":
        return None
    if padding == "border":
        return max(0, min(index, size - 1))
    phase = index % max(1, 2 * (size - 1))
    return min(phase, 2 * (size - 1) - phase)


# Weight and derivative at a distance d from a pixel, d = position - pixel; at a knot the right-hand derivative.


def bilinear(d: float) -> tuple[float, float]:
    return max(0.0, 1 - abs(d)), 1.0 if -1 <= d < 0 else -1.0 if 0 <= d < 1 else 0.0


def nearest(d: float) -> tuple[float, float]:
    return float(d == 0), 0.0


def bicubic(d: float) -> tuple[float, float]:
    """Keys' kernel, a = -3/4."""
    r, sign = abs(d), math.copysign(1, d)
    if r < 1:
        return 1.25 * r**3 - 2.25 * r**2 + 1, sign * (3.75 * r**2 - 4.5 * r)
    if r < 2:
        return -0.75 * (r**3 - 5 * r**2 + 8 * r - 4), sign * -0.75 * (3 * r**2 - 10 * r + 8)
    return 0.0, 0.0


KERNELS: dict[str, Callable[[float], tuple[float, float]]] = {
    "bilinear": bilinear,
    "nearest": nearest,
    "bicubic": bicubic,
}
TAPS = {"bilinear": 2, "nearest": 1, "bicubic": 4}


def expected(interpolation: str, padding: str, size: int, position: float) -> np.ndarray:
    """Weights and slopes, (2, size)."""
    kernel, sums = KERNELS[interpolation], np.zeros((2, size))
    at = float(round(position)) if interpolation == "nearest" else position  # halves to even
    for index in range(math.floor(at) - 1, math.floor(at) + 3):
        pixel = pixel_of(index, size, padding)
        if pixel is not None:
            sums[:, pixel] += kernel(at - index)
    return sums


@dataclass(frozen=True)
class Sampler:
    """What is sampled how, and in which type."""

    interpolation: str
    padding: str
    size: int
    dtype: type[np.floating] = np.float32

    def take(
        self, kernels: Kernels, positions: list[float]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index, weight and slope of all taps, (positions, taps)."""
        shape = len(positions), TAPS[self.interpolation]
        index = np.zeros(shape, np.int32)
        weight, slope = np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)
        kernels.run(
            self.interpolation,
            position=np.array(positions, self.dtype),
            index=index,
            weight=weight,
            slope=slope,
            size=self.size,
            padding=PADDINGS.index(self.padding),
        ).raise_if_any()
        assert ((index == OUTSIDE) | ((index >= 0) & (index < self.size))).all(), index
        return index, weight, slope

    def sums(self, kernels: Kernels, positions: list[float]) -> np.ndarray:
        """Weights and slopes of each pixel, (positions, 2, size)."""
        index, *each = self.take(kernels, positions)
        sums = np.zeros((len(positions), 2, self.size))
        for number, taps in enumerate(index):
            for kind, values in enumerate(each):
                for pixel, value in zip(taps, values[number]):
                    if pixel != OUTSIDE:
                        sums[number, kind, pixel] += value
        return sums

    def check(self, kernels: Kernels) -> None:
        """From well before the image to well behind it, and as far as positions are exact."""
        near = np.arange(-12 * self.size - 16, 16 * self.size + 17) / 4
        positions = [*near.tolist(), *(s * (2.0**20 + f) for s in (-1, 1) for f in (0.25, 7.75))]
        for position, actual in zip(positions, self.sums(kernels, positions)):
            wanted = expected(self.interpolation, self.padding, self.size, position)
            if position % 1 == 0 and not 0 <= position < self.size:
                actual, wanted = actual[:1], wanted[:1]  # a mirrored knot has the other derivative
            assert np.array_equal(actual, wanted), f"{position}: {actual}, not {wanted}"

    def check_far(self, kernels: Kernels) -> None:
        """Where rounding leaves no position: the padding, of a reflection some place in the image."""
        far = [1e9, 1e10, 3e38, *([] if self.padding == "reflection" else [math.inf])]
        for position in (*far, *(-v for v in far)):
            weight, slope = self.sums(kernels, [position])[0]
            assert np.isfinite(slope).all()
            if self.padding == "reflection":
                assert weight.sum() == 1  # at whole numbers
                continue
            edge = np.zeros(self.size)
            edge[-1 if position > 0 else 0] = self.padding == "border"
            assert np.array_equal(weight, edge)
            assert not slope.any()

    def check_behind_the_border(self, kernels: Kernels) -> None:
        """Each tap's slope is zero, not only their sum, of which a fused multiply-add would leave a rounding."""
        _, _, slope = self.take(kernels, [-1e9, -0.25, self.size - 0.75, 1e9])
        assert not slope.any()

    def check_unknown(self, kernels: Kernels) -> None:
        """NaN reads nothing and its sum is NaN, as is its derivative; so with the reflection of infinity."""
        unknown = [math.nan, *([math.inf, -math.inf] if self.padding == "reflection" else [])]
        index, weight, slope = self.take(kernels, unknown)
        assert (index == OUTSIDE).all()
        assert np.isnan(weight).all()
        assert not slope.any() if self.interpolation == "nearest" else np.isnan(slope).all()


def sampler_checks(dtype: type[np.floating]) -> list[Check]:
    checks: list[Check] = []
    for interpolation in KERNELS:
        for padding in PADDINGS:
            for size in SIZES:
                sampler = Sampler(interpolation, padding, size, dtype)
                checks += [sampler.check, sampler.check_far, sampler.check_unknown]
                if padding == "border" and interpolation != "bicubic":  # which weighs on behind it
                    checks.append(sampler.check_behind_the_border)
    return checks
