"""What must notice the loss of any barrier or condition of the kernels of flow_warp."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from cuda_on_cpu.emulator import Check, Kernels
from cuda_on_cpu.flow_warp_cases import (
    LAYOUTS,
    NAMES,
    Warp,
    check_weightless_neighbours,
    laid_out,
    misaligned,
)
from tolerances import assert_same

_DENSE = "output and grad_input are dense: channels last and aligned wherever input is"
IDLE = {
    ("backward.cu", "p.grad_flow != nullptr"): "saves the dot products that nobody wants",
    ("backward_deterministic.cu", "row >= 0"): "row -1 gives a number below those of all pixels",
    **{
        (file, "p.channels_last"): "planes have a pixel stride of 1, never aligned"
        for file in ("forward.cu", "backward.cu", "backward_deterministic.cu")
    },
    (
        "footprint.cuh",
        "p.channels % kVector<T> == 0",
    ): "output and grad_input are dense: other channels give them strides that are not aligned",
    **{
        (file, f"is_aligned<T>(p, p.{name}, p.{name}_stride)"): _DENSE
        for file, name in (
            ("forward.cu", "output"),
            ("backward.cu", "grad_input"),
            ("backward_deterministic.cu", "grad_input"),
        )
    },
}


def check_parts(kernels: Kernels, case: Warp) -> None:
    """One gradient alone, and an output without a mask."""
    both = case.backward(kernels)
    for index, wanted in enumerate(NAMES[1:]):
        assert_same(case.backward(kernels, wanted=(wanted,))[index], both[index])
    case.forward(kernels, with_mask=False)


def check_empty(kernels: Kernels) -> None:
    empty = Warp.random((0, 4, 5, 6))
    empty.forward(kernels)
    empty.backward(kernels)
    empty.deterministic_grad_input(kernels)


def check_taps_without_weight(kernels: Kernels) -> None:
    """A NaN in grad_output reaches its own pixel alone."""
    case = Warp.random((1, 8, 6, 7))
    spoilt = torch.full_like(case.grad_output, math.nan)
    spoilt[:, :, 2, 3] = 1.0
    case = replace(case, grad_output=spoilt, flow=torch.zeros_like(case.flow))
    assert_same(case.deterministic_grad_input(kernels), spoilt)


def probe() -> list[Check]:
    """All that the kernels decide on, for fp32 and fp16, bilinear, zero padding."""
    half = (torch.float16, torch.float16)
    checks: list[Check] = [Warp.random((1, 16, 5, 7), None, half).check, check_empty]
    for dtypes in ((torch.float32, torch.float32), (torch.float16, torch.float32)):
        dense = Warp.random((2, 16, 5, 7), None, dtypes, "channels_last")
        for layout in LAYOUTS:
            case = Warp.random((2, 16, 5, 7), None, dtypes, layout)
            checks += [
                case.check,
                replace(dense, grad_output=case.grad_output).check,
                replace(dense, input=case.input).check,
                Warp.random((1, 13, 5, 7), None, dtypes, layout).check,
            ]
        checks += [
            replace(dense, input=misaligned(dense.input)).check,
            replace(dense, grad_output=misaligned(dense.grad_output)).check,
        ]
        for layout in ("contiguous", "channels_last"):
            case = Warp.random((2, 16, 5, 7), None, dtypes, layout)
            checks += [
                partial(check_parts, case=case),
                partial(check_weightless_neighbours, layout=layout, interpolation="bilinear"),
            ]
    return [*checks, *probe_deterministic()]


def probe_deterministic() -> list[Check]:
    """Taps outside and without weight, channels that fill vectors and blocks or do not, gaps in memory."""
    cases = [
        Warp.random((2, channels, 5, 7), (4, 3), layout=layout)
        for channels in (3, 8, 13)
        for layout in ("contiguous", "channels_last")
    ]
    dense = Warp.random((2, 16, 5, 7), layout="channels_last")
    cases += [replace(dense, grad_output=laid_out(dense.grad_output, name)) for name in LAYOUTS]
    cases.append(replace(dense, grad_output=misaligned(dense.grad_output)))
    last = Warp.random((1, 8, 2, 2), (1, 1))  # all taps count, and the last one is the last pixel's
    cases.append(replace(last, flow=torch.full_like(last.flow, 0.5)))
    return [*(case.check_deterministic for case in cases), check_taps_without_weight]
