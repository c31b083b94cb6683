"""The CUDA kernels of deform_align, those of modulated_deform_conv2d on raw offsets, on the emulator.

The fast build gives values, in three orders of the threads; the checked build also watches every access.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.deform_align_cases import (
    ALIGN_CASES,
    ALIGN_TENSOR_CORE_CASES,
    GRADS,
    HALF_A_STEP,
    PARTS_AND_FLOWS,
    AlignCase,
    check_align,
    check_align_alone,
    check_align_backward,
    check_align_empty,
    check_parts_on_tensor_cores,
    check_saturated_head,
    check_zero_head,
    options_of,
    split,
)
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, why_not
from cuda_on_cpu.modulated_deform_conv2d_cases import DTYPES, OP, packed_weight_bytes

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}")

TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = ("two flows, 2 parts over 3 groups, half flow", "one flow, 65 pixels, 17 to 65 channels")
all_cases = pytest.mark.parametrize("case", ALIGN_CASES.values(), ids=ALIGN_CASES.keys())
tensor_core_cases = pytest.mark.parametrize(
    "case", ALIGN_TENSOR_CORE_CASES.values(), ids=ALIGN_TENSOR_CORE_CASES.keys()
)
some_cases = pytest.mark.parametrize("case", [ALIGN_CASES[name] for name in FEW], ids=FEW)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return emulate(OP)


@pytest.fixture(scope="module")
def checked() -> Kernels:
    return emulate(OP, checked=True)


@all_cases
def test_forward(kernels: Kernels, case: AlignCase) -> None:
    for order, dtype in zip((*ORDERS, "random"), DTYPES):
        check_align(kernels, case, dtype, (order,))


@tensor_core_cases
@pytest.mark.parametrize("dtype", TENSOR_CORE_DTYPES, ids=str)
def test_forward_on_tensor_cores(kernels: Kernels, case: AlignCase, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    of_case = options_of(case, tensors)
    assert packed_weight_bytes(kernels, case.convolution, split(tensors), **of_case) > 0
    check_align(kernels, case, dtype, ("random",))


@all_cases
def test_backward(kernels: Kernels, case: AlignCase) -> None:
    for order, dtype in zip((*ORDERS, "random"), DTYPES):
        check_align_backward(kernels, case, dtype, (order,))


@some_cases
@dtypes
def test_deterministic_backward_has_the_same_bits_in_any_order(
    kernels: Kernels, case: AlignCase, dtype: torch.dtype
) -> None:
    check_align_backward(kernels, case, dtype, deterministic=True)


@some_cases
def test_accesses(checked: Kernels, case: AlignCase) -> None:
    check_align(checked, case, torch.float32, ("random",))
    check_align_backward(checked, case, torch.float32, ("random",))
    check_align_backward(checked, case, torch.float16, ("random",), deterministic=True)


def test_accesses_on_tensor_cores(checked: Kernels) -> None:
    case = ALIGN_TENSOR_CORE_CASES["96 channels in 3 parts of 4 offset groups, one flow"]
    check_align(checked, case, torch.bfloat16, ("random",))
    check_parts_on_tensor_cores(checked, case, torch.bfloat16, True)
    check_parts_on_tensor_cores(checked, PARTS_AND_FLOWS, torch.float16, True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_of_parts_on_tensor_cores(kernels: Kernels, deterministic: bool) -> None:
    case = ALIGN_TENSOR_CORE_CASES["96 channels in 3 parts of 4 offset groups, one flow"]
    for taken, each in ((True, case), (True, PARTS_AND_FLOWS), (False, HALF_A_STEP)):
        check_parts_on_tensor_cores(kernels, each, torch.float16, taken, deterministic)
        check_parts_on_tensor_cores(kernels, each, torch.bfloat16, taken, deterministic)


@pytest.mark.parametrize("wanted", GRADS)
def test_each_gradient_alone(kernels: Kernels, wanted: str) -> None:
    check_align_alone(kernels, wanted)


@dtypes
def test_zeros_of_the_head_are_exact(kernels: Kernels, dtype: torch.dtype) -> None:
    check_zero_head(kernels, ALIGN_CASES["no flow"], dtype)
    check_zero_head(kernels, ALIGN_TENSOR_CORE_CASES[next(iter(ALIGN_TENSOR_CORE_CASES))], dtype)


@dtypes
@pytest.mark.parametrize("channels", [8, 64])
def test_saturated_head(kernels: Kernels, dtype: torch.dtype, channels: int) -> None:
    check_saturated_head(kernels, dtype, channels)


def test_empty(checked: Kernels) -> None:
    check_align_empty(checked)
