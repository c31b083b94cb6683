"""The tensor-core backward of modulated_deform_conv2d, run on the CPU by the emulator in tests/cuda_on_cpu.

Held to oracles in fp64, as the generic kernels are in test_modulated_deform_conv2d_cuda.py.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.deform_align_cases import AlignCase, check_align_backward
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, why_not
from cuda_on_cpu.modulated_deform_conv2d_backward_cases import (
    BACKWARD_ALIGN_CASES,
    BACKWARD_CASES,
    check_each_gradient_alone,
    check_infinite_gradient,
    check_infinite_sample,
    check_not_for_tensor_cores,
    check_slices,
    check_wild_offsets,
    on_tensor_cores,
)
from cuda_on_cpu.modulated_deform_conv2d_cases import (
    OP,
    Case,
    backward,
    check_backward,
    random_grad,
)
from tolerances import assert_same

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}")

halves = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
routes = pytest.mark.parametrize("deterministic", [False, True])
cases = pytest.mark.parametrize("case", BACKWARD_CASES.values(), ids=BACKWARD_CASES.keys())


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return emulate(OP)


@pytest.fixture(scope="module")
def checked() -> Kernels:
    return emulate(OP, checked=True)


@cases
@halves
def test_gradients(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    assert on_tensor_cores(kernels, case, tensors, random_grad(case, tensors))
    check_backward(kernels, case, dtype, ("random",))


@cases
@halves
def test_deterministic_gradients_have_the_same_bits_in_any_order(
    kernels: Kernels, case: Case, dtype: torch.dtype
) -> None:
    check_backward(kernels, case, dtype, ORDERS, deterministic=True)


@pytest.mark.parametrize("case", BACKWARD_ALIGN_CASES.values(), ids=BACKWARD_ALIGN_CASES.keys())
@halves
@routes
def test_gradients_of_raw_offsets(
    kernels: Kernels, case: AlignCase, dtype: torch.dtype, deterministic: bool
) -> None:
    check_align_backward(kernels, case, dtype, ORDERS[1:], deterministic)


@pytest.mark.parametrize(
    "name",
    [
        "3 vectors, 72 outputs, 129 pixels",
        "1 vector, 3x3, 64 outputs, 2 images",
        "1 vector, 64 outputs, inside",
    ],
)
@routes
def test_accesses(checked: Kernels, name: str, deterministic: bool) -> None:
    """Races, bounds, uninitialised reads and unwritten outputs, which the checked build sees."""
    check_backward(checked, BACKWARD_CASES[name], torch.bfloat16, ("random",), deterministic)


def test_accesses_with_raw_offsets(checked: Kernels) -> None:
    case = BACKWARD_ALIGN_CASES["1 vector, two flows, 2 images"]
    check_align_backward(checked, case, torch.bfloat16, ("random",))


@halves
def test_fragments_hold_the_channels_that_they_should(kernels: Kernels, dtype: torch.dtype) -> None:
    """A weight that permutes channels permutes grad_output into grad_input, to the bit: offsets 0, no mask."""
    case = Case(
        1,
        128,
        128,
        (5, 7),
        (1, 1),
        padding=(0, 0),
        offset_groups=16,
        channels_last=True,
        mask=False,
        bias=False,
    )
    tensors = case.tensors(dtype)
    tensors[1] = tensors[1] * 0
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    tensors[3] = torch.eye(128)[order].to(dtype).view(128, 128, 1, 1)
    grad_output = random_grad(case, tensors)
    expected = torch.empty_like(grad_output)
    expected[:, order] = grad_output
    assert_same(backward(kernels, case, tensors, grad_output, ("input",))["input"], expected)


@halves
@routes
def test_wild_offsets(kernels: Kernels, dtype: torch.dtype, deterministic: bool) -> None:
    check_wild_offsets(kernels, dtype, deterministic)


@halves
def test_infinite_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    check_infinite_gradient(kernels, dtype)


def test_infinite_sample(kernels: Kernels) -> None:
    check_infinite_sample(kernels)


@pytest.mark.parametrize(
    "name", ["1 vector, 3x3, 64 outputs, 2 images", "1 vector, 64 outputs, inside"]
)
def test_each_gradient_alone(kernels: Kernels, name: str) -> None:
    check_each_gradient_alone(kernels, BACKWARD_CASES[name])


def test_slices_of_channels(kernels: Kernels) -> None:
    check_slices(kernels)


def test_not_for_tensor_cores(kernels: Kernels) -> None:
    check_not_for_tensor_cores(kernels)


@halves
def test_right_hand_derivative_at_integers(kernels: Kernels, dtype: torch.dtype) -> None:
    """At n the slope is image[n + 1] - image[n], zero outside: seven points from -2 to 4 of rows of three."""
    case = Case(
        1,
        32,
        8,
        size=(1, 3),
        kernel=(1, 1),
        padding=(0, 2),
        offset_groups=4,
        channels_last=True,
        mask=False,
        bias=False,
    )
    tensors = case.tensors(dtype)
    row = torch.tensor([3.0, 5.0, 11.0], dtype=dtype)
    tensors[0] = row.expand(1, 32, 1, 3).contiguous(memory_format=torch.channels_last)
    tensors[1] = tensors[1] * 0
    tensors[3] = torch.ones_like(tensors[3]) / 64  # 8 outputs, 8 channels of a group
    grad_output = torch.ones(1, 8, *case.out_size, dtype=dtype)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grad = backward(kernels, case, tensors, grad_output)["offset"]
    for group in range(4):
        assert grad[0, 2 * group].flatten().tolist() == [0, 0, -3, -5, -11, 0, 0]
        assert grad[0, 2 * group + 1].flatten().tolist() == [0, 3, 2, 6, -11, 0, 0]
