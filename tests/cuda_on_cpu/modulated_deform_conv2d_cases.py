"""Calls of the CUDA kernels of modulated_deform_conv2d on the emulator, held to oracles in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from cuda_on_cpu.emulator import ORDERS, Kernels
from oracles import deform_conv2d_loop, deform_conv2d_torch
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor

OP = "modulated_deform_conv2d"
DOUBLE = torch.float64
DTYPES = (DOUBLE, torch.float32, torch.float16, torch.bfloat16)
GRADS = ("input", "offset", "mask", "weight", "bias")


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
    planar_offset: bool = False  # and mask, beside an input that is channels_last
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
        """Input, offset, mask, weight, bias within [-1, 1], [-reach, reach], [0, 1], [-1, 1], [-1, 1].

        Offsets keep 0.2 from every integer, where the oracles' gradients are not the right-hand ones.
        """
        generator = torch.Generator().manual_seed(hash(astuple(self)) % 2**31)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1

        pairs = self.offset_groups * math.prod(self.kernel)
        low = dtype in (torch.float16, torch.bfloat16)
        offset_dtype = torch.float32 if low and self.float_offset else dtype
        mask_dtype = torch.float32 if low and self.float_mask else dtype
        shift = self.reach * uniform(self.batch, 2 * pairs, *self.out_size)
        shift = shift.floor() + 0.2 + 0.6 * (shift - shift.floor())
        mask = uniform(self.batch, pairs, *self.out_size).abs().to(mask_dtype)
        format = torch.channels_last if self.channels_last else torch.contiguous_format
        every = [
            uniform(self.batch, self.channels, *self.size).to(dtype),
            shift.to(offset_dtype),
            mask if self.mask else None,
            uniform(self.out_channels, self.channels // self.groups, *self.kernel).to(dtype),
            uniform(self.out_channels).to(dtype) if self.bias else None,
        ]
        formats = [format] + 2 * [torch.contiguous_format if self.planar_offset else format]
        images = [
            None if t is None else t.contiguous(memory_format=f) for t, f in zip(every, formats)
        ]
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
    "64 pixels": Case(
        batch=1, channels=2, out_channels=3, size=(8, 9), kernel=(1, 2), padding=(0, 0)
    ),
    "65 pixels": Case(
        batch=1, channels=2, out_channels=3, size=(5, 13), kernel=(1, 1), padding=(0, 0)
    ),
    "15 to 63 channels": Case(1, 15, 63, (3, 4), (1, 2), channels_last=True),
    "16 to 64 channels": Case(1, 16, 64, (3, 4), (1, 1), padding=(0, 0), offset_groups=4),
    "17 to 65 channels": Case(1, 17, 65, (3, 4), (1, 1), padding=(0, 0), channels_last=True),
    "half offsets, float mask": Case(float_offset=False, float_mask=True, offset_groups=2),
}

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
        2, 64, 64, (9, 8), offset_groups=8, channels_last=True, planar_offset=True
    ),
    "kernel 3x2, stride 2x1, dilation 1x2, 12 steps": Case(
        1, 64, 24, (9, 8), (3, 2), (2, 1), (0, 2), (1, 2), 1, 2, channels_last=True
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


def double(tensors: list[Any]) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def poisoned(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """NaN in the layout of `like`; one channel counts as planar."""
    last = like.shape[1] > 1 and like.stride(1) == 1
    out = torch.full(shape, math.nan, dtype=dtype or like.dtype)
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def arguments_of(case: Case, tensors: list[Any]) -> dict[str, Any]:
    """Of every entry. Bias apart."""
    return {**dict(zip(("input", "offset", "mask", "weight"), tensors)), **case.numbers}


def packed_weight_bytes(
    kernels: Kernels, case: Case, tensors: list[Any], output: Tensor | None = None
) -> int:
    """0: not for the tensor cores."""
    if output is None:
        output = poisoned(tensors[0], len(tensors[0]), len(tensors[3]), *tensors[1].shape[2:])
    size = np.zeros(1, np.int64)
    arguments = arguments_of(case, tensors)
    kernels.run("packed_weight_bytes", **arguments, output=output, sizes=size).raise_if_any()
    return int(size[0])


def forward(
    kernels: Kernels, case: Case, tensors: list[Any], generic: bool = False, **options: Any
) -> Tensor:
    """On the tensor cores where they take it, unless generic."""
    input, offset, _, weight, bias = tensors
    output = poisoned(input, len(input), len(weight), *offset.shape[2:])
    arguments = arguments_of(case, tensors)
    packed = np.full(packed_weight_bytes(kernels, case, tensors, output), 0xFF, np.uint8)
    kernels.run(
        "forward",
        **arguments,
        bias=bias,
        output=output,
        packed_weight=packed if packed.size and not generic else None,
        **options,
    ).raise_if_any()
    used = packed.size > 0 and not (packed == 0xFF).all()  # poison where no kernel wrote
    assert used == (packed.size > 0 and not generic and output.numel() > 0)
    return output


def backward(
    kernels: Kernels,
    case: Case,
    tensors: list[Any],
    grad_output: Tensor,
    wanted: Sequence[str] = GRADS,
    deterministic: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The wanted gradients that there are, by argument name, as the binding makes them."""
    input, offset, mask, weight, bias = tensors
    arguments = arguments_of(case, tensors)
    sizes = np.zeros(2, np.int64)
    kernels.run("workspace", **arguments, sizes=sizes).raise_if_any()
    accumulator = torch.promote_types(input.dtype, torch.float32)
    grads = {
        "input": poisoned(input, *input.shape, dtype=accumulator).zero_(),
        "offset": torch.full(offset.shape, math.nan, dtype=offset.dtype),
        "mask": None if mask is None else torch.full(mask.shape, math.nan, dtype=mask.dtype),
        "weight": torch.full(weight.shape, math.nan, dtype=weight.dtype),
        "bias": None if bias is None else torch.full(bias.shape, math.nan, dtype=bias.dtype),
    }
    present = {name: g for name, g in grads.items() if g is not None and name in wanted}
    workspaces: dict[str, Any] = {}
    if deterministic and "input" in present:
        workspaces["fixed_sums"] = np.zeros(int(sizes[1]) * input.numel(), np.int64)
        workspaces["exponents"] = np.zeros(3, np.int32)
    if "weight" in present:
        workspaces["weight_partials"] = torch.full((int(sizes[0]),), math.nan, dtype=accumulator)
    report = kernels.run(
        "backward",
        **arguments,
        grad_output=grad_output,
        **{f"grad_{name}": g for name, g in present.items()},
        **workspaces,
        **options,
    )
    report.raise_if_any()
    return {n: g.to(input.dtype) if n == "input" else g for n, g in present.items()}


def oracle(case: Case, tensors: list[Any], grad_output: Tensor) -> dict[str, Tensor]:
    """The gradients by automatic differentiation of the PyTorch oracle, in the dtypes of the tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    deform_conv2d_torch(*leaves, *case.geometry).backward(grad_output)  # type: ignore[arg-type]
    return {name: t.grad for name, t in zip(GRADS, leaves) if t is not None and t.grad is not None}


def random_grad(case: Case, tensors: list[Any]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (case.batch, case.out_channels, *case.out_size)
    grad = torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1
    format = torch.channels_last if case.channels_last else torch.contiguous_format
    return grad.to(tensors[0].dtype).contiguous(memory_format=format)


def check_forward(
    kernels: Kernels, case: Case, dtype: torch.dtype, orders: Sequence[str] = ORDERS
) -> None:
    tensors = case.tensors(dtype)
    exact = deform_conv2d_loop(*tensors, *case.geometry)  # type: ignore[arg-type]
    baseline = deform_conv2d_torch(*tensors, *case.geometry)  # type: ignore[arg-type]
    for order in orders:
        actual = forward(kernels, case, tensors, order=order)
        if dtype == DOUBLE:
            assert_rounding_only(actual, exact, case.terms)
        else:
            assert_as_accurate(actual, baseline, exact, f"{dtype} {order}", case.terms)


def check_backward(
    kernels: Kernels,
    case: Case,
    dtype: torch.dtype,
    orders: Sequence[str] = ORDERS,
    deterministic: bool = False,
) -> None:
    """Against the oracle; deterministic: with the same bits in every order."""
    tensors = case.tensors(dtype)
    grad_output = random_grad(case, tensors)
    exact = oracle(case, double(tensors), grad_output.double())
    baseline = oracle(case, tensors, grad_output)
    terms = max(case.terms, case.batch * math.prod(case.out_size))
    first: dict[str, Tensor] = {}
    for seed, order in enumerate(orders):
        actual = backward(
            kernels,
            case,
            tensors,
            grad_output,
            deterministic=deterministic,
            order=order,
            seed=seed,
        )
        assert actual.keys() == exact.keys()
        for name, grad in actual.items():
            if dtype == DOUBLE:
                assert_rounding_only(grad, exact[name], terms)
            else:
                what = f"{dtype} {order} grad_{name}"
                assert_as_accurate(grad, baseline[name], exact[name], what, terms)
            if deterministic or name != "input":
                assert_same(grad, first.setdefault(name, grad))
