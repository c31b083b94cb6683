"""self_attention: values, gradients, windows, the bound on memory, low precision, errors, the module."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import attention_loop, windowed_attention_loop
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from mafnet_ops import SelfAttention, reference, self_attention

NATIVE = "cpu" in importlib.import_module("mafnet_ops.self_attention")._NATIVE_DEVICES
LOW = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = torch.float64
# Called with unpacked lists, which a type checker cannot count.
attention: Callable[..., Tensor] = self_attention
by_loop: Callable[..., Tensor] = attention_loop
by_window_loop: Callable[..., Tensor] = windowed_attention_loop
plain: Callable[..., Tensor] = reference.self_attention
plain_windows: Callable[..., Tensor] = reference.windowed_self_attention

# (N, heads, L, D_qk, D_v)
SHAPES = [(2, 3, 7, 4, 5), (1, 1, 1, 1, 1), (1, 2, 33, 8, 64), (3, 1, 12, 5, 2), (1, 1, 2, 16, 1)]


def tensors(*shape: int, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Query, key and value of a shape as in ``SHAPES``, within [-1, 1]."""
    batch, heads, length, d_qk, d_v = shape
    generator = torch.Generator().manual_seed(length)
    return [
        (torch.rand(batch, heads, length, d, generator=generator, dtype=DOUBLE) * 2 - 1).to(dtype)
        for d in (d_qk, d_qk, d_v)
    ]


def sdpa(*tensors_and_scale: Any) -> Tensor:
    query, key, value, *scale = tensors_and_scale
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, scale=scale[0] if scale else 1.0)


def gradients(function: Any, given: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    out = function(*leaves, *rest)
    generator = torch.Generator().manual_seed(out.numel())
    out.backward((torch.rand(out.shape, generator=generator, dtype=DOUBLE) * 2 - 1).to(out.dtype))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def terms(shape: tuple[int, ...]) -> int:
    """Roundings of one output: the scores' D_qk products, the exponentials, and two sums over L."""
    return shape[3] + 2 * shape[2] + 4


# -------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_fp64_values_equal_both_oracles(shape: tuple[int, ...], scale: float) -> None:
    given = tensors(*shape)
    actual = attention(*given, scale)
    # An error of a score, at most scale * D_qk large, multiplies its exponential by as much.
    magnitude = max(1.0, scale * shape[3])
    assert_rounding_only(actual, by_loop(*given, scale), terms(shape), magnitude)
    assert_rounding_only(actual, sdpa(*given, scale), terms(shape), magnitude)


def test_default_scale_is_one() -> None:
    given = tensors(*SHAPES[0])
    assert_same(attention(*given), attention(*given, scale=1.0))
    assert (attention(*given) - sdpa(*given, 0.5)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = tensors(*shape, dtype=dtype)
    wide = [t.double() for t in given]
    actual, baseline, exact = attention(*given), sdpa(*given), sdpa(*wide)
    assert actual.dtype == dtype
    assert_as_accurate(actual, baseline, exact, "values", terms(shape))
    grads = zip(*(gradients(f, g) for f, g in ((attention, given), (sdpa, given), (sdpa, wide))))
    for name, (a, b, e) in zip(("query", "key", "value"), grads):
        assert_as_accurate(a, b, e, f"grad_{name}", terms(shape))


@pytest.mark.parametrize("dtype", LOW)
def test_large_scores(dtype: torch.dtype) -> None:
    """q k^T of 64 * 60 * 60 = 230,400 is above the fp16 range; the softmax is one-hot and finite."""
    signs = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).repeat(1, 32)
    query = (60 * signs).view(1, 1, 2, 64).to(dtype)
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2).to(dtype)
    assert_same(attention(query, query, value), value)
    for grad in gradients(attention, [query, query, value]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_not_rounded_to_half(dtype: torch.dtype) -> None:
    """Scores of 256.0 and 256.5 differ by half, which bf16 cannot hold: the shares would be equal."""
    query = torch.tensor([16.0, 1.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2).to(dtype).contiguous()
    key = torch.tensor([[16.0, 0.0], [16.0, 0.5]]).view(1, 1, 2, 2).to(dtype)
    value = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).to(dtype)
    expected = 1 / (1 + math.exp(-0.5))
    for scale in (1.0, 1.0 + 2.0**-20):  # the scale is not rounded either
        out = attention(query, key, value, scale)
        assert abs(out.double() - expected).max().item() <= torch.finfo(dtype).eps


def test_autocast_keeps_scores_in_fp32() -> None:
    given = tensors(1, 2, 33, 8, 8, dtype=torch.float32)
    given[:2] = [t * 8 for t in given[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*given)
        windowed = attention(*given, 1.0, 40, (3, 11))
        mixed = attention(given[0].bfloat16(), *given[1:])
    low = [t.bfloat16() for t in given]
    expected = attention(*low)
    assert out.dtype == torch.bfloat16
    for result in (out, windowed, mixed):
        assert_same(result, expected)
    assert_as_accurate(out, sdpa(*low), sdpa(*(t.double() for t in low)), terms=200)
    wide = tensors(*SHAPES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(attention(*wide), attention(*wide))
        assert attention(*wide).dtype == DOUBLE


# ----------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("blocks", [False, True])
def test_gradcheck_twice(window: int | None, blocks: bool, monkeypatch: Any) -> None:
    if blocks:
        monkeypatch.setattr(reference, "MAX_SCORES", 8)
    given = [t.requires_grad_() for t in tensors(1, 2, 6, 2, 3)]

    def function(*args: Tensor) -> Tensor:
        return attention(*args, 0.7, window, (3, 2))

    assert gradcheck(function, given)
    assert gradgradcheck(function, given, fast_mode=True)


# -------------------------------------------------------------------------------------- memory bound


class ScoreMeter:
    """Counts the scores that each softmax works on, and what autograd saves of that size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        softmax = torch.softmax

        def measured(input: Tensor, dim: int) -> Tensor:
            self.sizes.append(input.numel())
            return softmax(input, dim)

        monkeypatch.setattr(torch, "softmax", measured)

    def largest(self) -> int:
        return max(self.sizes)


@pytest.mark.parametrize("limit", [1, 13, 14 * 3, 14 * 14 * 2 - 1, 14 * 14 * 2])
def test_scores_held_at_once_are_bounded(limit: int, monkeypatch: Any) -> None:
    """2 heads, 14 tokens: 392 scores. Less room, same result, forward and backward."""
    given = tensors(1, 2, 14, 3, 4)
    expected, grads = plain(*given, 1.0), gradients(plain, given, 1.0)
    monkeypatch.setattr(reference, "MAX_SCORES", limit)
    meter = ScoreMeter(monkeypatch)
    assert_rounding_only(plain(*given, 1.0), expected, terms((1, 2, 14, 3, 4)))
    at_least_one_row = max(limit, 2 * 14)
    assert meter.largest() <= at_least_one_row
    assert sum(meter.sizes) == 392
    meter.sizes.clear()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        actual = gradients(plain, given, 1.0)
    for a, e in zip(actual, grads):
        assert_rounding_only(a, e, terms((1, 2, 14, 3, 4)), 4)
    assert meter.largest() <= at_least_one_row
    if limit < 392:  # each block is computed again in the backward, and none is kept until then
        assert sum(meter.sizes) == 2 * 392
        assert max(saved) <= 14 * 2 * 4
    else:
        assert sum(meter.sizes) == 392


def test_windows_are_bounded_too(monkeypatch: Any) -> None:
    given = tensors(1, 1, 64, 2, 2)
    expected = plain_windows(*given, 1.0, 4, (8, 8))
    monkeypatch.setattr(reference, "MAX_SCORES", 64)
    meter = ScoreMeter(monkeypatch)
    out = plain_windows(*given, 1.0, 4, (8, 8))
    assert_rounding_only(out, expected, terms((1, 1, 16, 2, 2)))
    assert meter.largest() <= 64


@pytest.mark.parametrize("length", [65535, 65536, 65537])
def test_more_keys_than_16_bits_count(length: int, monkeypatch: Any) -> None:
    """The last key must be read: it alone is like the query. Three queries; all of them would take minutes."""
    meter = ScoreMeter(monkeypatch)
    key = torch.zeros(1, 1, length, 2)
    key[..., -1, :] = 30
    value = torch.zeros(1, 1, length, 3)
    value[..., -1, :] = torch.tensor([1.0, 2.0, 3.0])
    query = torch.ones(1, 1, 3, 2)
    out = reference.self_attention(query, key, value, 1.0)
    # exp(-60) * 65,536 is 6e-22 beside the one.
    assert_same(out, value[..., -1:, :].expand(1, 1, 3, 3))
    assert meter.largest() == 3 * length
    for queries in (3, 40):
        rows = query[..., :1, :].expand(1, 1, queries, 2)
        assert_same(attention(rows, key, value), value[..., -1:, :].expand(1, 1, queries, 3))


@pytest.mark.parametrize("length", [65536, 65537, 129600])
def test_rows_of_many_tokens(length: int) -> None:
    """A few queries against all keys, and all queries against a few keys, forward and backward."""
    for shape in ((1, 1, 40, length, 8, 4), (1, 1, length, 40, 8, 4)):
        given = unequal(shape, torch.float32)
        wide = [t.double() for t in given]
        actual = [attention(*given), *gradients(attention, given)]
        baseline = [sdpa(*given), *gradients(sdpa, given)]
        exact = [sdpa(*wide), *gradients(sdpa, wide)]
        for a, b, e in zip(actual, baseline, exact):
            assert_as_accurate(a, b, e, terms=length)


def test_65537_tokens_fit_in_windows() -> None:
    start = time.monotonic()
    given = [t.requires_grad_() for t in tensors(1, 1, 65537, 2, 2, dtype=torch.float32)]
    out = attention(*given, 1.0, 16, (1, 65537))
    out.sum().backward()
    assert time.monotonic() - start < 10
    last = tensors(1, 1, 65537, 2, 2, dtype=torch.float32)[2][..., -1:, :]
    assert_same(out[..., -1:, :], last)  # a window of its own
    with torch.no_grad():
        middle = [t[:, :, 65504:65520].detach() for t in given]
        assert_rounding_only(out[:, :, 65504:65520], attention(*middle), 40)


@pytest.mark.slow
def test_65537_tokens_fit() -> None:
    """Full attention, 4.3 * 10^9 scores: 16 GiB at once in fp32, a bound of 128 MiB here."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 65537, 1)
    value = torch.cat([torch.ones(1, 1, 65537, 1), torch.arange(65537.0).view(1, 1, -1, 1)], -1)
    with torch.no_grad():
        out = attention(query, key, value)
    rows = [0, 510, 511, 512, 65535, 65536]
    exact = sdpa(query[:, :, rows].double(), key.double(), value.double())
    # A sum of 65,537 positive terms: relative error of at most that many roundings.
    relative = ((out[:, :, rows] - exact) / exact).abs().max().item()
    assert relative <= 65537 * torch.finfo(torch.float32).eps


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 8), (8, 1), (3, 3), (1, 1)])
def test_windows_equal_full_attention_on_each(window: int, size: tuple[int, int]) -> None:
    shape = (2, 2, size[0] * size[1], 3, 4)
    given = tensors(*shape)
    actual = attention(*given, 0.5, window, size)
    expected = by_window_loop(*given, 0.5, window, size)
    assert_rounding_only(actual, expected, terms(shape), 2)


def test_windows_by_hand() -> None:
    """4 x 5 pixels in windows of 3: one whole, two cut by an edge, one corner."""
    given = tensors(1, 1, 20, 2, 3)
    actual = attention(*given, 1.0, 3, (4, 5)).view(4, 5, 3)
    images = [t.view(4, 5, -1) for t in given]
    for rows, columns in (
        (slice(0, 3), slice(0, 3)),
        (slice(0, 3), slice(3, 5)),
        (slice(3, 4), slice(0, 3)),
        (slice(3, 4), slice(3, 5)),
    ):
        parts = [t[rows, columns].reshape(1, 1, -1, t.shape[-1]) for t in images]
        expected = sdpa(*parts).view(actual[rows, columns].shape)
        assert_rounding_only(actual[rows, columns], expected, 30)


def test_a_window_over_the_image_is_full_attention() -> None:
    given = tensors(2, 3, 20, 2, 3)
    assert_same(attention(*given, 1.0, 5, (4, 5)), attention(*given))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.none() | st.integers(1, 8),
    widths=st.tuples(*[st.integers(1, 9)] * 2),
    dtype=st.sampled_from([DOUBLE, *LOW]),
)
def test_any_size(size: Any, window: int | None, widths: Any, dtype: torch.dtype) -> None:
    shape = (1, 2, size[0] * size[1], *widths)
    given = tensors(*shape, dtype=dtype)
    wide = [t.double() for t in given]
    whole = window if window is not None else max(size)
    exact = by_window_loop(*wide, 0.5, whole, size)
    actual = attention(*given, 0.5, window, size)
    if dtype == DOUBLE:
        assert_rounding_only(actual, exact, terms(shape), 5)
    else:
        mask = torch.zeros(shape[2], shape[2], dtype=torch.bool)
        cell = [(y // whole, x // whole) for y in range(size[0]) for x in range(size[1])]
        for i, a in enumerate(cell):
            mask[i] = torch.tensor([a == b for b in cell])
        with sdpa_kernel(SDPBackend.MATH):
            q, k, v = given
            baseline = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
        assert_as_accurate(actual, baseline, exact, terms=terms(shape))


# ------------------------------------------------------------------- blocks, kernels, sizes, memory

# (N, heads, L_q, L_k, D_qk, D_v): one token above blocks of 128 and 192, fewer keys, odd widths
BLOCKS = [
    (1, 2, 129, 129, 8, 64),
    (1, 1, 193, 577, 64, 64),
    (2, 1, 520, 31, 33, 17),
    (1, 1, 33, 640, 1, 130),
    (1, 1, 40, 49, 256, 3),
]


def unequal(shape: tuple[int, ...], dtype: torch.dtype, reach: float = 1.0) -> list[Tensor]:
    batch, heads, queries, keys, d_qk, d_v = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((queries, d_qk), (keys, d_qk), (keys, d_v))
    made = [torch.randn(batch, heads, *s, generator=generator, dtype=DOUBLE) for s in sizes]
    return [(reach * t).to(dtype) for t in made]


def with_stored_out(out: Tensor) -> Any:
    """Attention whose backward takes rowsum(grad_out * out) from the rounded out, and nothing else is rounded.

    A backward that recomputes the scores has no other; where the softmax is nearly one-hot that rounding is the
    largest error.
    """

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            weight = torch.softmax(q @ k.mT * scale, -1)
            ctx.save_for_backward(q, k, v, weight)
            ctx.scale = scale
            return weight @ v

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            q, k, v, weight = ctx.saved_tensors
            grad = grads[0].to(out.dtype).double()
            delta = (grad * out.double()).sum(-1, keepdim=True)
            score = weight * (grad @ v.mT - delta) * ctx.scale
            return score @ k, score.mT @ q, weight.mT @ grad, None

    return Attention.apply


class LongDoubleAttention(torch.autograd.Function):
    """The formulas in NumPy's long double, more digits than fp64 where the CPU has them; results are fp64."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (t.detach().numpy().astype(np.longdouble) for t in (query, key, value))
        score = scale * (q @ k.swapaxes(-1, -2))
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        ctx.given = q, k, v, weight, scale
        return torch.from_numpy((weight @ v).astype(np.float64))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, weight, scale = ctx.given
        grad = grads[0].numpy().astype(np.longdouble)
        through = grad @ v.swapaxes(-1, -2)
        score = scale * weight * (through - (weight * through).sum(-1, keepdims=True))
        made = score @ k, score.swapaxes(-1, -2) @ q, weight.swapaxes(-1, -2) @ grad
        return *(torch.from_numpy(g.astype(np.float64)) for g in made), None


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_several_blocks(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    given = unequal(shape, dtype)
    wide = [t.double() for t in given]
    if dtype == DOUBLE:
        exact = gradients(LongDoubleAttention.apply, given, scale)
        exact.insert(0, LongDoubleAttention.apply(*given, scale))
    else:
        exact = [sdpa(*wide, scale), *gradients(sdpa, wide, scale)]
    actual = [attention(*given, scale), *gradients(attention, given, scale)]
    baseline = [sdpa(*given, scale), *gradients(sdpa, given, scale)]
    if dtype in (torch.float16, torch.bfloat16):
        stored = gradients(with_stored_out(actual[0]), wide, scale)
        for i, (b, s, e) in enumerate(zip(baseline[1:], stored, exact[1:]), 1):
            if (s - e).abs().max() > (b - e).abs().max():
                baseline[i] = s.to(dtype)
    for name, a, b, e in zip(("out", "query", "key", "value"), actual, baseline, exact):
        assert_as_accurate(a, b, e, name, sum(shape[2:]))


@pytest.mark.skipif(not NATIVE, reason="the extension is not built")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_vector_level(level: str) -> None:
    """The tests of blocks again, in a process whose kernels use lower instructions."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "0.5-dtype1 or 0.5-dtype3 or special_values"],
        env={**os.environ, "MAFNET_SIMD": level},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


BF16_SCRIPT = """
import torch
from mafnet_ops import self_attention
torch.manual_seed(0)
low = [torch.randn(1, 1, 129, depth).bfloat16().requires_grad_() for depth in (64, 64, 16)]
wide = [t.detach().float().requires_grad_() for t in low]
results = [self_attention(*low, 0.125), self_attention(*wide, 0.125)]
results += [torch.autograd.grad(out.sum(), given)[2] for out, given in zip(results[:2], (low, wide))]
print([torch.equal(a, b.bfloat16()) for a, b in zip(results[::2], results[1::2])])
"""


@pytest.mark.skipif(not NATIVE, reason="the extension is not built")
@pytest.mark.parametrize("level", ["avx512", "avx512bf16", "amx"])
def test_bfloat16_is_multiplied_as_such(level: str) -> None:
    """Weights rounded to bfloat16 give other digits than those in float, which are taken elsewhere."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    rounded = level != "avx512" and "avx512_bf16" in flags
    command = [sys.executable, "-c", BF16_SCRIPT]
    environment = {**os.environ, "MAFNET_SIMD": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([not rounded] * 2)


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_special_values(dtype: torch.dtype) -> None:
    """-inf scores weigh nothing, NaN and +inf spoil their row, values of any size come through."""
    query, key, value = unequal((1, 1, 70, 200, 4, 5), dtype)
    query[..., 0] = 1
    key[..., 7:9, :] = 0
    key[..., 7:9, 0] = -math.inf  # two keys that no query sees
    seen = [i for i in range(200) if i not in (7, 8)]
    expected = attention(query, key[..., seen, :], value[..., seen, :])
    exact = sdpa(query.double(), key[..., seen, :].double(), value[..., seen, :].double())
    assert_as_accurate(attention(query, key, value), expected, exact, terms=200)
    query[..., 3, 2] = math.nan
    rows = attention(query, key, value).isnan().any(-1).flatten().nonzero().flatten().tolist()
    assert rows == [3]
    key[..., 7, 0] = math.inf
    assert attention(query, key, value).isnan().all()
    all_hidden = torch.full_like(key[..., :30, :], -math.inf)
    out = attention(query.abs() + 1, all_hidden, value[..., :30, :])
    assert out.isnan().all()


@pytest.mark.parametrize("factor", [2.0**-110, 2.0**-60, 2.0**60, 2.0**100])
def test_small_and_large_floats(factor: float) -> None:
    """Sizes that pieces of bfloat16 cannot hold take the other kernel."""
    query, key, value = unequal((1, 1, 70, 200, 4, 5), torch.float32)
    exact = sdpa(query.double(), key.double(), (value * factor).double())
    baseline = sdpa(query, key, value * factor)
    assert_as_accurate(attention(query, key, value * factor), baseline, exact, terms=200)
    far = sdpa(query.double() * factor, key.double() / factor, value.double())
    near = sdpa(query * factor, key / factor, value)
    assert_as_accurate(attention(query * factor, key / factor, value), near, far, terms=200)


@pytest.mark.parametrize("ends, values", [(2.0**-30, 2.0**-40), (2.0**-38, 2.0**-20)])
def test_small_gradients(ends: float, values: float) -> None:
    """Products of three numbers, the last digits of which leave the range of float first."""
    query, key, value = unequal((1, 1, 70, 200, 4, 5), torch.float32)
    given = [t.requires_grad_() for t in (query * ends, key * ends, value * values)]
    wide = [t.detach().double().requires_grad_() for t in given]
    grad = values * torch.randn(1, 1, 70, 5)
    actual = torch.autograd.grad(attention(*given), given, grad)
    baseline = torch.autograd.grad(sdpa(*given), given, grad)
    exact = torch.autograd.grad(sdpa(*wide), wide, grad.double())
    for name, a, b, e in zip(("query", "key", "value"), actual, baseline, exact):
        assert_as_accurate(a, b, e, name, terms=270)


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_no_keys_give_zeros(dtype: torch.dtype) -> None:
    given = unequal((1, 2, 5, 0, 3, 4), dtype)
    assert_same(attention(*given), torch.zeros(1, 2, 5, 4, dtype=dtype))
    grads = gradients(attention, given)
    assert_same(grads[0], torch.zeros(1, 2, 5, 3, dtype=dtype))
    assert [g.shape for g in grads[1:]] == [t.shape for t in given[1:]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_results_lie_as_their_arguments_do(transposed: bool, window: int | None) -> None:
    """What was an image stays one; a transposed copy would cost as much as a small op."""
    given = tensors(2, 2, 30, 3, 4, dtype=torch.float32)
    if transposed:
        given = [t.mT.contiguous().mT for t in given]
    leaves = [t.requires_grad_() for t in given]
    out = attention(*leaves, 1.0, window, (5, 6))
    grads = torch.autograd.grad(out.sum(), leaves)
    for result in (out, *grads):
        assert (result.mT if transposed else result).is_contiguous()


@pytest.mark.skipif(not NATIVE, reason="the extension is not built")
def test_memory_of_57600_tokens() -> None:
    """Packed keys and a bounded number of sums; 64 queries, as all of them would take minutes."""
    code = (
        "import resource, torch; from mafnet_ops import self_attention\n"
        "t = [torch.randn(1, 1, n, d) for n, d in ((64, 8), (57600, 8), (57600, 64))]\n"
        "small = [x[..., :300, :].clone().requires_grad_() for x in t]\n"
        "self_attention(*small).sum().backward()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); leaves = [x.requires_grad_() for x in t]\n"
        "torch.autograd.grad(self_attention(*leaves).sum(), leaves)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gradients_kb = 57600 * 72 * 4 // 1024
    assert int(done.stdout) < 200_000 + gradients_kb


# --------------------------------------------------------------------- layouts, edges, determinism


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("window", [None, 2])
def test_strides(dtype: torch.dtype, window: int | None) -> None:
    given = tensors(2, 2, 12, 3, 4, dtype=dtype)
    expected = attention(*given, 1.0, window, (3, 4))
    for position, plain in enumerate(given):
        padded = F.pad(plain, (1, 1, 1, 1), value=math.nan)[..., 1:-1, 1:-1]
        variants = [
            plain.mT.contiguous().mT,
            padded,
            plain.movedim(0, 2).contiguous().movedim(2, 0),
        ]
        for variant in variants:
            changed = [*given[:position], variant, *given[position + 1 :]]
            out = attention(*changed, 1.0, window, (3, 4))
            assert_as_accurate(out, expected, expected.double(), terms=terms((2, 2, 12, 3, 4)))


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("window", [None, 2])
def test_batch_0(dtype: torch.dtype, window: int | None) -> None:
    given = tensors(0, 2, 12, 3, 4, dtype=dtype)
    assert attention(*given, 1.0, window, (3, 4)).shape == (0, 2, 12, 4)
    grads = gradients(attention, given, 1.0, window, (3, 4))
    assert [g.shape for g in grads] == [t.shape for t in given]


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("shape", [(1, 2, 30, 40, 4, 0), (1, 2, 0, 40, 4, 5)], ids=str)
def test_gradients_where_the_output_has_no_elements(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = unequal(shape, dtype)
    for grad, tensor in zip(gradients(attention, given), given):
        assert_same(grad, torch.zeros_like(tensor))


def test_no_tokens() -> None:
    assert attention(*tensors(2, 1, 0, 3, 4)).shape == (2, 1, 0, 4)


@pytest.mark.parametrize("window", [None, 2])
def test_nan_stays_in_its_row_or_window(window: int | None) -> None:
    given = tensors(1, 1, 12, 3, 4)
    given[0][0, 0, 5, 1] = math.nan  # pixel (1, 1) of 3 x 4
    out = attention(*given, 1.0, window, (3, 4))
    assert out.isnan().any(-1).flatten().nonzero().flatten().tolist() == [5]
    given[1][0, 0, 5, 1] = math.nan
    out = attention(*given, 1.0, window, (3, 4))
    rows = list(range(12)) if window is None else [0, 1, 4, 5]
    assert out.isnan().any(-1).flatten().nonzero().flatten().tolist() == rows


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
@pytest.mark.parametrize("window", [None, 9])
def test_same_bits_for_any_number_of_threads(
    dtype: torch.dtype, window: int | None, two_threads: None
) -> None:
    given = tensors(2, 1, 26 * 20, 8, 16, dtype=dtype)  # several blocks of keys and of queries
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        arguments = (1.0, window, (26, 20))
        results.append([attention(*given, *arguments), *gradients(attention, given, *arguments)])
    for result in results[1:]:
        for a, b in zip(results[0], result):
            assert_same(a, b)


@pytest.mark.parametrize("window, blocks", [(None, False), (None, True), (3, False)])
def test_compile_fullgraph(window: int | None, blocks: bool, monkeypatch: Any) -> None:
    """Dynamic shapes without blocks; with blocks their number belongs to the graph."""
    if blocks:
        monkeypatch.setattr(reference, "MAX_SCORES", 3 * 2 * 35 * 20)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(query: Tensor, key: Tensor, value: Tensor, height: int) -> Tensor:
        size = (height, query.shape[2] // height)
        return attention(query, key, value, 0.5, window, size)

    dynamic = not blocks and window is None
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for height in (5, 6) if dynamic else (5,):
        given = tensors(3, 2, height * 7, 4, 9, dtype=torch.float32)
        expected = gradients(function, given, height)
        for a, e in zip(gradients(compiled, given, height), expected):
            assert_as_accurate(a, e, e.double(), terms=terms((3, 2, 42, 4, 9)))
        q, k, v = (t.requires_grad_() for t in given)
        out = function(q, k, v, height)
        assert_as_accurate(compiled(q, k, v, height), out, out.double(), terms=100)
    assert counter.frame_count == 1
    assert counter.op_count > 0


# -------------------------------------------------------------------------------------------- errors

_Q = torch.zeros(2, 1, 12, 3)
ERRORS = [
    (dict(query=None), TypeError, "query: expected a torch.Tensor, got NoneType"),
    (dict(key=[0]), TypeError, "key: expected a torch.Tensor, got list"),
    (dict(value=_Q[0]), ValueError, "value: expected 4 dimensions, got shape (1, 12, 3)"),
    (
        dict(value=_Q.long()),
        TypeError,
        "value: expected dtype float64, float32, float16 or bfloat16, got torch.int64",
    ),
    (
        dict(key=_Q.double()),
        TypeError,
        "key: expected dtype torch.float32 as query, got torch.float64",
    ),
    (
        dict(value=_Q.half()),
        TypeError,
        "value: expected dtype torch.float32 as query, got torch.float16",
    ),
    (dict(key=_Q.to("meta")), ValueError, "key: expected device cpu as query, got meta"),
    (
        dict(key=_Q[..., :2]),
        ValueError,
        "key: expected (2, 1, 12, 3) as query, any L, got (2, 1, 12, 2)",
    ),
    (
        dict(value=_Q[:, :, :11]),
        ValueError,
        "value: expected N, heads, L = (2, 1, 12) as key, got (2, 1, 11)",
    ),
    (
        dict(query=_Q[..., :0], key=_Q[..., :0]),
        ValueError,
        "query: expected D_qk of at least 1, got 0",
    ),
    (dict(window=0), ValueError, "window: expected None or an int >= 1, got 0"),
    (dict(window=2), ValueError, "image_size: expected (H, W) with window, got None"),
    (
        dict(window=2, image_size=(3, 5)),
        ValueError,
        "image_size: expected H * W = L = 12, got (3, 5)",
    ),
    (
        dict(window=2, image_size=(3,)),
        ValueError,
        "image_size: expected an int or a pair of ints >= 1, got (3,)",
    ),
    (
        dict(window=2, image_size=(0, 4)),
        ValueError,
        "image_size: expected an int or a pair of ints >= 1, got (0, 4)",
    ),
]


@pytest.mark.parametrize("changed, error, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^self_attention: {re.escape(message)}$"):
        attention(**{"query": _Q, "key": _Q, "value": _Q, **changed})


# -------------------------------------------------------------------------------------------- module


def test_module_state_and_identity_at_start() -> None:
    module = SelfAttention(16, reduction=4)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {
        "gamma": (1,),
        "query.weight": (4, 16, 1, 1),
        "query.bias": (4,),
        "key.weight": (4, 16, 1, 1),
        "key.bias": (4,),
        "value.weight": (16, 16, 1, 1),
        "value.bias": (16,),
    }
    image = torch.randn(2, 16, 3, 5)
    assert_same(module(image), image)
    assert SelfAttention(4, reduction=8).query.out_channels == 1
    with pytest.raises(
        ValueError, match=r"^self_attention: reduction: expected an int >= 1, got 0$"
    ):
        SelfAttention(4, reduction=0)


@pytest.mark.parametrize("window", [None, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(4, 5), (1, 6), (3, 3)])
def test_module_values(window: int | None, size: tuple[int, int]) -> None:
    """x + gamma * attention(x), from nn.Conv2d and the loop."""
    torch.manual_seed(0)
    module = SelfAttention(8, reduction=4, window=window).double()
    nn.init.constant_(module.gamma, 0.7)
    image = torch.rand(2, 8, *size, dtype=DOUBLE)
    tokens = [
        conv(image).detach().flatten(2).mT[:, None]
        for conv in (module.query, module.key, module.value)
    ]
    side = max(size) if window is None else window
    attended = by_window_loop(*tokens, 1.0, side, size)[:, 0].mT.reshape(image.shape)
    # Values of a convolution of eight channels of weights below 1 / sqrt(8) are below 4.
    assert_rounding_only(module(image).detach(), image + 0.7 * attended, 60, 4)
    assert all(p.grad is None for p in module.parameters())
    module(image).sum().backward()
    # The softmax does not see what is added to all scores, so the bias of the key alone has no gradient.
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        has_gradient = parameter.grad.abs().max().item() > 1e-9
        assert has_gradient is not (name == "key.bias"), name
