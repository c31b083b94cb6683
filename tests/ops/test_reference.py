"""The reference as such: the fallback below fp64 where no kernel is built, and rules that all its ops share."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from oracles import align_offsets_loop, bilinear_at, deform_conv2d_torch, to_array
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor

from mafnet_ops import deform_align, modulated_deform_conv2d, reference

LOW = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = torch.float64
# Called with unpacked lists, which a type checker cannot count.
deform: Callable[..., Tensor] = modulated_deform_conv2d
align: Callable[..., Tensor] = deform_align
by_torch: Callable[..., Tensor] = deform_conv2d_torch
GEOMETRY = ((2, 1), (1, 2), (1, 2))


def uniform(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return (torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1).to(dtype)


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the compiled extension."""
    module = importlib.import_module("mafnet_ops.modulated_deform_conv2d")
    monkeypatch.setattr(module, "_NATIVE_DEVICES", frozenset())


def deform_tensors(dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Two convolution groups, three offset groups that straddle them, points off the integers."""
    offset = 3 * uniform(batch, 2 * 3 * 9, 6, 40, dtype=torch.float32)
    offset = offset.floor() + 0.1 + 0.8 * (offset - offset.floor())
    return [
        uniform(batch, 6, 11, 40, dtype=dtype),
        offset.double() if dtype == DOUBLE else offset,
        uniform(batch, 27, 6, 40, dtype=dtype).abs(),
        uniform(4, 3, 3, 3, dtype=dtype),
        uniform(4, dtype=dtype),
    ]


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, *GEOMETRY)
    out.backward(uniform(*out.shape).to(out.dtype))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("dtype", LOW)
def test_fallback_deform_conv(dtype: torch.dtype, no_kernel: None) -> None:
    """Its coordinates are normalised: off by a few roundings of 40 px, beside a slope of 2 per pixel."""
    tensors = deform_tensors(dtype)
    wide = [t.double() for t in tensors]
    exact = by_torch(*wide, *GEOMETRY)
    actual = deform(*tensors, *GEOMETRY)
    assert actual.dtype == dtype
    fractions = 4 * 40 * torch.finfo(torch.float32).eps / 2 * 2 * 27  # 27 samples of an output
    error = (actual - exact).abs().max().item()
    baseline = (by_torch(*tensors, *GEOMETRY) - exact).abs().max().item()
    assert error <= 2 * baseline + fractions
    for a, b, e in zip(
        gradients(deform, tensors),
        gradients(by_torch, tensors),
        gradients(by_torch, wide),
    ):
        # Up to 480 positions are summed into one element of a gradient.
        allowed = 2 * (b - e).abs().max().item() + fractions * 480 / 27
        assert (a - e).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("wild", [math.inf, -math.inf, 1e9, math.nan])
def test_fallback_at_wild_offsets(dtype: torch.dtype, wild: float, no_kernel: None) -> None:
    tensors = deform_tensors(dtype)
    clean = deform(*tensors, *GEOMETRY)
    # Offset group 0, tap 4, one output pixel: read by convolution group 0 alone.
    tensors[1][1, 8, 3, 20] = wild
    out = deform(*tensors, *GEOMETRY)
    if math.isnan(wild):
        expected = clean.clone()
        expected[1, :2, 3, 20] = math.nan
    else:
        closed = [*tensors]
        closed[1] = deform_tensors(dtype)[1]
        closed[2] = tensors[2].clone()
        closed[2][1, 4, 3, 20] = 0
        expected = deform(*closed, *GEOMETRY)
    assert_same(out, expected)
    grads = gradients(deform, tensors)
    assert grads[0].isfinite().all()
    if not math.isnan(wild):
        assert all(g.isfinite().all() for g in grads)


def test_fallback_second_derivative_is_right_or_refused(no_kernel: None) -> None:
    """F.grid_sample has one in newer versions of torch; never may it be a silent zero."""

    def second(function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves, *GEOMETRY)
        (grad,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum() + leaves[1].sum(), leaves[1])[0] - 1

    tensors = deform_tensors(torch.float32)
    exact = second(by_torch, [t.double() for t in tensors])
    assert exact.abs().max() > 1
    try:
        actual = second(deform, tensors)
    except RuntimeError as error:
        assert "not implemented" in str(error)
        return
    # Coordinates are off by a few roundings of 40 px; the values have a slope of twice their size per pixel.
    pixels = 4 * 40 * torch.finfo(torch.float32).eps / 2
    baseline = (second(by_torch, tensors) - exact).abs().max().item()
    allowed = 2 * baseline + 2 * pixels * exact.abs().max().item()
    assert (actual - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_fallback_formats_and_batch_0(dtype: torch.dtype, no_kernel: None) -> None:
    tensors = deform_tensors(dtype)
    expected = deform(*tensors, *GEOMETRY)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    out = deform(*tensors, *GEOMETRY)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_same(out, expected)
    none = [t.requires_grad_() for t in deform_tensors(dtype, batch=0)]
    out = deform(*none, *GEOMETRY)
    assert out.shape == (0, *expected.shape[1:])
    for tensor, grad in zip(none, torch.autograd.grad(out.sum(), none)):
        assert grad.shape == tensor.shape


def test_fallback_serves_deform_align(no_kernel: None) -> None:
    image, raw = uniform(1, 2, 5, 6), uniform(1, 54, 5, 6)
    weight, flow = uniform(3, 2, 3, 3), uniform(1, 5, 6, 2) * 3
    exact = align(image, raw, weight, None, flow, flow)
    narrow = [t.float() for t in (image, raw, weight)]
    out = align(*narrow, None, flow.float(), flow.float())
    offsets = [
        reference.deform_align_offsets(r, f, f, 10.0)[0]
        for r, f in ((raw, flow), (narrow[1], flow.float()))
    ]
    # The fp32 offsets are off by this much, at a slope of 2 per pixel and axis, 18 products an output.
    shift = (offsets[0] - offsets[1]).abs().max().item() + 4 * 6 * 2.0**-24
    eps = torch.finfo(torch.float32).eps
    assert (out - exact).abs().max().item() <= 18 * (4 * shift + 18 * eps)


# -------------------------------------------------------------------------------------- shared rules


def test_sample_bilinear_equals_the_loop() -> None:
    image = uniform(1, 3, 4, 5)
    points = [-1e300, -1.5, -1.0, -0.5, 0.0, 0.25, 2.0, 3.0, 3.5, 4.0, 4.5, 5.0, 9.0, math.inf]
    points += [-math.inf, math.nan]
    y, x = (
        t.reshape(1, -1)
        for t in torch.meshgrid(*[torch.tensor(points, dtype=DOUBLE)] * 2, indexing="ij")
    )
    out = reference.sample_bilinear(image, y, x)[0].T
    for value, py, px in zip(out, y[0].tolist(), x[0].tolist()):
        expected = torch.from_numpy(bilinear_at(to_array(image)[0], py, px))
        assert_rounding_only(value, expected, 8)


def test_a_nan_coordinate_reaches_no_pixel() -> None:
    """Neither the value of a pixel nor its gradient: not even of pixel (0, 0), where lookups are parked."""
    image = uniform(1, 2, 3, 4).requires_grad_()
    points = torch.tensor([[math.nan, 1.25, math.inf]], dtype=DOUBLE)
    out = reference.sample_bilinear(image, points, points.flip(1))
    assert out.isnan().any(1).tolist() == [[True, False, True]]
    out.backward(torch.ones_like(out))
    assert image.grad is not None and image.grad.isfinite().all()
    spoilt = image.detach().clone()
    spoilt[..., 0, 0] = math.inf
    away = reference.sample_bilinear(spoilt, points[:, 1:2] + 50, points[:, 1:2])
    assert_same(away, torch.zeros_like(away))


@pytest.mark.parametrize("dtype", LOW)
def test_coordinates_are_fp32_below_fp64(dtype: torch.dtype) -> None:
    assert reference.coordinate_dtype(dtype) == torch.float32
    assert reference.coordinate_dtype(DOUBLE) == DOUBLE
    raw, flow = uniform(1, 27, 2, 3, dtype=dtype), 1000 + uniform(1, 2, 3, 2, dtype=torch.float32)
    offset, mask = reference.deform_align_offsets(raw, flow, None, 10.0)
    assert offset.dtype == mask.dtype == torch.float32
    exact = align_offsets_loop(raw, flow, None, 9, 10.0)
    base = flow.permute(0, 3, 1, 2).flip(1).repeat(1, 9, 1, 1)
    expected = 10 * torch.tanh(raw[:, :18].float()) + base
    assert_as_accurate(offset, expected, exact[0])
    assert_as_accurate(mask, torch.sigmoid(raw[:, 18:].float()), exact[1])
