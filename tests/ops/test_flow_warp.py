"""flow_warp: values, gradients, dtypes, layouts, edges, transforms, errors, determinism, compilation.

Two oracles: a loop over pixels and taps in fp64, which extends the image without end and never folds a
coordinate, and F.grid_sample, which takes normalised coordinates. The PyTorch code is held to them too.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, laid_out, uniform
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from mafnet_ops import flow_warp

MODULE = importlib.import_module("mafnet_ops.flow_warp")
NATIVE = "cpu" in MODULE._NATIVE_DEVICES
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled CPU kernel is not built")

INTERPOLATIONS = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TERMS = 16  # taps of the largest stencil

interpolations = pytest.mark.parametrize("interpolation", INTERPOLATIONS)
paddings = pytest.mark.parametrize("padding_mode", PADDINGS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(params=["native", "pytorch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the compiled kernel and on the PyTorch code."""
    if request.param == "pytorch":
        monkeypatch.setattr(MODULE, "_NATIVE_DEVICES", frozenset())
    elif not NATIVE:
        pytest.skip("the compiled CPU kernel is not built")
    return request.param


# ------------------------------------------------------------------------------------------- oracles


def kernel_1d(distance: float, interpolation: str) -> tuple[float, float]:
    """Weight of a pixel that lies `distance` left of the point, and its derivative by the point."""
    d, sign = abs(distance), math.copysign(1.0, distance)
    if interpolation == "bilinear":
        return 1 - d, -sign
    a = -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1, sign * (3 * (a + 2) * d**2 - 2 * (a + 3) * d)
    return a * (d**3 - 5 * d**2 + 8 * d - 4), sign * a * (3 * d**2 - 10 * d + 8)


def extended(index: int, size: int, padding_mode: str) -> int | None:
    """The pixel that stands at any integer place of the endless image; None for a zero."""
    if 0 <= index < size:
        return index
    if padding_mode == "zeros":
        return None
    if padding_mode == "border" or size == 1:
        return min(max(index, 0), size - 1)
    while not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index


def taps_1d(
    x: float, size: int, interpolation: str, padding_mode: str
) -> list[tuple[int | None, float, float]]:
    """(pixel, weight, slope) of all taps; at an integer x the slopes are those of the cell to the right."""
    if interpolation == "nearest":
        return [(extended(round(x), size, padding_mode), 1.0, 0.0)]
    first = math.floor(x)
    reach = range(0, 2) if interpolation == "bilinear" else range(-1, 3)
    result = []
    for step in reach:
        distance = x - (first + step)
        # a distance of exactly 0 is approached from above: the cell to the right
        weight, slope = kernel_1d(distance if distance else 0.0, interpolation)
        result.append((extended(first + step, size, padding_mode), weight, slope))
    return result


def warp_loop(
    input: Tensor, flow: Tensor, grad_output: Tensor, interpolation: str, padding_mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, mask, grad_input and grad_flow, pixel by pixel and tap by tap. For finite flows."""
    image, shift, grad = (t.detach().cpu().double().numpy() for t in (input, flow, grad_output))
    height, width = image.shape[2:]
    output, grad_input, grad_flow = np.zeros_like(grad), np.zeros_like(image), np.zeros_like(shift)
    mask = np.zeros((len(image), 1, *shift.shape[1:3]))
    for n, i, j in np.ndindex(*shift.shape[:3]):
        x, y = j + shift[n, i, j, 0], i + shift[n, i, j, 1]
        mask[n, 0, i, j] = 0 <= x <= width - 1 and 0 <= y <= height - 1
        for row, wy, sy in taps_1d(y, height, interpolation, padding_mode):
            for column, wx, sx in taps_1d(x, width, interpolation, padding_mode):
                if row is None or column is None:
                    continue
                pixel = image[n, :, row, column]
                output[n, :, i, j] += wy * wx * pixel
                grad_input[n, :, row, column] += wy * wx * grad[n, :, i, j]
                dot = (pixel * grad[n, :, i, j]).sum()
                grad_flow[n, i, j] += np.array([wy * sx * dot, sy * wx * dot])
    return tuple(map(torch.from_numpy, (output, mask, grad_input, grad_flow)))  # type: ignore[return-value]


def warp_grid_sample(input: Tensor, flow: Tensor, interpolation: str, padding_mode: str) -> Tensor:
    """The usual recipe; H and W of at least 2."""
    height, width = input.shape[2:]
    rows = torch.arange(flow.shape[1], device=flow.device, dtype=flow.dtype).view(-1, 1)
    columns = torch.arange(flow.shape[2], device=flow.device, dtype=flow.dtype)
    x = 2 * (columns + flow[..., 0]) / (width - 1) - 1
    y = 2 * (rows + flow[..., 1]) / (height - 1) - 1
    grid = torch.stack([x, y], -1)
    return F.grid_sample(input, grid, interpolation, padding_mode, align_corners=True)


def run(
    input: Tensor, flow: Tensor, grad_output: Tensor, function: Any, *options: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, grad_input, grad_flow of a differentiable function of input and flow."""
    x, f = input.detach().requires_grad_(), flow.detach().requires_grad_()
    output = function(x, f, *options)
    grad_input, grad_flow = torch.autograd.grad(output, (x, f), grad_output)
    return output.detach(), grad_input, grad_flow


# ------------------------------------------------------------------------------ values and gradients

SIZES = [(1, 1), (1, 7), (6, 1), (2, 3), (5, 7)]


@devices
@interpolations
@paddings
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_loop(
    backend: str, device: str, interpolation: str, padding_mode: str, size: tuple[int, int]
) -> None:
    input, flow = uniform(2, 3, *size), uniform(2, *size, 2, reach=9.0, seed=1)
    grad = uniform(2, 3, *size, seed=2)
    expected = warp_loop(input, flow, grad, interpolation, padding_mode)
    for layout in LAYOUTS:
        x, f, g = (t.to(device) for t in (laid_out(input, layout), flow, grad))
        x = laid_out(x, layout)
        output, grad_input, grad_flow = run(x, f, g, flow_warp, interpolation, padding_mode)
        mask = flow_warp(x, f, interpolation, padding_mode, return_mask=True)[1]
        assert_rounding_only(output.cpu(), expected[0], TERMS, 4)
        assert_same(mask.cpu(), expected[1])
        terms = size[0] * size[1] * TERMS  # where all pixels sample one
        assert_rounding_only(grad_input.cpu(), expected[2], terms, 4)
        assert_rounding_only(grad_flow.cpu(), expected[3], TERMS * 3, 4)


@needs_native
@layouts
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 65])
@pytest.mark.parametrize("width", [63, 64, 65])
def test_block_and_vector_boundaries(layout: str, channels: int, width: int) -> None:
    """Blocks of 64 pixels, bands of 8 rows, vectors of 16 and chunks of 64 channels."""
    input, flow = uniform(1, channels, 9, width), uniform(1, 9, width, 2, reach=4.0, seed=1)
    grad = uniform(1, channels, 9, width, seed=2)
    exact = run(input, flow, grad, warp_grid_sample, "bicubic", "zeros")
    fp32 = [t.float() for t in (input, flow, grad)]
    actual = run(
        laid_out(fp32[0], layout), fp32[1], laid_out(fp32[2], layout), flow_warp, "bicubic"
    )
    baseline = run(fp32[0], fp32[1], fp32[2], warp_grid_sample, "bicubic", "zeros")
    for name, a, b, e in zip(("output", "grad_input", "grad_flow"), actual, baseline, exact):
        assert_as_accurate(a, b, e, name)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("reach", "height"), [(3.0, 35), (18.0, 75), (300.0, 35)], ids=["near", "halves", "far"]
)
@pytest.mark.parametrize("width", [127, 128, 145, 400])
def test_blocks(width: int, reach: float, height: int, dtype: torch.dtype, layout: str) -> None:
    """Of planes blocks of 32 x 128 pixels, tiles of 16 channels and 5 more. At 400 the far flow reaches too much to
    hold, and that of "halves" too much for a block, not for half of one. Of channels_last blocks of 48 or 96 columns.
    """
    size = (2, 37, height, width)
    input, grad = (laid_out(uniform(*size, seed=s).to(dtype), layout) for s in (0, 2))
    # off the kinks, and so coarse that all weights are exact
    flow = uniform(2, height, width, 2, reach=reach, seed=1).mul(4).round().div(4).add(1 / 8)
    exact = run(input.double(), flow, grad.double(), flow_warp)
    actual = run(input, flow.float(), grad, flow_warp)
    # a pixel is reached from at most 9 x 9 of the near flow, from fewer of the far one
    for a, e, terms in zip(actual, exact, (4, 81, 37 * 4)):
        assert_rounding_only(a, e.to(a.dtype), terms)


@devices
@interpolations
@paddings
def test_matches_grid_sample(
    backend: str, device: str, interpolation: str, padding_mode: str
) -> None:
    input, flow = (
        uniform(2, 5, 9, 11).to(device),
        uniform(2, 9, 11, 2, reach=8.0, seed=1).to(device),
    )
    grad = uniform(2, 5, 9, 11, seed=2).to(device)
    expected = run(input, flow, grad, warp_grid_sample, interpolation, padding_mode)
    actual = run(input, flow, grad, flow_warp, interpolation, padding_mode)
    for a, e in zip(actual, expected):
        assert_rounding_only(a, e, 11 * TERMS)


@needs_native
@devices
@interpolations
@paddings
@layouts
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_is_as_accurate_as_pytorch(
    device: str, interpolation: str, padding_mode: str, layout: str, dtype: torch.dtype
) -> None:
    """Against PyTorch in fp32 rounded to the dtype: its own half-precision grid_sample is broken."""
    size = (18, 37)
    input, grad = (uniform(2, 19, *size, seed=s).to(device, dtype) for s in (0, 2))
    # multiples of 1/8 off the pixel edges of "nearest": the same cell in every precision
    flow = (
        (uniform(2, *size, 2, reach=9.0, seed=1) * 4).round().div(4).add(1 / 8).float().to(device)
    )
    args = [t.double() for t in (input, flow, grad)]
    exact = run(args[0], args[1], args[2], flow_warp, interpolation, padding_mode)
    fp32 = [t.float() for t in (input, flow, grad)]
    baseline = [
        b.to(d)
        for b, d in zip(
            run(fp32[0], fp32[1], fp32[2], warp_grid_sample, interpolation, padding_mode),
            (dtype, dtype, torch.float32),
        )
    ]
    actual = run(laid_out(input, layout), flow, grad, flow_warp, interpolation, padding_mode)
    for name, a, b, e in zip(("output", "grad_input", "grad_flow"), actual, baseline, exact):
        assert_as_accurate(a, b, e, name)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    out=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    interpolation=st.sampled_from(INTERPOLATIONS),
    padding_mode=st.sampled_from(PADDINGS),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    shape: tuple[int, int, int, int],
    out: tuple[int, int],
    interpolation: str,
    padding_mode: str,
    layout: str,
    seed: int,
) -> None:
    """Also an output of another size than the input."""
    input, flow = uniform(*shape, seed=seed), uniform(shape[0], *out, 2, reach=6.0, seed=seed + 1)
    grad = uniform(*shape[:2], *out, seed=seed + 2)
    expected = warp_loop(input, flow, grad, interpolation, padding_mode)
    x = laid_out(input, layout)
    output, grad_input, grad_flow = run(x, flow, grad, flow_warp, interpolation, padding_mode)
    assert_rounding_only(output, expected[0], TERMS, 4)
    assert_rounding_only(grad_input, expected[2], 25 * TERMS, 4)
    assert_rounding_only(grad_flow, expected[3], TERMS * 5, 4)


@needs_native
@paddings
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(2, 2), (2, 9), (5, 40)], ids=str)
def test_fp32_takes_the_same_sides_as_fp64(
    padding_mode: str, layout: str, size: tuple[int, int]
) -> None:
    """fp32 has kernels of its own. Quarter steps across every edge are exact in both: so are the sides."""
    input, grad = (uniform(2, 19, *size, seed=s).float() for s in (0, 2))
    flow = (uniform(2, *size, 2, reach=14.0 * max(size), seed=1) * 4).round().div(4).float()
    flow[:, :, ::2] = flow[:, :, ::2].round()
    flow[1] = flow[1].clamp(-3, 3)
    args = [t.double() for t in (input, flow, grad)]
    exact = run(args[0], args[1], args[2], flow_warp, "bilinear", padding_mode)
    x, g = laid_out(input, layout), laid_out(grad, layout)
    terms = size[0] * size[1] * TERMS
    for a, e in zip(run(x, flow, g, flow_warp, "bilinear", padding_mode), exact):
        assert_rounding_only(a, e.float(), terms, 4)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_infinite_pixels_spoil_only_what_weighs_them(layout: str, dtype: torch.dtype) -> None:
    """The fast kernels redo what came out not finite: only the samples that use such a pixel stay so."""
    input = uniform(1, 21, 9, 70).to(dtype)
    input[:, ::3, 4, 30], input[:, 1::3, 2, 8] = math.inf, math.nan
    input[:, ::3, 7, 69] = math.inf  # no sample outside the image may see it
    flow = torch.zeros(1, 9, 70, 2)
    flow[..., 1:, 0] = 0.5
    flow[0, 6, 5, 1] = math.nan
    flow[0, 7] = 200.0
    exact = flow_warp(input.double(), flow.double())
    output = flow_warp(laid_out(input, layout), flow)
    assert exact.isfinite().float().mean() > 0.9 and not exact.isfinite().all()
    assert ((output.isnan() == exact.isnan()) & (output.isinf() == exact.isinf())).all()
    grad = torch.ones_like(input)
    grad_input, grad_flow = run(laid_out(input, layout), flow, grad, flow_warp)[1:]
    expected = run(input.double(), flow.double(), grad.double(), flow_warp)[1:]
    assert (grad_flow.isnan() == expected[1].isnan()).all() and grad_input.isfinite().all()


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_vector_level(level: str) -> None:
    """The level is chosen once per process, so each one gets its own."""
    code = (
        "import torch; from mafnet_ops import flow_warp\n"
        "x = torch.rand(1, 37, 9, 70, dtype=torch.double); f = torch.rand(1, 9, 70, 2).double() * 4\n"
        "for layout in (torch.contiguous_format, torch.channels_last):\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "        y = x.to(dtype).contiguous(memory_format=layout)\n"
        "        out = flow_warp(y, f.float())\n"
        "        exact = flow_warp(y.double(), f.float().double())\n"
        "        # one rounding of the value, and one of both fp32 coordinates, below 128\n"
        "        bound = torch.finfo(dtype).eps + 2 * 64 * torch.finfo(torch.float32).eps\n"
        "        assert (out - exact).abs().max() < bound, (layout, dtype)\n"
    )
    environment = {**os.environ, "MAFNET_SIMD": level}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------- exactness, dtypes


@devices
@interpolations
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_flow_is_the_identity(
    device: str, interpolation: str, layout: str, dtype: torch.dtype
) -> None:
    input = laid_out(uniform(2, 19, 7, 66).to(device, dtype), layout)
    for padding_mode in PADDINGS:
        flow = torch.zeros(
            2, 7, 66, 2, device=device, dtype=torch.promote_types(dtype, torch.float32)
        )
        assert_same(flow_warp(input, flow, interpolation, padding_mode), input)


@needs_native
@interpolations
@layouts
def test_weightless_neighbours_do_not_spoil_an_exact_sample(
    interpolation: str, layout: str
) -> None:
    input = uniform(1, 17, 6, 70)
    input[:, :, ::2, ::3], input[:, :, 1, 1] = math.inf, math.nan
    flow = torch.zeros(1, 6, 70, 2, dtype=torch.float64)
    assert_same(flow_warp(laid_out(input, layout), flow, interpolation), input)


@interpolations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_flow_is_an_exact_shift(
    backend: str, interpolation: str, dtype: torch.dtype
) -> None:
    input = uniform(1, 3, 6, 1921).to(dtype)
    flow = torch.tensor([2.0, -1.0]).to(dtype).expand(1, 6, 1921, 2)  # 2 right, 1 up
    expected = torch.zeros_like(input)
    expected[:, :, 1:, :-2] = input[:, :, :-1, 2:]
    assert_same(flow_warp(input, flow, interpolation), expected)


@pytest.mark.parametrize(
    ("dtype", "flow_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes(backend: str, dtype: torch.dtype, flow_dtype: torch.dtype) -> None:
    """A lower or float32 flow counts with the value it has; gradients come in the dtypes of the inputs."""
    input, flow = uniform(1, 4, 5, 6).to(dtype), uniform(1, 5, 6, 2, reach=3.0).to(flow_dtype)
    grad = uniform(1, 4, 5, 6, seed=3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    output, grad_input, grad_flow = run(input, flow, grad, flow_warp)
    assert output.dtype == grad_input.dtype == dtype and grad_flow.dtype == flow_dtype
    assert_same(output, flow_warp(input, flow.to(wide)))
    assert_same(grad_flow, run(input, flow.to(wide), grad, flow_warp)[2].to(flow_dtype))


@devices
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_dtypes_alone(device: str, low: torch.dtype) -> None:
    features, flow = uniform(1, 4, 5, 6).to(device), uniform(1, 5, 6, 2).to(device)
    plain = flow_warp(features.to(low), flow.float())
    with torch.autocast(device, dtype=low):
        assert_same(flow_warp(features.to(low), flow.float()), plain)
        assert flow_warp(features.float(), flow.float()).dtype == torch.float32


@layouts
def test_output_layout_follows_the_input(backend: str, layout: str) -> None:
    output = flow_warp(laid_out(uniform(2, 4, 5, 6), layout), uniform(2, 5, 6, 2))
    channels_last = layout == "channels_last"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=memory_format)


# ---------------------------------------------------------------------------------------------- edges


@devices
@interpolations
@layouts
def test_far_and_odd_flow(backend: str, device: str, interpolation: str, layout: str) -> None:
    """Zeros, the edge pixel, or a pixel of the image; NaN for NaN and for the reflection of infinity."""
    input = laid_out(uniform(1, 3, 4, 5).float().to(device), layout)
    low, high = input.amin((2, 3)), input.amax((2, 3))
    for value in (1e9, -1e9, 3e38, -3e38, math.inf, -math.inf):
        flow = torch.zeros(1, 4, 5, 2, device=device)
        flow[..., 0] = value
        assert_same(flow_warp(input, flow, interpolation, "zeros"), torch.zeros_like(input))
        edge = input[..., -1:] if value > 0 else input[..., :1]
        border = flow_warp(input, flow, interpolation, "border")
        assert_same(border, edge.expand_as(input).contiguous(memory_format=_format(border)))
        reflected = flow_warp(input, flow, interpolation, "reflection")
        if math.isinf(value):
            assert reflected.isnan().all()
        elif interpolation != "bicubic":  # which overshoots
            assert (reflected >= low[..., None, None]).all()
            assert (reflected <= high[..., None, None]).all()
        else:
            assert reflected.isfinite().all()


def _format(tensor: Tensor) -> torch.memory_format:
    contiguous = tensor.is_contiguous()
    return torch.contiguous_format if contiguous else torch.channels_last


@devices
@interpolations
@paddings
@layouts
def test_nan_flow_gives_nan_and_scatters_nothing(
    backend: str, device: str, interpolation: str, padding_mode: str, layout: str
) -> None:
    input = laid_out(uniform(1, 3, 4, 5).float().to(device), layout)
    flow = torch.zeros(1, 4, 5, 2, device=device)
    flow[0, 1, 2, 0], flow[0, 3, 4, 1] = math.nan, math.nan
    output, mask = flow_warp(input, flow, interpolation, padding_mode, return_mask=True)
    bad = torch.zeros(4, 5, dtype=torch.bool, device=device)
    bad[1, 2] = bad[3, 4] = True
    assert (output.isnan() == bad).all()
    assert ((mask == 0) == bad).all()
    grad_input = run(input, flow, torch.ones_like(input), flow_warp, interpolation, padding_mode)[1]
    assert_same(
        grad_input,
        (~bad).to(input.dtype).expand(1, 3, 4, 5).clone(memory_format=_format(grad_input)),
    )


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_gradient_at_pixel_centres_is_that_of_the_cell_to_the_right(
    backend: str, padding_mode: str
) -> None:
    """Zero flow is where every alignment starts. Beyond the last pixel lies the padding."""
    input, grad = uniform(1, 2, 4, 5), uniform(1, 2, 4, 5, seed=2)
    flow = torch.zeros(1, 4, 5, 2, dtype=torch.float64)
    expected = warp_loop(input, flow, grad, "bilinear", padding_mode)[3]
    assert_rounding_only(
        run(input, flow, grad, flow_warp, "bilinear", padding_mode)[2], expected, 8
    )


@devices
@interpolations
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)], ids=str)
def test_empty(device: str, interpolation: str, shape: tuple[int, int, int, int]) -> None:
    input, flow = torch.rand(shape, device=device), torch.rand(shape[0], 4, 5, 2, device=device)
    output, grad_input, grad_flow = run(input, flow, torch.rand(shape, device=device), flow_warp)
    assert output.shape == grad_input.shape == shape
    assert_same(grad_flow, torch.zeros_like(flow))
    mask = flow_warp(input, flow, interpolation, return_mask=True)[1]
    assert mask.shape == (shape[0], 1, 4, 5)


@layouts
def test_empty_flow(layout: str) -> None:
    input = laid_out(torch.rand(2, 3, 4, 5), layout)
    output, grad_input, _ = run(input, torch.rand(2, 0, 5, 2), torch.rand(2, 3, 0, 5), flow_warp)
    assert output.shape == (2, 3, 0, 5)
    assert_same(grad_input.contiguous(), torch.zeros(2, 3, 4, 5))


@needs_native
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_elements_than_an_int_counts(channels_last: bool) -> None:
    """2^31 + 2^16 halves, of which only the pages that are touched take memory."""
    channels, height, width = 2, 2**15 + 1, 2**15
    size = (1, height, width, channels) if channels_last else (1, channels, height, width)
    image = torch.empty(size, dtype=torch.float16)
    image = image.permute(0, 3, 1, 2) if channels_last else image
    corner = uniform(1, channels, 2, 2).half()
    image[:, :, -2:, -2:] = corner
    target = torch.tensor([width - 2.0, height - 2.0])
    flow = (target + torch.tensor([0.25, 0.5])).view(1, 1, 1, 2).requires_grad_()
    output = flow_warp(image, flow)
    small_flow = torch.tensor([0.25, 0.5]).view(1, 1, 1, 2).requires_grad_()
    expected = flow_warp(corner, small_flow)
    assert_same(output.contiguous(), expected.contiguous())
    grads = torch.autograd.grad(output.sum(), flow), torch.autograd.grad(expected.sum(), small_flow)
    assert_same(grads[0][0], grads[1][0])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_precision_at_the_size_of_video(dtype: torch.dtype) -> None:
    """180 x 320 is more than 32,767 pixels, where F.grid_sample is garbage on the CPU in half precision."""
    input, grad = (uniform(1, 3, 180, 320, seed=s).to(dtype) for s in (0, 2))
    flow = uniform(1, 180, 320, 2, reach=8.0, seed=1).float()
    exact = run(input.double(), flow.double(), grad.double(), flow_warp)
    fp32 = run(input.float(), flow, grad.float(), warp_grid_sample, "bilinear", "zeros")
    for a, b, e in zip(run(input, flow, grad, flow_warp), fp32, exact):
        assert_as_accurate(a, b.to(a.dtype), e, terms=16)


@layouts
def test_expanded_gradient(layout: str) -> None:
    """sum().backward() hands over a gradient whose strides are all zero."""
    input, flow = laid_out(uniform(2, 3, 4, 5), layout), uniform(2, 4, 5, 2)
    one = torch.ones((), dtype=torch.float64).expand(2, 3, 4, 5)
    for a, b in zip(run(input, flow, one, flow_warp), run(input, flow, one.clone(), flow_warp)):
        assert_same(a, b)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@interpolations
def test_every_output_is_written(layout: str, interpolation: str) -> None:
    """Deterministic mode fills fresh memory with NaN."""
    input, flow = laid_out(torch.rand(2, 5, 19, 70), layout), torch.rand(2, 19, 70, 2) * 40 - 20
    grad = torch.rand(2, 5, 19, 70)
    plain = run(input, flow, grad, flow_warp, interpolation)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for a, b in zip(run(input, flow, grad, flow_warp, interpolation), plain):
            assert_same(a, b)
        assert flow_warp(input, flow, return_mask=True)[1].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(layout: str) -> None:
    input, grad = (laid_out(torch.rand(1, 33, 70, 90), layout) for _ in range(2))
    flow = torch.rand(1, 70, 90, 2) * 20 - 10
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(input, flow, grad, flow_warp))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same(a, b)


# ---------------------------------------------------------------------------- derivatives, transforms


def smooth_case() -> tuple[Tensor, Tensor]:
    """fp64, the sampled points a quarter away from pixel centres, some of them outside."""
    flow = uniform(1, 3, 4, 2, reach=3.0, seed=1).floor() + 0.25 + uniform(1, 3, 4, 2, seed=2) / 5
    return uniform(1, 2, 3, 4).requires_grad_(), flow.requires_grad_()


@interpolations
@paddings
def test_gradcheck(backend: str, interpolation: str, padding_mode: str) -> None:
    def function(input: Tensor, flow: Tensor) -> Tensor:
        return flow_warp(input, flow, interpolation, padding_mode)

    forward = backend == "native"
    assert gradcheck(function, smooth_case(), check_forward_ad=forward, check_batched_grad=forward)
    assert gradgradcheck(function, smooth_case(), fast_mode=True)


def test_mask_carries_no_gradient(backend: str) -> None:
    input, flow = smooth_case()
    assert not flow_warp(input, flow, return_mask=True)[1].requires_grad


def test_only_what_is_needed_is_computed() -> None:
    input, flow = smooth_case()
    for x, f in ((input, flow.detach()), (input.detach(), flow)):
        output = flow_warp(x, f)
        leaf = x if x.requires_grad else f
        (alone,) = torch.autograd.grad(output.sum(), leaf)
        both = torch.autograd.grad(flow_warp(input, flow).sum(), (input, flow))
        assert_same(alone, both[0] if leaf is x else both[1])


def test_torch_func_transforms() -> None:
    input, flow = (t.detach() for t in smooth_case())

    def loss(x: Tensor, f: Tensor) -> Tensor:
        return flow_warp(x, f).square().sum()

    x, f = input.clone().requires_grad_(), flow.clone().requires_grad_()
    expected = torch.autograd.grad(loss(x, f), (x, f))
    for a, e in zip(torch.func.grad(loss, (0, 1))(input, flow), expected):
        assert_same(a, e)
    reverse = torch.func.jacrev(flow_warp, (0, 1))(input, flow)
    forward = torch.func.jacfwd(flow_warp, (0, 1))(input, flow)
    for a, e in zip(forward, reverse):
        assert_rounding_only(a, e, TERMS, 4)
    tangents = uniform(1, 2, 3, 4, seed=5), uniform(1, 3, 4, 2, seed=6)
    jvp: Any = torch.func.jvp(flow_warp, (input, flow), tangents)
    output, tangent = jvp
    assert_same(output, flow_warp(input, flow))
    by_hand = (reverse[0] * tangents[0]).sum((4, 5, 6, 7)) + (reverse[1] * tangents[1]).sum(
        (4, 5, 6, 7)
    )
    assert_rounding_only(tangent, by_hand, 2 * TERMS, 4)


def test_hessian_of_flow() -> None:
    input, flow = (t.detach() for t in smooth_case())

    def loss(f: Tensor) -> Tensor:
        return flow_warp(input, f).square().sum()

    f = flow.clone().requires_grad_()
    expected: Any = torch.autograd.functional.hessian(loss, f)
    assert expected.abs().max() > 0
    for hessian in (torch.func.hessian(loss)(flow), torch.func.jacrev(torch.func.grad(loss))(flow)):
        assert_rounding_only(hessian, expected, TERMS * 4, 4)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("return_mask", [False, True])
def test_vmap(in_dims: tuple[int | None, int | None], return_mask: bool) -> None:
    inputs, flows = uniform(3, 2, 4, 5, 6), uniform(3, 2, 5, 6, 2, reach=2.0, seed=1)

    def one(x: Tensor, f: Tensor) -> Any:
        return flow_warp(x, f, return_mask=return_mask)

    def grads(x: Tensor, f: Tensor) -> Any:
        return torch.func.grad(lambda *a: flow_warp(*a).square().sum(), (0, 1))(x, f)

    args = [t if d is not None else t[0] for t, d in zip((inputs, flows), in_dims)]
    args = [t.movedim(0, d) if d else t for t, d in zip(args, in_dims)]
    for function in (one, grads):
        batched = torch.vmap(function, in_dims)(*args)
        for i in range(3):
            single = function(
                *(t[i if d is not None else 0] for t, d in zip((inputs, flows), in_dims))
            )
            pairs = zip(batched, single) if isinstance(single, tuple) else [(batched, single)]
            for a, e in pairs:
                assert_same(a[i].contiguous(), e.contiguous())


# ------------------------------------------------------------------------------- torch's own machinery


@needs_native
@devices
@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(device: str, layout: str, dtype: torch.dtype) -> None:
    input = laid_out(uniform(2, 3, 4, 5).to(device, dtype), layout)
    flow = uniform(2, 4, 5, 2).to(device, torch.promote_types(dtype, torch.float32))
    grad = uniform(2, 3, 4, 5, seed=1).to(device, dtype)
    ops = torch.ops.mafnet_ops
    for return_mask in (False, True):
        torch.library.opcheck(ops.flow_warp_forward.default, (input, flow, 0, 1, return_mask))
    for needs in ((True, True, False), (True, False, True), (False, True, True)):
        torch.library.opcheck(ops.flow_warp_backward.default, (grad, input, flow, 2, 0, *needs))


@needs_native
@layouts
def test_compile_is_one_graph(layout: str) -> None:
    """Forward and backward, two sizes by one dynamic graph, no break."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(x: Tensor, f: Tensor) -> Tensor:
        warped, mask = flow_warp(x * 2, f, "bilinear", "border", return_mask=True)
        return (warped * mask).square()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for size in ((6, 7), (9, 5)):
        input, flow = laid_out(uniform(2, 3, *size), layout), uniform(2, *size, 2, reach=2.0)
        grad = uniform(2, 3, *size, seed=2)
        for a, e in zip(run(input, flow, grad, compiled), run(input, flow, grad, function)):
            assert_same(a, e)
    assert counter.frame_count == 1
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("autograd_function_apply" in name or "flow_warp_forward" in name for name in names)


@needs_native
def test_export_keeps_the_op() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, f: Tensor) -> Tensor:
            return flow_warp(x, f)

    args = uniform(1, 3, 4, 5), uniform(1, 4, 5, 2)
    program = torch.export.export(Net(), args)
    assert "mafnet_ops.flow_warp_forward" in str(program.graph)
    assert_same(program.module()(*args), flow_warp(*args))


@needs_native
@pytest.mark.parametrize(
    ("interpolation", "taps"), [("bilinear", 4), ("nearest", 1), ("bicubic", 16)]
)
def test_flop_formula(interpolation: str, taps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        flow_warp(torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5, 2), interpolation)
    assert counter.get_total_flops() == 2 * taps * 2 * 3 * 4 * 5


@needs_native
def test_native_op_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the PyTorch code ran")

    monkeypatch.setattr(MODULE.reference, "flow_warp", refuse)
    flow_warp(torch.rand(1, 2, 3, 4), torch.rand(1, 3, 4, 2))


@pytest.mark.gpu
@interpolations
@paddings
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_mode_on_cuda(
    interpolation: str, padding_mode: str, layout: str, dtype: torch.dtype
) -> None:
    """Equal bits over runs, where many output pixels read one input pixel; as accurate as the atomics."""
    input, grad = (
        laid_out(uniform(2, 19, 18, 37, seed=s).to("cuda", dtype), layout) for s in (0, 2)
    )
    flow = uniform(2, 18, 37, 2, reach=9.0, seed=1).to("cuda", dtype)
    plain = run(input, flow, grad, flow_warp, interpolation, padding_mode)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            run(input, flow, grad, flow_warp, interpolation, padding_mode) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second):
        assert_same(a, b)
    args = [t.double() for t in (input, flow, grad)]
    exact = run(args[0], args[1], args[2], flow_warp, interpolation, padding_mode)
    for name, a, b, e in zip(("output", "grad_input", "grad_flow"), first, plain, exact):
        assert_as_accurate(a, b, e, name, terms=18 * 37)


# ---------------------------------------------------------------------------------------------- errors

INPUT, FLOW = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5, 2)
BAD = [
    ((None, FLOW), TypeError, "input: expected a torch.Tensor, got NoneType"),
    (
        (INPUT.long(), FLOW),
        TypeError,
        "input: expected dtype float64, float32, float16 or bfloat16",
    ),
    ((INPUT[0], FLOW), ValueError, "input: expected 4 dimensions, got shape (3, 4, 5)"),
    ((INPUT, FLOW[0]), ValueError, "flow: expected 4 dimensions, got shape (4, 5, 2)"),
    (
        (INPUT, FLOW[:1]),
        ValueError,
        "flow: expected (N, H_out, W_out, 2) = (2, 4, 5, 2), got (1, 4, 5, 2)",
    ),
    (
        (INPUT, FLOW.permute(0, 3, 1, 2)),
        ValueError,
        "flow: expected (N, H_out, W_out, 2) = (2, 2, 4, 2), got (2, 2, 4, 5)",
    ),
    (
        (INPUT, FLOW.double()),
        TypeError,
        "flow: expected dtype torch.float32 or float32, got torch.float64",
    ),
    ((INPUT, FLOW.to("meta")), ValueError, "flow: expected device cpu as input, got meta"),
    ((INPUT[..., :0], FLOW), ValueError, "input: expected H and W of at least 1, got (2, 3, 4, 0)"),
    (
        (INPUT, FLOW, "cubic"),
        ValueError,
        "interpolation: expected one of bilinear, nearest, bicubic, got 'cubic'",
    ),
    (
        (INPUT, FLOW, "nearest", "wrap"),
        ValueError,
        "padding_mode: expected one of zeros, border, reflection",
    ),
]


@pytest.mark.parametrize(("args", "kind", "message"), BAD, ids=[m[:34] for _, _, m in BAD])
def test_error_messages(args: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(f"flow_warp: {message}")):
        flow_warp(*args)


RAW_BAD = [
    (
        (INPUT, FLOW[..., :1], 0, 0, False),
        "flow: expected size 2 in dimension 3, got shape (2, 4, 5, 1)",
    ),
    ((INPUT, FLOW.half(), 0, 0, False), "flow: expected the dtype of input, or float32"),
    ((INPUT, FLOW, 3, 0, False), "interpolation: expected 0, 1 or 2, got 3"),
    ((INPUT, FLOW, 0, -1, False), "padding_mode: expected 0, 1 or 2, got -1"),
    (
        (INPUT.int(), FLOW, 0, 0, False),
        "input: expected dtype float64, float32, float16 or bfloat16",
    ),
    ((INPUT[..., :0], FLOW, 0, 0, False), "input: expected H and W of at least 1"),
]


@needs_native
@pytest.mark.parametrize(("args", "message"), RAW_BAD, ids=[m[:34] for _, m in RAW_BAD])
def test_raw_op_checks_for_itself(args: tuple[Any, ...], message: str) -> None:
    """A caller of torch.ops gets an error too, never an access out of bounds."""
    with pytest.raises(RuntimeError, match=re.escape(f"flow_warp: {message}")):
        torch.ops.mafnet_ops.flow_warp_forward(*args)


@needs_native
def test_raw_backward_checks_the_gradient() -> None:
    with pytest.raises(
        RuntimeError, match=r"flow_warp: grad_output: expected size 4 in dimension 2"
    ):
        torch.ops.mafnet_ops.flow_warp_backward(
            INPUT[:, :, 1:], INPUT, FLOW, 0, 0, True, True, False
        )
    with pytest.raises(RuntimeError, match=r"flow_warp: grad_output: expected the dtype of input"):
        torch.ops.mafnet_ops.flow_warp_backward(
            INPUT.double(), INPUT, FLOW, 0, 0, True, True, False
        )
