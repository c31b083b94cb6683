"""pyramid_spatial_attention and its parts: every size, both oracles, gradients, dtypes, layouts, errors."""

from __future__ import annotations

import importlib
import itertools
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
from oracles import (
    PyramidArrays,
    conv_loop,
    gate_loop,
    leaky_relu_loop,
    pool_concat_loop,
    pyramid_loop,
    resize_loop,
    to_array,
)
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from mafnet_ops import (
    PyramidSpatialAttention,
    _native,
    pool_concat,
    pool_concat_conv,
    pyramid_spatial_attention,
    reference,
    resize_add,
    spatial_gate,
)
from mafnet_ops.pyramid_spatial_attention import LAYERS

parts = importlib.import_module("mafnet_ops.pyramid_spatial_attention_parts")
raw_ops = importlib.import_module("mafnet_ops.pyramid_spatial_attention_kernels")
LOW = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = torch.float64
EVERY_SIZE = [(h, w) for h in range(1, 10) for w in range(1, 10)]
KERNELS = {"pool_2": 3, "conv_2": 3, "mask": 3}


def uniform(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return (torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1).to(dtype)


def parameters(channels: int, dtype: torch.dtype = DOUBLE) -> tuple[list[Tensor], list[Tensor]]:
    """Eight weights of unit sums at most, so that no activation is above 2, and biases."""
    weights, biases = [], []
    for seed, name in enumerate(LAYERS):
        fan_in = 2 * channels if name.startswith("pool") else channels
        kernel = KERNELS.get(name, 1)
        weight = uniform(channels, fan_in, kernel, kernel, seed=seed) / (fan_in * kernel**2) * 2
        weights.append(weight.to(dtype))
        biases.append(uniform(channels, dtype=dtype, seed=seed))
    return weights, biases


class Chain(nn.Module):
    """The network of Fig. 2b from torch.nn alone; the names are those of the state dict."""

    def __init__(self, channels: int, mask_from: str = "m", scale: float = 2.0) -> None:
        super().__init__()
        self.mask_from, self.scale = mask_from, scale
        self.max_pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.avg_pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.lrelu = nn.LeakyReLU(0.1)
        for name in LAYERS:
            fan_in = 2 * channels if name.startswith("pool") else channels
            kernel = KERNELS.get(name, 1)
            conv = nn.Conv2d(fan_in, channels, kernel, padding=kernel // 2)
            self.add_module(name, conv)

    def level(self, name: str, x: Tensor) -> Tensor:
        return self.lrelu(self.get_submodule(name)(x))

    def pooled(self, name: str, x: Tensor) -> Tensor:
        return self.level(name, torch.cat([self.max_pool(x), self.avg_pool(x)], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        level_1 = self.pooled("pool_1", self.level("reduce", x))
        level_2 = self.level("conv_2", self.pooled("pool_2", self.level("level_2", level_1)))
        up = nn.Upsample(level_1.shape[2:], mode="bilinear")(level_2)
        up = nn.Upsample(x.shape[2:], mode="bilinear")(self.level("add", up + level_1))
        mask = self.get_submodule("mask")(up)
        feature = self.level("feature", mask)
        gate = torch.sigmoid(mask if self.mask_from == "m" else feature)
        return x * gate * self.scale + feature


def chain(
    channels: int, weights: list[Tensor], biases: list[Tensor], mask_from: str = "m"
) -> nn.Module:
    module = Chain(channels, mask_from).to(weights[0].dtype)
    state = {f"{name}.weight": weight for name, weight in zip(LAYERS, weights)}
    state.update({f"{name}.bias": bias for name, bias in zip(LAYERS, biases)})
    module.load_state_dict(state)
    return module.requires_grad_(False)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def arrays(tensors: list[Tensor]) -> dict[str, Any]:
    return dict(zip(LAYERS, (to_array(t) for t in tensors)))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------- values, every size

# Each of the eight stages is a sum of at most 18 products of factors below 2, on values below 4.
TERMS = 8 * 18


@pytest.mark.parametrize("mask_from", ["m", "feature"])
def test_every_size_equals_both_oracles(mask_from: str) -> None:
    weights, biases = parameters(2)
    module = chain(2, weights, biases, mask_from)
    for size in EVERY_SIZE:
        image = uniform(2, 2, *size)
        out = pyramid_spatial_attention(image, weights, biases, mask_from=mask_from)
        assert_rounding_only(out, module(image), TERMS, 8)
        for one, x in zip(out, image):
            expected = pyramid_loop(
                to_array(x), arrays(weights), arrays(biases), mask_from=mask_from
            )
            assert_rounding_only(one, torch.from_numpy(expected), TERMS, 8)


def test_all_sizes_up_to_70(restored_threads: None) -> None:
    """4,900 of them, across every strip of 64 columns, block of 96 pixels and parity of both levels."""
    torch.set_num_threads(1)  # maps this small are not worth the wait for a second thread
    weights, biases = parameters(2)
    oracle = PyramidArrays(arrays(weights), arrays(biases))
    x = to_array(uniform(2, 13, 10))
    loop = pyramid_loop(x, arrays(weights), arrays(biases))
    assert_rounding_only(torch.from_numpy(oracle(x)), torch.from_numpy(loop), TERMS, 8)
    largest = uniform(1, 2, 70, 70)
    for height, width in itertools.product(range(1, 71), repeat=2):
        image = largest[:, :, :height, :width]
        out = pyramid_spatial_attention(image, weights, biases)[0]
        assert_rounding_only(out, torch.from_numpy(oracle(to_array(image[0]))), TERMS, 8)


def test_gradients_of_sizes_up_to_70() -> None:
    """70 sizes, each height and each width once, against the chain of torch.nn modules."""
    weights, biases = parameters(2)
    module = chain(2, weights, biases)

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return pyramid_spatial_attention(x, rest[:8], rest[8:])

    def expected(x: Tensor, *rest: Tensor) -> Tensor:
        names = [f"{name}.{kind}" for kind in ("weight", "bias") for name in LAYERS]
        return torch.func.functional_call(module, dict(zip(names, rest)), x)

    largest = uniform(1, 2, 70, 70)
    for height in range(1, 71):
        width = 29 * height % 71  # a permutation of 1 ... 70, since 71 is prime
        leaves = [largest[:, :, :height, :width], *weights, *biases]
        for a, e in zip(gradients(call, leaves), gradients(expected, leaves)):
            assert_rounding_only(a, e, TERMS * height * width, 8)


def test_pool_concat_of_every_size() -> None:
    for size in EVERY_SIZE:
        image = uniform(1, 3, *size) - 2  # all negative: padding must not win the maximum
        expected = torch.from_numpy(pool_concat_loop(to_array(image)[0]))[None]
        out = pool_concat(image)
        assert out.shape == (1, 6, -(-size[0] // 2), -(-size[1] // 2))
        assert_same(out[:, :3], expected[:, :3])
        assert_rounding_only(out[:, 3:], expected[:, 3:], 10, 3)


def test_average_counts_the_padding() -> None:
    out = pool_concat(torch.ones(1, 1, 1, 1))
    assert out[0, 0].item() == 1
    assert out[0, 1].item() == pytest.approx(1 / 9, rel=1e-6)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("slope", [0.1, 0.3])
def test_pool_concat_conv(kernel: int, slope: float) -> None:
    weight, bias = uniform(5, 6, kernel, kernel), uniform(5)
    for size in ((1, 1), (1, 4), (5, 2), (6, 7)):
        image = uniform(1, 3, *size)
        pooled = pool_concat_loop(to_array(image)[0])
        conv = conv_loop(pooled, to_array(weight), to_array(bias))
        expected = torch.from_numpy(leaky_relu_loop(conv, slope))[None]
        out = pool_concat_conv(image, weight, bias, slope)
        assert_rounding_only(out, expected, 6 * kernel**2 + 10)
        bare = pool_concat_conv(image, weight, None, slope)
        assert_same(bare, pool_concat_conv(image, weight, bias * 0, slope))


@pytest.mark.parametrize("kernel", [5, 7])
def test_large_kernels_on_a_row_of_bfloat16(kernel: int) -> None:
    """oneDNN's gradient of the weight, where a map of many channels has fewer rows than the padding."""
    tensors = [uniform(1, 63, 1, 6), uniform(70, 126, kernel, kernel, seed=1)]

    def grad_weight(dtype: torch.dtype) -> Tensor:
        image, weight = (t.bfloat16().to(dtype).requires_grad_() for t in tensors)
        return torch.autograd.grad(pool_concat_conv(image, weight).sum(), weight)[0]

    assert_rounding_only(grad_weight(torch.bfloat16), grad_weight(torch.float64).bfloat16(), 3, 2)


def test_resize_add_of_every_size() -> None:
    for small in ((1, 1), (1, 3), (4, 2), (5, 5)):
        for size in EVERY_SIZE:
            image, other = uniform(1, 2, *small), uniform(1, 2, *size, seed=1)
            expected = resize_loop(to_array(image)[0], *size) + to_array(other)[0]
            assert_rounding_only(resize_add(image, other), torch.from_numpy(expected)[None], 20)


@pytest.mark.parametrize("mask_from", ["m", "feature"])
@pytest.mark.parametrize("scale, slope", [(2.0, 0.1), (1.0, 0.3)])
def test_spatial_gate(mask_from: str, scale: float, slope: float) -> None:
    image, mask = uniform(1, 3, 4, 5), uniform(1, 3, 4, 5, seed=1)
    weight, bias = uniform(3, 3, 1, 1), uniform(3)
    x, m, w, b = (to_array(t) for t in (image, mask, weight, bias))
    expected = gate_loop(x[0], m[0], w, b, scale, slope, mask_from)
    out = spatial_gate(image, mask, weight, bias, scale, slope, mask_from)
    assert_rounding_only(out, torch.from_numpy(expected)[None], 12, 3)
    bare = spatial_gate(image, mask, weight, None, scale, slope, mask_from)
    assert_same(bare, spatial_gate(image, mask, weight, bias * 0, scale, slope, mask_from))


def test_an_untrained_gate_is_neutral() -> None:
    image = uniform(1, 3, 4, 5)
    assert_same(spatial_gate(image, image * 0, uniform(3, 3, 1, 1)), image)


# ----------------------------------------------------------------------------------------- gradients


Call = tuple[Callable[..., Tensor], list[Tensor]]


def part_calls(batch: int, channels: int, size: tuple[int, int]) -> dict[str, Call]:
    """Every op as a function of its tensors; random values have no ties in the maximum."""
    weights, biases = parameters(channels)
    image = uniform(batch, channels, *size)
    other = uniform(*image.shape, seed=1)
    small = uniform(batch, channels, max(size[0] // 2, 1), max(size[1] // 2, 1))

    def pyramid(x: Tensor, *rest: Tensor) -> Tensor:
        return pyramid_spatial_attention(x, rest[:8], rest[8:])

    return {
        "pool_concat": (pool_concat, [image]),
        "pool_concat_conv": (
            pool_concat_conv,
            [image, uniform(3, 2 * channels, 3, 3), uniform(3)],
        ),
        "resize_add": (resize_add, [small, image]),
        "spatial_gate": (spatial_gate, [image, other, weights[-1], biases[-1]]),
        "pyramid_spatial_attention": (pyramid, [image, *weights, *biases]),
    }


PARTS = part_calls(1, 2, (5, 4))
PARTS["pyramid of one pixel"] = part_calls(1, 2, (1, 1))["pyramid_spatial_attention"]
all_parts = pytest.mark.parametrize("name", PARTS)


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(uniform(*out.shape).to(out.dtype))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@all_parts
def test_gradcheck_twice(name: str) -> None:
    function, tensors = PARTS[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert gradcheck(function, leaves, fast_mode=len(leaves) > 4)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (7, 1), (9, 6)])
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_values_and_gradients(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Against the chain of torch.nn modules in the same dtype, and in fp64 from the same numbers."""
    weights, biases = parameters(8, dtype)
    image = uniform(2, 8, *size, dtype=dtype)
    modules = [
        chain(8, weights, biases),
        chain(8, doubled(weights), doubled(biases)),
    ]
    out = pyramid_spatial_attention(image, weights, biases)
    baseline, exact = modules[0](image), modules[1](image.double())
    assert_as_accurate(out, baseline, exact, "values", TERMS)

    leaves = [image, *weights, *biases]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return pyramid_spatial_attention(x, rest[:8], rest[8:])

    actual = gradients(call, leaves)
    references = []
    for module, x in zip(modules, (image, image.double())):
        for parameter in module.parameters():
            parameter.requires_grad_().grad = None
        x = x.clone().requires_grad_()
        result = module(x)
        result.backward(uniform(*result.shape).to(dtype).to(result.dtype))
        layers = [module.get_submodule(name) for name in LAYERS]
        grads = [x.grad, *(c.weight.grad for c in layers), *(c.bias.grad for c in layers)]
        references.append(grads)
    assert len(actual) == len(references[0]) == 17
    for a, b, e in zip(actual, *references):
        assert_as_accurate(a, b, e, "gradient", TERMS)


# --------------------------------------------------------------- dtypes, layouts, edges, determinism


@all_parts
@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_layouts(name: str, dtype: torch.dtype) -> None:
    function, tensors = PARTS[name]
    tensors = [t.to(dtype) for t in tensors]
    expected = function(*tensors)
    assert expected.dtype == dtype
    padded = [F.pad(t, (1, 2, 1, 0), value=math.nan)[..., 1:, 1:-2] for t in tensors[:1]]
    variants = {
        "channels_last": tensors[0].contiguous(memory_format=torch.channels_last),
        "transposed": tensors[0].mT.contiguous().mT,
        "slice": padded[0],
    }
    for variant in variants.values():
        out = function(variant, *tensors[1:])
        # Another layout may take another order of summation.
        assert_as_accurate(out, expected, expected.double(), terms=TERMS)


def test_channels_last_in_channels_last_out() -> None:
    weights, biases = parameters(4)
    image = uniform(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    gated = spatial_gate(image, image, weights[-1], biases[-1])
    for out in (
        pool_concat(image),
        pool_concat_conv(image, weights[1], biases[1]),
        resize_add(image, F.pad(image, (0, 3)).contiguous(memory_format=torch.channels_last)),
        gated,
        pyramid_spatial_attention(image, weights, biases),
    ):
        assert out.is_contiguous(memory_format=torch.channels_last)


@all_parts
@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_batch_0(name: str, dtype: torch.dtype) -> None:
    function, tensors = PARTS[name]
    tensors = [
        t[:0].to(dtype) if t.dim() == 4 and i == 0 else t.to(dtype) for i, t in enumerate(tensors)
    ]
    if name in ("resize_add", "spatial_gate"):
        tensors[1] = tensors[1][:0]
    full = function(*(t.to(dtype) for t in PARTS[name][1]))
    assert function(*tensors).shape == (0, *full.shape[1:])
    for tensor, grad in zip(tensors, gradients(function, tensors)):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_biases_may_be_none() -> None:
    weights, biases = parameters(2)
    image = uniform(1, 2, 5, 4)
    expected = pyramid_spatial_attention(image, weights, [b * 0 for b in biases])
    assert_same(pyramid_spatial_attention(image, weights, [None] * 8), expected)


def test_negative_slope_and_scale_reach_every_stage() -> None:
    weights, biases = parameters(2)
    image = uniform(1, 2, 5, 4)
    args = to_array(image)[0], arrays(weights), arrays(biases)
    out = pyramid_spatial_attention(image, weights, biases, 1.5, 0.3)
    expected = torch.from_numpy(pyramid_loop(*args, 1.5, 0.3))[None]
    assert_rounding_only(out, expected, TERMS, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Convolutions in ``dtype``, gate and sum in fp32 with an fp32 input."""
    weights, biases = parameters(8, torch.float32)
    image = uniform(1, 8, 9, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = pyramid_spatial_attention(image, weights, biases)
        baseline = chain(8, weights, biases)(image)
    assert out.dtype == baseline.dtype
    module = chain(8, doubled(weights), doubled(biases))
    assert_as_accurate(out, baseline, module(image.double()), terms=TERMS)


def test_nan_stays_within_its_reach() -> None:
    """A pixel reaches less than 32 pixels around it, through two poolings and four 3 x 3 convolutions."""
    weights, biases = parameters(2)
    image = uniform(1, 2, 3, 80)
    clean = pyramid_spatial_attention(image, weights, biases)
    image[0, 0, 0, 0] = math.nan
    out = pyramid_spatial_attention(image, weights, biases)
    assert out[..., 0, 0].isnan().all()
    assert_same(out[..., 32:], clean[..., 32:])


@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_deterministic_over_runs(dtype: torch.dtype, restored_threads: None) -> None:
    weights, biases = parameters(8, dtype)
    leaves = [uniform(2, 8, 17, 19, dtype=dtype), *weights, *biases]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return pyramid_spatial_attention(x, rest[:8], rest[8:])

    for threads in (1, 2):
        torch.set_num_threads(threads)
        a, b = ([call(*leaves), *gradients(call, leaves)] for _ in range(2))
        for x, y in zip(a, b):
            assert_same(x, y)


@pytest.mark.parametrize("name", part_calls(1, 1, (1, 1)))
def test_compile_fullgraph_with_dynamic_shapes(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Callable[..., Tensor] | None = None
    frames = []
    # No size of the first call equals another of its dimensions by chance: Dynamo would tie them.
    for size in ((37, 45), (53, 62)):
        function, tensors = part_calls(5, 4, size)[name]
        if compiled is None:
            compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        assert_rounding_only(compiled(*tensors), function(*tensors), TERMS, 8)
        frames.append(counter.frame_count)
    # A float argument makes Dynamo trace twice at first; another size adds nothing.
    assert 1 <= frames[0] == frames[1]
    assert counter.op_count > 0


@pytest.mark.parametrize("name", PARTS)
def test_compile_fullgraph_with_gradients(name: str) -> None:
    function, tensors = PARTS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=False)
    for a, e in zip(gradients(compiled, tensors), gradients(function, tensors)):
        assert_rounding_only(a, e, TERMS, 8)
    assert counter.frame_count >= 1 and counter.op_count > 0


# ------------------------------------------------------------------------------ the compiled kernels


NATIVE = "cpu" in raw_ops._NATIVE_DEVICES
native = pytest.mark.skipif(not NATIVE, reason="the extension is not built")


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 1), (3, 5), (6, 195), (5, 383)])
def test_pooling_of_every_vector(size: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """83 channels are vectors of every width, 195 columns more than a block; then numbers that are not finite."""
    image = uniform(2, 83, *size, dtype=dtype).to(memory_format=LAYOUTS[layout])
    for values in ((), (math.inf, -math.inf), (-math.inf,), (math.nan, math.inf)):
        for i, value in enumerate(
            values
        ):  # in the last block, channels of the widest vector and others
            image[1, 5 + i :: 38, -1, max(size[1] - 1 - i, 0)] = value
        out, exact = pool_concat(image), reference.pool_concat(image.double())
        assert_same(out[:, :83].double(), exact[:, :83])
        baseline = reference.pool_concat(image)
        assert_as_accurate(out[:, 83:], baseline[:, 83:], exact[:, 83:], terms=9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_from", ["m", "feature"])
@pytest.mark.parametrize("channels", [16, 64])
def test_gate_of_far_masks(channels: int, mask_from: str, dtype: torch.dtype, layout: str) -> None:
    """Where exp over- and underflows, each mask beside others of its size alone; NaN stays."""
    far = torch.tensor([-math.inf, -1e30, -104, -89, -88, -87, 87, 88, 89, 104, 1e30, math.inf])
    mask = torch.cat([far, torch.tensor([math.nan]), torch.linspace(-86, 86, 1000)]).to(dtype)
    mask = mask.view(1, 1, 1, -1).repeat(1, channels, 3, 1).to(memory_format=LAYOUTS[layout])
    image = uniform(*mask.shape, dtype=dtype).to(memory_format=LAYOUTS[layout])
    weight = torch.zeros(channels, channels, 1, 1, dtype=dtype)
    if mask_from == "feature":  # the mask itself, where it is finite
        weight = torch.eye(channels, dtype=dtype)[..., None, None]
        mask = mask.nan_to_num(0, 104, -104)
    call = weight, None, 2.0, 1.0, mask_from
    out, exact = (
        spatial_gate(image, mask, *call),
        reference.spatial_gate(image.double(), mask.double(), weight.double(), *call[1:]),
    )
    mixed = reference.spatial_gate(image, mask, *call)
    for one in range(mask.shape[-1]):  # of one magnitude each
        parts = (t[..., one] for t in (out, mixed, exact))
        assert_as_accurate(*parts, f"mask {mask[0, 0, 0, one]}", terms=2, roundings=3)


@pytest.mark.parametrize("mask_from", ["m", "feature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 64, 96, 128])
@pytest.mark.parametrize("width", [5, 96, 203])
def test_gate_of_whole_vectors(
    width: int, channels: int, dtype: torch.dtype, mask_from: str
) -> None:
    """Blocks that are done beside the products of the next, blocks cut short, every channel with weights of its own."""
    maps = [uniform(2, channels, 3, width, dtype=dtype, seed=i) for i in range(2)]
    maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    weight = (uniform(channels, channels, 1, 1, dtype=dtype) / channels**0.5).contiguous()
    tensors = [*maps, weight, uniform(channels, dtype=dtype, seed=2)]
    out = spatial_gate(*tensors, 1.5, 0.3, mask_from)
    baseline = reference.spatial_gate(*tensors, 1.5, 0.3, mask_from)
    exact = reference.spatial_gate(*doubled(tensors), 1.5, 0.3, mask_from)
    assert_as_accurate(out, baseline, exact, terms=channels + 12, roundings=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", [(1, 1), (2, 3), (4, 7), (8, 14), (11, 5), (33, 30)])
def test_resize_add_of_every_vector(to: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """83 channels are vectors of every width; rows and columns that nothing goes to, and far more than there were."""
    image = uniform(2, 83, 4, 7, dtype=dtype).to(memory_format=LAYOUTS[layout])
    other = uniform(2, 83, *to, dtype=dtype, seed=1).to(memory_format=LAYOUTS[layout])
    out, baseline = resize_add(image, other), reference.resize_add(image, other)
    exact = reference.resize_add(*doubled([image, other]))
    assert_as_accurate(out, baseline, exact, terms=5)
    uses = math.ceil(2 * to[0] / 4 + 1) * math.ceil(2 * to[1] / 7 + 1)  # of an input pixel
    grads = gradients(resize_add, [image, other])
    baselines = gradients(reference.resize_add, [image, other])
    exacts = gradients(reference.resize_add, doubled([image, other]))
    assert_as_accurate(grads[0], baselines[0], exacts[0], terms=uses)
    assert_same(grads[1], baselines[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_have_the_bits_of_small_ones(dtype: torch.dtype, layout: str) -> None:
    """Large ones are stored around the caches, once their memory exists; a third of the rows is not."""
    image = uniform(1, 64, 192, 256, dtype=dtype).to(memory_format=LAYOUTS[layout])
    weight = uniform(64, 64, 1, 1, dtype=dtype) / 8
    for _ in range(3):  # the first may get new pages
        gated, pooled = spatial_gate(image, image, weight), pool_concat(image)
    for first in range(0, 192, 64):
        rows = image[:, :, first : first + 64].contiguous(memory_format=LAYOUTS[layout])
        assert_same(gated[:, :, first : first + 64], spatial_gate(rows, rows, weight))
        begin, end = first // 2 + 1, first // 2 + 32  # the first of a part pools padding
        assert_same(pooled[:, :, begin:end], pool_concat(rows)[:, :, 1:])


@native
@pytest.mark.parametrize(
    "size, to",
    [
        ((3, 5), (7, 11)),
        ((40, 70), (9, 8)),
        ((2, 100), (65, 200)),
        ((3, 97), (6, 194)),  # twice as large, in strips of an odd width
        ((20, 4), (40, 9)),
    ],
)
def test_convolution_of_what_is_resized(size: tuple[int, int], to: tuple[int, int]) -> None:
    """Up and down by any factor, several strips wide, with values and gradients of PyTorch's chain."""
    tensors = [uniform(2, 3, *size), uniform(5, 3, 3, 3), uniform(5)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _native.call("resize_conv", (x, weight, bias), (*to, 0.3))

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.resize_conv(x, weight, bias, *to, 0.3)

    assert_rounding_only(ours(*tensors), theirs(*tensors), 4 * 27)
    terms = 4 * 27 * to[0] * to[1]
    for a, e in zip(gradients(ours, tensors), gradients(theirs, tensors)):
        assert_rounding_only(a, e, terms)


@native
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_threads_have_no_bearing_on_what_is_resized(
    dtype: torch.dtype, restored_threads: None
) -> None:
    """Bands of rows are cut for the threads: here one of 50 rows, or four."""
    tensors = [uniform(2, 3, 25, 10, dtype=dtype), uniform(5, 3, 3, 3, dtype=dtype)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(_native.call("resize_conv", (*tensors, None), (50, 20, 0.3)))
    assert_same(*results)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _native.call("resize_conv", (x, weight, bias), (*x.shape[2:], 1.0))


@native
@pytest.mark.parametrize("channels, to", [(16, 16), (20, 33), (64, 24)])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (9, 98), (8, 97)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convolution_of_pairs_of_rows(
    channels: int, to: int, size: tuple[int, int], dtype: torch.dtype, restored_threads: None
) -> None:
    """From 16 channels on by Winograd's products: odd ends, several strips and bands, any number of threads."""
    tensors = [uniform(2, channels, *size), uniform(to, channels, 3, 3), uniform(to)]
    low = [t.to(dtype) for t in tensors]

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def all_of(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        return [function(*tensors), *gradients(function, tensors)]

    torch.set_num_threads(1)
    actual = all_of(plain_conv, low)
    exact = all_of(theirs, doubled(low))
    pixels = 2 * size[0] * size[1]
    for a, b, e, terms in zip(
        actual, all_of(theirs, low), exact, (9 * channels, 9 * to, pixels, pixels)
    ):
        assert_as_accurate(a, b, e, terms=terms)
    torch.set_num_threads(2)
    for a, b in zip(actual, all_of(plain_conv, low)):
        assert_same(a, b)


@native
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_pairs_of_rows_keep_infinities(value: float) -> None:
    """What PyTorch gives around a pixel that differences do not bear, and elsewhere the same bits as without it."""
    weight, bias = uniform(16, 16, 3, 3, dtype=torch.float32), torch.zeros(16)
    weight[0] = 0.1  # where infinities and twice 3e38 stay what they are
    image = uniform(1, 16, 8, 9, dtype=torch.float32)
    clean = plain_conv(image, weight, bias)
    image[0, 3, 4:6, 4] = value
    out, expected = plain_conv(image, weight, bias), F.conv2d(image, weight, bias, padding=1)
    near = torch.zeros(8, 9, dtype=torch.bool)
    near[3:7, 3:6] = True
    assert_same(out[..., ~near], clean[..., ~near])
    assert_same(out[..., near].isnan(), expected[..., near].isnan())
    assert_same(out[..., near].isinf(), expected[..., near].isinf())
    torch.testing.assert_close(out[0, 0, near], expected[0, 0, near], equal_nan=True)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run on CUDA, by the kernels of the CPU."""
    monkeypatch.setattr(parts, "saves_launches", lambda input: True)
    monkeypatch.setattr(parts, "has_conv_pool_conv", lambda *tensors: True)


class Launches(TorchDispatchMode):
    """The raw ops of a forward, each of which is one launch on CUDA (the emulator's tests count)."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "mafnet_ops":
            self.ops.append(op.name().removeprefix("mafnet_ops::"))
        return op(*args, **(kwargs or {}))


@native
def test_launches_of_a_forward(on_cuda: None) -> None:
    """The table of docs/ops/pyramid_spatial_attention.md."""
    weights, biases = parameters(4)
    with Launches() as launches:
        pyramid_spatial_attention(uniform(1, 4, 9, 10), weights, biases)
    assert launches.ops == [
        "conv_pool_conv_forward",
        "pointwise_conv_forward",
        "pool_concat_conv_forward",
        "resize_conv_forward",
        "resize_add_conv_forward",
        "resize_conv_forward",
        "spatial_gate_forward",
    ]


@native
def test_what_has_a_kernel_for_the_first_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 and bf16, up to 64 channels of each, in groups of 8."""
    monkeypatch.setattr(raw_ops, "saves_launches", lambda input: True)

    def has(dtype: torch.dtype, inputs: int, middle: int, out: int) -> bool:
        shapes = (1, inputs, 2, 2), (middle, inputs, 1, 1), (out, 2 * middle, 1, 1)
        return raw_ops.has_conv_pool_conv(*(torch.zeros(s, dtype=dtype) for s in shapes))

    assert has(torch.float16, 64, 8, 24) and has(torch.bfloat16, 8, 64, 64)
    assert not has(torch.float32, 64, 64, 64)
    for other in (4, 72):
        for sizes in ((other, 64, 64), (64, other, 64), (64, 64, other)):
            assert not has(torch.float16, *sizes)


@native
@pytest.mark.parametrize("size", [(1, 1), (5, 6)])
def test_steps_in_one_launch(on_cuda: None, size: tuple[int, int]) -> None:
    """The same block, gradients and second derivatives included, where steps are one op."""
    function, tensors = part_calls(1, 2, size)["pyramid_spatial_attention"]
    module = chain(2, tensors[1:9], tensors[9:])
    assert_rounding_only(function(*tensors), module(tensors[0]), TERMS, 8)
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def sum_in_steps(input: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return parts.pointwise_conv(parts.resize_add(input, other), weight, bias, 0.3)


def sum_in_one(input: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return parts.resize_add_conv(input, other, weight, bias, 0.3)


def pool_in_steps(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pooled = parts.pool_concat(input)
    return parts.resize_conv(pooled, weight, bias, pooled.shape[2:], 0.3)


def pool_in_one(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return parts.pool_concat_conv(input, weight, bias, 0.3)


def map_in_steps(input: Tensor, *layers: Tensor) -> Tensor:
    middle = parts.pointwise_conv(input, *layers[:2], 0.3)
    return parts.pool_concat_conv(middle, *layers[2:], 0.3)


def map_in_one(input: Tensor, *layers: Tensor) -> Tensor:
    return parts.conv_pool_conv(input, layers[:2], layers[2:], 0.3)


IN_ONE = {
    "conv_pool_conv": (
        map_in_one,
        map_in_steps,
        ((2, 3, 7, 9), (5, 3, 1, 1), (5,), (4, 10, 1, 1), (4,)),
    ),
    "resize_add_conv": (sum_in_one, sum_in_steps, ((2, 3, 4, 5), (2, 3, 7, 9), (4, 3, 1, 1), (4,))),
    "pool_concat_conv": (pool_in_one, pool_in_steps, ((2, 3, 7, 9), (4, 6, 3, 3), (4,))),
}


@native
@pytest.mark.parametrize("name", IN_ONE)
@pytest.mark.parametrize("dtype", [DOUBLE, *LOW])
def test_values_and_gradients_in_one_launch(on_cuda: None, name: str, dtype: torch.dtype) -> None:
    """Those of the two steps, gradients one at a time too; further derivatives in fp64."""
    one, steps, shapes = IN_ONE[name]
    tensors = [uniform(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    assert_same(one(*tensors), steps(*tensors))
    every = gradients(steps, tensors)
    for a, e in zip(gradients(one, tensors), every):
        assert_same(a, e)
    for i, expected in enumerate(every):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        out = one(*leaves)
        out.backward(uniform(*out.shape).to(dtype))
        grad = leaves[i].grad
        assert grad is not None
        assert_same(grad, expected)
    if dtype == DOUBLE:
        leaves = [t.requires_grad_() for t in tensors]
        assert gradcheck(one, leaves, fast_mode=True, check_forward_ad=True)
        assert gradgradcheck(one, leaves, fast_mode=True)


@native
def test_a_3x3_kernel_passes_opcheck() -> None:
    """The contract tries a 1 x 1."""
    op = torch.ops.mafnet_ops.pool_concat_conv_forward.default
    for image in (uniform(2, 3, 7, 9), uniform(2, 3, 9, 7).mT):
        torch.library.opcheck(op, (image, uniform(4, 6, 3, 3), uniform(4), 0.3))


@native
def test_compile_fullgraph_in_one_launch(on_cuda: None) -> None:
    function, tensors = PARTS["pyramid_spatial_attention"]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, e in zip(gradients(compiled, tensors), gradients(function, tensors)):
        assert_rounding_only(a, e, TERMS, 8)


@pytest.mark.parametrize("part", [pool_concat, lambda x: resize_add(x[:, :, ::2], x)])
def test_output_of_a_part_changed_in_place(part: Callable[[Tensor], Tensor]) -> None:
    """As by an inplace ReLU: backward does not read it."""
    image = uniform(1, 2, 5, 7).requires_grad_()
    (expected,) = torch.autograd.grad((part(image) * 2).sum(), image)
    assert_same(torch.autograd.grad(part(image).mul_(2).sum(), image)[0], expected)


@native
def test_gradient_of_ties_and_nan_goes_to_one_pixel() -> None:
    """The first of the largest gets it, and the last NaN, as in PyTorch."""
    image = torch.zeros(1, 2, 5, 7, dtype=torch.float32)
    image[0, 0, 2, 3] = image[0, 0, 3, 1] = math.nan
    grads = []
    for function in (pool_concat, reference.pool_concat):
        x = image.clone().requires_grad_()
        out = function(x)
        out.backward(torch.arange(1.0, out.numel() + 1).view_as(out))
        assert x.grad is not None
        grads.append((out.detach(), x.grad))
    assert_same(grads[0][0], grads[1][0])
    assert_rounding_only(grads[0][1], grads[1][1], 10, 50)


SIMD_SCRIPT = """
import sys, torch, mafnet_ops
torch.manual_seed(0)
module = mafnet_ops.PyramidSpatialAttention(24)
for dtype in (torch.float32, torch.bfloat16):
    net = module.to(dtype)
    x = torch.randn(1, 24, 21, 37).to(dtype).requires_grad_()
    y = net(x)
    y.sum().backward()
    torch.save([y.detach(), x.grad, net.mask.weight.grad.clone()], f"{sys.argv[1]}.{x.element_size()}")
    net.zero_grad()
    torch.manual_seed(0)
    module = mafnet_ops.PyramidSpatialAttention(24)
"""


@native
def test_every_vector_level(tmp_path: Path) -> None:
    """The same network by the instructions of every level, in processes of their own."""
    levels = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
    for level in levels:
        command = [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / level)]
        subprocess.run(command, check=True, env={**os.environ, "MAFNET_SIMD": level})
    for size, dtype in ((4, torch.float32), (2, torch.bfloat16)):
        first, *others = (torch.load(tmp_path / f"{level}.{size}") for level in levels)
        for other in others:
            for a, b in zip(first, other):
                assert a.dtype == dtype
                error = (a.double() - b.double()).abs().max().item()
                # Sums in another order, and 20 roundings of maps to the dtype.
                bound = 2 * math.sqrt(20) * torch.finfo(dtype).eps + 1e-5
                assert error <= bound * b.abs().max().item()


@native
def test_memory_stays_below_half_of_pytorch() -> None:
    """Bytes that torch's allocator holds at the worst moment of a forward without gradients."""
    weights, biases = parameters(16, torch.float32)
    module = chain(16, weights, biases)
    image = uniform(1, 16, 64, 96, dtype=torch.float32)

    def peak(function: Callable[[], Tensor]) -> int:
        with profile(profile_memory=True) as recorded, torch.no_grad():
            function()
        now = most = 0
        for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    ours = peak(lambda: pyramid_spatial_attention(image, weights, biases))
    assert ours <= peak(lambda: module(image)) / 2


def test_a_negative_slope_is_refused() -> None:
    """The kernels tell the sign of an argument from that of the result."""
    message = "pool_concat_conv: negative_slope: expected at least 0, got -0.1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pool_concat_conv(torch.zeros(1, 2, 3, 3), torch.zeros(2, 4, 1, 1), None, -0.1)


# -------------------------------------------------------------------------------------------- errors

_X = torch.zeros(2, 3, 4, 5)
_W = torch.zeros(3, 3, 1, 1)
_B = torch.zeros(3)
_FLOATS = "expected dtype float64, float32, float16 or bfloat16, got torch.int64"
_GATE = dict(input=_X, mask=_X, weight=_W)
_CONV = dict(input=_X, weight=torch.zeros(4, 6, 3, 3))
Error = tuple[Callable[..., Tensor], dict[str, Any], type[Exception], str]
ERRORS: list[Error] = [
    (pool_concat, dict(input=None), TypeError, "input: expected a torch.Tensor, got NoneType"),
    (pool_concat, dict(input=_X.long()), TypeError, f"input: {_FLOATS}"),
    (
        pool_concat,
        dict(input=_X[0]),
        ValueError,
        "input: expected 4 dimensions, got shape (3, 4, 5)",
    ),
    (
        pool_concat,
        dict(input=_X[:, :, :0]),
        ValueError,
        "input: expected H and W of at least 1, got (2, 3, 0, 5)",
    ),
    (
        pool_concat_conv,
        {**_CONV, "input": _X[..., :0]},
        ValueError,
        "input: expected H and W of at least 1, got (2, 3, 4, 0)",
    ),
    (
        pool_concat_conv,
        {**_CONV, "weight": [0]},
        TypeError,
        "weight: expected a torch.Tensor, got list",
    ),
    (
        pool_concat_conv,
        {**_CONV, "weight": torch.zeros(4, 3, 3, 3)},
        ValueError,
        "weight: expected (C_out, 2 * C, k, k) = (4, 6, 3, 3), got (4, 3, 3, 3)",
    ),
    (
        pool_concat_conv,
        {**_CONV, "weight": torch.zeros(4, 6, 1, 3)},
        ValueError,
        "weight: expected (C_out, 2 * C, k, k) = (4, 6, 3, 3), got (4, 6, 1, 3)",
    ),
    (
        pool_concat_conv,
        {**_CONV, "weight": torch.zeros(4, 6, 2, 2)},
        ValueError,
        "weight: expected an odd kernel size, got 2",
    ),
    (
        pool_concat_conv,
        {**_CONV, "weight": _CONV["weight"].double()},
        TypeError,
        "weight: expected dtype torch.float32 as input, got torch.float64",
    ),
    (
        pool_concat_conv,
        {**_CONV, "weight": _CONV["weight"].to("meta")},
        ValueError,
        "weight: expected device cpu as input, got meta",
    ),
    (
        pool_concat_conv,
        {**_CONV, "bias": _B},
        ValueError,
        "bias: expected (C_out,) = (4,), got (3,)",
    ),
    (
        pool_concat_conv,
        {**_CONV, "bias": _W},
        ValueError,
        "bias: expected 1 dimensions, got shape (3, 3, 1, 1)",
    ),
    (
        resize_add,
        dict(input=_X, other=_X[:, :2]),
        ValueError,
        "input: expected N and C of other = (2, 2, 4, 5), got (2, 3, 4, 5)",
    ),
    (
        resize_add,
        dict(input=_X, other=_X[..., :0]),
        ValueError,
        "other: expected H and W of at least 1, got (2, 3, 4, 0)",
    ),
    (
        resize_add,
        dict(input=_X[:, :, :0], other=_X),
        ValueError,
        "input: expected H and W of at least 1, got (2, 3, 0, 5)",
    ),
    (resize_add, dict(input=_X.long(), other=_X), TypeError, f"input: {_FLOATS}"),
    (resize_add, dict(input=_X, other=1), TypeError, "other: expected a torch.Tensor, got int"),
    (
        resize_add,
        dict(input=_X, other=_X.to("meta")),
        ValueError,
        "other: expected device cpu as input, got meta",
    ),
    (
        spatial_gate,
        {**_GATE, "mask": _X[..., :4]},
        ValueError,
        "mask: expected the shape of input = (2, 3, 4, 5), got (2, 3, 4, 4)",
    ),
    (
        spatial_gate,
        {**_GATE, "mask": _X.to("meta")},
        ValueError,
        "mask: expected device cpu as input, got meta",
    ),
    (
        spatial_gate,
        {**_GATE, "weight": torch.zeros(3, 3, 3, 3)},
        ValueError,
        "weight: expected (C, C, 1, 1) = (3, 3, 1, 1), got (3, 3, 3, 3)",
    ),
    (
        spatial_gate,
        {**_GATE, "bias": torch.zeros(4)},
        ValueError,
        "bias: expected (C_out,) = (3,), got (4,)",
    ),
    (
        spatial_gate,
        {**_GATE, "mask_from": "mask"},
        ValueError,
        "mask_from: expected 'm' or 'feature', got 'mask'",
    ),
]


@pytest.mark.parametrize(
    "function, given, error, message", ERRORS, ids=[f"{e[0].__name__} {e[3]}" for e in ERRORS]
)
def test_errors_of_the_parts(
    function: Callable[..., Tensor], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: {re.escape(message)}$"):
        function(**given)


def replaced(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


WEIGHTS, BIASES = parameters(3, torch.float32)
PYRAMID_ERRORS = [
    (dict(input=None), TypeError, "input: expected a torch.Tensor, got NoneType"),
    (
        dict(input=_X[:, :, :0]),
        ValueError,
        "input: expected H and W of at least 1, got (2, 3, 0, 5)",
    ),
    (dict(weights=WEIGHTS[:7]), ValueError, f"weights: expected 8 tensors {LAYERS}, got 7"),
    (dict(biases=BIASES[:7]), ValueError, "biases: expected 8 tensors or None, got 7"),
    (
        dict(weights=replaced(WEIGHTS, 3, WEIGHTS[4])),
        ValueError,
        "weights[pool_2]: expected (C_out, C_in, k, k) = (3, 6, 3, 3), got (3, 3, 3, 3)",
    ),
    (
        dict(weights=replaced(WEIGHTS, 6, _W)),
        ValueError,
        "weights[mask]: expected (C_out, C_in, k, k) = (3, 3, 3, 3), got (3, 3, 1, 1)",
    ),
    (
        dict(weights=replaced(WEIGHTS, 0, None)),
        TypeError,
        "weights[reduce]: expected a torch.Tensor, got NoneType",
    ),
    (
        dict(weights=replaced(WEIGHTS, 7, _W.double())),
        TypeError,
        "weights[feature]: expected dtype torch.float32 as input, got torch.float64",
    ),
    (
        dict(biases=replaced(BIASES, 5, _B.to("meta"))),
        ValueError,
        "biases[add]: expected device cpu as input, got meta",
    ),
    (
        dict(biases=replaced(BIASES, 1, _B[:2])),
        ValueError,
        "biases[pool_1]: expected (C_out,) = (3,), got (2,)",
    ),
    (dict(weights=None), ValueError, f"weights: expected 8 tensors {LAYERS}, got NoneType"),
    (dict(biases=3), ValueError, "biases: expected 8 tensors or None, got int"),
    (dict(scale=None), TypeError, "scale: expected a number, got None"),
    (dict(mask_from="x"), ValueError, "mask_from: expected 'm' or 'feature', got 'x'"),
]


@pytest.mark.parametrize(
    "changed, error, message", PYRAMID_ERRORS, ids=[e[2] for e in PYRAMID_ERRORS]
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": _X, "weights": WEIGHTS, "biases": BIASES, **changed}
    with pytest.raises(error, match=f"^pyramid_spatial_attention: {re.escape(message)}$"):
        pyramid_spatial_attention(**given)


def test_fp64_beside_what_autocast_lowers_is_refused() -> None:
    message = r"^pyramid_spatial_attention: weights\[add\]: expected dtype torch.float32 as input"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        pyramid_spatial_attention(_X, replaced(WEIGHTS, 5, _W.double()), BIASES)


# -------------------------------------------------------------------------------------------- module


def test_module_state_dict() -> None:
    shapes = {k: tuple(t.shape) for k, t in PyramidSpatialAttention(5).state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {}
    for name, fan_in, kernel in (
        ("reduce", 5, 1),
        ("pool_1", 10, 1),
        ("level_2", 5, 1),
        ("pool_2", 10, 3),
        ("conv_2", 5, 3),
        ("add", 5, 1),
        ("mask", 5, 3),
        ("feature", 5, 1),
    ):
        expected |= {f"{name}.weight": (5, fan_in, kernel, kernel), f"{name}.bias": (5,)}
    assert shapes == expected


@pytest.mark.parametrize("mask_from, scale", [("m", 2.0), ("feature", 1.0)])
def test_module_equals_the_chain(mask_from: str, scale: float) -> None:
    torch.manual_seed(0)
    module = PyramidSpatialAttention(4, scale, mask_from).double()
    other = Chain(4, mask_from, scale).double()
    other.load_state_dict(module.state_dict())
    image = uniform(2, 4, 7, 6)
    assert_rounding_only(module(image).detach(), other(image).detach(), TERMS, 8)
    module(image).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    with pytest.raises(ValueError, match="mask_from: expected 'm' or 'feature', got 'x'"):
        PyramidSpatialAttention(4, mask_from="x")
