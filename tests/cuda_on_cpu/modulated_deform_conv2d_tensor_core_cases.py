"""Calls of the tensor-core forward of modulated_deform_conv2d on the emulator."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cuda_on_cpu.emulator import Check, Kernels
from cuda_on_cpu.modulated_deform_conv2d_cases import (
    Case,
    check_forward,
    forward,
    packed_weight_bytes,
    poisoned,
)
from oracles import deform_conv2d_loop
from tolerances import assert_same

# What the tensor cores take. A block has 128 pixels, 8 warps of 16; a step 32 channels of one tap, its ring 4 stages; a
# tile 64 output channels.
TENSOR_CORE_CASES = {
    "1 step, 8 outputs, 2 pixels": Case(
        1, 32, 8, (1, 2), (1, 1), padding=(0, 0), offset_groups=4, channels_last=True
    ),
    "2 steps, 56 outputs, 127 pixels": Case(
        1, 64, 56, (1, 127), (1, 1), padding=(0, 0), offset_groups=8, channels_last=True, mask=False
    ),
    "3 steps, 64 outputs, 128 pixels": Case(
        1,
        32,
        64,
        (128, 1),
        (3, 1),
        padding=(1, 0),
        offset_groups=2,
        channels_last=True,
        planar_offset=True,
    ),
    "4 steps, 72 outputs, 129 pixels": Case(
        1, 128, 72, (3, 43), (1, 1), padding=(0, 0), channels_last=True, bias=False
    ),
    "5 steps, 128 outputs, 2 images of 130 pixels": Case(
        2, 32, 128, (10, 13), (1, 5), padding=(0, 2), offset_groups=1, channels_last=True
    ),
    "18 steps, 64 outputs": Case(
        2,
        64,
        64,
        (9, 8),
        offset_groups=8,
        channels_last=True,
        planar_offset=True,
        float_offset=False,
    ),
    "kernel 3x2, stride 2x1, dilation 1x2, 12 steps": Case(
        1, 64, 24, (9, 8), (3, 2), (2, 1), (0, 2), (1, 2), 1, 2, channels_last=True
    ),
    "offset groups of 4 channels, 18 steps, 64 outputs": Case(
        2, 64, 64, (9, 8), offset_groups=16, channels_last=True, planar_offset=True
    ),
    "offset groups of 12 channels, 12 steps, no mask": Case(
        1, 96, 16, (4, 5), (2, 2), offset_groups=8, channels_last=True, mask=False
    ),
    "half offsets, float mask, 96 channels in 3": Case(
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
}


def check_tf32(kernels: Kernels, case: Case) -> None:
    """Samples and weights are each off by at most 2^-11 of themselves, and it shows."""
    tensors = case.tensors(torch.float32)
    actual = forward(kernels, case, tensors, order="random", allow_tf32=1).double()
    exact = deform_conv2d_loop(*tensors, *case.geometry)
    input, offset, mask, weight, bias = tensors
    absolute = deform_conv2d_loop(
        input.abs(),
        offset,
        mask,
        weight.abs(),
        None if bias is None else bias.abs(),
        *case.geometry,
    )
    error, eps = (actual - exact).abs(), torch.finfo(torch.float32).eps
    assert (error <= absolute * (2.0**-10 + 2.0**-22 + case.terms * eps)).all()
    full = forward(kernels, case, tensors, order="random").double()
    assert error.max() > 16 * (full - exact).abs().max()


def check_wild_offsets_on_tensor_cores(
    kernels: Kernels, dtype: torch.dtype, offset_groups: int = 8
) -> None:
    """Far ones sample zeros beside infinite pixels, NaN gives NaN in its pixel alone, and the rest stays."""
    case = Case(
        1,
        64,
        64,
        (6, 7),
        offset_groups=offset_groups,
        channels_last=True,
        reach=0.4,
        padding=(0, 0),
    )
    tensors = case.tensors(dtype)
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        tensors[0][0, :, y, x] = math.inf
    tensors[1][:, :, 0, 0] = 3  # samples that would meet those pixels go elsewhere
    tensors[1][:, :, 0, -1] = 3
    tensors[1][:, :, -1, 0] = 3
    tensors[1][:, :, -1, -1] = -3
    closed = tensors[2].clone()
    wild = tensors[1].clone()
    for group, far in enumerate((1e9, -1e9, 4.2e6, -4.2e6, 3e38, -3e38, math.inf, -math.inf)):
        wild[0, 18 * group + 8 + group % 2, 1, 1 + group % 3] = far
        closed[0, 9 * group + 4, 1, 1 + group % 3] = 0
    expected = forward(kernels, case, [*tensors[:2], closed, *tensors[3:]])
    wild[0, 18 * 5 + 3, 2, 2] = math.nan
    expected[0, :, 2, 2] = math.nan
    assert_same(forward(kernels, case, [tensors[0], wild, *tensors[2:]]), expected)


def check_slices_on_tensor_cores(kernels: Kernels) -> None:
    """Strides wider than the channels, aligned; a slice that begins off 16 bytes goes the generic way."""
    case = TENSOR_CORE_CASES["2 steps, 56 outputs, 127 pixels"]
    tensors = case.tensors(torch.float16)
    expected = forward(kernels, case, tensors)
    for first, taken in ((16, True), (4, False)):
        wide = torch.full((1, 96, *case.size), math.nan, dtype=torch.float16)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, first : first + 64] = tensors[0]
        sliced = [wide[:, first : first + 64], *tensors[1:]]
        assert (packed_weight_bytes(kernels, case, sliced) > 0) == taken
        if taken:
            assert_same(forward(kernels, case, sliced), expected)


# Changes of a case that the tensor cores take after which they do not.
NOT_FOR_TENSOR_CORES: tuple[dict[str, Any], ...] = (
    {"channels": 48, "offset_groups": 6},
    {"channels": 4096, "offset_groups": 1, "kernel": (1, 1)},
    {"channels": 64, "offset_groups": 32},
    {"out_channels": 60},
    {"groups": 2},
    {"channels_last": False},
    {"size": (0, 3), "padding": (2, 1)},
    {"size": (3, 0), "padding": (1, 2)},
    {
        "batch": 65536,
        "channels": 32,
        "offset_groups": 4,
        "kernel": (1, 1),
        "padding": (0, 0),
        "size": (1, 2),
    },
    {"stride": (1 << 20, 1), "padding": (1 << 21, 1)},
    {"stride": (1, 1 << 20), "padding": (1, 1 << 21)},
)


def check_not_for_tensor_cores(kernels: Kernels, change: dict[str, Any]) -> None:
    case = Case(1, 64, 64, (2, 3), offset_groups=8, channels_last=True)
    assert packed_weight_bytes(kernels, case, case.tensors(torch.float16)) > 0
    other = replace(case, **change)
    assert packed_weight_bytes(kernels, other, other.tensors(torch.float16)) == 0
    assert packed_weight_bytes(kernels, case, case.tensors(torch.float64)) == 0


def check_strides_for_tensor_cores(kernels: Kernels) -> None:
    """Any strides of N, H and W that are whole vectors, and channels side by side."""
    case = Case(2, 64, 64, (2, 3), offset_groups=8, channels_last=True)
    tensors = case.tensors(torch.float16)
    output = poisoned(tensors[0], 2, 64, 2, 3)
    for strides, taken in (
        ((384, 1, 192, 64), True),
        ((424, 1, 208, 72), True),
        ((388, 1, 192, 64), False),
        ((392, 1, 196, 64), False),
        ((416, 1, 208, 68), False),
        ((768, 2, 384, 128), False),
    ):
        image = torch.zeros(1024 * 2, dtype=torch.float16).as_strided((2, 64, 2, 3), strides)
        size = packed_weight_bytes(kernels, case, [image, *tensors[1:]], output)
        assert (size > 0) == taken, strides


def probe() -> list[Check]:
    """Also the generic kernels, where these do not take a case; in fp16 where one type is enough."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    cases = TENSOR_CORE_CASES
    wild = check_wild_offsets_on_tensor_cores
    return [
        *(partial(check_not_for_tensor_cores, change=change) for change in NOT_FOR_TENSOR_CORES),
        check_slices_on_tensor_cores,
        check_strides_for_tensor_cores,
        *(
            partial(wild, dtype=dtype, offset_groups=groups)
            for dtype, groups in ((half, 8), (brain, 16), (single, 16))
        ),
        *(
            partial(check_forward, case=cases[name], dtype=dtype, orders=("random",))
            for name, dtype in (
                ("4 steps, 72 outputs, 129 pixels", half),
                ("kernel 3x2, stride 2x1, dilation 1x2, 12 steps", half),
                ("offset groups of 12 channels, 12 steps, no mask", half),
                ("offset groups of 12 channels, 12 steps, no mask", single),
                ("half offsets, float mask, 96 channels in 3", half),
            )
        ),
        partial(check_tf32, case=cases["4 steps, 72 outputs, 129 pixels"]),
    ]
