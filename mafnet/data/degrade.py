"""How low-resolution frames are made from high-resolution ones: BI and BD, and bicubic back up.

BI is MATLAB's ``imresize(x, 1/4, 'bicubic')``: Keys cubic with a = -1/2, stretched by the scale
when shrinking (antialiasing: 16 input pixels per output pixel at 1/4), symmetric padding.  The
bicubic of cv2, PIL or torch is another function.  BD is a Gaussian blur followed by taking every
fourth pixel.

At scale 1/4 every tap weight is a multiple of 2**-12, so one pass over 8-bit pixels is exact in
float32 and two passes are exact in float64.  Rounding ties therefore do not depend on the order of
summation, and crops give bit for bit what whole frames give.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mafnet.data.errors import check_image

FloatArray = npt.NDArray[np.float64]
ByteArray = npt.NDArray[np.uint8]
BDVariant = Literal["even12", "odd13"]

SCALE = 4
# Output pixels at 1/4 whose 16-pixel support reaches over the border of the input, on each side.
BORDER_LR = 2
MARGIN_HR = BORDER_LR * SCALE

_BD_SIGMA = 1.6


def cubic(x: FloatArray) -> FloatArray:
    """Keys' cubic convolution kernel with a = -1/2 (support 4), any shape."""
    a = np.abs(x)
    inner = (1.5 * a - 2.5) * a * a + 1.0
    outer = ((-0.5 * a + 2.5) * a - 4.0) * a + 2.0
    return np.where(a <= 1.0, inner, np.where(a <= 2.0, outer, 0.0))


def _taps(n_in: int, n_out: int, scale: float) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Source indices and weights, both (n_out, K), of one axis; each row of weights sums to 1."""
    stretch = min(scale, 1.0)
    support = 4.0 / stretch
    # Pixel centres of both grids in input coordinates, 0-based: (j + .5) / scale - .5.
    centre = (np.arange(n_out) + 0.5) / scale - 0.5
    first = np.floor(centre - support / 2).astype(np.int64)
    index = first[:, None] + np.arange(int(np.ceil(support)) + 2)
    weight = stretch * cubic(stretch * (centre[:, None] - index))
    weight /= weight.sum(axis=1, keepdims=True)
    # Symmetric padding: ... 1 0 | 0 1 ... n-1 | n-1 n-2 ...
    index %= 2 * n_in
    index = np.where(index < n_in, index, 2 * n_in - 1 - index)
    used = (weight != 0.0).any(axis=0)
    return index[:, used], weight[:, used]


@lru_cache(maxsize=64)
def _cached_taps(n_in: int, n_out: int, scale: float) -> tuple[npt.NDArray[np.int64], FloatArray]:
    return _taps(n_in, n_out, scale)


def resize_matrix(n_in: int, n_out: int, scale: float) -> FloatArray:
    """Matrix R of one axis of MATLAB's bicubic ``imresize``: ``out = R @ x``.

    Args:
        n_in: input pixels, n_out: output pixels (MATLAB: ``ceil(n_in * scale)``).
        scale: output pixels per input pixel; below 1 the kernel is stretched (antialiasing).

    Returns:
        (n_out, n_in) float64, rows sum to 1.

    Raises:
        ValueError: a size below 1 or a scale that is not positive.
    """
    if n_in < 1 or n_out < 1 or not scale > 0:
        raise ValueError(
            "resize_matrix: n_in, n_out, scale: expected sizes >= 1 and scale > 0, "
            f"got {n_in}, {n_out}, {scale}"
        )
    index, weight = _cached_taps(n_in, n_out, float(scale))
    matrix = np.zeros((n_out, n_in))
    rows = np.broadcast_to(np.arange(n_out)[:, None], index.shape)
    np.add.at(matrix, (rows, index), weight)
    return matrix


def _resize_rows(image: FloatArray, n_out: int, scale: float) -> FloatArray:
    """``resize_matrix @ image`` along axis 0 by its few taps: K is 16 at 1/4 and 4 at x4."""
    index, weight = _cached_taps(image.shape[0], n_out, float(scale))
    column = (slice(None),) + (None,) * (image.ndim - 1)
    out = np.zeros((n_out, *image.shape[1:]))
    for k in range(index.shape[1]):
        out += weight[:, k][column] * image[index[:, k]]
    return out


def imresize(image: npt.NDArray[Any], scale: float) -> FloatArray:
    """MATLAB's ``imresize(image, scale, 'bicubic')`` in float64, without rounding or clipping.

    Args:
        image: (H, W) or (H, W, C), any range.
        scale: output pixels per input pixel.

    Returns:
        (ceil(H * scale), ceil(W * scale)[, C]) float64.
    """
    if image.ndim not in (2, 3):
        raise ValueError(f"imresize: image: expected (H, W) or (H, W, C), got shape {image.shape}")
    height, width = (int(np.ceil(n * scale)) for n in image.shape[:2])
    rows = _resize_rows(np.asarray(image, dtype=np.float64), height, scale)
    return _resize_rows(rows.swapaxes(0, 1), width, scale).swapaxes(0, 1)


def to_uint8(image: FloatArray) -> ByteArray:
    """Round half up, as MATLAB does for positive values, and clip to 0..255."""
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)


def crop_to_multiple(image: ByteArray, scale: int = SCALE) -> ByteArray:
    """Drop rows below and columns at the right until both sides are multiples of ``scale``."""
    height, width = (n - n % scale for n in image.shape[:2])
    if height == 0 or width == 0:
        raise ValueError(
            f"crop_to_multiple: image: expected sides >= scale {scale}, got shape {image.shape}"
        )
    return image[:height, :width]


def bi_downscale(image: ByteArray, scale: int = SCALE) -> ByteArray:
    """BI degradation: crop to a multiple of ``scale``, MATLAB bicubic by 1/scale, round to 8 bits.

    (H, W, C) uint8 -> (H // scale, W // scale, C) uint8.

    Raises:
        ValueError: not (H, W, C) uint8, or smaller than ``scale`` pixels.
    """
    check_image("bi_downscale", image)
    return to_uint8(imresize(crop_to_multiple(image, scale), 1 / scale))


def bicubic_upscale(image: ByteArray, scale: int = SCALE) -> ByteArray:
    """MATLAB bicubic enlargement, the baseline of every table: (H, W, C) uint8, sides x scale."""
    check_image("bicubic_upscale", image)
    return to_uint8(imresize(image, float(scale)))


def bd_downscale(image: ByteArray, scale: int = SCALE, variant: BDVariant = "even12") -> ByteArray:
    """BD degradation: Gaussian of sigma 1.6, then every ``scale``-th pixel, then 8 bits.

    ``even12``: 12x12 kernel, replicate padding, MATLAB's ``blurred(2:4:end-2)``.  ``imfilter`` puts
    an even kernel half a pixel towards larger indices, so the samples lie at the centres of 4x4
    blocks and share the phase of BI.
    ``odd13``: 13x13 kernel, reflect padding (edge pixel not repeated), samples ``[0::4]``: the
    centre of the top left pixel of each block, 1.5 pixels away from the phase of BI.
    A model trained on one loses decibels on the other.

    (H, W, C) uint8 -> (H // scale, W // scale, C) uint8, after the crop to a multiple of ``scale``.
    """
    check_image("bd_downscale", image)
    image = crop_to_multiple(image, scale)
    if variant == "even12":
        return to_uint8(_blur_and_take(image, 12, scale, first=scale // 2 - 1, mode="edge"))
    if variant == "odd13":
        return to_uint8(_blur_and_take(image, 13, scale, first=0, mode="reflect"))
    raise ValueError(f"bd_downscale: variant: expected 'even12' or 'odd13', got {variant!r}")


def _blur_and_take(
    image: ByteArray, size: int, scale: int, first: int, mode: Literal["edge", "reflect"]
) -> FloatArray:
    """Separable Gaussian evaluated only at ``first::scale``."""
    before = (size - 1) // 2  # taps left of the sample, as in MATLAB's imfilter
    offset = np.arange(size) - (size - 1) / 2
    kernel = np.exp(-(offset**2) / (2 * _BD_SIGMA**2))
    kernel /= kernel.sum()
    out = image.astype(np.float64)
    for axis in (0, 1):
        length = out.shape[axis]
        if mode == "reflect" and length <= before:
            raise ValueError(
                f"bd_downscale: image: expected sides > {before} pixels, got shape {image.shape}"
            )
        padding = [(0, 0)] * 3
        padding[axis] = (before, size - 1 - before)
        padded = np.moveaxis(np.pad(out, padding, mode=mode), axis, 0)
        taken = sum(kernel[k] * padded[k + first : k + length : scale] for k in range(size))
        out = np.moveaxis(np.asarray(taken), 0, axis)
    return out


@lru_cache(maxsize=16)
def _interior_matrix(n: int) -> torch.Tensor:
    """(n / 4 - 4, n) float64: the rows of the 1/4 resize that never touch the padding."""
    return torch.from_numpy(resize_matrix(n, n // SCALE, 1 / SCALE)[BORDER_LR:-BORDER_LR])


def interior_bi(batch: torch.Tensor) -> torch.Tensor:
    """BI on crops, exactly as a whole frame would give it: for training batches.

    Computes the rows and columns whose support lies inside the crop: 2 LR pixels (8 HR pixels) per
    side are dropped.  Pair the result with ``batch[..., 8:-8, 8:-8]``.

    Args:
        batch: (N, 3, h, w) float32 holding 8-bit levels 0..255, h and w multiples of 4, >= 20.

    Returns:
        (N, 3, h / 4 - 4, w / 4 - 4) float32, whole levels 0..255, bit-equal to ``bi_downscale`` of
        any frame that contains the crop at a multiple of 4.

    Raises:
        ValueError: another rank or side.
    """
    height, width = batch.shape[-2:]
    if batch.ndim != 4 or height % SCALE or width % SCALE or min(height, width) < 20:
        raise ValueError(
            "interior_bi: batch: expected (N, C, h, w) with h and w multiples of 4 and >= 20, "
            f"got shape {tuple(batch.shape)}"
        )
    # First pass exact in float32 (8-bit levels times multiples of 2**-12), second needs float64.
    columns = torch.matmul(batch.float(), _interior_matrix(width).T.float())
    levels = torch.matmul(_interior_matrix(height), columns.double())
    return levels.add_(0.5).floor_().clamp_(0, 255).float()
