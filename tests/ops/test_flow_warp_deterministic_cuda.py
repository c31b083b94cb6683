"""csrc/flow_warp/backward_deterministic.cu on the CPU emulator: values, edges, memory, races, fixed order.

The binding in C++ lets torch sort the taps; here torch sorts them too, between the two launches.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, emulate, why_not
from strategies import DTYPES, SLICED, laid_out, strided, uniform
from tolerances import assert_as_accurate, assert_same
from torch import Tensor

from mafnet_ops import reference

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

INTERPOLATIONS = {"bilinear": 0, "nearest": 1, "bicubic": 2}
PADDINGS = {"zeros": 0, "border": 1, "reflection": 2}
TAPS = {"bilinear": 4, "nearest": 1, "bicubic": 16}
checked = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    flow: Tensor,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    checked: bool = False,
    order: str = "forward",
) -> Tensor:
    """What flow_warp_backward gives for grad_input under deterministic algorithms, in the layout of input."""
    kernels = emulate("flow_warp", checked=checked)
    channels_last = input.shape[1] > 1 and input.stride(1) == 1
    options = {
        "input": input,
        "flow": flow,
        "interpolation": INTERPOLATIONS[interpolation],
        "padding": PADDINGS[padding_mode],
        "channels_last": int(channels_last),
        "order": order,
    }
    batch, out_height, out_width, _ = flow.shape
    count = out_height * out_width * TAPS[interpolation]
    taps = torch.empty(batch, count, dtype=torch.int64)
    kernels.run("flow_warp_backward_taps", taps=taps, **options).raise_if_any()
    sorted_taps, tap_order = taps.sort(dim=1, stable=True)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty(input.shape, dtype=input.dtype, memory_format=memory_format)
    kernels.run(
        "flow_warp_backward_gather",
        grad_output=grad_output.contiguous(memory_format=memory_format),
        sorted_taps=sorted_taps,
        tap_order=tap_order,
        grad_input=result,
        **options,
    ).raise_if_any()
    return result


def expected(
    grad_output: Tensor, input: Tensor, flow: Tensor, interpolation: str, padding_mode: str
) -> Tensor:
    leaf = input.detach().clone().requires_grad_()
    output = reference.flow_warp(leaf, flow, interpolation, padding_mode)
    return torch.autograd.grad(output, leaf, grad_output)[0]


def assert_right(
    result: Tensor, grad: Tensor, input: Tensor, flow: Tensor, interpolation: str, padding: str
) -> None:
    """As accurate as PyTorch in fp32, rounded to the dtype; fp64 to its own rounding."""
    exact = expected(grad.double(), input.double(), flow.double(), interpolation, padding)
    terms = flow.shape[1] * flow.shape[2] * TAPS[interpolation]  # all of them on one pixel
    if result.dtype == torch.float64:
        assert_as_accurate(result, exact, exact, terms=4 * terms)  # both are rounded: two walks
        return
    wide = expected(grad.float(), input.float(), flow.float(), interpolation, padding)
    assert_as_accurate(result, wide.to(result.dtype), exact, terms=terms)


@checked
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_modes(interpolation: str, padding_mode: str, checked: bool) -> None:
    input, grad = uniform(2, 3, 5, 7), uniform(2, 3, 6, 4, seed=2)
    flow = uniform(2, 6, 4, 2, reach=5.0, seed=1)
    result = grad_input(grad, input, flow, interpolation, padding_mode, checked)
    assert_right(result, grad, input, flow, interpolation, padding_mode)


@checked
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 17, 24])
def test_dtypes_layouts_and_channels(
    dtype: torch.dtype, layout: str, channels: int, checked: bool
) -> None:
    """Vectors of 2, 4 and 8 channels, planes in blocks of 8, and what is left over."""
    input = laid_out(uniform(1, channels, 5, 6).to(dtype), layout)
    grad = uniform(1, channels, 5, 6, seed=2).to(dtype)
    flow = uniform(1, 5, 6, 2, reach=3.0, seed=1).to(torch.promote_types(dtype, torch.float32))
    result = grad_input(grad, input, flow, checked=checked)
    assert_right(result, grad, input, flow, "bilinear", "zeros")


def test_flow_in_half_precision_and_any_strides() -> None:
    input = strided(uniform(2, 3, 5, 6).half(), SLICED)
    flow = strided(uniform(2, 5, 6, 2, reach=3.0, seed=1).half(), SLICED)
    grad = uniform(2, 3, 5, 6, seed=2).half()
    result = grad_input(grad, input, flow, checked=True)
    assert_right(result, grad, input, flow, "bilinear", "zeros")


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_no_bit(order: str) -> None:
    """More items than a block has threads, and every output pixel reads one corner of the image."""
    input, grad = uniform(1, 9, 17, 19).float(), uniform(1, 9, 17, 19, seed=2).float()
    flow = uniform(1, 17, 19, 2, reach=1.0, seed=1).float()
    flow -= torch.stack(torch.meshgrid(torch.arange(17), torch.arange(19), indexing="ij")[::-1], -1)
    result = grad_input(grad, input, flow, "bilinear", "border", order=order)
    assert_same(result, grad_input(grad, input, flow, "bilinear", "border"))
    assert_right(result, grad, input, flow, "bilinear", "border")


@checked
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_odd_flow_reaches_no_memory(interpolation: str, padding_mode: str, checked: bool) -> None:
    """NaN sends nothing; what is far lands in the image or nowhere."""
    input, grad = uniform(1, 2, 3, 4).float(), torch.ones(1, 2, 3, 4)
    values = [math.nan, math.inf, -math.inf, 1e9, -1e9, 3e38, -3e38, 2.0**31, -(2.0**31), 0.5, 0, 7]
    flow = torch.tensor(values).reshape(1, 3, 4, 1).repeat(1, 1, 1, 2)
    result = grad_input(grad, input, flow, interpolation, padding_mode, checked)
    assert result.isfinite().all()
    nothing = grad_input(
        grad, input, torch.full_like(flow, math.nan), interpolation, padding_mode, checked
    )
    assert_same(nothing, torch.zeros_like(input))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_one_pixel_wide(size: tuple[int, int], padding_mode: str) -> None:
    input, grad = uniform(2, 2, *size), uniform(2, 2, *size, seed=2)
    flow = uniform(2, *size, 2, reach=3.0, seed=1)
    for interpolation in INTERPOLATIONS:
        result = grad_input(grad, input, flow, interpolation, padding_mode, checked=True)
        assert_right(result, grad, input, flow, interpolation, padding_mode)


def test_empty_batch_launches_nothing() -> None:
    result = grad_input(torch.ones(0, 2, 3, 4), torch.ones(0, 2, 3, 4), torch.ones(0, 3, 4, 2))
    assert result.shape == (0, 2, 3, 4)
