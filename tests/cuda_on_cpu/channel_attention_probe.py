"""What must notice the loss of any barrier or condition of the kernels of channel_attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from cuda_on_cpu.channel_attention_cases import LAYOUTS, Channels, laid_out
from cuda_on_cpu.emulator import Check, Kernels

HALF = torch.float16
IDLE = {("pass.cuh", "images.channels_last"): "channels side by side are also read one by one"}


def check_empty(kernels: Kernels) -> None:
    assert not Channels.random((0, 4, 3, 5)).scale(kernels).numel()


def check_wanted(kernels: Kernels, wanted: tuple[str, ...]) -> None:
    case = Channels.random((1, 8, 3, 4))
    case.check_results(case.scale_backward(kernels, wanted=wanted))


def check_failing_launches(kernels: Kernels, call: str) -> None:
    case = Channels.random((1, 4, 3, 4))
    kernels.check_failing_launches(lambda: getattr(case, call)(kernels))


def check_chunks(kernels: Kernels) -> None:
    """Lines of one pixel are a step each."""
    case = Channels.random((1, 1, 300, 2))
    grad_output = case.grad_output[..., :1]
    replace(case, input=case.input[..., :1], grad_output=grad_output).check(kernels)


def check_nan(kernels: Kernels) -> None:
    case = Channels.random((1, 3, 2, 3))
    case.input[0, 1, 0, 1] = torch.nan
    statistics = case.statistics(kernels)
    case.check_results({"mean": statistics[:, 0], "max": statistics[:, 1]})


def probe() -> list[Check]:
    """Every layout, alone and beside a dense one; groups and tiles that are not full; one gradient or none."""
    checks: list[Check] = [check_empty, check_chunks, check_nan]
    for dtype in (torch.float32, HALF):
        for layout in LAYOUTS:
            checks.append(Channels.random((2, 8, 3, 8), dtype, layout).check)
    for layout in ("contiguous", "channels_last"):
        dense = Channels.random((2, 8, 2, 8), HALF, layout)
        checks += [
            Channels.random((2, 13, 3, 5), HALF, layout).check,
            Channels.random((1, 264, 3, 3), layout=layout).check,
            *(replace(dense, grad_output=laid_out(dense.grad_output, n)).check for n in LAYOUTS),
        ]
        for name in ("input", "output", "grad_output", "grad_input"):
            checks.append(replace(dense, misaligned=name).check)
    checks.append(Channels.random((2, 13, 3, 5), HALF, "padded_pixels").check)
    gradients = ((), ("grad_input",), ("grad_gate",))
    checks += [partial(check_wanted, wanted=wanted) for wanted in gradients]
    calls = ("statistics", "statistics_backward", "scale", "scale_backward")
    return [*checks, *(partial(check_failing_launches, call=call) for call in calls)]
