"""Calls of the tensor-core backward of modulated_deform_conv2d on the emulator."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cuda_on_cpu.deform_align_cases import AlignCase, check_align_backward
from cuda_on_cpu.emulator import ORDERS, Check, Kernels
from cuda_on_cpu.modulated_deform_conv2d_cases import (
    Case,
    arguments_of,
    backward,
    check_backward,
    check_failing_launches,
    random_grad,
    workspace_sizes,
)
from cuda_on_cpu.modulated_deform_conv2d_tensor_core_cases import NOT_FOR_TENSOR_CORES
from tolerances import assert_rounding_only, assert_same
from torch import Tensor

# What the tensor cores take. A block has 128 pixels, 8 warps of 16, a step 32 channels of one tap; up to 64 output
# channels of grad_output stay in registers, more are read 64 at a time. 1, 2 or 4 lanes share an offset group, and take
# one or more vectors of 8 channels of it. For the weight a block has 64 pixels, 64 output channels and 4 steps, and a
# range at least 8 times 64 pixels.
BACKWARD_CASES = {
    "1 vector per group, 8 outputs, 2 pixels": Case(
        1, 32, 8, (1, 2), (1, 1), padding=(0, 0), offset_groups=4, channels_last=True
    ),
    "1 vector, 56 outputs, 127 pixels, no mask": Case(
        1, 64, 56, (1, 127), (1, 1), padding=(0, 0), offset_groups=8, channels_last=True, mask=False
    ),
    "2 vectors, 64 outputs, 128 pixels": Case(
        1, 32, 64, (128, 1), (3, 1), padding=(1, 0), offset_groups=2, channels_last=True
    ),
    "3 vectors, 72 outputs, 129 pixels": Case(
        1,
        96,
        72,
        (3, 43),
        (1, 1),
        padding=(0, 0),
        offset_groups=4,
        channels_last=True,
        planar_offset=True,
    ),
    "4 vectors, 128 outputs, 2 images of 130 pixels": Case(
        2, 32, 128, (10, 13), (1, 5), padding=(0, 2), offset_groups=1, channels_last=True
    ),
    "6 vectors, 136 outputs": Case(
        1, 192, 136, (4, 5), (1, 2), padding=(0, 0), offset_groups=4, channels_last=True
    ),
    "8 vectors, kernel 3x2, stride 2x1, dilation 1x2": Case(
        1, 128, 24, (9, 8), (3, 2), (2, 1), (0, 2), (1, 2), 1, 2, channels_last=True
    ),
    "half offsets, float mask": Case(
        1,
        96,
        16,
        (4, 5),
        (2, 2),
        offset_groups=3,
        channels_last=True,
        float_offset=False,
        float_mask=True,
    ),
    "3 ranges of pixels, the middle one in both images": Case(
        2, 32, 8, (36, 21), (1, 1), padding=(0, 0), offset_groups=4, channels_last=True
    ),
    "1 vector, 3x3, 64 outputs, 2 images": Case(
        2, 64, 64, (9, 8), offset_groups=8, channels_last=True, planar_offset=True
    ),
    # The tap in the middle lies inside for two whole warps, which then need no bounds.
    "1 vector, 64 outputs, inside": Case(
        1, 32, 64, (10, 14), padding=(0, 0), dilation=(3, 3), offset_groups=4, channels_last=True
    ),
    "2 vectors, 72 outputs, inside": Case(
        1, 32, 72, (10, 14), padding=(0, 0), dilation=(3, 3), offset_groups=2, channels_last=True
    ),
}


# The same kernels on raw offsets; flows are summed over taps and groups.
BACKWARD_ALIGN_CASES = {
    "1 vector, two flows, 2 images": AlignCase(
        Case(2, 32, 24, (4, 5), offset_groups=4, channels_last=True), 2
    ),
    "2 vectors, one flow, 72 outputs, planar": AlignCase(
        Case(1, 64, 72, (5, 6), (3, 2), offset_groups=4, channels_last=True, planar_offset=True),
        1,
        float_flow=False,
    ),
    "4 vectors, no flow": AlignCase(
        Case(1, 32, 8, (4, 5), (1, 2), offset_groups=1, channels_last=True)
    ),
    "3 parts, one flow": AlignCase(
        Case(1, 96, 8, (4, 5), (1, 2), offset_groups=4, channels_last=True), 1, 3
    ),
    "2 parts, inside": AlignCase(
        replace(BACKWARD_CASES["1 vector, 64 outputs, inside"], channels=64), 1, 2
    ),
}


def on_tensor_cores(kernels: Kernels, case: Case, tensors: list[Any], grad_output: Tensor) -> bool:
    arguments = {**arguments_of(case, tensors), "grad_output": grad_output}
    return workspace_sizes(kernels, arguments)[3] > 0


def check_wild_offsets(kernels: Kernels, dtype: torch.dtype, deterministic: bool) -> None:
    """Far ones meet nothing beside infinite pixels at the edge, NaN stays where it is, and the rest is as before."""
    case = Case(1, 64, 64, (6, 7), offset_groups=8, channels_last=True, reach=0.4, padding=(0, 0))
    tensors = case.tensors(dtype)
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        tensors[0][0, :, y, x] = math.inf
        tensors[1][:, :, y, x] = -3 if (y, x) == (-1, -1) else 3  # samples there go elsewhere
    wild, closed = tensors[1].clone(), tensors[2].clone()
    places = []
    for group, far in enumerate((1e9, -1e9, 4.2e6, -4.2e6, 3e38, -3e38, math.inf, -math.inf)):
        plane, y, x = 9 * group + 4, 1, 1 + group % 3
        wild[0, 2 * plane + group % 2, y, x] = far
        closed[0, plane, y, x] = 0
        places.append((plane, y, x))
    grad_output = random_grad(case, tensors)
    options: dict[str, Any] = {"deterministic": deterministic}
    expected = backward(kernels, case, [*tensors[:2], closed, *tensors[3:]], grad_output, **options)
    for plane, y, x in places:
        expected["mask"][0, plane, y, x] = 0
    wild[0, 2 * (9 * 5 + 1) + 1, 2, 2] = math.nan
    actual = backward(kernels, case, [tensors[0], wild, *tensors[2:]], grad_output, **options)
    assert actual["input"].isfinite().all()
    for name in ("offset", "mask"):
        touched = (slice(92, 94) if name == "offset" else slice(46, 47), 2, 2)
        assert actual[name][(0, *touched)].isnan().any()
        for grads in (actual, expected):
            grads[name][(0, *touched)] = 0
        assert_same(actual[name], expected[name])


def check_infinite_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    """An infinite grad_output reaches the same elements of grad_input on both routes, in any order."""
    case = replace(BACKWARD_CASES["2 vectors, 64 outputs, 128 pixels"], size=(12, 3), reach=0.4)
    tensors = case.tensors(dtype)
    grad_output = random_grad(case, tensors)
    grad_output[0, 9, 5, 1] = math.inf
    expected = backward(kernels, case, tensors, grad_output)["input"]
    first = None
    for order in ORDERS:
        actual = backward(kernels, case, tensors, grad_output, ("input",), True, order=order)
        first = actual["input"] if first is None else first
        assert_same(actual["input"], first)
    assert first is not None and 0 < (~first.isfinite()).sum() < first.numel()
    assert_same(first.isnan(), expected.isnan())
    assert_same(first.isinf(), expected.isinf())


def check_each_gradient_alone(kernels: Kernels, case: Case) -> None:
    tensors = case.tensors(torch.float16)
    grad_output = random_grad(case, tensors)
    every = backward(kernels, case, tensors, grad_output)
    for wanted in every:
        alone = backward(kernels, case, tensors, grad_output, (wanted,))
        assert alone.keys() == {wanted}
        if wanted == "bias":  # alone it is summed in another order
            pixels = case.batch * math.prod(case.out_size)
            assert_rounding_only(alone["bias"], every["bias"], pixels)
        else:
            assert_same(alone[wanted], every[wanted])


def check_infinite_sample(kernels: Kernels) -> None:
    """Both pixels sample infinity; the last one's repetitions up to the end of the tile are not there."""
    case = Case(1, 32, 8, (1, 2), (1, 1), padding=(0, 0), offset_groups=4, channels_last=True)
    tensors = case.tensors(torch.float16)
    tensors[0][0, 5, 0, 0] = math.inf
    tensors[1] = tensors[1] * 0
    tensors[1][:, 1::2, :, 1] = -1
    tensors[2] = torch.ones_like(tensors[2])
    grad_output = random_grad(case, tensors).abs() + 1
    assert on_tensor_cores(kernels, case, tensors, grad_output)
    grad = backward(kernels, case, tensors, grad_output, ("weight",))["weight"]
    assert (grad[:, 5] == math.inf).all()
    assert grad.isfinite().sum() == 31 * 8


def check_slices(kernels: Kernels) -> None:
    """Input and grad_output as slices of wider tensors; those off 16 bytes go the generic way."""
    case = BACKWARD_CASES["1 vector, 56 outputs, 127 pixels, no mask"]
    tensors = case.tensors(torch.float16)
    grad_output = random_grad(case, tensors)
    expected = backward(kernels, case, tensors, grad_output)

    def slice_of(tensor: Tensor, first: int) -> Tensor:
        channels = tensor.shape[1]
        wide = torch.full((1, channels + 40, *tensor.shape[2:]), math.nan, dtype=tensor.dtype)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, first : first + channels] = tensor
        return wide[:, first : first + channels]

    for first, taken in ((16, True), (4, False)):
        inputs = [slice_of(tensors[0], first), *tensors[1:]]
        grads = slice_of(grad_output, first)
        assert on_tensor_cores(kernels, case, inputs, grad_output) == taken
        assert on_tensor_cores(kernels, case, tensors, grads) == taken
        if taken:
            actual = backward(kernels, case, inputs, grads)
            for name, grad in actual.items():
                assert_same(grad, expected[name])


def check_not_for_tensor_cores(kernels: Kernels) -> None:
    case = Case(1, 64, 64, (2, 3), offset_groups=8, channels_last=True)

    def taken(case: Case, dtype: torch.dtype) -> bool:
        tensors = case.tensors(dtype)
        return on_tensor_cores(kernels, case, tensors, random_grad(case, tensors))

    assert taken(case, torch.float16) and taken(case, torch.bfloat16)
    assert not taken(case, torch.float32)
    for change in (*NOT_FOR_TENSOR_CORES, {"offset_groups": 16}):
        assert not taken(replace(case, **change), torch.float16), change
    tensors = case.tensors(torch.float16)
    grad_output = random_grad(case, tensors)
    assert not on_tensor_cores(kernels, case, tensors, grad_output.contiguous())
    same = grad_output[:, :1, :1, :1].expand(grad_output.shape)  # as of a sum
    assert not on_tensor_cores(kernels, case, tensors, same)
    # Elements of an image of grad_output are counted in 32 bits: 5 steps from pixel to pixel, then the channels.
    furthest = ((1 << 32) - 1 - case.out_channels) // 5 // 8 * 8
    arguments = {**arguments_of(case, tensors), "grad_output": grad_output}
    for stride, fits in ((furthest, True), (furthest + 8, False)):
        assert (workspace_sizes(kernels, {**arguments, "pixel_stride": stride})[3] > 0) == fits


def probe() -> list[Check]:
    """In fp16 where one type is enough."""
    half, random = torch.float16, ("random",)
    checks: list[Check] = [
        check_not_for_tensor_cores,
        check_slices,
        partial(check_each_gradient_alone, case=BACKWARD_CASES["half offsets, float mask"]),
        partial(check_each_gradient_alone, case=BACKWARD_CASES["1 vector, 64 outputs, inside"]),
        partial(check_infinite_gradient, dtype=half),
        check_infinite_sample,
        partial(
            check_failing_launches,
            case=BACKWARD_CASES["1 vector per group, 8 outputs, 2 pixels"],
            dtype=half,
        ),
        partial(check_wild_offsets, dtype=torch.bfloat16, deterministic=False),
        partial(check_wild_offsets, dtype=half, deterministic=True),
    ]
    for name in ("3 vectors, 72 outputs, 129 pixels", "half offsets, float mask"):
        check = partial(check_backward, case=BACKWARD_CASES[name], dtype=half)
        checks.append(partial(check, orders=random))
        checks.append(partial(check, orders=ORDERS[:2], deterministic=True))
    for name in ("6 vectors, 136 outputs", "3 ranges of pixels, the middle one in both images"):
        case = BACKWARD_CASES[name]
        checks.append(partial(check_backward, case=case, dtype=half, orders=random))
    for align_case in BACKWARD_ALIGN_CASES.values():
        checks.append(partial(check_align_backward, case=align_case, dtype=half, orders=random))
    return checks
