"""The Triton kernels of self_attention: in Triton's interpreter where there is no GPU, on the GPU where there is one.

The interpreter takes milliseconds for a block of scores whatever its size, so that most tests choose blocks of their
own: small ones that short rows straddle, large ones for long rows. The kernels are the same.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import attention_loop
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mafnet_ops import self_attention_triton as ours
from mafnet_ops.self_attention_triton import Blocks

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

# Triton 3.6 compiles the kernels, but its interpreter has no bfloat16 constants and fails with numpy 2.4.
OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
LOW = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Blocks(16, 32, 4, 2)
KERNELS = Path(ours.__file__).with_name("self_attention_kernels")


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                torch.cuda.is_available() or OLD,
                reason="for machines without a GPU, with the interpreter of Triton 3.9 or later",
            ),
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs in the interpreter, and again as a GPU test."""
    yield request.param


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mends Triton's interpreter: it cuts fp32 off to bfloat16 where a GPU rounds, and patches tl at every call.

    The second is two fifths of the time. Calls of helpers within a kernel need no patch of their own.
    """
    if torch.cuda.is_available():
        return
    convert, patch = interpreter._convert_float, interpreter._patch_lang
    patched: set[int] = set()

    def convert_float(array: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(array)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return array.astype(np.uint32) << 16
        return convert(array, source, target, mode)

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        scope = patch(function)
        patched.add(module)
        if len(patched) == 1:  # a kernel; its helpers do not restore
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        return scope

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def choose(monkeypatch: pytest.MonkeyPatch, blocks: Blocks, splits: int = 1) -> None:
    for name in ("forward_blocks", "key_value_blocks", "query_blocks"):
        monkeypatch.setattr(ours, name, lambda *args: blocks)
    monkeypatch.setattr(ours, "key_splits", lambda *args: splits)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, SMALL)


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], Any]]:
    """Name, grid and options of what is launched, which then is not."""
    launched = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launched.append((kernel.__name__, grid, options))

    monkeypatch.setattr(ours, "launch", launch)
    return launched


# (N, heads, L_q, L_k, D_qk, D_v)
Shape = tuple[int, int, int, int, int, int]


def make(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value and grad_out in [-1, 1]."""
    images, heads, length_q, length_k, width_qk, width_v = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((length_q, width_qk), (length_k, width_qk), (length_k, width_v), (length_q, width_v))
    return [
        (torch.rand(images, heads, *s, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)
        for s in sizes
    ]


def sdpa(given: list[Tensor], scale: float, mask: Tensor | None = None) -> list[Tensor]:
    """out and the three gradients by PyTorch's definition, on the CPU."""
    *leaves, grad_out = (t.detach().clone() for t in given)
    leaves = [t.requires_grad_() for t in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def run(
    given: list[Tensor],
    scale: float,
    device: str,
    window: Sequence[int] = (),
    deterministic: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """[out, grad_query, grad_key, grad_value] and lse of the kernels, on the CPU."""
    query, key, value, grad_out = (t.to(device) for t in given)
    out, lse = ours.forward(query, key, value, scale, list(window))
    saved = (grad_out, query, key, value, out, lse, scale, list(window))
    return [t.cpu() for t in (out, *ours.backward(*saved, deterministic))], lse.cpu()


NAMES = ("out", "grad_query", "grad_key", "grad_value")


def check(
    given: list[Tensor],
    scale: float,
    device: str,
    window: Sequence[int] = (),
    mask: Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Values, log-sum-exp and gradients against fp64, by PyTorch's error in the same dtype."""
    actual, lse = run(given, scale, device, window, deterministic)
    wide = [t.double() for t in given]
    baseline, exact = sdpa(given, scale, mask), sdpa(wide, scale, mask)
    length = max(given[0].shape[2], given[1].shape[2])
    terms = given[0].shape[3] + given[2].shape[3] + 3 * length + 4
    for name, a, b, e in zip(NAMES, actual, baseline, exact):
        assert a.dtype == given[0].dtype
        assert_as_accurate(a, b, e, name, terms)
    scores = wide[0] @ wide[1].transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    # Half dtypes add up weights that are rounded already, as the products with value see them.
    weights = torch.finfo(given[0].dtype).eps if given[0].dtype != torch.float32 else 0.0
    largest = scores[scores.isfinite()].abs().max().item()
    bound = terms * max(1.0, largest) * torch.finfo(torch.float32).eps + weights
    assert lse.dtype == torch.float32
    assert (lse - torch.logsumexp(scores, -1)).abs().max().item() <= bound


# ------------------------------------------------------------------------------------------- values

SHAPES: list[Shape] = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 15, 31, 3, 5),
    (1, 2, 16, 32, 16, 16),
    (1, 1, 17, 33, 17, 40),
    (1, 1, 33, 7, 8, 64),
    (1, 1, 7, 65, 20, 1),
]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: Shape, dtype: torch.dtype, device: str, small: None) -> None:
    check(make(shape, dtype), 0.7, device)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_deterministic_gradients(
    shape: Shape, dtype: torch.dtype, device: str, small: None
) -> None:
    check(make(shape, dtype), -1.3, device, deterministic=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1 + 2.0**-20])
def test_values_equal_a_loop(scale: float, device: str, small: None) -> None:
    given = make((2, 2, 17, 40, 3, 5), torch.float32)
    out = run(given, scale, device)[0][0]
    expected = attention_loop(*given[:3], scale)  # type: ignore[arg-type, misc]
    assert_rounding_only(out.double(), expected, 100, 2.0**29)  # in roundings of fp32


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("length", [127, 129])
def test_the_chosen_blocks(dtype: torch.dtype, length: int, device: str) -> None:
    check(make((1, 1, length, length, 16, 64), dtype), 0.5, device)
    check(make((1, 1, 65, length, 9, 7), dtype), 0.5, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [65, 256])
def test_wide_heads(dtype: torch.dtype, width: int, device: str) -> None:
    check(make((1, 1, 65, 33, width, 8), dtype), width**-0.5, device)
    check(make((1, 1, 33, 65, 8, width), dtype), 1.0, device)


@pytest.mark.parametrize("new_setting", [False, True])
def test_tf32_is_torchs_choice(new_setting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either of torch's settings; reading the old one fails where the new one chose."""
    launched = record_launches(monkeypatch)
    given = make((1, 1, 4, 4, 2, 2), torch.float32)
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.fp32_precision
    try:
        for old, new in (("highest", "ieee"), ("high", "tf32")):
            if new_setting:
                matmul.fp32_precision = new
            else:
                torch.set_float32_matmul_precision(old)
            ours.forward(*given[:3], 1.0, [])
            ours.forward(*(t.half() for t in given[:3]), 1.0, [])
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.fp32_precision = before[1]
    chosen = [(options["PRECISION"], options["ONES"]) for _, _, options in launched]
    assert chosen[0] == ("tf32x3", False) and chosen[2] == ("tf32", True)
    assert chosen[1] == chosen[3] == ("tf32x3", True)  # of no effect on half dtypes


# ------------------------------------------------------------------------------------------ windows


def window_mask(window: int, size: tuple[int, int]) -> Tensor:
    """(L, L): whether two pixels are in one window."""
    cells = torch.tensor(
        [y // window * 1000 + x // window for y in range(size[0]) for x in range(size[1])]
    )
    return cells[:, None] == cells[None, :]


@pytest.mark.parametrize(
    ("window", "size"),
    [(2, (2, 3)), (3, (4, 5)), (5, (11, 7)), (6, (5, 13)), (9, (4, 5)), (17, (1, 35))],
)
def test_windows(window: int, size: tuple[int, int], device: str, small: None) -> None:
    length = size[0] * size[1]
    given = make((1, 2, length, length, 3, 5), torch.float32)
    mask, deterministic = window_mask(window, size), window % 2 == 0
    check(given, 0.7, device, [window, *size], mask, deterministic)


def test_windows_of_one_pixel(device: str, small: None) -> None:
    given = make((2, 1, 6, 6, 3, 5), torch.float32)
    (out, *grads), _ = run(given, 0.7, device, [1, 2, 3])
    assert_rounding_only(out, given[2], 2)
    # Of its one score the softmax is constant; scores are at most 3 * 0.7, the sums have 5 terms.
    for grad in grads[:2]:
        assert_rounding_only(grad, torch.zeros_like(grad), 10)
    assert_rounding_only(grads[2], given[3], 2)


@pytest.mark.parametrize("dtype", LOW)
def test_windows_in_the_chosen_blocks(dtype: torch.dtype, device: str) -> None:
    given = make((1, 1, 20 * 23, 20 * 23, 8, 16), dtype)
    check(given, 1.0, device, [12, 20, 23], window_mask(12, (20, 23)))


# ---------------------------------------------------------------------------------------- strides


def planar(tensor: Tensor) -> Tensor:
    """The same values with tokens side by side, as in (N, C, H * W)."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def strided(tensor: Tensor) -> Tensor:
    """The same values at odd strides and an offset."""
    images, heads, length, width = tensor.shape
    room = tensor.new_full((length, images, heads, width * 3 + 1), math.nan)
    view = room.permute(1, 2, 0, 3)[..., 1::3]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(("window", "deterministic"), [([], False), ([3, 5, 7], True)])
def test_any_strides_give_the_same_bits(
    window: list[int], deterministic: bool, device: str, small: None
) -> None:
    given = make((1, 2, 35, 35, 5, 6), torch.float32)
    # Atomics on a GPU add in any order.
    deterministic = deterministic or device == "cuda"
    expected, _ = run(given, 0.7, device, window, deterministic)
    for layout in (planar, strided):
        actual, _ = run([layout(t) for t in given], 0.7, device, window, deterministic)
        for a, e in zip(actual, expected):
            assert_same(a, e)
    expanded = [*given[:3], given[3][:, :1, :1].expand(1, 2, 35, 6)]
    dense = [*given[:3], expanded[3].contiguous()]
    for a, e in zip(*(run(g, 0.7, device, window, deterministic)[0] for g in (expanded, dense))):
        assert_same(a, e)


def test_results_are_laid_out_like_their_tensors(device: str, small: None) -> None:
    given = make((1, 2, 15, 15, 5, 6), torch.float32)
    given[1], given[2] = planar(given[1]), planar(given[2])
    (out, *grads), _ = run(given, 1.0, device)
    assert grads[0].is_contiguous()
    for planar_result in (out, *grads[1:]):
        assert planar_result.transpose(2, 3).is_contiguous()


def test_wide_offsets_give_the_same_bits(
    device: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make((1, 2, 35, 35, 5, 6), torch.float16)
    for window, splits in (([], 1), ([3, 5, 7], 1), ([], 2)):
        choose(monkeypatch, SMALL, splits)
        results = []
        for wide in (False, True):
            monkeypatch.setattr(ours, "_wide", lambda *args, wide=wide: wide)
            results.append(run(given, 0.7, device, window, deterministic=True)[0])
        for a, e in zip(*results):
            assert_same(a, e)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((9, 9, 2, 1), (0, 0, 2**31 - 1, 1), False),
        ((1, 1, 2, 1), (0, 0, 2**31, 1), True),
        ((1, 1, 2, 2), (0, 0, 2**30, 2**30), True),
        ((2, 1, 1, 1), (2**40, 0, 2**40, 1), False),  # images have 64 bits anyway
    ],
)
def test_offsets_past_31_bits_are_wide(size: Any, stride: Any, expected: bool) -> None:
    tensor = torch.empty_strided(size, stride, device="meta")
    assert ours._wide(torch.empty(1, 1, 1, 1), tensor) is expected


@pytest.mark.gpu
def test_tokens_four_gibibytes_apart() -> None:
    given = [t.cuda() for t in make((1, 1, 2, 2, 1, 1), torch.float16)]
    room = torch.zeros(2**31 + 1, dtype=torch.float16, device="cuda")
    far = room.as_strided((1, 1, 2, 1), (0, 0, 2**31, 1))
    far.copy_(given[1])
    out, _ = ours.forward(given[0], far, given[2], 1.0, [])
    assert_same(out, ours.forward(*given[:3], 1.0, [])[0])


# ------------------------------------------------------------------------------- edges of the numbers


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("splits", [1, 3])
def test_infinite_and_nan_scores(
    dtype: torch.dtype, splits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are infinite or NaN in a whole block, in the tail, in a part, everywhere: as softmax has it."""
    choose(monkeypatch, SMALL, splits)
    places = (slice(3, 4), slice(79, 80), slice(0, 32), slice(0, 64), slice(0, 80))
    cases = [(at, number) for at in places for number in (-math.inf, math.inf, math.nan)]
    _, key, value, _ = make((len(cases), 1, 1, 80, 1, 3), dtype)
    for image, (at, number) in enumerate(cases):
        key[image, :, at] = number
    query = torch.ones(len(cases), 1, 1, 1, dtype=dtype)
    exact = torch.softmax(key.double().transpose(-1, -2), -1) @ value.double()
    low = torch.softmax(key.float().transpose(-1, -2), -1) @ value.float()
    out, lse = ours.forward(*(t.to(device) for t in (query, key, value)), 1.0, [])
    assert_as_accurate(out.cpu(), low.to(dtype), exact, "", 100)
    # NaN, as the weights, where a score is +inf; there logsumexp has inf.
    expected = torch.logsumexp(key.double(), 2)
    expected[expected == math.inf] = math.nan
    finite = expected.isfinite()
    assert_same(lse.cpu()[~finite], expected.float()[~finite])
    error = (lse.cpu()[finite] - expected[finite]).abs().max()
    assert error <= torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps


def test_nan_of_one_query_stays_in_its_row(device: str, small: None) -> None:
    given = make((1, 2, 40, 40, 3, 5), torch.float32)
    clean, _ = run(given, 1.0, device)
    given[0][0, 1, 35] = math.nan
    (out, grad_query, *others), _ = run(given, 1.0, device)
    for result, expected in ((out, clean[0]), (grad_query, clean[1])):
        assert result[0, 1, 35].isnan().all()
        result[0, 1, 35] = expected[0, 1, 35]
        assert not result.isnan().any()
    for grad in others:  # every key of the head met it, none of the other
        assert grad[0, 1].isnan().all() and not grad[0, 0].isnan().any()


@pytest.mark.parametrize("dtype", LOW)
def test_huge_scores(dtype: torch.dtype, device: str, small: None) -> None:
    """Scores of +-230,400: one-hot weights, without an overflow anywhere."""
    signs = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).repeat(1, 32)
    query = (60 * signs).view(1, 1, 2, 64).to(dtype)
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2).to(dtype)
    for scale, expected in ((1.0, value), (-1.0, value.flip(2))):
        key = query if scale > 0 else query * torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1).to(dtype)
        if scale < 0:
            expected = (sdpa([t.double() for t in (query, key, value, value)], scale)[0]).to(dtype)
        results, _ = run([query, key, value, value], scale, device)
        assert_same(results[0], expected)
        assert all(t.isfinite().all() for t in results)


def test_scores_below_any_constant(device: str, small: None) -> None:
    """All scores -1e35: a start of the maximum at -1e30, as kernels have it, would give 0 / 0."""
    query = torch.full((1, 1, 2, 1), 1e17)
    value = torch.arange(3.0).view(1, 1, 3, 1)
    out, _ = ours.forward(
        *(t.to(device) for t in (query, -1e18 * torch.ones(1, 1, 3, 1), value)), 1.0, []
    )
    assert_rounding_only(out.cpu(), torch.ones(1, 1, 2, 1), 3)


@pytest.mark.parametrize("sign", [1, -1])
def test_padding_keys_add_nothing(sign: int, device: str, small: None) -> None:
    """Scores of -128 to -162: the exponential of a padding key's score of 0 less the log-sum-exp is infinite."""
    given = make((1, 1, 5, 5, 2, 3), torch.float32)
    given[0] = given[0].abs() + 8
    given[1] = sign * (given[1].abs() + 8)
    exact = sdpa([t.double() for t in given], 1.0)
    # A weight is off by four roundings of numbers up to 162, a gradient is five weights by 6 * 9 at most.
    bound = 4 * 162 * torch.finfo(torch.float32).eps * 5 * 54
    for result, expected in zip(run(given, 1.0, device)[0], exact):
        assert (result - expected).abs().max().item() <= bound


# ---------------------------------------------------------------------------------------- long rows


@pytest.mark.parametrize("length", [65535, 65536, 65537, 129600])
def test_more_keys_than_16_bits_count(
    length: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last key must be read: it alone is like the query. In the backward the same of queries."""
    choose(monkeypatch, Blocks(16, 8192, 4, 1) if device == "cpu" else Blocks(64, 64, 4, 1))
    key, value = torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 3)
    key[..., -1, :], value[..., -1, :] = 30, torch.tensor([1.0, 2.0, 3.0])
    query = torch.ones(1, 1, 3, 2)
    # exp(-60) * 129,600 is 1e-21 beside the one.
    out, lse = ours.forward(*(t.to(device) for t in (query, key, value)), 1.0, [])
    assert_same(out.cpu(), value[..., -1:, :].expand(1, 1, 3, 3))
    assert_rounding_only(lse.cpu(), torch.full((1, 1, 3), 60.0), 1, 60)

    # Queries as many, of which all but the last have no gradient; the other way round in the blocks too.
    choose(monkeypatch, Blocks(8192, 16, 4, 1) if device == "cpu" else Blocks(64, 64, 4, 1))
    query = torch.zeros(1, 1, length, 2)
    query[..., -1, :] = 1
    key, value = torch.eye(2).view(1, 1, 2, 2), torch.eye(2).view(1, 1, 2, 2)
    grad_out = torch.zeros(1, 1, length, 2)
    grad_out[..., -1, 0] = 1
    deterministic = length % 2 == 0
    (out, *grads), _ = run([query, key, value, grad_out], 1.0, device, [], deterministic)
    # Weights 1/2 and 1/2: grad_score = 1/2 (1, 0) - 1/4 = (1/4, -1/4).
    assert_rounding_only(out, torch.full_like(out, 0.5), 4)
    expected = torch.zeros_like(query)
    expected[..., -1, :] = torch.tensor([0.25, -0.25])
    assert_rounding_only(grads[0], expected, 4)
    assert_rounding_only(grads[1], torch.tensor([[[[0.25] * 2, [-0.25] * 2]]]), 4)
    assert_rounding_only(grads[2], torch.tensor([[[[0.5, 0.0]] * 2]]), 4)


def test_a_row_of_windows_longer_than_16_bits_count(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, window = 65537, 1024
    choose(monkeypatch, Blocks(1024, 1024, 4, 1) if device == "cpu" else Blocks(64, 64, 4, 1))
    value = torch.arange(length).float().view(1, 1, length, 1)
    zeros = torch.zeros(1, 1, length, 1)
    out, _ = ours.forward(*(t.to(device) for t in (zeros, zeros, value)), 1.0, [window, 1, length])
    starts = torch.arange(length) // window * window
    expected = (starts + (starts + window).clamp(max=length) - 1) / 2
    relative = (out.cpu().view(-1).double() / expected.double() - 1).abs()
    assert relative[1:].max() <= window * torch.finfo(torch.float32).eps
    assert_same(out.cpu()[..., -1:, :], value[..., -1:, :])  # a window of its own


def test_grids_have_no_axis_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third axis of a grid end at 65,535."""
    launched = record_launches(monkeypatch)
    many = torch.empty(70000, 3, 1, 1)
    ours.forward(many, many, many, 1.0, [])
    ours.backward(many, many, many, many, many, many[..., 0], 1.0, [], True)
    assert [grid[0] for _, grid, _ in launched] == [210000] * 4
    assert all(n <= 16 for _, grid, _ in launched for n in grid[1:])


# ------------------------------------------------------------------------------------ parts of the keys


@pytest.mark.parametrize("splits", [2, 3, 16])
def test_parts_of_the_keys_are_merged(
    splits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, SMALL, splits)
    given = make((1, 2, 35, 32 * 7 + 5, 3, 5), torch.float32)
    given[1][:, :, 32:64] *= 50  # one part outweighs
    check(given, 1.0, device)
    given = make((2, 2, 33, 70, 3, 5), torch.bfloat16)
    check([planar(t) for t in given], 1.0, device)


@pytest.mark.parametrize(
    ("programs", "key_blocks", "expected"),
    [(32, 32, 8), (32, 3, 1), (132, 450, 2), (450, 450, 1), (1, 1000, 16), (0, 5, 1)],
)
def test_small_grids_split_the_keys(programs: int, key_blocks: int, expected: int) -> None:
    assert ours.key_splits(programs, key_blocks, 132) == expected


# ---------------------------------------------------------------------------- what is chosen and refused


def test_deterministic_takes_no_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record_launches(monkeypatch)
    for width in (8, 16, 17):
        query, _, value, grad_out = make((1, 1, 4, 4, width, 2), torch.float32)
        for deterministic in (False, True):
            launched.clear()
            lse = query[..., 0]
            ours.backward(grad_out, query, query, value, value, lse, 1.0, [], deterministic)
            names = [name.removeprefix("self_attention_") for name, _, _ in launched]
            atomic = width <= 16 and not deterministic
            assert names[:2] == ["delta_kernel", "backward_key_value_kernel"]
            assert names[2:] == ([] if atomic else ["backward_query_kernel"])
            assert launched[1][2]["ATOMIC"] is atomic


@pytest.mark.gpu
def test_deterministic_has_the_same_bits() -> None:
    given = make((2, 2, 1000, 1000, 8, 64), torch.bfloat16)
    first, _ = run(given, 1.0, "cuda", deterministic=True)
    for _ in range(5):
        for a, e in zip(run(given, 1.0, "cuda", deterministic=True)[0], first):
            assert_same(a, e)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t, None),
        (lambda t: t.half(), None),
        (lambda t: t.double(), "the Triton kernels have no float64"),
        (lambda t: t.expand(1, 1, 4, 257), "take up to 256 channels a head, not 257"),
    ],
)
def test_what_is_supported(
    change: Callable[[Tensor], Tensor], reason: str | None, device: str
) -> None:
    given = [change(torch.zeros(1, 1, 4, 1, device=device)) for _ in range(3)]
    said = ours.supported(*given)
    assert said == reason or (reason is not None and reason in str(said))
    if reason is not None:
        with pytest.raises(ValueError, match="self_attention_forward: query: expected what"):
            ours.forward(*given, 1.0, [])


def test_reasons_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.zeros(1, 1, 4, 1)] * 3
    monkeypatch.setattr(ours, "_interpreted", lambda: False)
    assert ours.supported(*given) == "the Triton kernels run on CUDA, not on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    missing = ours._ask_device.__wrapped__
    assert missing(0) == "sm_75 is older than sm_80"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert missing(0) is None
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert missing(0) == "triton 3.5.1 is older than 3.6"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing(0) == "triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert missing(0) == "the kernels are for NVIDIA GPUs"


@pytest.mark.parametrize(
    "shape",
    [
        (0, 1, 3, 3, 2, 2),
        (1, 0, 3, 3, 2, 2),
        (1, 1, 0, 3, 2, 2),
        (1, 1, 3, 0, 2, 2),
        (1, 1, 3, 3, 2, 0),
    ],
)
def test_empty(shape: Shape, device: str, small: None) -> None:
    given = make(shape, torch.float32)
    (out, *grads), lse = run(given, 1.0, device)
    assert out.shape == given[3].shape and lse.shape == out.shape[:3]
    assert_same(out, torch.zeros_like(out))  # no keys: a sum of nothing
    if shape[3] == 0:
        assert_same(lse, torch.full_like(lse, -math.inf))
    for grad, tensor in zip(grads, given):
        assert_same(grad, torch.zeros_like(tensor))


# -------------------------------------------------------------------------------------- planted bugs


def load_with(replaced: str, by: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package of kernels, copied to ``folder``, with ``by`` wherever ``replaced`` stands."""
    found = 0
    for path in KERNELS.glob("*.py"):
        source = path.read_text()
        found += source.count(replaced)
        (folder / path.name).write_text(source.replace(replaced, by))
    assert found
    monkeypatch.syspath_prepend(folder.parent)
    return importlib.import_module(folder.name)


def edges(device: str) -> None:
    check(make((1, 1, 17, 33, 3, 5), torch.float32), 0.7, device)
    check(make((1, 1, 17, 33, 3, 5), torch.float32), 0.7, device, deterministic=True)


def several_blocks(device: str) -> None:
    check(make((1, 1, 32, 96, 3, 5), torch.float32), 3.0, device)


def ragged_windows(device: str) -> None:
    given = make((1, 1, 35, 35, 3, 5), torch.float32)
    check(given, 0.7, device, [3, 5, 7], window_mask(3, (5, 7)))


def parts(device: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose(monkeypatch, SMALL, 2)
        check(make((2, 2, 17, 70, 3, 5), torch.float32), 1.0, device)


# None leaves its memory: the interpreter would go with it.
PLANTED: list[tuple[str, str, Callable[[str], None]]] = [
    ("valid = whole + columns < last_key", "valid = whole + columns < last_key - 1", edges),
    ("valid = whole + columns < count_k", "valid = whole + columns < count_k - 1", edges),
    ("valid = at + columns < count_q", "valid = at + columns < count_q - 1", edges),
    ("acc * shrink[:, None]", "acc", several_blocks),
    ("total * shrink + tl.sum", "total + tl.sum", several_blocks),
    ("grad_p - row_delta[None, :]", "grad_p", edges),
    ("grad_p - row_delta[:, None]", "grad_p", edges),
    ("(grad_k * scale)", "grad_k", edges),
    ("if NEGATE:", "if False:", lambda d: check(make(SHAPES[3], torch.float32), -1.0, d)),
    ("(highest + tl.log2(total)) * LN2", "highest + tl.log2(total)", edges),
    ("index // across * width", "index // across * across", ragged_windows),
    ("first = y * width + x", "first = y * width", ragged_windows),
    ("tl.minimum(window, height - y) *", "tl.minimum(window, height - y - 1) *", ragged_windows),
    ("columns = tl.cdiv(width, window)", "columns = width // window", ragged_windows),
    ("acc += weight[:, None] * tl.load", "acc += tl.load", parts),
    ("split.to(tl.int64) * planes * length_q * WIDTH_V", "0", parts),
    ("-3.4028234663852886e38", "-1e30", lambda d: test_scores_below_any_constant(d, None)),
    (
        "p = tl.where(valid_k[:, None] & valid_q[None, :], p, 0.0)",
        "p = tl.where(valid_q[None, :], p, 0.0)",
        lambda d: test_padding_keys_add_nothing(-1, d, None),
    ),
]


@pytest.mark.skipif(torch.cuda.is_available() or OLD, reason="in the interpreter")
@pytest.mark.parametrize(("replaced", "by", "test"), PLANTED, ids=[p[1] for p in PLANTED])
def test_planted_bugs_are_caught(
    replaced: str,
    by: str,
    test: Callable[[str], None],
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    planted = load_with(replaced, by, tmp_path, monkeypatch)
    monkeypatch.setattr(ours, "_kernels", lambda: planted)
    with pytest.raises(AssertionError):
        test("cpu")


def test_asking_for_the_device_is_traceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo cannot trace what is asked of the system; it must take the answer as it is."""
    ours._ask_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))

    @torch.compile(fullgraph=True, backend="eager")
    def taken(x: Tensor) -> Tensor:
        return x + 1 if ours._device_missing(0) is None else x - 1

    assert taken(torch.zeros(())) == -1
    ours._ask_device.cache_clear()
