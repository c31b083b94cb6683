"""Calls of the CUDA kernels of modulated_deform_conv2d on the emulator, held to oracles in fp64."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from cuda_on_cpu.emulator import ORDERS, Check, Kernels
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
    kernels: Kernels,
    case: Case,
    tensors: list[Any],
    output: Tensor | None = None,
    **options: Any,
) -> int:
    """0: not for the tensor cores."""
    if output is None:
        output = poisoned(tensors[0], len(tensors[0]), len(tensors[3]), *tensors[1].shape[2:])
    size = np.zeros(1, np.int64)
    arguments = {**arguments_of(case, tensors), **options}
    kernels.run("packed_weight_bytes", **arguments, output=output, sizes=size).raise_if_any()
    return int(size[0])


def forward(
    kernels: Kernels,
    case: Case,
    tensors: list[Any],
    generic: bool = False,
    order: str = "forward",
    **options: Any,
) -> Tensor:
    """On the tensor cores where they take it, unless generic. Options: more arguments of the entries."""
    input, offset, _, weight, bias = tensors
    output = poisoned(input, len(input), len(weight), *offset.shape[2:])
    arguments = {**arguments_of(case, tensors), **options}
    size = packed_weight_bytes(kernels, case, tensors, output, **options)
    packed = np.full(size, 0xFF, np.uint8)
    workspaces: dict[str, Any] = {"packed_weight": packed} if packed.size and not generic else {}
    kernels.run(
        "forward", **arguments, bias=bias, output=output, **workspaces, order=order
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
    accumulator = torch.promote_types(input.dtype, torch.float32)
    grads = {
        "input": poisoned(input, *input.shape, dtype=accumulator).zero_(),
        "offset": torch.full(offset.shape, math.nan, dtype=offset.dtype),
        "mask": None if mask is None else torch.full(mask.shape, math.nan, dtype=mask.dtype),
        "weight": torch.full(weight.shape, math.nan, dtype=weight.dtype),
        "bias": None if bias is None else torch.full(bias.shape, math.nan, dtype=bias.dtype),
    }
    present = {name: g for name, g in grads.items() if g is not None and name in wanted}
    targets: dict[str, Any] = {f"grad_{name}": g for name, g in present.items()}
    arguments = {**arguments_of(case, tensors), "grad_output": grad_output}
    workspaces = backward_workspaces(kernels, arguments, present.keys(), deterministic)
    report = kernels.run("backward", **arguments, **targets, **workspaces, **options)
    report.raise_if_any()
    hold_packed_weight(workspaces)
    return {n: g.to(input.dtype) if n == "input" else g for n, g in present.items()}


def backward_workspaces(
    kernels: Kernels, arguments: dict[str, Any], wanted: Collection[str], deterministic: bool
) -> dict[str, Any]:
    """As the binding allocates them. Those of sums are zero, the others poison."""
    partials, limbs, flow_partials, packed_bytes = workspace_sizes(kernels, arguments)
    input = arguments["input"]
    accumulator = torch.promote_types(input.dtype, torch.float32)
    workspaces: dict[str, Any] = {}
    if deterministic and "input" in wanted:
        workspaces["fixed_sums"] = np.zeros(limbs * input.numel(), np.int64)
        workspaces["exponents"] = np.zeros(3, np.int32)
    if "weight" in wanted:
        workspaces["weight_partials"] = torch.full((partials,), math.nan, dtype=accumulator)
    if {"flow_1", "flow_2"} & set(wanted):
        workspaces["flow_partials"] = torch.full((flow_partials,), math.nan, dtype=accumulator)
    if packed_bytes and set(wanted) - {"weight", "bias"}:
        workspaces["packed_weight"] = np.full(packed_bytes, 0xFF, np.uint8)
    return workspaces


def hold_packed_weight(workspaces: dict[str, Any]) -> None:
    """Where there is one, the tensor cores were used."""
    packed = workspaces.get("packed_weight")
    assert packed is None or not (packed == 0xFF).all()


def workspace_sizes(kernels: Kernels, arguments: dict[str, Any]) -> list[int]:
    """Elements of weight_partials, limbs of fixed_sums, elements of flow_partials, bytes of packed_weight.

    The last is 0 where the tensor cores do not take the backward.
    """
    sizes = np.zeros(4, np.int64)
    kernels.run("workspace", **arguments, sizes=sizes).raise_if_any()
    return [int(size) for size in sizes]


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


# What must come out is kept: each order of the threads asks again, and so does each mutant of the kernels.


@lru_cache(maxsize=64)
def expected_output(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the loop in fp64, and of PyTorch."""
    arguments = *case.tensors(dtype), *case.geometry
    return deform_conv2d_loop(*arguments), deform_conv2d_torch(*arguments)


@lru_cache(maxsize=64)
def expected_gradients(
    case: Case, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the oracle in fp64, and in dtype."""
    tensors = case.tensors(dtype)
    grad_output = random_grad(case, tensors)
    return oracle(case, double(tensors), grad_output.double()), oracle(case, tensors, grad_output)


def assert_output(actual: Tensor, case: Case, what: str = "") -> None:
    """What the case's own tensors must give."""
    exact, baseline = expected_output(case, actual.dtype)
    if actual.dtype == DOUBLE:
        assert_rounding_only(actual, exact, case.terms)
    else:
        assert_as_accurate(actual, baseline, exact, f"{actual.dtype} {what}", case.terms)


def assert_gradients(
    actual: dict[str, Tensor], case: Case, dtype: torch.dtype, what: str = ""
) -> None:
    """What the case's own tensors must give, with random_grad()."""
    exact, baseline = expected_gradients(case, dtype)
    terms = max(case.terms, case.batch * math.prod(case.out_size))
    assert actual.keys() == exact.keys()
    for name, grad in actual.items():
        if dtype == DOUBLE:
            assert_rounding_only(grad, exact[name], terms)
        else:
            where = f"{grad.dtype} {what} grad_{name}"
            assert_as_accurate(grad, baseline[name], exact[name], where, terms)


def check_forward(
    kernels: Kernels, case: Case, dtype: torch.dtype, orders: Sequence[str] = ORDERS
) -> None:
    tensors = case.tensors(dtype)
    for order in orders:
        assert_output(forward(kernels, case, tensors, order=order), case, order)


def check_backward(
    kernels: Kernels,
    case: Case,
    dtype: torch.dtype,
    orders: Sequence[str] = ORDERS,
    deterministic: bool = False,
) -> None:
    """Against the oracle; what is deterministic with the same bits in every order."""
    tensors = case.tensors(dtype)
    grad_output = random_grad(case, tensors)
    first: dict[str, Tensor] = {}
    for seed, order in enumerate(orders):
        options: dict[str, Any] = {"deterministic": deterministic, "order": order, "seed": seed}
        actual = backward(kernels, case, tensors, grad_output, **options)
        assert_gradients(actual, case, dtype, order)
        for name, grad in actual.items():
            if deterministic or name != "input":
                assert_same(grad, first.setdefault(name, grad))


def check_far_offsets(
    kernels: Kernels, dtype: torch.dtype, far: float, deterministic: bool
) -> None:
    """Even beside infinite and NaN pixels at the edge: as if the mask were closed there."""
    case = Case(channels=8, offset_groups=2, reach=0.4, padding=(0, 0))
    tensors = case.tensors(dtype)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        tensors[0][0, :, corner[0], corner[1]] = math.inf
        tensors[1][0, :, corner[0], corner[1]] = 9  # samples there go elsewhere
    wild, closed = tensors[1].clone(), tensors[2].clone()
    for axis in (0, 1):
        wild[0, 2 * 4 + axis, 1, 1 + axis] = far  # group 0, tap 4, two pixels
        closed[0, 4, 1, 1 + axis] = 0
    actual = forward(kernels, case, [tensors[0], wild, *tensors[2:]])
    expected = forward(kernels, case, [*tensors[:2], closed, *tensors[3:]])
    assert_same(actual, expected)
    grads = backward(
        kernels,
        case,
        [tensors[0], wild, *tensors[2:]],
        random_grad(case, tensors),
        deterministic=deterministic,
    )
    assert grads["input"].isfinite().all()
    for axis in (0, 1):
        assert not grads["offset"][0, 8:10, 1, 1 + axis].any()
        assert grads["mask"][0, 4, 1, 1 + axis] == 0


def check_nan_offset(kernels: Kernels, dtype: torch.dtype, axis: int, deterministic: bool) -> None:
    """One NaN in offset group 1 of 2, tap 4, pixel (2, 3) of image 0; convolution group 1 of 2 reads it."""
    case = Case(channels=8, out_channels=4, groups=2, offset_groups=2)
    tensors = case.tensors(dtype)
    grad_output = random_grad(case, tensors)
    expected = forward(kernels, case, tensors)
    expected[0, 2:, 2, 3] = math.nan
    clean = backward(kernels, case, tensors, grad_output, deterministic=deterministic)
    tensors[1][0, 2 * (9 + 4) + axis, 2, 3] = math.nan
    assert_same(forward(kernels, case, tensors), expected)
    grads = backward(kernels, case, tensors, grad_output, deterministic=deterministic)
    where = {name: grad.isnan() for name, grad in grads.items()}
    touched = torch.zeros_like(where["weight"])
    touched[2:, :, 1, 1] = True  # tap 4 of the second group's output channels
    assert_same(where["weight"], touched)
    assert not where["input"].any() and not where["bias"].any()
    assert where["mask"].nonzero().tolist() == [[0, 13, 2, 3]]
    assert {tuple(i) for i in where["offset"].nonzero().tolist()} <= {
        (0, 26, 2, 3),
        (0, 27, 2, 3),
    }
    assert_same(grads["input"][1], clean["input"][1])


def check_gradient_alone(kernels: Kernels, wanted: str) -> None:
    case = CASES["17 to 65 channels"]
    tensors = case.tensors(torch.float32)
    grad_output = random_grad(case, tensors)
    every = backward(kernels, case, tensors, grad_output)
    alone = backward(kernels, case, tensors, grad_output, wanted=(wanted,))
    assert_same(alone[wanted], every[wanted])
    assert alone.keys() == {wanted}


def check_empty(kernels: Kernels, deterministic: bool) -> None:
    """No image, no output channel, and images without a row, whose samples are all outside."""
    without_row = Case(size=(0, 3), padding=(2, 1), bias=False)
    for case in (Case(batch=0), Case(out_channels=0), without_row):
        tensors = case.tensors(torch.float32)
        assert not forward(kernels, case, tensors).any()
        grad_output = random_grad(case, tensors)
        grads = backward(kernels, case, tensors, grad_output, deterministic=deterministic)
        for name, grad in grads.items():
            assert not grad.any(), name


def check_wild_weight(kernels: Kernels, wild: float) -> None:
    """An infinite weight takes no bit from what it does not touch."""
    case = replace(CASES["offset groups straddle 3 groups"], batch=1)
    tensors = case.tensors(torch.float32)
    tensors[3][4, 0, 1, 1] = wild
    grad_output = random_grad(case, tensors)
    expected = backward(kernels, case, tensors, grad_output, ("input",))["input"]
    actual = backward(kernels, case, tensors, grad_output, ("input",), True)["input"]
    known = expected.isfinite()
    assert 0 < known.sum() < known.numel()
    assert_same(actual.isnan(), expected.isnan())
    assert_same(actual.isinf(), expected.isinf())
    assert_rounding_only(actual[known], expected[known], 64)


def check_infinite_weight(kernels: Kernels) -> None:
    """Threads past the last pixel, whose gradient is 0, meet it as well, and add no NaN."""
    case = Case(1, 1, 1, (3, 3), (1, 1), padding=(0, 0), reach=0.4)
    tensors = case.tensors(torch.float32)
    tensors[3] = torch.full_like(tensors[3], math.inf)
    grad_output = random_grad(case, tensors).abs() + 1
    grad = backward(kernels, case, tensors, grad_output, ("input",))["input"]
    assert grad.isinf().any() and not grad.isnan().any()


def check_fixed_point_scale(kernels: Kernels, dtype: torch.dtype, scale: float) -> None:
    """A power of two near scale, on grad_output or on the weight, scales grad_input to the bit."""
    case = CASES["17 to 65 channels"]
    tensors = case.tensors(dtype)
    factor = 2.0 ** round(math.log2(scale))
    grad_output = random_grad(case, tensors)
    grad_output[..., 0] = 0  # neither says anything about the scale
    grad_output[0, 0, -1, -1] = math.inf
    small = [*tensors[:3], tensors[3] * factor, tensors[4]]
    options: dict[str, Any] = {"wanted": ("input",), "deterministic": True}
    plain = backward(kernels, case, tensors, grad_output, **options)["input"]
    for calls in ((tensors, grad_output * factor), (small, grad_output)):
        assert_same(backward(kernels, case, *calls, **options)["input"], plain * factor)


def check_failing_launches(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    """Forward and both backwards end with a launch that fails, whichever it is."""
    tensors = case.tensors(dtype)
    grad_output = random_grad(case, tensors)
    kernels.check_failing_launches(lambda: forward(kernels, case, tensors))
    backwards = partial(backward, kernels, case, tensors, grad_output)
    kernels.check_failing_launches(backwards)
    kernels.check_failing_launches(partial(backwards, deterministic=True))


def probe() -> list[Check]:
    """The generic kernels, in fp32 and fp16."""
    single, half = torch.float32, torch.float16
    checks: list[Check] = [
        partial(check_fixed_point_scale, dtype=single, scale=1e-20),
        partial(check_far_offsets, dtype=single, far=math.inf, deterministic=False),
        partial(check_nan_offset, dtype=single, axis=0, deterministic=True),
        partial(check_empty, deterministic=True),
        partial(check_failing_launches, case=CASES["one pixel"], dtype=single),
        partial(check_wild_weight, wild=math.inf),
        check_infinite_weight,
        *(partial(check_gradient_alone, wanted=wanted) for wanted in ("input", "weight", "bias")),
    ]
    for name in ("offset groups straddle 3 groups", "no mask", "17 to 65 channels", "65 pixels"):
        checks.append(partial(check_forward, case=CASES[name], dtype=single, orders=("random",)))
    for name in ("17 to 65 channels", "65 pixels"):
        check = partial(check_backward, case=CASES[name], dtype=single)
        checks.append(partial(check, orders=("random",)))
        checks.append(partial(check, orders=ORDERS[:2], deterministic=True))
    for name in ("offset groups straddle 3 groups", "half offsets, float mask", "no mask"):
        check = partial(check_backward, case=CASES[name], dtype=half)
        checks.append(partial(check, orders=("random",), deterministic=True))
    return checks
