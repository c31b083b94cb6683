"""The CUDA kernels of channel_attention, run on the CPU by the emulator in tests/cuda_on_cpu.

The fast build gives values, in three orders of the threads; the checked build also watches every access. Both are
held to the reference in fp64. Outputs come poisoned, so one that is not written is a NaN.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu.channel_attention_cases import LAYOUTS, Channels, Shape, laid_out
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, needs_emulator
from tolerances import assert_same

pytestmark = needs_emulator

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture(scope="module", params=["fast", "checked"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return emulate("channel_attention", checked=request.param == "checked")


# ------------------------------------------------------------------------------ values and gradients


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_reference(kernels: Kernels, dtype: torch.dtype, layout: str) -> None:
    Channels.random((2, 8, 5, 6), dtype, layout).check(kernels)
    Channels.random((2, 16, 4, 8), dtype, layout).check(kernels)


# Channels around groups of 16 bytes and the 32 of a block; pixels around groups, lines of one group, and a block.
SHAPES: list[Shape] = [
    (1, 1, 1, 1), (3, 1, 1, 7), (1, 3, 5, 1), (2, 7, 3, 4), (1, 9, 2, 2), (2, 33, 1, 3), (1, 264, 3, 3), (1, 2, 33, 65),
]  # fmt: skip


@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernels: Kernels, shape: Shape, layout: str) -> None:
    for dtype in (torch.float32, torch.float16):
        Channels.random(shape, dtype, layout).check(kernels)


@layouts
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_threads(kernels: Kernels, layout: str, order: str) -> None:
    """Several chunks and tiles of several images, with the same bits in every order."""
    shape = (2, 136, 10, 13) if layout == "channels_last" else (2, 3, 66, 130)
    Channels.random(shape, torch.float32, layout).check(kernels, (order, "forward"))


@pytest.mark.parametrize("height", [300, 8200])
def test_many_chunks(kernels: Kernels, height: int) -> None:
    """More than the second kernel has rows for, and more than there may be: lines of one pixel are a step each."""
    image = Channels.random((1, 1, height, 2))
    columns = (t[:, :, :, :1] for t in (image.input, image.grad_output))
    input, grad_output = columns
    replace(image, input=input, grad_output=grad_output).check(kernels)


@layouts
def test_layouts_beside_each_other(kernels: Kernels, layout: str) -> None:
    """The gradient in another layout than the image; one of them alone not aligned."""
    dense = Channels.random((2, 8, 4, 8), torch.float16, layout)
    for other in LAYOUTS:
        replace(dense, grad_output=laid_out(dense.grad_output, other)).check(kernels)
        replace(dense, input=laid_out(dense.input, other)).check(kernels)
    for name in ("input", "output", "grad_output", "grad_input"):
        replace(dense, misaligned=name).check(kernels)
    one = dense.grad_output[:, :, :1, :1].expand(dense.input.shape)  # as of a sum
    replace(dense, grad_output=one).check(kernels)


@layouts
def test_one_gradient_alone(kernels: Kernels, layout: str) -> None:
    case = Channels.random((2, 8, 5, 6), layout=layout)
    every = case.scale_backward(kernels)
    for name, grad in every.items():
        assert_same(case.scale_backward(kernels, wanted=(name,))[name], grad)
    assert case.scale_backward(kernels, wanted=()) == {}


# ---------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5)], ids=str)
def test_empty(kernels: Kernels, shape: Shape) -> None:
    results = Channels.random(shape).results(kernels, "forward")
    assert all(result.numel() == 0 for result in results.values())


@layouts
@dtypes
def test_ties_share_the_gradient(kernels: Kernels, dtype: torch.dtype, layout: str) -> None:
    """Of equal maxima, in one block and in several; a channel with NaN gets NaN, as from amax."""
    case = Channels.random((2, 8, 9, 129), dtype, layout)
    values = (case.input.float() * 1.5).round().to(dtype)
    values[0, 1, 7, 7] = math.nan
    values[1, 2] = -math.inf
    case = replace(case, input=laid_out(values, layout))
    actual, expected = case.statistics_backward(kernels), case.reference(torch.float64)
    assert actual[0, 1].isnan().all()
    case.check_results({"grad_of_statistics": actual})
    assert_same(case.statistics(kernels)[:, 1], expected["max"].to(dtype))


@layouts
@pytest.mark.parametrize("at", [(0, 0), (3, 5), (8, 12)])
def test_nan_reaches_the_statistics_of_its_channel_alone(
    kernels: Kernels, at: tuple[int, int], layout: str
) -> None:
    case = Channels.random((2, 5, 9, 13), layout=layout)
    clean = case.statistics(kernels)
    spoilt = case.input.clone()
    spoilt[1, 2, at[0], at[1]] = math.nan
    statistics = replace(case, input=laid_out(spoilt, layout)).statistics(kernels)
    assert statistics[1, :, 2].isnan().all()
    statistics[1, :, 2] = clean[1, :, 2]
    assert_same(statistics, clean)


@layouts
def test_infinities(kernels: Kernels, layout: str) -> None:
    """The mean of both is NaN, the maximum is not."""
    case = Channels.random((1, 4, 9, 11), layout=layout)
    spoilt = case.input.clone()
    spoilt[0, 0, 3, 4], spoilt[0, 1, 0, 0] = math.inf, -math.inf
    spoilt[0, 2, 8, 10], spoilt[0, 2, 0, 1] = math.inf, -math.inf
    case = replace(case, input=laid_out(spoilt, layout))
    case.check_results(dict(zip(("mean", "max"), case.statistics(kernels).unbind(1))))


def test_a_mean_of_equal_values_is_exact_to_few_roundings(kernels: Kernels) -> None:
    """Sums of steps, rows and chunks: a plain sum in fp32 of so many is off by more."""
    case = Channels.random((1, 2, 128, 512))
    case = replace(case, input=torch.full_like(case.input, 0.1))
    mean = case.statistics(kernels)[:, 0]
    assert (mean - 0.1).abs().max() <= 0.1 * torch.finfo(torch.float32).eps * math.sqrt(64)


# ---------------------------------------------------------------------------- what the tests can see


def test_a_wrong_value_is_noticed(kernels: Kernels) -> None:
    case = Channels.random((1, 4, 4, 5))
    results = case.results(kernels, "forward")
    for name in results:
        wrong = {key: value.clone() for key, value in results.items()}
        wrong[name].view(-1)[0] += 1e-3
        with pytest.raises(AssertionError):
            case.check_results(wrong)
