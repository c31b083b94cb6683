"""The CUDA kernels of modulated_deform_conv2d, run by the emulator of tests/cuda_on_cpu."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, why_not
from oracles import deform_conv2d_loop, deform_conv2d_torch
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}")

DOUBLE = torch.float64
DTYPES = [DOUBLE, torch.float32, torch.float16, torch.bfloat16]
OP = "modulated_deform_conv2d"
builds = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Case:
    """Shapes of one call, and the layouts of its tensors."""

    batch: int = 2
    channels: int = 4
    out_channels: int = 4
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    channels_last: bool = False
    reach: float = 2.0
    float_offset: bool = True  # beside half-precision features
    float_mask: bool = False

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    @property
    def numbers(self) -> dict[str, int]:
        names = ("stride", "padding", "dilation")
        return {f"{n}_{a}": v for n, pair in zip(names, self.geometry) for a, v in zip("hw", pair)}

    @property
    def out_size(self) -> list[int]:
        each = zip(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each]

    @property
    def terms(self) -> int:
        """Products in one output element: four corners, each with its weights, and the bias."""
        return 4 * self.channels // self.groups * math.prod(self.kernel) + 4

    def tensors(self, dtype: torch.dtype) -> list[Any]:
        """Input, offset, mask, weight, bias within [-1, 1], [-reach, reach], [0, 1], [-1, 1], [-1, 1]."""
        generator = torch.Generator().manual_seed(hash(astuple(self)) % 2**31)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1

        pairs = self.offset_groups * math.prod(self.kernel)
        low = dtype in (torch.float16, torch.bfloat16)
        offset_dtype = torch.float32 if low and self.float_offset else dtype
        mask_dtype = torch.float32 if low and self.float_mask else dtype
        mask = uniform(self.batch, pairs, *self.out_size).abs().to(mask_dtype)
        format = torch.channels_last if self.channels_last else torch.contiguous_format
        every = [
            uniform(self.batch, self.channels, *self.size).to(dtype),
            (self.reach * uniform(self.batch, 2 * pairs, *self.out_size)).to(offset_dtype),
            mask if self.mask else None,
            uniform(self.out_channels, self.channels // self.groups, *self.kernel).to(dtype),
            uniform(self.out_channels).to(dtype) if self.bias else None,
        ]
        images = [None if t is None else t.contiguous(memory_format=format) for t in every[:3]]
        return [*images, *every[3:]]


CASES = {
    "plain": Case(),
    "kernel 3x2, stride 2x1, dilation 1x2": Case(
        size=(9, 8), kernel=(3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)
    ),
    "2 groups, offset groups inside": Case(channels=8, groups=2, offset_groups=4),
    "offset groups straddle 3 groups": Case(
        channels=6, out_channels=9, groups=3, offset_groups=2, size=(4, 5)
    ),
    "one offset group over 2 groups": Case(channels=6, out_channels=2, groups=2),
    "no mask": Case(mask=False, offset_groups=2),
    "neither mask nor bias, kernel 1": Case(
        mask=False, bias=False, kernel=(1, 1), padding=(0, 0), channels_last=True
    ),
    "H 1": Case(size=(1, 7), kernel=(1, 3), padding=(0, 1)),
    "W 1": Case(size=(7, 1), kernel=(3, 1), padding=(1, 0), channels_last=True),
    "one pixel": Case(size=(1, 1), batch=1),
    "63 pixels": Case(batch=1, channels=2, out_channels=3, size=(7, 9), kernel=(1, 2)),
    "64 pixels": Case(batch=1, channels=2, out_channels=3, size=(8, 9), kernel=(1, 2), padding=(0, 0)),
    "65 pixels": Case(batch=1, channels=2, out_channels=3, size=(5, 13), kernel=(1, 1), padding=(0, 0)),
    "15 to 63 channels": Case(1, 15, 63, (3, 4), (1, 2), channels_last=True),
    "16 to 64 channels": Case(1, 16, 64, (3, 4), (1, 1), padding=(0, 0), offset_groups=4),
    "17 to 65 channels": Case(1, 17, 65, (3, 4), (1, 1), padding=(0, 0), channels_last=True),
    "half offsets, float mask": Case(float_offset=False, float_mask=True, offset_groups=2),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def double(tensors: list[Any]) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def like(tensor: Tensor, *shape: int) -> Tensor:
    format = torch.channels_last if tensor.stride(1) == 1 else torch.contiguous_format
    return torch.full(shape, math.nan, dtype=tensor.dtype).contiguous(memory_format=format)


def run_forward(kernels: Kernels, case: Case, tensors: list[Any], **options: Any) -> Tensor:
    input, offset, mask, weight, bias = tensors
    output = like(input, len(input), len(weight), *offset.shape[2:])
    arguments = dict(input=input, offset=offset, mask=mask, weight=weight, bias=bias)
    report = kernels.run("forward", **arguments, output=output, **case.numbers, **options)
    report.raise_if_any()
    return output


def check_forward(kernels: Kernels, case: Case, dtype: torch.dtype, **options: Any) -> None:
    tensors = case.tensors(dtype)
    actual = run_forward(kernels, case, tensors, **options)
    exact = deform_conv2d_loop(*tensors, *case.geometry)
    baseline = deform_conv2d_torch(*tensors, *case.geometry)
    assert_as_accurate(actual, baseline, exact, str(dtype), case.terms)


@all_cases
@dtypes
def test_forward(case: Case, dtype: torch.dtype) -> None:
    for order in ORDERS:
        check_forward(emulate(OP), case, dtype, order=order)


@all_cases
def test_forward_checked(case: Case) -> None:
    check_forward(emulate(OP, checked=True), case, torch.float32, order="random")
