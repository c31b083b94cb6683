"""The CUDA kernels of flow_warp, run on the CPU by the emulator in tests/cuda_on_cpu.

The fast build gives values, in three orders of the threads; the checked build also watches every access. Both are
held to the reference in fp64. Outputs come poisoned, so one that is not written is a NaN.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, needs_emulator
from cuda_on_cpu.flow_warp_cases import (
    INTERPOLATIONS,
    LAYOUTS,
    NAMES,
    PADDINGS,
    Warp,
    check_weightless_neighbours,
    misaligned,
)
from tolerances import assert_same

pytestmark = needs_emulator

# dtype of the features, of the flow
DTYPES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
interpolations = pytest.mark.parametrize("interpolation", INTERPOLATIONS)
paddings = pytest.mark.parametrize("padding_mode", PADDINGS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair)
)


@pytest.fixture(scope="module", params=["fast", "checked"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return emulate("flow_warp", checked=request.param == "checked")


# ------------------------------------------------------------------------------ values and gradients


@dtypes
@interpolations
@paddings
def test_matches_the_reference(
    kernels: Kernels,
    dtypes: tuple[torch.dtype, torch.dtype],
    interpolation: str,
    padding_mode: str,
) -> None:
    for layout in LAYOUTS:
        case = Warp.random((2, 16, 5, 7), None, dtypes, layout, interpolation, padding_mode)
        case.check(kernels)


@layouts
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 40, 65, 72])
def test_channels_around_vectors_and_groups(kernels: Kernels, layout: str, channels: int) -> None:
    """Vectors are of 4 or 8 channels, a group of 8 lanes moves 32 or 64 at a time."""
    for dtype in (torch.float32, torch.float16):
        Warp.random((1, channels, 5, 6), None, (dtype, torch.float32), layout).check(kernels)


@layouts
@pytest.mark.parametrize("pixels", [1, 31, 32, 33, 255, 256, 257])
def test_pixels_around_warps_and_blocks(kernels: Kernels, layout: str, pixels: int) -> None:
    """Blocks have 256 threads: one a pixel, one for 4 channels of a pixel, or one of 8 for a pixel."""
    orders = ORDERS if pixels in (33, 257) else ORDERS[1:2]
    Warp.random((1, 4, 6, 9), (1, pixels), layout=layout).check(kernels, orders)


@interpolations
@paddings
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (2, 3)], ids=str)
def test_thin_images(
    kernels: Kernels, interpolation: str, padding_mode: str, shape: tuple[int, int]
) -> None:
    for layout in ("contiguous", "channels_last"):
        options = (torch.float32, torch.float32), layout, interpolation, padding_mode
        Warp.random((2, 4, *shape), None, *options).check(kernels)
        Warp.random((2, 4, *shape), (3, 2), *options).check(kernels)


@pytest.mark.parametrize("order", ORDERS)
@interpolations
def test_every_order_of_threads(kernels: Kernels, order: str, interpolation: str) -> None:
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            case = Warp.random((2, 24, 9, 33), None, (dtype, torch.float32), layout, interpolation)
            case.check(kernels, (order,))


@layouts
def test_strided_flow(kernels: Kernels, layout: str) -> None:
    case = Warp.random((2, 8, 5, 7), layout=layout)
    planes = case.flow.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # as a network makes it
    replace(case, flow=planes).check(kernels)
    apart = case.flow.new_full((2, 5, 14, 5), math.nan)[:, :, ::2, 1:5:3].copy_(case.flow)
    replace(case, flow=apart).check(kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vectors_only_where_all_is_aligned(kernels: Kernels, dtype: torch.dtype) -> None:
    """One tensor in an odd layout beside dense ones, channels that fill no vector, odd storage."""
    dense = Warp.random((2, 16, 5, 7), None, (dtype, torch.float32), "channels_last")
    for layout in LAYOUTS:
        case = Warp.random((2, 16, 5, 7), None, (dtype, torch.float32), layout)
        replace(dense, grad_output=case.grad_output).check(kernels)
        replace(dense, input=case.input).check(kernels)
        Warp.random((2, 13, 5, 7), None, (dtype, torch.float32), layout).check(kernels)
    replace(dense, input=misaligned(dense.input)).check(kernels)
    replace(dense, grad_output=misaligned(dense.grad_output)).check(kernels)


@interpolations
@layouts
def test_weightless_neighbours(kernels: Kernels, layout: str, interpolation: str) -> None:
    check_weightless_neighbours(kernels, layout, interpolation)


@layouts
def test_without_mask(kernels: Kernels, layout: str) -> None:
    case = Warp.random((2, 8, 5, 7), layout=layout)
    assert_same(case.forward(kernels, with_mask=False)[0], case.forward(kernels)[0])


@pytest.mark.parametrize("wanted", ["grad_input", "grad_flow"])
@layouts
def test_one_gradient_alone(kernels: Kernels, wanted: str, layout: str) -> None:
    case = Warp.random((2, 8, 5, 7), layout=layout, interpolation="bicubic")
    alone = case.backward(kernels, wanted=(wanted,))
    both = case.backward(kernels)
    index = NAMES.index(wanted) - 1
    assert_same(alone[index], both[index])
    assert_same(alone[1 - index], torch.zeros_like(both[1 - index]))


# ---------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    "shape", [((0, 4, 5, 6), (5, 6)), ((2, 4, 5, 6), (0, 6)), ((2, 0, 5, 6), (5, 6))], ids=str
)
def test_empty(kernels: Kernels, shape: tuple[tuple[int, int, int, int], tuple[int, int]]) -> None:
    case = Warp.random(*shape)
    output, mask = case.forward(kernels)
    assert output.numel() == 0
    assert mask.shape == (shape[0][0], 1, *shape[1])
    for gradient in case.backward(kernels):
        assert_same(gradient, torch.zeros_like(gradient))


@interpolations
@paddings
@pytest.mark.parametrize("value", [1e9, -1e9, 3e38, -3e38, math.inf, -math.inf, math.nan])
def test_far_infinite_and_nan_flow(
    kernels: Kernels, interpolation: str, padding_mode: str, value: float
) -> None:
    """Some pixels go astray: theirs is what PyTorch's code gives, and nothing else changes."""
    for layout in ("contiguous", "channels_last"):
        case = Warp.random(
            (1, 4, 5, 6), layout=layout, interpolation=interpolation, padding_mode=padding_mode
        )
        astray = torch.zeros(1, 5, 6, 2, dtype=torch.bool)
        astray[0, 1, 2, 0] = astray[0, 3, 4, 1] = True
        case = replace(case, flow=case.flow.masked_fill(astray, value))
        bad = astray.any(3)
        clean = replace(
            case,
            flow=case.flow.masked_fill(astray, 0),
            grad_output=case.grad_output.masked_fill(bad[:, None], 0),
        )
        output, mask = case.forward(kernels, "random")
        grad_input, grad_flow = case.backward(kernels, "random")
        expected, clean_mask = clean.forward(kernels)
        rows, columns = bad[0].nonzero(as_tuple=True)
        kept = (~bad)[:, None].expand_as(output)
        assert_same(output[kept], expected[kept])
        assert_same(mask, clean_mask.masked_fill(bad[:, None], 0))
        astray_output = output[0, :, rows, columns]
        if math.isnan(value) or (math.isinf(value) and padding_mode == "reflection"):
            assert astray_output.isnan().all()
            assert_same(grad_input, clean.backward(kernels, "random")[0])  # scatters nothing
        elif padding_mode == "zeros":
            assert (astray_output == 0).all()
            assert_same(grad_input, clean.backward(kernels, "random")[0])
        else:
            assert astray_output.isfinite().all()
            assert grad_input.isfinite().all()
        kept_flow = (~bad)[..., None].expand_as(grad_flow)
        assert_same(grad_flow[kept_flow], clean.backward(kernels)[1][kept_flow])


# ---------------------------------------------------------------------------- what the tests can see


def test_a_wrong_value_is_noticed(kernels: Kernels) -> None:
    """The comparison of check() fails for an error of two roundings in one element."""
    case = Warp.random((1, 4, 5, 6))
    exact = case.to(torch.float64).reference()
    results = (case.forward(kernels)[0], *case.backward(kernels))
    case.check_results(results, exact)
    for index in range(3):
        wrong = [result.clone() for result in results]
        wrong[index].view(-1)[0] += 1e-3
        with pytest.raises(AssertionError):
            case.check_results(tuple(wrong), exact)
