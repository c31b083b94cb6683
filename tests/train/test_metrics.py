"""PSNR and SSIM against loops over pixels and windows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mafnet.metrics import (
    clip_average,
    psnr_rgb,
    psnr_y,
    rgb_to_y,
    set_average,
    ssim_rgb,
    ssim_y,
)


def pair(height: int = 14, width: int = 17, noise: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    b = np.clip(a + rng.integers(-noise, noise + 1, size=a.shape), 0, 255).astype(np.uint8)
    return a, b


def loop_luma(image: np.ndarray) -> list[list[float]]:
    return [
        [16 + (65.481 * int(r) + 128.553 * int(g) + 24.966 * int(b)) / 255 for r, g, b in row]
        for row in image
    ]


def loop_psnr(a: list[float], b: list[float]) -> float:
    error = math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    return 20 * math.log10(255) - 10 * math.log10(error)


def loop_ssim(a: list[list[float]], b: list[list[float]]) -> float:
    weight = [
        [math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * 1.5**2)) for x in range(11)]
        for y in range(11)
    ]
    total = sum(map(sum, weight))
    c1, c2 = 2.55**2, 7.65**2
    values = []
    for top in range(len(a) - 10):
        for left in range(len(a[0]) - 10):
            at = [(y, x) for y in range(11) for x in range(11)]
            w = [weight[y][x] / total for y, x in at]
            p = [a[top + y][left + x] for y, x in at]
            q = [b[top + y][left + x] for y, x in at]
            mp = math.fsum(k * v for k, v in zip(w, p, strict=True))
            mq = math.fsum(k * v for k, v in zip(w, q, strict=True))
            vp = math.fsum(k * (v - mp) ** 2 for k, v in zip(w, p, strict=True))
            vq = math.fsum(k * (v - mq) ** 2 for k, v in zip(w, q, strict=True))
            both = zip(w, p, q, strict=True)
            cov = math.fsum(k * (v - mp) * (u - mq) for k, v, u in both)
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return math.fsum(values) / len(values)


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def test_luma_of_known_colours() -> None:
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    np.testing.assert_allclose(rgb_to_y(colours), [16.0, 235.0, 81.481, 40.966], rtol=1e-14)


# Loops and code sum the same float64 terms in another order, some of which cancel: 1e-11 is 1e4
# roundings of a value near 1 and far below the fourth digit that tables print.
def test_psnr_equals_the_loop() -> None:
    a, b = pair()
    assert psnr_y(a, b) == pytest.approx(loop_psnr(flat(loop_luma(a)), flat(loop_luma(b))), 1e-11)
    channels = [[float(v) for v in image.reshape(-1)] for image in (a, b)]
    assert psnr_rgb(a, b) == pytest.approx(loop_psnr(*channels), 1e-11)


def test_psnr_of_a_constant_error_is_known() -> None:
    a = np.full((4, 5, 3), 100, dtype=np.uint8)
    # One grey level is 219 / 255 of a level of luma.
    assert psnr_rgb(a, a + 1) == pytest.approx(48.1308036, abs=1e-7)
    assert psnr_y(a, a + 1) == pytest.approx(48.1308036 + 20 * math.log10(255 / 219), abs=1e-7)


def test_ssim_equals_the_loop() -> None:
    a, b = pair()
    assert ssim_y(a, b) == pytest.approx(loop_ssim(loop_luma(a), loop_luma(b)), abs=1e-11)
    planes = [loop_ssim(a[..., c].tolist(), b[..., c].tolist()) for c in range(3)]
    assert ssim_rgb(a, b) == pytest.approx(sum(planes) / 3, abs=1e-11)


def test_equal_pictures() -> None:
    a, _ = pair()
    assert psnr_y(a, a) == psnr_rgb(a, a) == math.inf
    assert ssim_y(a, a) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr_y, psnr_rgb, ssim_y, ssim_rgb])
def test_crop_leaves_the_border_out(metric) -> None:
    a, b = pair(20, 23)
    assert metric(a, b, crop=3) == metric(a[3:-3, 3:-3], b[3:-3, 3:-3])
    damaged = b.copy()
    damaged[:3] = 0
    assert metric(a, damaged, crop=3) == metric(a, b, crop=3)
    assert metric(a, damaged) < metric(a, b)


def test_clips_count_alike_whatever_their_length() -> None:
    a, b = pair()
    _, worse = pair(noise=90)
    long, short = [b, b, b], [worse]
    means = [clip_average(psnr_y, [a] * 3, long), clip_average(psnr_y, [a], short)]
    assert means == [pytest.approx(psnr_y(a, b)), pytest.approx(psnr_y(a, worse))]
    assert set_average(means) == pytest.approx((psnr_y(a, b) + psnr_y(a, worse)) / 2)
    mixed = clip_average(psnr_y, [a, a], [b, worse])
    assert mixed == pytest.approx((psnr_y(a, b) + psnr_y(a, worse)) / 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a, b: psnr_y(a, b[:-1]), ["psnr_y", "(14, 17, 3)", "(13, 17, 3)"]),
        (lambda a, b: psnr_y(a.astype(float), b), ["psnr_y", "a:", "uint8", "float64"]),
        (lambda a, b: ssim_y(a, b[..., 0]), ["ssim_y", "b:", "(14, 17)"]),
        (lambda a, b: ssim_y(a, b, crop=2), ["ssim_y", "crop", "11x11", "14x17", "2"]),
        (lambda a, b: psnr_rgb(a, b, crop=-1), ["psnr_rgb", "crop", "-1"]),
        (lambda a, b: clip_average(psnr_y, [a], []), ["clip_average", "1 and 0"]),
        (lambda a, b: set_average([]), ["set_average", "none"]),
        (lambda a, b: rgb_to_y(a[..., :2]), ["rgb_to_y", "(14, 17, 2)"]),
    ],
)
def test_bad_input_is_named(call, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call(*pair())
    for word in words:
        assert word in str(error.value)
