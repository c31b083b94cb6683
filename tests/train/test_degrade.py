"""Degradations against loops written from MATLAB's documentation, in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mafnet.data.degrade import (
    bd_downscale,
    bi_downscale,
    bicubic_upscale,
    imresize,
    interior_bi,
    resize_matrix,
)


def exact_cubic(x: Fraction) -> Fraction:
    a = abs(x)
    if a <= 1:
        return Fraction(3, 2) * a**3 - Fraction(5, 2) * a**2 + 1
    if a <= 2:
        return Fraction(-1, 2) * a**3 + Fraction(5, 2) * a**2 - 4 * a + 2
    return Fraction(0)


def exact_rows(n_in: int, n_out: int, scale: Fraction) -> list[dict[int, Fraction]]:
    """Weights of every output pixel as MATLAB's ``contributions`` makes them, 1-based inside."""
    shrink = min(scale, Fraction(1))
    width = 4 / shrink
    mirror = [*range(1, n_in + 1), *range(n_in, 0, -1)]
    rows = []
    for x in range(1, n_out + 1):
        u = x / scale + Fraction(1, 2) * (1 - 1 / scale)
        left = math.floor(u - width / 2)
        weights = {
            i: shrink * exact_cubic(shrink * (u - i))
            for i in range(left, left + math.ceil(width) + 2)
        }
        total = sum(weights.values())
        row: dict[int, Fraction] = {}
        for i, weight in weights.items():
            source = mirror[(i - 1) % (2 * n_in)] - 1
            row[source] = row.get(source, Fraction(0)) + weight / total
        rows.append(row)
    return rows


def exact_resize(image: np.ndarray, scale: Fraction) -> list[list[list[Fraction]]]:
    height, width, channels = image.shape
    down = exact_rows(height, math.ceil(height * scale), scale)
    across = exact_rows(width, math.ceil(width * scale), scale)
    return [
        [
            [
                sum(
                    (
                        a * b * int(image[y, x, c])
                        for y, a in row.items()
                        for x, b in column.items()
                        if a and b
                    ),
                    Fraction(0),
                )
                for c in range(channels)
            ]
            for column in across
        ]
        for row in down
    ]


def rounded(values: list[list[list[Fraction]]]) -> np.ndarray:
    return np.array(
        [
            [[min(255, max(0, math.floor(v + Fraction(1, 2)))) for v in p] for p in row]
            for row in values
        ],
        dtype=np.uint8,
    )


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


@pytest.mark.parametrize("n_in", [1, 3, 4, 7, 8, 16, 33])
@pytest.mark.parametrize("scale", [Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), 2, 3, 4])
def test_resize_matrix_equals_exact_weights(n_in: int, scale: Fraction) -> None:
    n_out = math.ceil(n_in * Fraction(scale))
    expected = np.zeros((n_out, n_in))
    for j, row in enumerate(exact_rows(n_in, n_out, Fraction(scale))):
        for i, weight in row.items():
            expected[j, i] = float(weight)
    # A weight is a polynomial of values below 13 in a handful of float64 operations.
    np.testing.assert_allclose(resize_matrix(n_in, n_out, float(scale)), expected, atol=1e-14)


def test_quarter_taps_are_the_golden_ones() -> None:
    """The row of MATLAB's imresize at 1/4 inside a picture, in units of 2**-12."""
    left = [-7, -45, -75, -49, 93, 399, 745, 987]
    golden = np.array([*left, *left[::-1]]) / 4096
    row = resize_matrix(64, 16, 0.25)[8]
    np.testing.assert_array_equal(row[np.flatnonzero(row)], golden)
    assert golden.sum() == 1


def test_bi_downscale_of_a_tiny_picture() -> None:
    """Golden: worked out in exact fractions, also where padding mirrors the picture twice."""
    ramp = (np.arange(64).reshape(8, 8) * 4 % 256).astype(np.uint8)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(bi_downscale(ramp)[..., 0], [[50, 67], [185, 202]])
    image = picture((12, 20, 3))
    np.testing.assert_array_equal(bi_downscale(image), rounded(exact_resize(image, Fraction(1, 4))))


def test_bicubic_upscale_of_a_tiny_picture() -> None:
    image = picture((3, 5, 3), seed=1)
    np.testing.assert_array_equal(bicubic_upscale(image), rounded(exact_resize(image, Fraction(4))))


def test_rounds_ties_up_and_clips() -> None:
    flat = np.zeros((8, 8, 1))
    assert imresize(flat + 7.0, 0.25).tolist() == [[[7.0], [7.0]], [[7.0], [7.0]]]
    # Rows 4, 5, 4, 5, ...: every 1/4 average is a tie at 4.5, and MATLAB's round goes up.
    stripes = np.tile(np.array([[4], [5]], dtype=np.uint8), (12, 24))[..., None]
    assert (bi_downscale(stripes)[2:-2] == 5).all()
    overshoot = np.zeros((4, 8, 1), dtype=np.uint8)
    overshoot[:, 4:] = 255
    grown = imresize(overshoot.astype(float), 4.0)
    assert grown.min() < 0 and grown.max() > 255
    assert bicubic_upscale(overshoot).min() == 0 and bicubic_upscale(overshoot).max() == 255


def test_imresize_keeps_straight_lines() -> None:
    """Output pixel j sits at input 4 j + 1.5: the phase a half-pixel error would break."""
    ramp = np.arange(64.0)[:, None] + np.zeros((1, 32))
    inner = imresize(ramp, 0.25)[2:-2, 2:-2]
    np.testing.assert_array_equal(inner, 4.0 * np.arange(2, 14)[:, None] + 1.5 + np.zeros((1, 4)))


def test_crops_to_a_multiple_of_the_scale_first() -> None:
    image = picture((23, 30, 3))
    np.testing.assert_array_equal(bi_downscale(image), bi_downscale(image[:20, :28]))
    np.testing.assert_array_equal(bd_downscale(image), bd_downscale(image[:20, :28]))
    assert bi_downscale(image).shape == (5, 7, 3)


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 20, 24), (8, 12, 40, 28)])
def test_interior_of_a_crop_equals_the_whole_frame(
    top: int, left: int, height: int, width: int
) -> None:
    frame = picture((64, 80, 3), seed=2)
    whole = bi_downscale(frame)
    crop = torch.from_numpy(frame[top : top + height, left : left + width].copy())
    lr = interior_bi(crop.permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy()
    y, x = top // 4, left // 4
    expected = whole[y + 2 : y + height // 4 - 2, x + 2 : x + width // 4 - 2]
    np.testing.assert_array_equal(lr, expected)


def test_interior_is_exact_at_rounding_ties() -> None:
    """Pictures that hold pixels so near a tie that float32 in the second pass misses them."""
    for seed in (3, 8, 15, 17, 28, 30, 37):
        frames = np.random.default_rng(seed).integers(0, 256, size=(48, 64, 64, 3), dtype=np.uint8)
        lr = interior_bi(torch.from_numpy(frames).permute(0, 3, 1, 2).float())
        expected = np.stack([bi_downscale(frame)[2:-2, 2:-2] for frame in frames])
        np.testing.assert_array_equal(lr.permute(0, 2, 3, 1).numpy(), expected)


def loop_bd(image: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Two-dimensional fspecial('gaussian', size, 1.6), imfilter, then the samples; 1-based."""
    height, width, channels = image.shape
    axis = [k - (size - 1) / 2 for k in range(size)]
    kernel = [[math.exp(-(y * y + x * x) / (2 * 1.6**2)) for x in axis] for y in axis]
    total = sum(map(sum, kernel))
    anchor = (size + 1) // 2  # imfilter's centre, 1-based

    def index(i: int, n: int) -> int:
        if mode == "edge":
            return min(max(i, 1), n)
        return 2 - i if i < 1 else 2 * n - i if i > n else i

    first, last = (2, -2) if size == 12 else (1, 0)
    rows = range(first, height + last + 1, 4)
    columns = range(first, width + last + 1, 4)
    out = np.zeros((len(rows), len(columns), channels))
    for j, y in enumerate(rows):
        for i, x in enumerate(columns):
            for v in range(size):
                for u in range(size):
                    py = index(y + v + 1 - anchor, height) - 1
                    px = index(x + u + 1 - anchor, width) - 1
                    out[j, i] += kernel[v][u] / total * image[py, px]
    return out


@pytest.mark.parametrize(
    ("variant", "size", "mode"), [("even12", 12, "edge"), ("odd13", 13, "reflect")]
)
def test_bd_equals_the_loop(variant: str, size: int, mode: str) -> None:
    image = picture((16, 20, 3), seed=4)
    expected = loop_bd(image, size, mode)
    # No value may lie so close to a tie that summation order decides it.
    assert np.abs(expected % 1 - 0.5).min() > 1e-9
    np.testing.assert_array_equal(
        bd_downscale(image, variant=variant),  # type: ignore[arg-type]
        np.floor(expected + 0.5).astype(np.uint8),
    )


def test_bd_variants_differ_in_phase() -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 2, (64, 64, 3)).copy()
    middle = slice(4, 12)
    even = bd_downscale(ramp)[middle, 8, 0]
    odd = bd_downscale(ramp, variant="odd13")[middle, 8, 0]
    np.testing.assert_array_equal(even, 8 * np.arange(4, 12) + 3)
    np.testing.assert_array_equal(odd, 8 * np.arange(4, 12))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bi_downscale(np.zeros((8, 8), np.uint8)), ["bi_downscale", "image", "(8, 8)"]),
        (
            lambda: bi_downscale(np.zeros((8, 8, 3), np.float32)),
            ["bi_downscale", "uint8", "float32"],
        ),
        (lambda: bi_downscale(picture((3, 8, 3))), ["image", "scale 4", "(3, 8, 3)"]),
        (lambda: bd_downscale(picture((8, 8, 3)), variant="x"), ["variant", "even12", "'x'"]),  # type: ignore[arg-type]
        (lambda: bd_downscale(picture((4, 8, 3)), variant="odd13"), ["image", "> 6", "(4, 8, 3)"]),
        (lambda: bicubic_upscale(np.zeros((0, 8, 3), np.uint8)), ["bicubic_upscale", "(0, 8, 3)"]),
        (lambda: imresize(np.zeros(5), 2.0), ["imresize", "(5,)"]),
        (lambda: resize_matrix(4, 0, 0.25), ["resize_matrix", "4, 0, 0.25"]),
        (lambda: interior_bi(torch.zeros(1, 3, 22, 24)), ["interior_bi", "(1, 3, 22, 24)"]),
        (lambda: interior_bi(torch.zeros(1, 3, 16, 24)), ["interior_bi", "(1, 3, 16, 24)"]),
    ],
)
def test_bad_input_is_named(call, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)
