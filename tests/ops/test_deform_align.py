"""deform_align: the glue from a raw head output and base flows to modulated_deform_conv2d, and its module."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import align_offsets_loop, deform_conv2d_loop, deform_conv2d_torch
from strategies import uniform
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from mafnet_ops import DeformAlign, deform_align, modulated_deform_conv2d

NATIVE = "cpu" in importlib.import_module("mafnet_ops.modulated_deform_conv2d")._NATIVE_DEVICES
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled CPU kernel is not built")
LOW = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = torch.float64
align: Callable[..., Tensor] = deform_align  # a type checker cannot count unpacked arguments

# (offset groups, flows, convolution groups, kernel, (H, W))
Shape = tuple[int, int, int, tuple[int, int], tuple[int, int]]
SHAPES: list[Shape] = [
    (1, 0, 1, (3, 3), (5, 6)),
    (2, 1, 1, (3, 3), (5, 4)),
    (4, 2, 2, (3, 3), (4, 5)),
    (2, 2, 1, (3, 2), (6, 5)),
    (4, 2, 1, (1, 1), (1, 7)),
    (2, 2, 4, (3, 3), (1, 1)),
]
TENSORS = ("input", "raw", "weight", "bias", "flow_1", "flow_2")


def arguments(shape: Shape, dtype: torch.dtype = DOUBLE, batch: int = 2) -> dict[str, Any]:
    """8 channels, raw within [-1, 1], flows within [-3, 3]; fp32 flows beside half features."""
    groups, flows, conv_groups, kernel, size = shape
    generator = torch.Generator().manual_seed(groups + 10 * flows)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1

    padding = (kernel[0] // 2, kernel[1] // 2)
    out = [n + 2 * p - k + 1 for n, p, k in zip(size, padding, kernel)]
    coordinates = DOUBLE if dtype == DOUBLE else torch.float32
    pairs = groups * math.prod(kernel)
    return {
        "input": uniform(batch, 8, *size).to(dtype),
        "raw": uniform(batch, 3 * pairs, *out).to(dtype),
        "weight": uniform(4, 8 // conv_groups, *kernel).to(dtype),
        "bias": uniform(4).to(dtype),
        **{f"flow_{i + 1}": (3 * uniform(batch, *out, 2)).to(coordinates) for i in range(flows)},
        "max_residue_magnitude": 2.0,
        "padding": padding,
    }


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}


def align_loop(given: dict[str, Any]) -> Tensor:
    weight = given["weight"]
    taps = weight.shape[2] * weight.shape[3]
    flows = given.get("flow_1"), given.get("flow_2")
    offset, mask = align_offsets_loop(given["raw"], *flows, taps, given["max_residue_magnitude"])
    bias = given["bias"]
    return deform_conv2d_loop(given["input"], offset, mask, weight, bias, padding=given["padding"])


def align_torch(given: dict[str, Any]) -> Tensor:
    """As BasicVSR++ writes it: chunk, tanh, flip, repeat, add, concatenate."""
    weight, raw = given["weight"], given["raw"]
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    first, second, mask = torch.chunk(raw, 3, dim=1)
    offset = given["max_residue_magnitude"] * torch.tanh(torch.cat((first, second), dim=1))
    flows = [given[name].permute(0, 3, 1, 2) for name in ("flow_1", "flow_2") if name in given]
    if len(flows) == 1:
        offset = offset + flows[0].flip(1).repeat(1, offset.size(1) // 2, 1, 1)
    elif flows:
        halves = torch.chunk(offset, 2, dim=1)
        moved = [
            half + flow.flip(1).repeat(1, half.size(1) // 2, 1, 1)
            for half, flow in zip(halves, flows)
        ]
        offset = torch.cat(moved, dim=1)
    mask = torch.sigmoid(mask)
    return deform_conv2d_torch(
        given["input"], offset, mask, weight, given["bias"], padding=given["padding"]
    )


def gradients(function: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {k: given[k].detach().clone().requires_grad_() for k in TENSORS if k in given}
    out = function({**given, **leaves})
    generator = torch.Generator().manual_seed(out.numel())
    out.backward((torch.rand(out.shape, generator=generator, dtype=DOUBLE) * 2 - 1).to(out.dtype))
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def op(given: dict[str, Any]) -> Tensor:
    return align(**given)


def terms(given: dict[str, Any]) -> int:
    return 4 * given["weight"][0].numel() + 4


# -------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("shape", SHAPES)
def test_fp64_values_equal_both_oracles(shape: Shape) -> None:
    given = arguments(shape)
    expected = align_loop(given)
    # tanh, its factor and the flow put a few roundings of up to 5 px into a coordinate, of slope 2 at most.
    assert_rounding_only(op(given), expected, terms(given), 10)
    assert_rounding_only(align_torch(given), expected, terms(given), 10)


@needs_native
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_values_and_gradients(shape: Shape, dtype: torch.dtype) -> None:
    given = arguments(shape, dtype)
    exact = align_torch(double(given))
    assert_as_accurate(op(given), align_torch(given), exact, "values", terms(given))
    actual, baseline = gradients(op, given), gradients(align_torch, given)
    sums = max(terms(given), exact[:, 0].numel())
    for name, grad in gradients(align_torch, double(given)).items():
        assert_as_accurate(actual[name], baseline[name], grad, f"grad_{name}", sums)


@needs_native
@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_flow_is_x_then_y_in_pixels(dtype: torch.dtype) -> None:
    """Raw 0 and an integer flow: half the input, shifted, as output(p) = input(p + flow(p))."""
    image = arguments((1, 0, 1, (3, 3), (5, 6)), dtype)["input"]
    weight = torch.eye(8, dtype=dtype).view(8, 8, 1, 1)
    flow = torch.tensor([2.0, -1.0]).expand(2, 5, 6, 2)  # 2 right, 1 up
    raw = torch.zeros(2, 3, 5, 6, dtype=dtype)
    out = align(image, raw, weight, flow_1=flow, padding=0)
    assert_same(out, F.pad(image, (0, 2, 1, 0))[..., :5, 2:].contiguous() / 2)


@needs_native
def test_two_flows_serve_the_halves_of_the_groups() -> None:
    image = torch.arange(2.0 * 4 * 9).view(2, 4, 1, 9)
    weight = torch.eye(4).view(4, 4, 1, 1) * 2
    raw = torch.zeros(2, 3 * 4, 1, 9)
    flows = [torch.tensor([float(x), 0.0]).expand(2, 1, 9, 2) for x in (1, -1)]
    out = align(image, raw, weight, None, *flows, padding=0)
    left = F.pad(image[:, :2], (0, 1))[..., 1:]
    right = F.pad(image[:, 2:], (1, 0))[..., :-1]
    assert_same(out, torch.cat([left, right], 1))


@needs_native
def test_residue_is_bounded_and_masks_are_sigmoid() -> None:
    """Raw 1e4: offsets of exactly the bound, mask exactly 1; raw -1e4 in the mask: zero."""
    image = torch.rand(1, 1, 9, 9)
    raw = torch.full((1, 3, 9, 9), 1e4)
    weight = torch.ones(1, 1, 1, 1)
    out = align(image, raw, weight, max_residue_magnitude=3.0, padding=0)
    assert_same(out, F.pad(image, (0, 3, 0, 3))[..., 3:, 3:].contiguous())
    out = align(image, raw, weight, padding=0)  # the default bound is 10, beyond the image
    assert_same(out, torch.zeros_like(out))
    raw[:, 2] = -1e4
    out = align(image, raw, weight, max_residue_magnitude=3.0, padding=0)
    assert_same(out, torch.zeros_like(out))


def test_stride_and_dilation_pass_through() -> None:
    given = arguments((2, 0, 1, (3, 3), (9, 8)))
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    raw = given["raw"][:, :, :5].contiguous()
    out = align(given["input"], raw, given["weight"], None, None, None, 2.0, **geometry)
    offset, mask = align_offsets_loop(raw, None, None, 9, 2.0)
    expected = deform_conv2d_loop(
        given["input"], offset, mask, given["weight"], None, (2, 1), (1, 2), (1, 2)
    )
    assert_rounding_only(out, expected, terms(given), 10)


# -------------------------------------------------------------------------------------------- parts

# (parts, groups, offset groups, channels of an offset group, flows)
PARTS = [
    (2, 2, 2, 4, 1),
    (2, 4, 1, 4, 1),
    (2, 1, 2, 3, 2),
    (3, 3, 2, 5, 2),
    (2, 3, 1, 6, 0),
    (2, 2, 1, 48, 1),
    (2, 2, 8, 4, 2),
]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts, groups, offset_groups, channels, flows", PARTS)
def test_parts_are_sampled_alike(
    parts: int, groups: int, offset_groups: int, channels: int, flows: int, dtype: torch.dtype
) -> None:
    """As one convolution whose offsets and masks are repeated for every part."""
    given = arguments((offset_groups, flows, 1, (3, 3), (9, 17)), dtype)
    channels *= parts * offset_groups
    generator = torch.Generator().manual_seed(channels)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1).to(dtype)

    given["input"] = uniform(2, channels, 9, 17)
    given["weight"] = uniform(2 * groups, channels // groups, 3, 3)
    given["bias"] = uniform(2 * groups)

    def repeated(given: dict[str, Any]) -> Tensor:
        third = given["raw"].shape[1] // 3
        first, second, mask = given["raw"].split(third, 1)
        flows = [given[name] for name in ("flow_1", "flow_2") if name in given]
        if len(flows) == 2:  # each serves half of the groups, of every part
            halves = [t.chunk(2, 1) for t in (torch.cat([first, second], 1), mask)]
            offset = torch.cat([half for half in halves[0] for _ in range(parts)], 1)
            mask = torch.cat([half for half in halves[1] for _ in range(parts)], 1)
            # The groups of the first flow come first, so that the channels must, too.
            order = _by_half(channels, parts, offset_groups)
            dense = _dense(given["weight"], channels)[:, order]
            given = {**given, "input": given["input"][:, order], "weight": dense}
            return align_torch({**given, "raw": torch.cat([offset, mask], 1)})
        offset = torch.cat([first, second], 1).repeat(1, parts, 1, 1)
        return align_torch({**given, "raw": torch.cat([offset, mask.repeat(1, parts, 1, 1)], 1)})

    def together(given: dict[str, Any]) -> Tensor:
        return align(**given, parts=parts)

    exact = repeated(double(given))
    count = terms(given)
    if dtype == DOUBLE:
        assert_rounding_only(together(given), exact, count, 10)
    else:
        assert_as_accurate(together(given), repeated(given), exact, "values", count)
    actual, baseline = gradients(together, given), gradients(repeated, given)
    sums = max(count, exact[:, 0].numel() * 9)
    for name, grad in gradients(repeated, double(given)).items():
        if dtype == DOUBLE:
            assert_as_accurate(actual[name], grad, grad, f"grad_{name}", 4 * sums)
        else:
            assert_as_accurate(actual[name], baseline[name], grad, f"grad_{name}", sums)


def _by_half(channels: int, parts: int, offset_groups: int) -> Tensor:
    """The channels of the first half of every part's offset groups, then those of the second."""
    grid = torch.arange(channels).view(parts, 2, offset_groups // 2, -1)
    return grid.transpose(0, 1).flatten()


def _dense(weight: Tensor, channels: int) -> Tensor:
    """The weight of a convolution in groups as that of one without."""
    blocks = weight.chunk(channels // weight.shape[1])
    wide = [
        F.pad(b, (0, 0, 0, 0, i * b.shape[1], channels - (i + 1) * b.shape[1]))
        for i, b in enumerate(blocks)
    ]
    return torch.cat(wide)


# ------------------------------------------------------------------------------- activations, flow sums


def _ladder(low: float, high: float) -> Tensor:
    """fp32 numbers whose logarithms are even, of both signs."""
    positive = torch.logspace(low, high, 2000)
    return torch.cat([-positive, torch.zeros(1), positive])


@needs_native
def test_sigmoid_is_right_to_a_few_units() -> None:
    """A 1 x 1 kernel over ones puts the masks out, and their slopes as gradients. Three operations follow the
    exponential, which is right to two units: eight in all. Below e^-87 it is 0."""
    values = _ladder(-8, 2)
    raw = torch.zeros(1, 3, 1, len(values))
    raw[0, 2, 0] = values
    raw.requires_grad_()
    ones, weight = torch.ones(1, 1, 1, len(values)), torch.ones(1, 1, 1, 1)
    out = align(ones, raw, weight, padding=0)
    (grad,) = torch.autograd.grad(out.sum(), raw)
    exact = values.double().sigmoid()
    slope = exact * (-values.double()).sigmoid()
    eps = torch.finfo(torch.float32).eps
    for actual, expected in ((out[0, 0, 0], exact), (grad[0, 2, 0], slope)):
        error = (actual.detach() - expected).abs() / expected
        normal = values.abs() < 87
        assert error[normal | (values > 0) & (expected > 0.5)].max() <= 8 * eps
        assert (actual[~normal] - expected[~normal]).abs().max() <= 2e-38 + eps


@needs_native
def test_tanh_is_right_to_a_few_units() -> None:
    """A row (0, 1): the sample at dx in (0, 1) is dx itself, so that tanh comes out, and its slope as gradient."""
    values = _ladder(-30, 2).abs()
    raw = torch.zeros(1, 3, len(values), 2)
    raw[0, 1, :, 0] = values
    raw[0, 2] = 100.0  # a mask of 1
    raw.requires_grad_()
    image = torch.tensor([0.0, 1.0]).expand(1, 1, len(values), 2)
    out = align(image, raw, torch.ones(1, 1, 1, 1), max_residue_magnitude=0.999, padding=0)
    (grad,) = torch.autograd.grad(out[..., 0].sum(), raw)
    bound = 0.999 * 8 * torch.finfo(torch.float32).eps
    exact = values.double().tanh()
    error = (out[0, 0, :, 0].detach() - 0.999 * exact).abs()
    assert (error <= bound * exact + 2e-38).all()
    slope = 0.999 / values.double().cosh() ** 2
    error = (grad[0, 1, :, 0] - slope).abs()
    assert (error <= bound / 0.999 * slope + 2e-38).all()


@needs_native
@pytest.mark.parametrize("flows", [1, 2])
def test_flow_gradients_of_an_image_that_goes_in_slices(flows: int) -> None:
    """Sums by offset group take 2 * 8 planes, more than are held at once: every pixel gets those of its own slice."""
    given = arguments((8, flows, 1, (1, 1), (300, 260)), torch.float32, batch=1)
    actual, baseline = gradients(op, given), gradients(align_torch, given)
    exact = gradients(align_torch, double(given))
    for name in ("flow_1", "flow_2")[:flows]:
        assert_as_accurate(actual[name], baseline[name], exact[name], name, 8 * 4 * 4)


# ----------------------------------------------------------------------------------------- gradients


def small() -> tuple[Any, list[Tensor]]:
    given = arguments((2, 2, 2, (1, 2), (3, 3)), batch=1)
    names = [name for name in TENSORS if name in given]
    # Raw within [-0.2, 0.2] moves 0.4 px at most, about flows of x.5: no coordinate is near an integer.
    given["raw"] = given["raw"] * 0.2
    for name in ("flow_1", "flow_2"):
        given[name] = given[name].floor() + 0.5

    def function(*tensors: Tensor) -> Tensor:
        return align(**{**given, **dict(zip(names, tensors))})

    return function, [given[name].requires_grad_() for name in names]


def test_gradcheck() -> None:
    assert gradcheck(*small())


def test_gradgradcheck() -> None:
    assert gradgradcheck(*small(), fast_mode=True)


# ------------------------------------------------------------------------- dtypes, layouts, edges


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_error_is_flat_in_the_width(dtype: torch.dtype, autocast: bool) -> None:
    """tanh and the sum with the flow are fp32: a residue of up to 10 px would else be off by 0.04 px, a coordinate
    beyond 256 by half a pixel. Features and raw are given in ``dtype``; what is left is one rounding of an output
    below 1 and width * 2^-24 px of coordinate at a slope of 1."""
    generator = torch.Generator().manual_seed(0)
    for width in (64, 4096):
        image = torch.rand(1, 2, 1, width, generator=generator).to(dtype)
        raw = torch.randn(1, 6, 1, width, generator=generator).to(dtype)
        raw[:, [0, 2]] = 0  # dy: the image is one row
        flow = torch.rand(1, 1, width, 2, generator=generator) * torch.tensor([4.0, 0.0])
        weight = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1).to(dtype)
        given = dict(max_residue_magnitude=10.0, padding=0, flow_1=flow)
        features = (image, raw, weight)
        if autocast:
            features = (image.float(), raw, weight.float())
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = align(*features, **given)
        assert out.dtype == dtype
        exact = align(*(t.double() for t in (image, raw, weight)), **given)
        bound = torch.finfo(dtype).eps / 2 + 4 * width * 2.0**-24
        assert (out - exact).abs().max().item() <= bound, width


def test_channels_last_in_channels_last_out() -> None:
    for dtype in (DOUBLE, *LOW):
        given = arguments(SHAPES[2], dtype=dtype)
        expected = op(given)
        for name in ("input", "raw"):
            changed = {**given, name: given[name].contiguous(memory_format=torch.channels_last)}
            out = op(changed)
            assert_same(out, expected)
            assert out.is_contiguous() is (name != "input")
        strided = {k: v.mT.contiguous().mT for k, v in given.items() if k in ("raw", "flow_1")}
        assert_same(op({**given, **strided}), expected)


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_batch_0(dtype: torch.dtype) -> None:
    given = arguments(SHAPES[2], dtype=dtype, batch=0)
    assert op(given).shape == (0, 4, 4, 5)
    assert {k: g.shape for k, g in gradients(op, given).items()} == {
        k: given[k].shape for k in TENSORS
    }


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_wild_flows(dtype: torch.dtype) -> None:
    """A far flow samples zeros, a NaN gives NaN there and only there."""
    given = arguments((2, 2, 1, (1, 1), (4, 5)), dtype=dtype)
    clean = op(given)
    for wild in (1e9, -math.inf, math.inf):
        flows = {k: torch.full_like(given[k], wild) for k in ("flow_1", "flow_2")}
        out = op({**given, **flows})
        assert_same(out, given["bias"].view(1, -1, 1, 1).expand_as(out).contiguous())
        for grad in gradients(op, {**given, **flows}).values():
            assert grad.isfinite().all()
    given["flow_2"][1, 2, 3, 0] = math.nan
    expected = clean.clone()
    expected[1, :, 2, 3] = math.nan
    assert_same(op(given), expected)
    assert not gradients(op, given)["input"].isnan().any()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_deterministic_over_runs_and_threads(dtype: torch.dtype, two_threads: None) -> None:
    given = arguments((4, 2, 1, (3, 3), (17, 19)), dtype=dtype)
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        results.append([op(given), *gradients(op, given).values()])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same(a, b)


@needs_native
def test_compile_fullgraph_with_dynamic_shapes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(align, backend=counter, fullgraph=True, dynamic=True)

    def traced(given: dict[str, Any]) -> Tensor:
        return compiled(**given)

    graphs = []
    for batch, size in ((5, (7, 11)), (6, (13, 17))):  # no batch of 2, the width of a flow
        given = arguments((4, 2, 1, (3, 3), size), dtype=torch.float32, batch=batch)
        expected = gradients(op, given)
        for name, grad in gradients(traced, given).items():
            assert_same(grad, expected[name])
        graphs.append(counter.frame_count)
    assert (
        graphs[0] == graphs[1]
    )  # not 1: torch starts anew when it finds that a float is a constant
    assert counter.op_count > 0


# -------------------------------------------------------------------------------------------- errors

_RAW = torch.zeros(2, 27, 5, 6)
_FLOW = torch.zeros(2, 5, 6, 2)
ERRORS = [
    (dict(input=1), TypeError, "input: expected a torch.Tensor, got int"),
    (dict(raw=None), TypeError, "raw: expected a torch.Tensor, got NoneType"),
    (dict(weight=_RAW[0]), ValueError, "weight: expected 4 dimensions, got shape (27, 5, 6)"),
    (
        dict(raw=_RAW.int()),
        TypeError,
        "raw: expected dtype float64, float32, float16 or bfloat16, got torch.int32",
    ),
    (
        dict(weight=torch.zeros(4, 8, 0, 3)),
        ValueError,
        "weight: expected a kernel of at least 1 x 1, got (0, 3)",
    ),
    (
        dict(raw=_RAW[:, :26]),
        ValueError,
        "raw: expected 3 * G * 9 channels with G dividing the 8 input channels, got 26 channels",
    ),
    (
        dict(raw=_RAW[:, :0]),
        ValueError,
        "raw: expected 3 * G * 9 channels with G dividing the 8 input channels, got 0 channels",
    ),
    (
        dict(raw=_RAW[..., :5]),
        ValueError,
        "raw: expected (N, 3 * G * K, H_out, W_out) = (2, 27, 5, 6), got (2, 27, 5, 5)",
    ),
    (
        dict(raw=_RAW.double()),
        TypeError,
        "raw: expected dtype torch.float32 or float32, got torch.float64",
    ),
    (dict(parts=0), ValueError, "parts: expected an int >= 1, got 0"),
    (
        dict(max_residue_magnitude=math.nan),
        ValueError,
        "max_residue_magnitude: expected a number or None, got nan",
    ),
    (
        dict(raw=_RAW.repeat(1, 4, 1, 1), parts=4),
        ValueError,
        "raw: expected 3 * G * 9 channels with G dividing the 2 channels of a part, got 108 channels",
    ),
    (dict(flow_2=_FLOW), ValueError, "flow_1: expected a tensor where flow_2 is given, got None"),
    (
        dict(flow_1=_FLOW, flow_2=_FLOW),
        ValueError,
        "raw: expected an even number of offset groups for two flows, got 1",
    ),
    (dict(flow_1=_FLOW[0]), ValueError, "flow_1: expected 4 dimensions, got shape (5, 6, 2)"),
    (dict(flow_1=[0]), TypeError, "flow_1: expected a torch.Tensor, got list"),
    (
        dict(flow_1=_FLOW.permute(0, 3, 1, 2)),
        ValueError,
        "flow_1: expected (N, H_out, W_out, 2) = (2, 5, 6, 2), got (2, 2, 5, 6)",
    ),
    (
        dict(raw=_RAW.repeat(1, 2, 1, 1), flow_1=_FLOW, flow_2=_FLOW[:1]),
        ValueError,
        "flow_2: expected (N, H_out, W_out, 2) = (2, 5, 6, 2), got (1, 5, 6, 2)",
    ),
    (dict(raw=_RAW.to("meta")), ValueError, "raw: expected device cpu as input, got meta"),
    (dict(flow_1=_FLOW.to("meta")), ValueError, "flow_1: expected device cpu as input, got meta"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": torch.zeros(2, 8, 5, 6), "raw": _RAW, "weight": torch.zeros(4, 8, 3, 3)}
    with pytest.raises(error, match=f"^deform_align: {re.escape(message)}$"):
        align(**{**given, **changed})


# -------------------------------------------------------------------------------------------- module


def test_module_parameters_and_forward() -> None:
    module = DeformAlign(8, 4, 3, groups=2, max_residue_magnitude=2.0)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {"weight": (4, 4, 3, 3), "bias": (4,)}
    given = arguments((4, 2, 2, (3, 3), (4, 5)), dtype=torch.float32)
    module.load_state_dict({"weight": given["weight"], "bias": given["bias"]})
    assert_same(module(given["input"], given["raw"], given["flow_1"], given["flow_2"]), op(given))
    alone = {k: v for k, v in given.items() if not k.startswith("flow")}
    assert_same(module(given["input"], given["raw"]), op(alone))


@pytest.mark.parametrize("groups", [1, 2])
def test_init_identity(groups: int) -> None:
    """At raw 0 the output is the input plus half of a tenth of the drawn weight."""
    torch.manual_seed(groups)
    module = DeformAlign(8, 8, groups=groups).double()
    drawn = module.weight.detach().clone()
    module.init_identity()
    image = arguments(SHAPES[0])["input"]
    out = module(image, torch.zeros(2, 27, 5, 6, dtype=DOUBLE)).detach()
    rest = F.conv2d(image, drawn * 0.05, padding=1, groups=groups)
    assert_rounding_only(out, image + rest, 8 * 9 + 2, 2)
    assert (out - image).abs().max() < 0.5 < image.abs().max()
    zero = modulated_deform_conv2d(
        image * 0, torch.zeros(2, 18, 5, 6), None, module.weight, module.bias, padding=1
    )
    assert not zero.any()  # the bias is gone


def test_init_identity_needs_as_many_channels_out_as_in() -> None:
    message = r"^deform_align: out_channels: expected in_channels, got 4$"
    with pytest.raises(ValueError, match=message):
        DeformAlign(8, 4).init_identity()


def test_kernel_of_two_sizes_keeps_the_size_of_the_map() -> None:
    module = DeformAlign(4, 6, (1, 5)).double()
    assert module.padding == (0, 2)
    raw = uniform(1, 3 * 5, 4, 7)
    assert module(uniform(1, 4, 4, 7, seed=1), raw).shape == (1, 6, 4, 7)
