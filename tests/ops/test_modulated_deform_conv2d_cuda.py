"""The CUDA kernels of modulated_deform_conv2d, run on the CPU by the emulator in tests/cuda_on_cpu.

The fast build gives values, in three orders of the threads; the checked build also watches every access. Both are held
to oracles in fp64. Outputs and workspaces come poisoned, so one that is not written is a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, why_not
from cuda_on_cpu.modulated_deform_conv2d_cases import (
    CASES,
    DOUBLE,
    DTYPES,
    GRADS,
    OP,
    Case,
    assert_gradients,
    assert_output,
    backward,
    check_backward,
    check_empty,
    check_failing_launches,
    check_far_offsets,
    check_fixed_point_scale,
    check_forward,
    check_gradient_alone,
    check_infinite_weight,
    check_nan_offset,
    check_wild_weight,
    forward,
    packed_weight_bytes,
    random_grad,
)
from cuda_on_cpu.modulated_deform_conv2d_tensor_core_cases import (
    NOT_FOR_TENSOR_CORES,
    TENSOR_CORE_CASES,
    check_not_for_tensor_cores,
    check_slices_on_tensor_cores,
    check_strides_for_tensor_cores,
    check_tf32,
    check_wild_offsets_on_tensor_cores,
)
from tolerances import assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mafnet_ops import deform_align, modulated_deform_conv2d
from mafnet_ops._library import backend

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}")

needs_ops = pytest.mark.skipif(
    backend("modulated_deform_conv2d", "cpu").name != "native",
    reason="the compiled ops are not built",
)
FEW = (
    "kernel 3x2, stride 2x1, dilation 1x2",
    "offset groups straddle 3 groups",
    "17 to 65 channels",
)
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
tensor_core_cases = pytest.mark.parametrize(
    "case", TENSOR_CORE_CASES.values(), ids=TENSOR_CORE_CASES.keys()
)
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def is_forward(name: str) -> bool:
    """Of a raw op."""
    return "mafnet_ops" in name and "forward" in name


class RecordedCalls(TorchDispatchMode):
    """The arguments of the raw forward ops that are called; a default that ends them is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.of_forward: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_forward(func.name()):
            self.of_forward.append(args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return emulate(OP)


@pytest.fixture(scope="module")
def checked() -> Kernels:
    return emulate(OP, checked=True)


@all_cases
def test_forward(kernels: Kernels, case: Case) -> None:
    for order, dtype in zip((*ORDERS, "random"), DTYPES):
        check_forward(kernels, case, dtype, (order,))


@tensor_core_cases
@pytest.mark.parametrize("dtype", TENSOR_CORE_DTYPES, ids=str)
def test_forward_on_tensor_cores(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    assert packed_weight_bytes(kernels, case, case.tensors(dtype)) > 0
    check_forward(kernels, case, dtype, ("random",))


@pytest.mark.parametrize("dtype", TENSOR_CORE_DTYPES, ids=str)
@pytest.mark.parametrize("offset_groups", [16, 32])
def test_fragments_hold_the_channels_that_they_should(
    kernels: Kernels, dtype: torch.dtype, offset_groups: int
) -> None:
    """A weight that permutes channels permutes them, to the bit: 128 in 4 vectors of 2 halves, to 128 in 2 tiles."""
    case = Case(
        1,
        128,
        128,
        (5, 7),
        (1, 1),
        padding=(0, 0),
        offset_groups=offset_groups,
        channels_last=True,
        mask=False,
        bias=False,
    )
    tensors = case.tensors(dtype)
    tensors[1] = tensors[1] * 0
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    tensors[3] = torch.eye(128)[order].to(dtype).view(128, 128, 1, 1)
    unit = 16  # bytes behind the weights: the mask of a call without one
    if dtype != torch.float32:
        assert packed_weight_bytes(kernels, case, tensors) == 128 * 128 * 2 + unit
        assert_same(forward(kernels, case, tensors), tensors[0][:, order])
        return
    for bits, size, allow_tf32 in ((22, 8, 0), (11, 4, 1)):  # those that the products keep
        tensors[0] = (tensors[0] * 2**bits).round() / 2**bits
        options = {"allow_tf32": allow_tf32}
        assert packed_weight_bytes(kernels, case, tensors, **options) == 128 * 128 * size + unit
        assert_same(forward(kernels, case, tensors, **options), tensors[0][:, order])


@tensor_core_cases
def test_forward_by_tf32(kernels: Kernels, case: Case) -> None:
    check_tf32(kernels, case)


@needs_ops
@pytest.mark.parametrize("op", [modulated_deform_conv2d, deform_align])
def test_tf32_where_torch_allows_it(op: Callable[..., Tensor]) -> None:
    """Torch's setting for matrix products reaches the kernels, in compiled code too."""
    input, offset, mask, weight, bias = Case().tensors(torch.float32)
    tensors = (input, offset, mask, weight, bias)
    if op is deform_align:
        tensors = (input, torch.cat([offset, mask], 1), weight, bias)
    traced: list[tuple[Any, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        nodes = [node for module in modules for node in module.graph.nodes]
        traced.extend(node.args for node in nodes if is_forward(str(node.target)))
        return graph.forward

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, allowed in (("ieee", False), ("tf32", True)):
            matmul.fp32_precision = precision
            with RecordedCalls() as calls:
                op(*tensors, padding=1)
            torch.compiler.reset()
            traced.clear()
            compiled = torch.compile(op, backend=backend, fullgraph=True)
            compiled(*tensors, padding=1)  # without gradients, and with them
            compiled(tensors[0].clone().requires_grad_(), *tensors[1:], padding=1)
            assert len(calls.of_forward) == 1 and len(traced) >= 2
            for arguments in (*calls.of_forward, *traced):
                assert (arguments[-1] is True) == allowed
    finally:
        matmul.fp32_precision = before


@all_cases
def test_backward(kernels: Kernels, case: Case) -> None:
    for order, dtype in zip((*ORDERS, "random"), DTYPES):
        check_backward(kernels, case, dtype, (order,))


@some_cases
@dtypes
def test_deterministic_backward_has_the_same_bits_in_any_order(
    kernels: Kernels, case: Case, dtype: torch.dtype
) -> None:
    check_backward(kernels, case, dtype, deterministic=True)


@some_cases
def test_accesses(checked: Kernels, case: Case) -> None:
    """Races, bounds, uninitialised reads and unwritten outputs, which the checked build sees."""
    check_forward(checked, case, torch.float32, ("random",))
    check_backward(checked, case, torch.float32, ("random",))
    check_backward(checked, case, torch.float16, ("random",), deterministic=True)


@pytest.mark.parametrize(
    "name",
    [
        "4 steps, 72 outputs, 129 pixels",
        "half offsets, float mask, 96 channels in 3",
        "offset groups of 12 channels, 12 steps, no mask",
    ],
)
def test_accesses_on_tensor_cores(checked: Kernels, name: str) -> None:
    check_forward(checked, TENSOR_CORE_CASES[name], torch.bfloat16, ("random",))
    check_forward(checked, TENSOR_CORE_CASES[name], torch.float32, ("random",))


def test_weight_over_several_ranges_of_pixels(kernels: Kernels) -> None:
    """Ranges have at least 32 steps of 16 pixels: 2 x 35 steps make three, the middle one in both images."""
    case = Case(2, 2, 3, (28, 20), (1, 1), padding=(0, 0))
    for dtype in (torch.float32, torch.float64):
        check_backward(kernels, case, dtype, ORDERS[1:])


@dtypes
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("far", [1e9, -3e38, math.inf, -math.inf])
def test_far_offsets_sample_zeros(
    kernels: Kernels, dtype: torch.dtype, far: float, deterministic: bool
) -> None:
    check_far_offsets(kernels, dtype, far, deterministic)


@dtypes
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_offset_gives_nan_there_and_only_there(
    kernels: Kernels, dtype: torch.dtype, axis: int, deterministic: bool
) -> None:
    check_nan_offset(kernels, dtype, axis, deterministic)


@pytest.mark.parametrize("dtype", TENSOR_CORE_DTYPES, ids=str)
@pytest.mark.parametrize("offset_groups", [8, 16])
def test_wild_offsets_on_tensor_cores(
    kernels: Kernels, dtype: torch.dtype, offset_groups: int
) -> None:
    check_wild_offsets_on_tensor_cores(kernels, dtype, offset_groups)


def test_slices_of_channels_on_tensor_cores(kernels: Kernels) -> None:
    check_slices_on_tensor_cores(kernels)
    check_strides_for_tensor_cores(kernels)


@pytest.mark.parametrize("change", NOT_FOR_TENSOR_CORES, ids=str)
def test_not_for_tensor_cores(kernels: Kernels, change: dict[str, Any]) -> None:
    check_not_for_tensor_cores(kernels, change)


@pytest.mark.parametrize("wild", [math.inf, math.nan])
def test_infinite_weight_in_fixed_point(kernels: Kernels, wild: float) -> None:
    check_wild_weight(kernels, wild)


def test_infinite_weight_beside_the_last_pixel(kernels: Kernels) -> None:
    check_infinite_weight(kernels)


def test_a_launch_that_fails_ends_the_call(kernels: Kernels) -> None:
    check_failing_launches(kernels, CASES["one pixel"], torch.float32)
    check_failing_launches(kernels, TENSOR_CORE_CASES["1 step, 8 outputs, 2 pixels"], torch.float16)


@pytest.mark.parametrize("wanted", GRADS)
def test_each_gradient_alone(kernels: Kernels, wanted: str) -> None:
    check_gradient_alone(kernels, wanted)


@pytest.mark.parametrize("deterministic", [False, True])
def test_empty(kernels: Kernels, deterministic: bool) -> None:
    check_empty(kernels, deterministic)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_right_hand_derivative_at_integers_and_at_minus_one(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    """At n the slope is image[n + 1] - image[n], zero outside: seven points from -2 to 4 of a row of three."""
    for axis in (0, 1):
        vertical = axis == 0
        case = Case(
            1,
            1,
            1,
            size=(3, 1) if vertical else (1, 3),
            kernel=(1, 1),
            padding=(2, 0) if vertical else (0, 2),
            mask=False,
            bias=False,
        )
        tensors = case.tensors(dtype)
        tensors[0] = torch.tensor([3.0, 5.0, 11.0], dtype=dtype).view(tensors[0].shape)
        tensors[1] = tensors[1] * 0
        tensors[3] = torch.ones_like(tensors[3])
        grad_output = torch.ones(1, 1, *case.out_size, dtype=dtype)
        grad = backward(kernels, case, tensors, grad_output)["offset"]
        assert grad[0, axis].flatten().tolist() == [0, 3, 2, 6, -11, 0, 0]
        assert grad[0, 1 - axis].flatten().tolist() == [0, 0, -3, -5, -11, 0, 0]


# ------------------------------------------------------------------------------------- fixed point


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_fixed_point_beside_a_huge_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    """Its rounding is relative to the bound of all contributions, 2^e: half of 2^-(61 - e - bits) each.

    Integer offsets, one channel and a weight of 1: contributions are the elements of grad_output, and bits is 6 for
    36 contributions. Doubles have 30 bits more.
    """
    case = Case(1, 1, 1, (6, 6), (1, 1), padding=(0, 0), mask=False, bias=False)
    tensors = case.tensors(dtype)
    tensors[1] = tensors[1].round()
    tensors[3] = torch.ones_like(tensors[3])
    grad_output = random_grad(case, tensors)
    grad_output[0, 0, 3, 3] = 2.0**30
    exact = backward(
        kernels, case, tensors, grad_output.double() if dtype == DOUBLE else grad_output
    )
    actual = backward(kernels, case, tensors, grad_output, deterministic=True)
    exponent = 31 + 1 + 1  # of grad_output, of the weight 1 and of a mask that is not there
    shift = 61 - exponent - 6 + (30 if dtype == DOUBLE else 0)
    small = exact["input"].abs() < 2**20
    assert small.sum() == 35
    error = (actual["input"] - exact["input"])[small].abs().max().item()
    rounding = torch.finfo(dtype).eps * exact["input"][small].abs().max().item()
    assert error <= 36 * 2.0 ** -(shift + 1) + 4 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_fixed_point_follows_the_scale(kernels: Kernels, dtype: torch.dtype, scale: float) -> None:
    check_fixed_point_scale(kernels, dtype, scale)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wild", [math.inf, -math.inf, math.nan])
def test_deterministic_gradient_that_is_not_finite_stays_where_it_goes(
    kernels: Kernels, dtype: torch.dtype, wild: float
) -> None:
    case = replace(CASES["offset groups straddle 3 groups"], batch=1)
    tensors = case.tensors(dtype)
    grad_output = random_grad(case, tensors)
    grad_output[0, 4, 2, 2] = wild  # the second of three groups
    expected = backward(kernels, case, tensors, grad_output)["input"]
    actual = [
        backward(kernels, case, tensors, grad_output, deterministic=True, order=order)["input"]
        for order in ORDERS
    ]
    assert 0 < (~actual[0].isfinite()).sum() < actual[0].numel()
    assert_same(actual[0].isnan(), expected.isnan())
    assert_same(actual[0].isinf(), expected.isinf())
    for other in actual[1:]:
        assert_same(actual[0], other)


# --------------------------------------------------------------------------------------- on a GPU


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the public op on CUDA, brought back."""
    tensors = [None if t is None else t.cuda().requires_grad_() for t in case.tensors(dtype)]
    input, offset, mask, weight, bias = tensors
    assert input is not None and offset is not None and weight is not None
    output = modulated_deform_conv2d(input, offset, mask, weight, bias, *case.geometry)
    output.backward(random_grad(case, case.tensors(dtype)).cuda())
    named = {
        n: t.grad.cpu() for n, t in zip(GRADS, tensors) if t is not None and t.grad is not None
    }
    return output.detach().cpu(), named


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [*CASES.values(), *TENSOR_CORE_CASES.values()], ids=[*CASES, *TENSOR_CORE_CASES]
)
@dtypes
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    output, grads = on_gpu(case, dtype)
    assert_output(output, case)
    assert_gradients(grads, case, dtype)


@pytest.mark.gpu
@some_cases
@dtypes
def test_deterministic_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)  # the fixture of all tests resets it
    first, again = on_gpu(case, dtype)[1], on_gpu(case, dtype)[1]
    for name, grad in first.items():
        assert_same(grad, again[name])
