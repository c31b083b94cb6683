"""PSNR and SSIM of 8-bit RGB pictures as the field reports them; float64 throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]
Metric = Callable[..., float]

# Red, green and blue in the luma of BT.601, studio range: 16 for black, 235 for white.
_LUMA = np.array([65.481, 128.553, 24.966]) / 255
_LUMA_OFFSET = 16.0

_SSIM_SIDE, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def rgb_to_y(image: npt.NDArray[np.generic]) -> FloatArray:
    """Luma as MATLAB's ``rgb2ycbcr`` has it, not rounded: (..., 3) levels 0..255 -> (...) 16..235.

    Raises:
        ValueError: the last axis is not 3 long.
    """
    if image.ndim < 1 or image.shape[-1] != 3:
        raise ValueError(f"rgb_to_y: image: expected (..., 3), got shape {image.shape}")
    return image.astype(np.float64) @ _LUMA + _LUMA_OFFSET


def psnr_y(a: Image, b: Image, crop: int = 0) -> float:
    """PSNR of the luma in dB, against a range of 255; infinite for equal pictures.

    Args:
        a, b: (H, W, 3) uint8 of one shape.
        crop: pixels left out at each border.

    Raises:
        ValueError: wrong shape or dtype, shapes that differ, or a crop that leaves nothing.
    """
    a, b = _checked("psnr_y", a, b, crop)
    return _psnr(rgb_to_y(a), rgb_to_y(b))


def psnr_rgb(a: Image, b: Image, crop: int = 0) -> float:
    """PSNR in dB over all three channels at once; see ``psnr_y``."""
    a, b = _checked("psnr_rgb", a, b, crop)
    return _psnr(a.astype(np.float64), b.astype(np.float64))


def ssim_y(a: Image, b: Image, crop: int = 0) -> float:
    """SSIM of the luma: Gaussian window 11x11 of sigma 1.5, inside the picture only, range 255.

    Args and errors as ``psnr_y``; after the crop the sides must be at least 11 pixels.
    """
    a, b = _checked("ssim_y", a, b, crop, least=_SSIM_SIDE)
    return _ssim(rgb_to_y(a), rgb_to_y(b))


def ssim_rgb(a: Image, b: Image, crop: int = 0) -> float:
    """Mean of the SSIM of red, green and blue; see ``ssim_y``."""
    a, b = _checked("ssim_rgb", a, b, crop, least=_SSIM_SIDE)
    planes = zip(np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0), strict=True)
    return float(np.mean([_ssim(p.astype(np.float64), q.astype(np.float64)) for p, q in planes]))


def clip_average(metric: Metric, a: Sequence[Image], b: Sequence[Image], crop: int = 0) -> float:
    """Mean of a metric over the frames of one clip.

    Raises:
        ValueError: no frames, or clips of different lengths.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"clip_average: clips: expected equal numbers of frames, got {len(a)} and {len(b)}"
        )
    return float(np.mean([metric(x, y, crop=crop) for x, y in zip(a, b, strict=True)]))


def set_average(clip_values: Iterable[float]) -> float:
    """Mean over clips of their means: every clip counts the same, however long it is.

    Raises:
        ValueError: no clips.
    """
    values = list(clip_values)
    if not values:
        raise ValueError("set_average: clip_values: expected at least one clip, got none")
    return float(np.mean(values))


def _checked(caller: str, a: Image, b: Image, crop: int, least: int = 1) -> tuple[Image, Image]:
    for name, image in (("a", a), ("b", b)):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"{caller}: {name}: expected (H, W, 3) uint8, got shape {image.shape}, "
                f"{image.dtype}"
            )
    if a.shape != b.shape:
        raise ValueError(f"{caller}: b: expected shape {a.shape} as a, got {b.shape}")
    if crop < 0 or min(a.shape[:2]) - 2 * crop < least:
        raise ValueError(
            f"{caller}: crop: expected one that leaves at least {least}x{least} of "
            f"{a.shape[0]}x{a.shape[1]} pixels, got {crop}"
        )
    inside = slice(crop, -crop if crop else None)
    return a[inside, inside], b[inside, inside]


def _psnr(a: FloatArray, b: FloatArray) -> float:
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0.0 else float(10 * np.log10(255.0**2 / error))


def _window_mean(image: FloatArray) -> FloatArray:
    """Gaussian-weighted mean around every pixel whose window lies inside: (H - 10, W - 10)."""
    offset = np.arange(_SSIM_SIDE) - _SSIM_SIDE // 2
    kernel = np.exp(-(offset**2) / (2 * _SSIM_SIGMA**2))
    kernel /= kernel.sum()
    rows, columns = (n - _SSIM_SIDE + 1 for n in image.shape)
    down = sum(kernel[k] * image[k : k + rows] for k in range(_SSIM_SIDE))
    return np.asarray(sum(kernel[k] * down[:, k : k + columns] for k in range(_SSIM_SIDE)))


def _ssim(a: FloatArray, b: FloatArray) -> float:
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    variance_a = _window_mean(a * a) - mean_a**2
    variance_b = _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _SSIM_C1) / (mean_a**2 + mean_b**2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variance_a + variance_b + _SSIM_C2)
    return float((luminance * structure).mean())
