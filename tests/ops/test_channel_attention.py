"""channel_attention and its statistics: values, ties, NaN, statistics from outside, sizes around blocks."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import channel_attention_loop, to_array
from strategies import uniform
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor, nn

from mafnet_ops import (
    ChannelAttention,
    ChannelStatistics,
    channel_attention,
    channel_statistics,
    reference,
)
from mafnet_ops.channel_attention import LAYERS

MODULE = importlib.import_module("mafnet_ops.channel_attention")
NATIVE = "cpu" in MODULE._NATIVE_DEVICES
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Channels around vectors and around a block of 2048 elements; pixels around blocks of 64 and 2048 and around
# tasks of 2048.
SHAPES = [
    (1, (1, 1)), (1, (64, 65)), (3, (1, 63)), (15, (5, 13)), (16, (8, 8)), (17, (13, 5)), (33, (2047, 1)),
    (2, (2049, 2)), (70, (61, 70)), (2047, (2, 2)), (2051, (1, 3)),
]  # fmt: skip


@pytest.fixture(params=["native", "PyTorch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(MODULE, "_NATIVE_DEVICES", frozenset())
    elif not NATIVE:
        pytest.skip("the extension is not built")


def parameters(channels: int, inner: int, kernel: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(inner, channels), (channels, inner)] * 2
    weights = [
        uniform(*shape, kernel, kernel, seed=i, reach=2 / shape[1])
        for i, shape in enumerate(shapes)
    ]
    return weights, [uniform(shape[0], seed=9 + i) for i, shape in enumerate(shapes)]


def theirs(x: Tensor) -> Tensor:
    """The statistics by PyTorch, (N, 2, C)."""
    return torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)


def ours(x: Tensor) -> Tensor:
    return torch.stack(tuple(channel_statistics(x)), 1)


# --------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)])
def test_equals_the_loop(size: tuple[int, int], path: None) -> None:
    weights, biases = parameters(3, 2)
    image = uniform(2, 3, *size)
    out = channel_attention(image, weights, biases)
    for one, x in zip(out, image):
        expected = channel_attention_loop(
            to_array(x), [to_array(w) for w in weights], [to_array(b) for b in biases]
        )
        # Four layers of 3 products each; the slope of a sigmoid is at most 1 / 4.
        assert_rounding_only(one, torch.from_numpy(expected), 4 * 3 + size[0] * size[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels, size", SHAPES, ids=str)
def test_statistics_around_blocks(
    channels: int, size: tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    image = uniform(2, channels, *size).to(dtype).to(memory_format=LAYOUTS[layout])
    mean, maximum = channel_statistics(image)
    exact = theirs(image.double())
    assert_as_accurate(mean, exact[:, 0].to(dtype), exact[:, 0], terms=size[0] * size[1])
    assert_same(maximum, exact[:, 1].to(dtype))

    x = image.requires_grad_()
    grad = uniform(2, 2, channels, seed=1).to(dtype)
    (actual,) = torch.autograd.grad(ours(x), x, grad)
    wide = image.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(theirs(wide), wide, grad.double())
    assert_as_accurate(actual, expected.to(dtype), expected, terms=3)
    if channels > 1:
        layout_kept = actual.is_contiguous(memory_format=LAYOUTS[layout])
        assert layout_kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels, size", SHAPES, ids=str)
def test_gradients_around_blocks(
    channels: int, size: tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    """Of the product: of the map, and of the gate, a sum over all pixels."""
    image = uniform(2, channels, *size).to(dtype).to(memory_format=LAYOUTS[layout])
    gate, grad = uniform(2, channels, seed=1).to(dtype), uniform(2, channels, *size, seed=2)
    leaves = image.requires_grad_(), gate.requires_grad_()
    actual = torch.autograd.grad(MODULE._channel_scale(*leaves), leaves, grad.to(dtype))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = wide[0] * wide[1][:, :, None, None]
    expected = torch.autograd.grad(out, wide, grad.to(dtype).double())
    for a, e in zip(actual, expected):
        assert_as_accurate(a, e.to(dtype), e, terms=size[0] * size[1])


def test_a_mean_of_a_million_pixels_is_exact_to_a_rounding() -> None:
    """Sums of blocks are added in fp64: a plain sum in fp32 is off by a thousandth here."""
    image = torch.full((1, 2, 1024, 1024), 0.1)
    for layout in LAYOUTS.values():
        mean, _ = channel_statistics(image.to(memory_format=layout))
        assert (mean - 0.1).abs().max() <= 0.1 * torch.finfo(torch.float32).eps * math.sqrt(64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_negative_channels(layout: str, path: None) -> None:
    image = (uniform(1, 5, 7, 9) - 3).to(memory_format=LAYOUTS[layout])
    assert_same(channel_statistics(image).max, image.amax((2, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(160, 256), (161, 257)])  # rows of whole lines, and not
def test_scale_of_large_maps(size: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """Stored around the caches once their memory exists; each element is one rounding of one product."""
    image = uniform(1, 64, *size).to(dtype).to(memory_format=LAYOUTS[layout])
    gate = uniform(1, 64).to(dtype)
    for _ in range(3):
        assert_same(MODULE._channel_scale(image, gate), reference.channel_scale(image, gate))


# ---------------------------------------------------------------------------------- NaN, ties, infinity


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at", [(0, 0), (3, 5), (69, 69)])
def test_nan_reaches_the_statistics_of_its_channel_alone(
    at: tuple[int, int], layout: str, path: None
) -> None:
    image = uniform(2, 5, 70, 70).to(memory_format=LAYOUTS[layout])
    clean = ours(image)
    image[1, 2, at[0], at[1]] = math.nan
    out = ours(image)
    assert out[1, :, 2].isnan().all()
    out[1, :, 2] = clean[1, :, 2]
    assert_same(out, clean)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinities(layout: str, path: None) -> None:
    image = uniform(1, 3, 9, 11)
    image[0, 0, 3, 4], image[0, 1, 0, 0] = math.inf, -math.inf
    image[0, 2, 8, 10], image[0, 2, 0, 1] = (
        math.inf,
        -math.inf,
    )  # their mean is NaN, not their maximum
    image = image.to(memory_format=LAYOUTS[layout])
    mean, maximum = channel_statistics(image)
    assert_same(mean[0, :2], torch.tensor([math.inf, -math.inf], dtype=image.dtype))
    assert mean[0, 2].isnan()
    assert_same(maximum, image.amax((2, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_share_the_gradient_as_in_pytorch(layout: str, path: None) -> None:
    """Of equal maxima, in one block and in several; a channel with NaN gets NaN, as from amax."""
    image = torch.randint(0, 3, (2, 4, 50, 60), generator=torch.Generator().manual_seed(0)).double()
    image[0, 1, 7, 7] = math.nan
    image = image.to(memory_format=LAYOUTS[layout])
    grads = []
    for function in (ours, theirs):
        x = image.clone(memory_format=torch.preserve_format).requires_grad_()
        grads += torch.autograd.grad(function(x), x, uniform(2, 2, 4))
    assert grads[1][0, 1].isnan().all()
    assert_rounding_only(grads[0], grads[1], 3)


# -------------------------------------------------------------------------------- the layers, the module


class Chain(nn.Module):
    """Fig. 2a from torch.nn alone, with the state dict of ChannelAttention."""

    def __init__(self, channels: int, inner: int, kernel: int) -> None:
        super().__init__()

        def layers() -> nn.Sequential:
            first = nn.Conv2d(channels, inner, kernel, padding=kernel // 2)
            second = nn.Conv2d(inner, channels, kernel, padding=kernel // 2)
            return nn.Sequential(first, nn.ReLU(), second)

        self.from_mean, self.from_max = layers(), layers()

    def forward(self, x: Tensor) -> Tensor:
        mean, maximum = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return x * torch.sigmoid(self.from_mean(mean) + self.from_max(maximum))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_module_equals_the_convolutions(kernel: int, path: None) -> None:
    """Gradients too: those of all taps but the centre are zero."""
    torch.manual_seed(0)
    module, chain = ChannelAttention(8, 4, kernel).double(), Chain(8, 2, kernel).double()
    chain.load_state_dict(module.state_dict())
    image, grad = uniform(2, 8, 6, 7), uniform(2, 8, 6, 7, seed=1)
    results = []
    for net in (module, chain):
        x = image.clone().requires_grad_()
        out = net(x)
        wanted = [x, *net.parameters()]
        results.append([out.detach(), *torch.autograd.grad(out, wanted, grad)])
    for a, e in zip(*results):
        assert_rounding_only(a, e, 2 * 8 * 42)
    if kernel > 1:
        taps = results[0][2].clone()
        taps[:, :, kernel // 2, kernel // 2] = 0
        assert not taps.any()


def test_biases_may_be_none() -> None:
    weights, biases = parameters(3, 2)
    image = uniform(1, 3, 4, 5)
    expected = channel_attention(image, weights, [b * 0 for b in biases])
    assert_same(channel_attention(image, weights, [None] * 4), expected)


def test_a_tile_with_the_statistics_of_its_frame_is_a_crop_of_the_whole(path: None) -> None:
    torch.manual_seed(0)
    module = ChannelAttention(6, 2).double()
    frame = uniform(2, 6, 20, 24)
    tile = frame[:, :, 3:12, 5:20]
    whole = module(frame)
    assert_same(module(tile, channel_statistics(frame)), whole[:, :, 3:12, 5:20])
    assert not torch.equal(module(tile), whole[:, :, 3:12, 5:20])


def test_gradients_flow_into_statistics_from_outside() -> None:
    weights, biases = parameters(3, 2)
    given = [uniform(2, 3, seed=s).requires_grad_() for s in (1, 2)]
    out = channel_attention(uniform(2, 3, 4, 5), weights, biases, ChannelStatistics(*given))
    out.sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_an_fp32_map(dtype: torch.dtype) -> None:
    """The layers are in the low dtype, the product is not, as in PyTorch."""
    module, image = ChannelAttention(8, 2), uniform(1, 8, 5, 6).float()
    chain = Chain(8, 4, 1)
    chain.load_state_dict(module.state_dict())
    with torch.autocast("cpu", dtype):
        out, baseline = module(image), chain(image)
    assert out.dtype == baseline.dtype == torch.float32
    assert_as_accurate(out, baseline, chain.double()(image.double()), terms=32)


# ------------------------------------------------------------------------------------ determinism, SIMD


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_for_any_number_of_threads(
    layout: str, threads: Callable[[int], None]
) -> None:
    """Several tasks of several blocks each, in the sums and in their gradients."""
    image = uniform(2, 24, 70, 90).float().to(memory_format=LAYOUTS[layout])
    gate = uniform(2, 24, seed=1).float()
    results = []
    for count in (1, 2, 3):
        threads(count)
        x, g = image.clone(memory_format=torch.preserve_format).requires_grad_(), gate.clone()
        statistics = ours(x)
        out = MODULE._channel_scale(x, g.requires_grad_())
        grads = torch.autograd.grad([statistics, out], [x, g], [statistics.detach(), image])
        results.append([statistics.detach(), *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same(a, b)


SIMD_SCRIPT = """
import sys, torch, mafnet_ops
torch.manual_seed(0)
module = mafnet_ops.ChannelAttention(37, 4)
results = []
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 37, 21, 43).to(memory_format=layout).requires_grad_()
    y = module(x)
    results += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]
torch.save(results, sys.argv[1])
"""


@pytest.mark.skipif(not NATIVE, reason="the extension is not built")
def test_every_vector_level(tmp_path: Path) -> None:
    """Baseline, AVX2 and AVX-512 instructions, in processes of their own."""
    levels = ("baseline", "avx2", "avx512")
    for level in levels:
        command = [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / level)]
        subprocess.run(command, check=True, env={**os.environ, "MAFNET_SIMD": level})
    first, *others = (torch.load(tmp_path / level) for level in levels)
    for other in others:
        for a, b in zip(first, other):
            # Sums of 21 * 43 products in another order, a random walk of their roundings.
            bound = 2 * math.sqrt(21 * 43) * torch.finfo(torch.float32).eps
            assert (a - b).abs().max() <= bound * b.abs().max()


# -------------------------------------------------------------------------------------------- errors

_X = torch.zeros(2, 3, 4, 5)
_WEIGHTS = [torch.zeros(2, 3, 1, 1), torch.zeros(3, 2, 1, 1)] * 2
_BIASES: list[Tensor | None] = [torch.zeros(2), torch.zeros(3)] * 2


def replaced(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(input=None), TypeError, "input: expected a torch.Tensor, got NoneType"),
    (
        dict(input=_X[:, :, :0]),
        ValueError,
        "input: expected H and W of at least 1, got (2, 3, 0, 5)",
    ),
    (dict(weights=_WEIGHTS[:3]), ValueError, f"weights: expected 4 tensors {LAYERS}, got 3"),
    (dict(biases=_BIASES[:3]), ValueError, "biases: expected 4 tensors or None, got 3"),
    (
        dict(weights=replaced(_WEIGHTS, 1, torch.zeros(3, 4, 1, 1))),
        ValueError,
        "weights[mean_out]: expected (C, R, k, k) = (3, 2, 1, 1), got (3, 4, 1, 1)",
    ),
    (
        dict(weights=replaced(_WEIGHTS, 2, torch.zeros(2, 4, 1, 1))),
        ValueError,
        "weights[max_in]: expected (R, C, k, k) = (2, 3, 1, 1), got (2, 4, 1, 1)",
    ),
    (
        dict(weights=replaced(_WEIGHTS, 0, torch.zeros(2, 3, 2, 2))),
        ValueError,
        "weights[mean_in]: expected an odd kernel size, got 2",
    ),
    (
        dict(biases=replaced(_BIASES, 3, torch.zeros(2))),
        ValueError,
        "biases[max_out]: expected (C_out,) = (3,), got (2,)",
    ),
    (
        dict(statistics=ChannelStatistics(torch.zeros(2, 3), torch.zeros(2, 4))),
        ValueError,
        "statistics[max]: expected (N, C) = (2, 3), got (2, 4)",
    ),
    (dict(statistics=_X.mean((2, 3))), ValueError, "statistics: expected (mean, max), got Tensor"),
    (dict(statistics=(_X[:, :, 0, 0],)), ValueError, "statistics: expected (mean, max), got tuple"),
    (
        dict(statistics=(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3))),
        ValueError,
        "statistics[mean]: expected device cpu as input, got meta",
    ),
    (dict(weights=None), ValueError, f"weights: expected 4 tensors {LAYERS}, got NoneType"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": _X, "weights": _WEIGHTS, "biases": _BIASES, **changed}
    with pytest.raises(error, match=f"^channel_attention: {re.escape(message)}$"):
        channel_attention(**given)


def test_errors_of_the_statistics_and_the_module() -> None:
    with pytest.raises(
        ValueError, match=r"^channel_statistics: input: expected H and W of at least 1"
    ):
        channel_statistics(_X[..., :0])
    with pytest.raises(ValueError, match=r"^ChannelAttention: kernel: expected an odd int, got 2$"):
        ChannelAttention(4, 2, 2)
    with pytest.raises(
        ValueError, match=r"^ChannelAttention: reduction: expected an int >= 1, got 0$"
    ):
        ChannelAttention(4, 0)


def test_module_state_dict() -> None:
    """The names that the bundled weights have."""
    shapes = {k: tuple(t.shape) for k, t in ChannelAttention(32, 8, 3).state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {}
    for name in ("from_mean", "from_max"):
        expected |= {f"{name}.0.weight": (4, 32, 3, 3), f"{name}.0.bias": (4,)}
        expected |= {f"{name}.2.weight": (32, 4, 3, 3), f"{name}.2.bias": (32,)}
    assert shapes == expected
