"""modulated_deform_conv2d: values, gradients, dtypes, layouts, edges, errors, determinism, compilation.

The compiled CPU kernel, or the PyTorch code where it is not built, is held to a loop, to PyTorch's own operations and,
where it is installed, to torchvision.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import deform_conv2d_loop, deform_conv2d_torch
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from mafnet_ops import ModulatedDeformConv2d, modulated_deform_conv2d

NATIVE = "cpu" in importlib.import_module("mafnet_ops.modulated_deform_conv2d")._NATIVE_DEVICES
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled CPU kernel is not built")
LOW = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = torch.float64
# Called with unpacked lists, which a type checker cannot count.
deform: Callable[..., Tensor] = modulated_deform_conv2d
by_loop: Callable[..., Tensor] = deform_conv2d_loop
by_torch: Callable[..., Tensor] = deform_conv2d_torch


@dataclass(frozen=True)
class Case:
    """Shapes of one call. Blocks of 96 pixels, chunks of 16, lanes of 4, 8 and 16 channels, 64 channels in the
    backward pass are internal limits to straddle."""

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

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.stride, self.padding, self.dilation

    @property
    def out_size(self) -> list[int]:
        each = zip(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each]

    @property
    def terms(self) -> int:
        """Products in one output element: four corners, each with its weights, and the bias."""
        return 4 * self.channels // self.groups * math.prod(self.kernel) + 4

    def tensors(self, dtype: torch.dtype = DOUBLE, reach: float = 2.0) -> list[Any]:
        """Input, offset, mask, weight, bias within [-1, 1], [-reach, reach], [0, 1], [-1, 1], [-1, 1]."""
        generator = torch.Generator().manual_seed(hash(astuple(self)) % 2**31)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1

        pairs = self.offset_groups * math.prod(self.kernel)
        coordinates = DOUBLE if dtype == DOUBLE else torch.float32
        mask = uniform(self.batch, pairs, *self.out_size).abs().to(dtype) if self.mask else None
        bias = uniform(self.out_channels).to(dtype) if self.bias else None
        return [
            uniform(self.batch, self.channels, *self.size).to(dtype),
            (reach * uniform(self.batch, 2 * pairs, *self.out_size)).to(coordinates),
            mask,
            uniform(self.out_channels, self.channels // self.groups, *self.kernel).to(dtype),
            bias,
        ]


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
    "no bias": Case(bias=False),
    "neither": Case(mask=False, bias=False, kernel=(1, 1), padding=(0, 0)),
    "H 1": Case(size=(1, 7)),
    "W 1": Case(size=(7, 1)),
    "one pixel": Case(size=(1, 1), batch=1),
    "output larger than input": Case(size=(3, 3), padding=(3, 4)),
    "95 pixels": Case(batch=1, channels=2, out_channels=3, size=(5, 19)),
    "96 pixels": Case(batch=1, channels=2, out_channels=3, size=(8, 12)),
    "97 pixels": Case(batch=1, channels=2, out_channels=3, size=(1, 97), kernel=(1, 1)),
    "channels 8": Case(batch=1, channels=8, out_channels=8, size=(6, 17)),
    "channels 16 in 2": Case(batch=1, channels=16, out_channels=16, size=(6, 17), offset_groups=2),
    "channels 65": Case(batch=1, channels=65, out_channels=2, size=(3, 4), kernel=(1, 2)),
    "channels 7 and 9": Case(batch=1, channels=7, out_channels=9, size=(4, 3)),
    "channels 17 and 33": Case(batch=1, channels=17, out_channels=33, size=(3, 4)),
    "channels 40 in 2 and 4": Case(
        batch=1, channels=40, out_channels=34, size=(3, 4), groups=2, offset_groups=4
    ),
    "channels 48 in 2 and 16": Case(
        batch=1, channels=48, out_channels=6, size=(3, 4), groups=2, offset_groups=16
    ),
    "166 outputs in 2": Case(batch=1, channels=4, out_channels=166, size=(2, 3), groups=2),
    "one channel": Case(channels=1, out_channels=1),
    "33 images": Case(batch=33, channels=1, out_channels=2, size=(2, 3), kernel=(1, 1)),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few_cases = pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, channels=2, out_channels=2, size=(3, 2)),
        Case(1, 6, 3, (3, 3), (3, 2), (2, 1), (1, 0), (1, 2), groups=3, offset_groups=2),
        Case(1, 2, 2, (2, 3), (2, 2), mask=False, bias=False, groups=2),
    ],
    ids=["plain", "straddling", "v1"],
)


def double(tensors: list[Any]) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def gradients(function: Any, tensors: list[Any], geometry: Any) -> dict[str, Tensor]:
    """Of a random weighted sum of the output, by argument name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, *geometry)
    generator = torch.Generator().manual_seed(out.numel())
    out.backward((torch.rand(out.shape, generator=generator, dtype=DOUBLE) * 2 - 1).to(out.dtype))
    names = ("input", "offset", "mask", "weight", "bias")
    return {name: t.grad for name, t in zip(names, leaves) if t is not None and t.grad is not None}


# -------------------------------------------------------------------------------------------- values


@all_cases
def test_fp64_values_equal_the_loop(case: Case) -> None:
    tensors = case.tensors()
    expected = by_loop(*tensors, *case.geometry)
    actual = deform(*tensors, *case.geometry)
    assert_rounding_only(actual, expected, case.terms)


@all_cases
def test_oracles_agree(case: Case) -> None:
    tensors = case.tensors()
    expected = by_loop(*tensors, *case.geometry)
    assert_rounding_only(by_torch(*tensors, *case.geometry), expected, case.terms)


@needs_native
@all_cases
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_values(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    actual = deform(*tensors, *case.geometry)
    baseline = by_torch(*tensors, *case.geometry)
    exact = by_torch(*double(tensors), *case.geometry)
    assert_as_accurate(actual, baseline, exact, str(dtype), case.terms)


@all_cases
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_zero_offset_is_conv2d(case: Case, dtype: torch.dtype) -> None:
    input, offset, _, weight, bias = case.tensors(dtype)
    actual = deform(input, offset * 0, None, weight, bias, *case.geometry)
    expected = F.conv2d(input, weight, bias, *case.geometry, groups=case.groups)
    if dtype == torch.float32 and not NATIVE:
        pytest.skip("the compiled CPU kernel is not built: fp32 coordinates are not exact")
    assert_rounding_only(actual, expected, case.terms)


@needs_native
@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_integer_offset_is_an_exact_shift(dtype: torch.dtype) -> None:
    image = Case(channels=3, size=(6, 7)).tensors(dtype)[0]
    weight = torch.eye(3, dtype=dtype).view(3, 3, 1, 1)
    for dy, dx in ((0, 0), (1, 0), (0, -1), (-2, 3), (5, 6), (6, 0)):
        offset = torch.tensor([dy, dx], dtype=torch.float32).view(1, 2, 1, 1).expand(2, 2, 6, 7)
        actual = deform(image, offset, None, weight)
        padded = F.pad(image, (8, 8, 8, 8))
        assert_same(actual, padded[:, :, 8 + dy : 14 + dy, 8 + dx : 15 + dx].contiguous())


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    small = st.integers(1, 3)
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.tuples(small, small))
    dilation = draw(st.tuples(small, small))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding)]
    return Case(
        batch=draw(st.integers(1, 2)),
        channels=math.lcm(groups, offset_groups) * draw(st.integers(1, 3)),
        out_channels=groups * draw(small),
        size=(least[0] + draw(st.integers(0, 4)), least[1] + draw(st.integers(0, 4))),
        kernel=kernel,
        stride=draw(st.tuples(small, small)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@needs_native
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from(LOW))
def test_any_geometry(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    exact = by_loop(*tensors, *case.geometry)
    actual = deform(*tensors, *case.geometry)
    baseline = by_torch(*tensors, *case.geometry)
    assert_as_accurate(actual, baseline, exact, terms=case.terms)
    assert_rounding_only(deform(*double(tensors), *case.geometry), exact, case.terms)


@needs_native
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_vector_level(level: str) -> None:
    """The level is chosen once per process, so each one gets its own."""
    code = (
        "import torch; from mafnet_ops import modulated_deform_conv2d as deform\n"
        "from oracles import deform_conv2d_torch as by_torch\n"
        "torch.manual_seed(0)\n"
        "for channels, groups in ((6, 1), (8, 1), (16, 1), (37, 1), (32, 8), (64, 4), (24, 2)):\n"
        "    x = torch.rand(1, channels, 9, 23); o = 6 * torch.rand(1, 18 * groups, 9, 23) - 3\n"
        "    m = torch.rand(1, 9 * groups, 9, 23); w = torch.rand(70, channels, 3, 3) / channels\n"
        "    t = [a.requires_grad_() for a in (x, o, m, w)]\n"
        "    d = [a.detach().double().requires_grad_() for a in t]\n"
        "    out = deform(*t, None, 1, 1); exact = by_torch(*d, None, (1, 1), (1, 1))\n"
        "    # a sum of 36 * channels products of the size 1 / channels, and of as many in a gradient\n"
        "    eps = torch.finfo(torch.float32).eps\n"
        "    assert (out - exact).abs().max() < 36 * 36 * eps, (channels, groups)\n"
        "    low = [a.detach().bfloat16() for a in t]\n"
        "    exact_low = by_torch(*(a.double() for a in low), None, (1, 1), (1, 1))\n"
        "    # samples and output are rounded to bfloat16\n"
        "    bound = torch.finfo(torch.bfloat16).eps * exact_low.abs().max()\n"
        "    assert (deform(*low, None, 1, 1) - exact_low).abs().max() < bound, (channels, groups)\n"
        "    grads = torch.autograd.grad(out.sum(), t); exacts = torch.autograd.grad(exact.sum(), d)\n"
        "    for g, e in zip(grads, exacts):\n"
        "        assert (g - e).abs().max() < 207 * eps * e.abs().max(), (channels, groups)\n"
    )
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "MAFNET_SIMD": level, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_bfloat16_where_groups_cross_offset_groups() -> None:
    """Segments of 10 and 5 channels: packed rows of samples begin and end anywhere."""
    x, offset = torch.rand(1, 30, 9, 23), 6 * torch.rand(1, 36, 9, 23) - 3
    mask, weight = torch.rand(1, 18, 9, 23), torch.rand(72, 10, 3, 3) / 10
    tensors = [t.bfloat16() for t in (x, offset, mask, weight)]
    out = modulated_deform_conv2d(*tensors, None, 1, 1)
    exact = by_torch(*(t.double() for t in tensors), None, (1, 1), (1, 1))
    # Samples and output are rounded to bfloat16.
    assert (out - exact).abs().max() < torch.finfo(torch.bfloat16).eps * exact.abs().max()


TORCHVISION = ["plain", "kernel 3x2, stride 2x1, dilation 1x2", "no mask", "H 1", "channels 8"]


@pytest.mark.parametrize("name", [*TORCHVISION, "2 groups, offset groups inside"])
def test_torchvision_agrees(name: str) -> None:
    """A third party, in fp64; its offset groups are ours."""
    ops = pytest.importorskip("torchvision.ops")
    case = CASES[name]

    def rival(input: Any, offset: Any, mask: Any, weight: Any, bias: Any, *geometry: Any) -> Tensor:
        return ops.deform_conv2d(input, offset, weight, bias, *geometry, mask)

    tensors = case.tensors()
    expected = rival(*tensors, *case.geometry)
    assert_rounding_only(deform(*tensors, *case.geometry), expected, case.terms)
    grads = gradients(deform, tensors, case.geometry)
    terms = max(case.terms, case.batch * math.prod(case.out_size))
    for key, wanted in gradients(rival, tensors, case.geometry).items():
        assert_rounding_only(grads[key], wanted, terms)


# ----------------------------------------------------------------------------------------- gradients


def differentiable(case: Case) -> tuple[Any, list[Tensor]]:
    """The op as a function of its present tensors, offsets at least 0.2 from every integer."""
    tensors = case.tensors()
    offset = tensors[1]
    tensors[1] = offset.floor() + 0.2 + 0.6 * (offset - offset.floor())
    present = [t is not None for t in tensors]

    def function(*given: Tensor) -> Tensor:
        values = iter(given)
        return deform(*(next(values) if there else None for there in present), *case.geometry)

    return function, [t.requires_grad_() for t in tensors if t is not None]


@few_cases
def test_gradcheck(case: Case) -> None:
    function, tensors = differentiable(case)
    assert gradcheck(function, tensors)


@few_cases
def test_gradgradcheck(case: Case) -> None:
    function, tensors = differentiable(case)
    assert gradgradcheck(function, tensors, fast_mode=True)


@needs_native
@all_cases
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_gradients(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    actual = gradients(deform, tensors, case.geometry)
    baseline = gradients(by_torch, tensors, case.geometry)
    exact = gradients(by_torch, double(tensors), case.geometry)
    assert actual.keys() == exact.keys()
    terms = max(case.terms, case.batch * math.prod(case.out_size))
    for name, grad in actual.items():
        assert_as_accurate(grad, baseline[name], exact[name], f"{dtype} grad_{name}", terms)


@pytest.mark.parametrize("dtype", [DOUBLE, pytest.param(torch.float32, marks=needs_native)])
def test_right_hand_derivative_at_integers_and_at_minus_one(dtype: torch.dtype) -> None:
    """At n the slope is image[n + 1] - image[n], zero outside: seven points from -2 to 4 of a row of three."""
    row = torch.tensor([3.0, 5.0, 11.0], dtype=dtype)
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    for axis in (0, 1):
        shape = (1, 1, 3, 1) if axis == 0 else (1, 1, 1, 3)
        padding = (2, 0) if axis == 0 else (0, 2)
        offset = torch.zeros(1, 2, *((7, 1) if axis == 0 else (1, 7)), requires_grad=True)
        image = row.view(shape)
        deform(image, offset, None, weight, padding=padding).sum().backward()
        assert offset.grad is not None
        assert offset.grad[0, axis].flatten().tolist() == [0, 3, 2, 6, -11, 0, 0]
        # Across, the image is one pixel wide and the cell to the right is empty.
        assert offset.grad[0, 1 - axis].flatten().tolist() == [0, 0, -3, -5, -11, 0, 0]


@needs_native
def test_zero_offsets_give_the_gradient_of_fp64() -> None:
    """The start of every training: zero offsets, padding 1, so every coordinate is an integer, some of them -1."""
    tensors = Case(channels=8, offset_groups=2, size=(6, 9)).tensors(torch.float32)
    tensors[1] = tensors[1] * 0
    geometry = ((1, 1), (1, 1), (1, 1))
    actual = gradients(deform, tensors, geometry)
    exact = gradients(deform, double(tensors), geometry)
    baseline = gradients(by_torch, tensors, geometry)
    for name, grad in actual.items():
        assert_as_accurate(grad, baseline[name], exact[name], name, terms=108)


def second_derivatives(function: Any, tensors: list[Any], geometry: Any) -> list[Tensor]:
    """Of the sum of the squared gradients, by every tensor."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    present = [t for t in leaves if t is not None]
    out = function(*leaves, *geometry).double().sin().sum()
    grads = torch.autograd.grad(out, present, create_graph=True)
    return list(torch.autograd.grad(sum(g.double().square().sum() for g in grads), present))


@needs_native
@pytest.mark.parametrize("case", [CASES["plain"], CASES["offset groups straddle 3 groups"]])
def test_second_derivative_in_fp32(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    actual = second_derivatives(deform, tensors, case.geometry)
    baseline = second_derivatives(by_torch, tensors, case.geometry)
    exact = second_derivatives(by_torch, double(tensors), case.geometry)
    for a, b, e in zip(actual, baseline, exact):
        assert_as_accurate(a, b, e, "second derivative", terms=case.terms**2)


@needs_native
@pytest.mark.parametrize("mask", [True, False])
def test_torch_func(mask: bool) -> None:
    """grad, vjp, jacrev, jvp and vmap equal what autograd and loops give."""
    case = Case(mask=mask, bias=mask)
    function, tensors = differentiable(case)
    tensors = [t.detach() for t in tensors]

    def loss(*given: Tensor) -> Tensor:
        return function(*given).sin().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    argnums = tuple(range(len(tensors)))
    for grad, wanted in zip(torch.func.grad(loss, argnums=argnums)(*tensors), expected):
        assert_same(grad, wanted)
    for grad, wanted in zip(torch.func.vjp(loss, *tensors)[1](tensors[0].new_ones(())), expected):
        assert_same(grad, wanted)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, directional = torch.func.jvp(loss, tuple(tensors), tangents)
    along = sum((g * t).sum() for g, t in zip(expected, tangents))
    assert_rounding_only(directional, along, terms=5 * case.terms)  # type: ignore[arg-type]

    batched = [torch.stack([t, t.flip(0), 2 * t]) for t in tensors]
    assert_same(
        torch.func.vmap(function)(*batched),
        torch.stack([function(*(t[i] for t in batched)) for i in range(3)]),
    )
    for position in range(len(tensors)):  # one argument has the dimension, the others are shared
        in_dims = tuple(0 if i == position else None for i in argnums)
        mixed = [batched[i] if i == position else tensors[i] for i in argnums]
        actual = torch.func.vmap(function, in_dims)(*mixed)
        for i in range(3):
            each = [mixed[j][i] if j == position else mixed[j] for j in argnums]
            assert_rounding_only(actual[i], function(*each), case.terms, magnitude=2)
        per_sample = torch.func.vmap(torch.func.grad(loss, argnums=argnums), in_dims)(*mixed)
        for i in range(3):
            each = [mixed[j][i] if j == position else mixed[j] for j in argnums]
            for a, e in zip(per_sample, torch.func.grad(loss, argnums=argnums)(*each)):
                assert_rounding_only(a[i], e, terms=120, magnitude=2)


@few_cases
def test_jacobians(case: Case) -> None:
    function, tensors = differentiable(case)
    tensors = [t.detach() for t in tensors]
    argnums = tuple(range(len(tensors)))
    wanted = torch.autograd.functional.jacobian(function, tuple(tensors))
    by_rows = torch.func.jacrev(function, argnums)(*tensors)
    by_columns = torch.func.jacfwd(function, argnums)(*tensors)
    for rows, columns, each in zip(by_rows, by_columns, wanted):
        assert_rounding_only(rows, each, case.terms)
        assert_rounding_only(columns, each, case.terms)


# ------------------------------------------------------------------------- dtypes, layouts, autocast


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_output_dtype_and_low_precision_offsets(dtype: torch.dtype) -> None:
    tensors = Case().tensors(dtype)
    assert deform(*tensors, padding=1).dtype == dtype
    low = tensors[:1] + [t.to(dtype) for t in tensors[1:3] if t is not None] + tensors[3:]
    upcast = [low[0], *(t.float() for t in low[1:3] if t is not None), *low[3:]]
    if dtype == DOUBLE:
        upcast = double(low)
    assert_same(deform(*low, padding=1), deform(*upcast, padding=1))


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other clothes."""
    yield "channels_last", tensor.contiguous(memory_format=torch.channels_last)
    yield "transposed", tensor.transpose(2, 3).contiguous().transpose(2, 3)
    storage = tensor.new_full((tensor.numel() + 3,), math.nan)
    yield "storage offset", storage[3:].copy_(tensor.flatten()).view(tensor.shape)
    n, c, h, w = tensor.shape
    for name, shape, index in (
        ("every other row", (n, c, 2 * h, w), (slice(None), slice(None), slice(1, None, 2))),
        ("every other column", (n, c, h, 2 * w), (..., slice(None, None, 2))),
        ("some channels", (n, c + 3, h, w), (slice(None), slice(2, c + 2))),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            whole = tensor.new_full(shape, math.nan).contiguous(memory_format=memory_format)
            whole[index] = tensor
            yield f"{name}, {memory_format}", whole[index]


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_layouts(dtype: torch.dtype) -> None:
    case = Case(channels=8, out_channels=6, offset_groups=2)
    tensors = case.tensors(dtype)
    expected = deform(*tensors, *case.geometry)
    assert expected.is_contiguous()
    grads = gradients(deform, tensors, case.geometry)
    for position in range(4):
        plain = tensors[position]
        for name, variant in layouts(plain):
            changed = [*tensors[:position], variant, *tensors[position + 1 :]]
            actual = deform(*changed, *case.geometry)
            assert_same(actual, expected)
            channels_last = position == 0 and variant.stride(1) == 1  # whatever the pixels' strides
            assert actual.is_contiguous() is not channels_last, (position, name)
            assert actual.is_contiguous(memory_format=torch.channels_last) is channels_last
            for key, grad in gradients(deform, changed, case.geometry).items():
                assert_same(grad, grads[key])


def test_layout_of_the_incoming_gradient() -> None:
    for dtype in (DOUBLE, torch.float32):
        input, *rest = Case().tensors(dtype)
        expected = None
        for _, seed in layouts(Case().tensors(dtype)[0]):
            leaf = input.clone().requires_grad_()
            deform(leaf, *rest, padding=1).backward(seed)
            expected = leaf.grad if expected is None else expected
            assert_same(leaf.grad, expected)


def width_error(width: int, dtype: torch.dtype, autocast: bool) -> float:
    """Largest error on a random image, offsets of up to 40 px, against fp64 on the same features."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 2, width, generator=generator).to(dtype)
    offset = torch.rand(1, 2, 2, width, generator=generator)
    offset[:, 1] = 80 * offset[:, 1] - 40
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    if autocast:
        with torch.autocast("cpu", dtype):
            actual = deform(image.float(), offset, None, weight.float())
    else:
        actual = deform(image, offset, None, weight)
    assert actual.dtype == dtype
    exact = deform(image.double(), offset.double(), None, weight.double())
    return (actual - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_error_is_flat_in_the_width(dtype: torch.dtype, autocast: bool) -> None:
    """Coordinates in bf16 are whole pixels off beyond 256 columns and offsets of 40 px off by an eighth; in fp32
    only the output is rounded.

    The output is at most 1, so one rounding is eps / 2. fp32 coordinates are off by a few times width * 2^-24 px,
    a slope of 1 per pixel turns that into as much.
    """
    for width in (256, 640, 1280, 1920):
        bound = torch.finfo(dtype).eps / 2 + 8 * width * 2.0**-24
        assert width_error(width, dtype, autocast) <= bound, width


def test_autocast_leaves_fp64_alone() -> None:
    tensors = Case().tensors()
    with torch.autocast("cpu", torch.bfloat16):
        actual = deform(*tensors, padding=1)
    assert_same(actual, deform(*tensors, padding=1))


# --------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_batch_0(dtype: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in Case(batch=0).tensors(dtype) if t is not None]
    out = deform(*tensors, padding=1)
    assert out.shape == (0, 4, 5, 6)
    for tensor, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors)):
        assert grad.shape == tensor.shape
        assert not grad.any()


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("far", [1e9, -1e9, 3e38, math.inf, -math.inf])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_far_offsets_sample_zeros(dtype: torch.dtype, far: float, axes: tuple[int, ...]) -> None:
    case = Case(channels=8, offset_groups=2)
    tensors = case.tensors(dtype)
    offset, mask = tensors[1:3]
    wild = offset.clone()
    for axis in axes:
        wild[0, 2 * 4 + axis, 2, 3] = far  # group 0, tap 4, one pixel
    closed = mask.clone()
    closed[0, 4, 2, 3] = 0
    actual = deform(tensors[0], wild, *tensors[2:], padding=1)
    expected = deform(tensors[0], offset, closed, *tensors[3:], padding=1)
    assert_same(actual, expected)
    grads = gradients(deform, [tensors[0], wild, *tensors[2:]], case.geometry)
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
    assert not grads["offset"][0, 8:10, 2, 3].any()
    assert grads["mask"][0, 4, 2, 3] == 0


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_offset_gives_nan_there_and_only_there(dtype: torch.dtype, axis: int) -> None:
    """One NaN in offset group 1 of 2, tap 4, pixel (2, 3) of image 0; convolution group 1 of 2 reads it."""
    case = Case(channels=8, out_channels=4, groups=2, offset_groups=2)
    tensors = case.tensors(dtype)
    channel = 2 * (9 + 4) + axis
    clean = deform(*tensors, padding=1)
    clean_grads = gradients(deform, tensors, case.geometry)
    tensors[1][0, channel, 2, 3] = math.nan
    out = deform(*tensors, padding=1)
    expected = clean.clone()
    expected[0, 2:, 2, 3] = math.nan
    assert_same(out, expected)

    grads = gradients(deform, tensors, case.geometry)
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
    # Pixels that the NaN sample does not touch keep their gradients, other images all of them.
    assert_same(grads["input"][1], clean_grads["input"][1])
    assert_same(grads["input"][:, :4], clean_grads["input"][:, :4])


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_outside_contributes_zero_beside_a_poisoned_edge(dtype: torch.dtype, poison: float) -> None:
    """The whole rim of the image is NaN or infinite; samples that lie outside, or on the zeros, do not see it."""
    image = torch.full((1, 8, 5, 40), poison, dtype=dtype)
    image[..., 1:-1, 1:-1] = 3
    weight = torch.ones(1, 8, 1, 1, dtype=dtype)
    for dy, dx in (
        (50, 0),
        (-7, 0),
        (0, 50),
        (0, -41),
        (1e9, -math.inf),
        (-6, 0),
        (5, 0),
        (0, 40),
    ):
        offset = torch.tensor([dy, dx], dtype=torch.float32).view(1, 2, 1, 1).repeat(1, 1, 5, 40)
        tensors = [image, offset, None, weight, None]
        out = deform(*tensors)
        assert_same(out, torch.zeros_like(out))
        grads = gradients(deform, tensors, ())
        for name in ("input", "offset", "weight"):
            assert not grads[name].any(), (name, dy, dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp64_offsets_are_not_rounded_silently(dtype: torch.dtype) -> None:
    input, offset, mask, weight, bias = Case().tensors(dtype)
    for name, changed in (("offset", (offset.double(), mask)), ("mask", (offset, mask.double()))):
        message = (
            f"modulated_deform_conv2d: {name}: expected dtype {dtype} or float32, got torch.float64"
        )
        with pytest.raises(TypeError, match=re.escape(message)):
            deform(input, *changed, weight, bias, padding=1)


memory_formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)


@needs_native
@memory_formats
def test_image_beyond_the_window(memory_format: torch.memory_format) -> None:
    """34 MB of features are sampled through windows of 32 MiB at most."""
    case = Case(1, 4, 1, (1000, 2100), (1, 1), padding=(0, 0), mask=False)
    tensors = case.tensors(torch.float32, reach=9)
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    tensors[1][0, 0, 700] = -650  # one row reads far above
    exact = by_torch(*double(tensors), *case.geometry)
    actual = deform(*tensors, *case.geometry)
    assert_as_accurate(actual, by_torch(*tensors, *case.geometry), exact, terms=case.terms)


@needs_native
@memory_formats
def test_gradient_beyond_the_band(memory_format: torch.memory_format) -> None:
    """4.3 MB of the gradient of the input come in bands of 4 MiB at most."""
    case = Case(1, 4, 1, (300, 900), (1, 1), padding=(0, 0))
    tensors = case.tensors(torch.float32, reach=9)
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    tensors[1][0, 0, 200] = -150
    # In sixteenths and off the integers, where the gradient jumps, coordinates are exact in fp32.
    tensors[1] = (8 * tensors[1]).floor() / 8 + 1 / 16
    grads = gradients(deform, tensors, case.geometry)
    baseline = gradients(by_torch, tensors, case.geometry)
    exact = gradients(by_torch, double(tensors), case.geometry)
    for name, grad in grads.items():
        assert_as_accurate(grad, baseline[name], exact[name], name, terms=300 * 900)


# --------------------------------------------------------------------------------------- determinism


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("offset_groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_deterministic_over_runs_and_threads(
    dtype: torch.dtype, offset_groups: int, two_threads: None
) -> None:
    # With two threads and one offset group the image is cut into bands; blocks that are sampled beside a product, of 4,
    # 8 or 16 channels, are others.
    case = Case(batch=3, channels=16, out_channels=16, size=(140, 19), offset_groups=offset_groups)
    tensors = case.tensors(dtype, reach=6)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        out = deform(*tensors, *case.geometry)
        results.append([out, *gradients(deform, tensors, case.geometry).values()])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same(a, b)


# --------------------------------------------------------------------------------- compile, opcheck


def assert_compiles(dtype: torch.dtype, sizes: list[tuple[int, int]], dynamic: bool) -> None:
    """Values and gradients of the compiled function, without a graph break and for all sizes at once."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(*tensors: Tensor) -> Tensor:
        return deform(*tensors, stride=(2, 1), padding=1)

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch, size in enumerate(sizes, 2):
        tensors = Case(batch, 8, 6, size, stride=(2, 1), offset_groups=2).tensors(dtype)
        eager, traced = (gradients(f, tensors, ()) for f in (function, compiled))
        for name, grad in eager.items():
            assert_same(traced[name], grad)
        assert_same(
            compiled(*(t.requires_grad_() for t in tensors if t is not None)), function(*tensors)
        )
    assert counter.frame_count == 1
    assert counter.op_count > 0


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph_with_dynamic_shapes(dtype: torch.dtype) -> None:
    # No two dimensions of the first call are alike by chance: Dynamo would tie them.
    assert_compiles(dtype, [(9, 7), (13, 12), (20, 31)], dynamic=True)


def test_compile_fullgraph_of_the_pytorch_code() -> None:
    assert_compiles(DOUBLE, [(9, 7)], dynamic=False)


@needs_native
def test_compiled_code_refuses_the_second_derivative() -> None:
    tensors = [t.requires_grad_() for t in Case().tensors(torch.float32) if t is not None]
    compiled = torch.compile(deform, backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(
        compiled(*tensors, padding=1).sum(), tensors[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        (grad.square().sum() + tensors[1].square().sum()).backward()


RAW = ["plain", "no mask", "offset groups straddle 3 groups", "one channel", "one pixel", "H 1"]


@needs_native
@pytest.mark.parametrize("name", RAW)
def test_opcheck(name: str) -> None:
    """Schema, fake kernel with its strides, and tracing of the raw ops, batch 0 included."""
    for batch in (0, 2):
        case = Case(**{**CASES[name].__dict__, "batch": batch})
        input, offset, mask, weight, bias = case.tensors(torch.float32)
        image = input.contiguous(memory_format=torch.channels_last)
        geometry = tuple(v for pair in case.geometry for v in pair)
        forward = torch.ops.mafnet_ops.modulated_deform_conv2d_forward
        backward = torch.ops.mafnet_ops.modulated_deform_conv2d_backward
        arguments = (image, offset, mask, weight, bias, *geometry)
        grad = torch.ones_like(forward(*arguments))
        torch.library.opcheck(forward, arguments)
        for needs in ([True] * 5, [False] * 5, [True, False, False, False, True]):
            options = (*geometry, *needs, False)
            torch.library.opcheck(backward, (grad, image, offset, mask, weight, *options))


# -------------------------------------------------------------------------------------------- errors


def call(**changed: Any) -> Tensor:
    names = ("input", "offset", "mask", "weight", "bias")
    arguments: dict[str, Any] = dict(zip(names, Case().tensors(torch.float32)))
    return deform(**{**arguments, "padding": 1, **changed})


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


ERRORS = [
    (dict(input=[1]), TypeError, "input: expected a torch.Tensor, got list"),
    (dict(offset=None), TypeError, "offset: expected a torch.Tensor, got NoneType"),
    (dict(weight=1.0), TypeError, "weight: expected a torch.Tensor, got float"),
    (dict(mask="m"), TypeError, "mask: expected a torch.Tensor, got str"),
    (dict(bias=0), TypeError, "bias: expected a torch.Tensor, got int"),
    (
        dict(input=zeros(2, 4, 5, 6, dtype=torch.int64)),
        TypeError,
        "input: expected dtype float64, float32, float16 or bfloat16, got torch.int64",
    ),
    (
        dict(offset=zeros(2, 18, 5, 6, dtype=torch.int32)),
        TypeError,
        "offset: expected dtype float64, float32, float16 or bfloat16, got torch.int32",
    ),
    (dict(input=zeros(4, 5, 6)), ValueError, "input: expected 4 dimensions, got shape (4, 5, 6)"),
    (dict(offset=zeros(18)), ValueError, "offset: expected 4 dimensions, got shape (18,)"),
    (dict(mask=zeros(9)), ValueError, "mask: expected 4 dimensions, got shape (9,)"),
    (dict(weight=zeros(4, 4, 3)), ValueError, "weight: expected 4 dimensions, got shape (4, 4, 3)"),
    (dict(bias=zeros(4, 1)), ValueError, "bias: expected 1 dimensions, got shape (4, 1)"),
    (
        dict(weight=zeros(4, 4, 3, 3, dtype=DOUBLE)),
        TypeError,
        "weight: expected dtype torch.float32 as input, got torch.float64",
    ),
    (
        dict(bias=zeros(4, dtype=torch.float16)),
        TypeError,
        "bias: expected dtype torch.float32 as input, got torch.float16",
    ),
    (dict(stride=0), ValueError, "stride: expected an int or a pair of ints >= 1, got 0"),
    (dict(stride=1.5), ValueError, "stride: expected an int or a pair of ints >= 1, got 1.5"),
    (
        dict(padding=(1, -1)),
        ValueError,
        "padding: expected an int or a pair of ints >= 0, got (1, -1)",
    ),
    (
        dict(dilation=(1, 1, 1)),
        ValueError,
        "dilation: expected an int or a pair of ints >= 1, got (1, 1, 1)",
    ),
    (
        dict(input=zeros(2, 0, 5, 6)),
        ValueError,
        "input: expected at least 1 channel, got (2, 0, 5, 6)",
    ),
    (
        dict(weight=zeros(4, 3, 3, 3)),
        ValueError,
        "weight: expected shape[1] to divide the 4 input channels, got 3",
    ),
    (
        dict(weight=zeros(4, 0, 3, 3)),
        ValueError,
        "weight: expected shape[1] to divide the 4 input channels, got 0",
    ),
    (
        dict(weight=zeros(3, 2, 3, 3)),
        ValueError,
        "weight: expected shape[0] a multiple of 2 groups, got 3",
    ),
    (
        dict(weight=zeros(4, 4, 3, 0)),
        ValueError,
        "weight: expected a kernel of at least 1 x 1, got (3, 0)",
    ),
    (
        dict(offset=zeros(2, 20, 5, 6)),
        ValueError,
        "offset: expected 2 * G * 9 channels with G dividing the 4 input channels, got 20 channels",
    ),
    (
        dict(offset=zeros(2, 54, 5, 6)),
        ValueError,
        "offset: expected 2 * G * 9 channels with G dividing the 4 input channels, got 54 channels",
    ),
    (
        dict(offset=zeros(2, 0, 5, 6)),
        ValueError,
        "offset: expected 2 * G * 9 channels with G dividing the 4 input channels, got 0 channels",
    ),
    (dict(dilation=4), ValueError, "input: expected an output of at least 1 x 1, got (-1, 0)"),
    (
        dict(offset=zeros(2, 18, 5, 5)),
        ValueError,
        "offset: expected (N, 2 * G * K, H_out, W_out) = (2, 18, 5, 6), got (2, 18, 5, 5)",
    ),
    (
        dict(mask=zeros(2, 18, 5, 6)),
        ValueError,
        "mask: expected (N, G * K, H_out, W_out) = (2, 9, 5, 6), got (2, 18, 5, 6)",
    ),
    (dict(bias=zeros(3)), ValueError, "bias: expected (C_out,) = (4,), got (3,)"),
]
ERRORS += [
    (
        {name: zeros(*shape, device="meta")},
        ValueError,
        f"{name}: expected device cpu as input, got meta",
    )
    for name, shape in {
        "offset": (2, 18, 5, 6),
        "mask": (2, 9, 5, 6),
        "weight": (4, 4, 3, 3),
        "bias": (4,),
    }.items()
]


@pytest.mark.parametrize("changed, error, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^modulated_deform_conv2d: {re.escape(message)}$"):
        call(**changed)


RAW_ERRORS = [
    ("input", lambda t: t[0], "input: expected 4 dimensions, got shape (4, 5, 6)"),
    ("input", lambda t: t.double(), "weight: expected the dtype of input, got Float"),
    ("offset", lambda t: t.double(), "offset: expected the dtype of input, or float32 beside"),
    ("mask", lambda t: t.half(), "mask: expected the dtype of input, or float32 beside"),
    ("offset", lambda t: t[:, :17].contiguous(), "offset: expected a multiple of 2 * kernel_h"),
    ("offset", lambda t: t[:1].contiguous(), "offset: expected size 2 in dimension 0, got shape"),
    ("mask", lambda t: t[..., :5].contiguous(), "mask: expected size 6 in dimension 3, got shape"),
    ("weight", lambda t: t[0], "weight: expected 4 dimensions, got shape (4, 3, 3)"),
    ("weight", lambda t: t[:, :3].contiguous(), "weight: expected shape[1] to divide the channels"),
    ("bias", lambda t: t[:3], "bias: expected shape (C_out,), got shape (3)"),
]


@needs_native
@pytest.mark.parametrize("name, change, message", RAW_ERRORS, ids=[e[2] for e in RAW_ERRORS])
def test_errors_of_the_raw_op(name: str, change: Any, message: str) -> None:
    names = ("input", "offset", "mask", "weight", "bias")
    arguments: dict[str, Any] = dict(zip(names, Case().tensors(torch.float32)))
    arguments["input"] = arguments["input"].contiguous(memory_format=torch.channels_last)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=re.escape(f"modulated_deform_conv2d: {message}")):
        torch.ops.mafnet_ops.modulated_deform_conv2d_forward(*arguments.values(), 1, 1, 1, 1, 1, 1)


# -------------------------------------------------------------------------------------------- module


def test_module_holds_the_parameters_of_deform_conv2d() -> None:
    module = ModulatedDeformConv2d(6, 4, (3, 2), stride=2, padding=(1, 0), dilation=2, groups=2)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {"weight": (4, 3, 3, 2), "bias": (4,)}
    without = ModulatedDeformConv2d(6, 4, 1, bias=False)
    assert list(without.state_dict()) == ["weight"]
    # Kaiming-uniform as nn.Conv2d: within 1 / sqrt(fan_in), and not all alike.
    bound = 1 / math.sqrt(3 * 3 * 2)
    for parameter in module.parameters():
        assert 0 < parameter.detach().abs().max() <= bound
        assert parameter.unique().numel() == parameter.numel()
    assert "stride=(2, 2), padding=(1, 0), dilation=(2, 2), groups=2" in repr(module)


def test_module_equals_the_function() -> None:
    case = Case(
        channels=6,
        size=(9, 8),
        kernel=(3, 2),
        stride=(2, 1),
        padding=(0, 2),
        dilation=(1, 2),
        groups=2,
    )
    input, offset, mask, weight, bias = case.tensors(torch.float32)
    module = ModulatedDeformConv2d(6, 4, case.kernel, *case.geometry, groups=2)
    module.load_state_dict({"weight": weight, "bias": bias})
    for m in (mask, None):
        expected = deform(input, offset, m, weight, bias, *case.geometry)
        assert_same(module(input, offset, m), expected)


MODULE_ERRORS = [
    (dict(in_channels=5, groups=2), "in_channels: expected a multiple of groups = 2, got 5"),
    (dict(out_channels=5, groups=2), "out_channels: expected a multiple of groups = 2, got 5"),
    (dict(kernel_size=0), "kernel_size: expected an int or a pair of ints >= 1, got 0"),
    (dict(stride=(0, 1)), "stride: expected an int or a pair of ints >= 1, got (0, 1)"),
    (dict(padding=-1), "padding: expected an int or a pair of ints >= 0, got -1"),
    (dict(dilation="2"), "dilation: expected an int or a pair of ints >= 1, got 2"),
]


@pytest.mark.parametrize("changed, message", MODULE_ERRORS, ids=[e[1] for e in MODULE_ERRORS])
def test_module_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^modulated_deform_conv2d: {re.escape(message)}$"):
        ModulatedDeformConv2d(**{"in_channels": 4, "out_channels": 4, **changed})
