"""csrc/flow_warp/backward_deterministic.cu on the CPU emulator: values, edges, memory, races, fixed order.

The binding in C++ lets torch sort the taps; here torch sorts them too, between the two launches.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, emulate, needs_emulator
from cuda_on_cpu.flow_warp_cases import INTERPOLATIONS, PADDINGS, Warp
from strategies import DTYPES, SLICED, strided
from tolerances import assert_same

pytestmark = needs_emulator

checked = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])


@checked
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_modes(interpolation: str, padding_mode: str, checked: bool) -> None:
    """Also an output of another size than the input."""
    case = Warp.random(
        (2, 3, 5, 7),
        (6, 4),
        (torch.float64, torch.float64),
        interpolation=interpolation,
        padding_mode=padding_mode,
    )
    case.check_deterministic(emulate("flow_warp", checked=checked))


@checked
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 17, 24])
def test_dtypes_layouts_and_channels(
    dtype: torch.dtype, layout: str, channels: int, checked: bool
) -> None:
    """Vectors of 2, 4 and 8 channels, planes in blocks of 8, and what is left over."""
    wide = torch.promote_types(dtype, torch.float32)
    case = Warp.random((1, channels, 5, 6), None, (dtype, wide), layout)
    case.check_deterministic(emulate("flow_warp", checked=checked))


def test_flow_in_half_precision_and_any_strides() -> None:
    case = Warp.random((2, 3, 5, 6), None, (torch.float16, torch.float16), "strided")
    case = Warp(case.input, strided(case.flow, SLICED), case.grad_output)
    case.check_deterministic(emulate("flow_warp", checked=True))


def test_the_order_of_threads_changes_no_bit() -> None:
    """More items than a block has threads, and every output pixel reads one corner of the image."""
    case = Warp.random((1, 9, 17, 19), padding_mode="border", reach=1.0)
    rows, columns = torch.meshgrid(torch.arange(17), torch.arange(19), indexing="ij")
    flow = case.flow - torch.stack((columns, rows), -1)
    case = Warp(case.input, flow, case.grad_output, "bilinear", "border")
    case.check_deterministic(emulate("flow_warp"), ORDERS)


@checked
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_odd_flow_reaches_no_memory(interpolation: str, padding_mode: str, checked: bool) -> None:
    """NaN sends nothing; what is far lands in the image or nowhere."""
    kernels = emulate("flow_warp", checked=checked)
    input, grad = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    values = [math.nan, math.inf, -math.inf, 1e9, -1e9, 3e38, -3e38, 2.0**31, -(2.0**31), 0.5, 0, 7]
    flow = torch.tensor(values).reshape(1, 3, 4, 1).repeat(1, 1, 1, 2)
    odd = Warp(input, flow, grad, interpolation, padding_mode)
    assert odd.deterministic_grad_input(kernels).isfinite().all()
    unknown = Warp(input, torch.full_like(flow, math.nan), grad, interpolation, padding_mode)
    assert_same(unknown.deterministic_grad_input(kernels), torch.zeros_like(input))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_one_pixel_wide(size: tuple[int, int], padding_mode: str, interpolation: str) -> None:
    dtypes = (torch.float64, torch.float64)
    case = Warp.random(
        (2, 2, *size),
        dtypes=dtypes,
        interpolation=interpolation,
        padding_mode=padding_mode,
        reach=3.0,
    )
    case.check_deterministic(emulate("flow_warp", checked=True))


def test_empty_batch_launches_nothing() -> None:
    case = Warp.random((0, 2, 3, 4))
    assert case.deterministic_grad_input(emulate("flow_warp")).shape == (0, 2, 3, 4)
