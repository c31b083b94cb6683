"""The CUDA kernels of pyramid_spatial_attention and its parts, run on the CPU by the emulator in tests/cuda_on_cpu.

The fast build gives values, in three orders of the threads; the checked build also watches every access. Both are
held to the reference in fp64. Outputs come poisoned, so one that is not written is a NaN.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, needs_emulator
from cuda_on_cpu.flow_warp_cases import LAYOUTS, laid_out, misaligned
from cuda_on_cpu.pyramid_spatial_attention_cases import (
    CONVOLUTIONS,
    FORWARD_ONLY,
    PARTS,
    RESIZED,
    Part,
    TwoLayers,
    wide_gate,
)
from tolerances import assert_same

pytestmark = needs_emulator

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
parts = pytest.mark.parametrize("op", PARTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(scope="module", params=["fast", "checked"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return emulate("pyramid_spatial_attention", checked=request.param == "checked")


# ------------------------------------------------------------------------------ values and gradients


@parts
@dtypes
def test_matches_the_reference(kernels: Kernels, op: str, dtype: torch.dtype) -> None:
    """Odd sizes, and for what resizes a factor that is not 2."""
    size = (5, 7) if op in RESIZED else None
    for layout in ("contiguous", "channels_last", "strided"):
        Part.random(op, (2, 8, 4, 5), None, size, dtype, layout).check(kernels)


@parts
@pytest.mark.parametrize("channels", [1, 3, 64, 65])
def test_channels_around_vectors_and_tiles(kernels: Kernels, op: str, channels: int) -> None:
    # Of one gradient alone the largest could be a sum whose terms cancel, which no tolerance is for.
    out = 8 if op in CONVOLUTIONS and channels == 1 else None
    for dtype in (torch.float32, torch.float16):
        for layout in ("contiguous", "channels_last"):
            Part.random(op, (1, channels, 2, 3), out, None, dtype, layout).check(kernels)


@pytest.mark.parametrize("op", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensor_cores(kernels: Kernels, op: str, dtype: torch.dtype) -> None:
    """Steps of 32 channels that are not full, two tiles of outputs, tiles of 128 pixels, odd layouts beside."""
    size = (3, 7) if op in RESIZED else None
    for channels, out in ((8, 8), (40, 72), (16, 12)):
        part = Part.random(op, (1, channels, 5, 4), out, size, dtype, "channels_last")
        part.check(kernels)
        strided = laid_out(part.grad_output, "strided")
        replace(part, grad_output=strided).check(kernels)
    size = (11, 25) if op in RESIZED else None
    Part.random(op, (1, 8, 12, 26), 8, size, dtype, "channels_last").check(kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_patches(kernels: Kernels, dtype: torch.dtype) -> None:
    """One of 8 x 16 pixels; one more row and column, of two images, with two steps and two tiles of outputs."""
    for shape, out in (((1, 8, 16, 32), 8), ((2, 40, 17, 33), 72)):
        part = Part.random("pool_concat_conv_3x3", shape, out, None, dtype, "channels_last")
        part.check(kernels, ORDERS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_patches_without_tensor_cores(kernels: Kernels, layout: str) -> None:
    """One of 8 x 8 pixels; one more row and column, of two images, with two steps and two tiles of outputs."""
    for shape, out in (((1, 4, 16, 16), 8), ((2, 20, 17, 17), 72)):
        part = Part.random("pool_concat_conv_3x3", shape, out, layout=layout)
        part.check(kernels, ORDERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_layers_in_one_launch(kernels: Kernels, dtype: torch.dtype) -> None:
    """The bits of two launches: a row, a patch of 8 x 16 pooled pixels, one more row and column of two images."""
    for shape, middle, out in (
        ((1, 8, 1, 3), 8, 8),
        ((1, 64, 16, 32), 64, 64),
        ((2, 40, 17, 33), 24, 56),
    ):
        TwoLayers.random(shape, middle, out, dtype).check(kernels, ORDERS)


def test_two_layers_with_nan_and_without_bias(kernels: Kernels) -> None:
    layers = TwoLayers.random((1, 16, 5, 7), 16, 16, layout="padded_pixels")
    layers.input[0, :, 2, 3], layers.input[0, :, 4, 6] = math.nan, math.inf
    (first, _), (second, _) = layers.first, layers.second
    replace(layers, first=(first, None), second=(second, None)).check(kernels)


def test_two_layers_that_have_no_kernel(kernels: Kernels) -> None:
    """Other dtypes, numbers of channels and layouts."""
    shape = (1, 8, 3, 4)
    for dtype in (torch.float64, torch.float32):
        TwoLayers.random(shape, 8, 8, dtype).check_refused(kernels)
    for inputs, middle, out in (
        (12, 8, 8),
        (8, 12, 8),
        (8, 8, 12),
        (72, 8, 8),
        (8, 72, 8),
        (8, 8, 72),
    ):
        TwoLayers.random((1, inputs, 3, 4), middle, out).check_refused(kernels)
    TwoLayers.random(shape, 8, 8, layout="contiguous").check_refused(kernels)
    TwoLayers.random((1, 12, 3, 4), 8, 8, layout="padded_pixels").check_refused(kernels)
    replace(TwoLayers.random(shape, 8, 8), misaligned=True).check_refused(kernels)


def test_more_weights_than_fit(kernels: Kernels) -> None:
    """27 steps of a 3 x 3 kernel, and 20 of two parts, of which shared memory holds 18."""
    Part.random("resize_conv", (1, 72, 2, 3), 8, None, torch.float16, "channels_last").check(
        kernels
    )
    Part.random("pool_concat_conv", (1, 320, 3, 3), 8, None, torch.float16, "channels_last").check(
        kernels
    )


def test_blocks_that_walk_over_tiles(kernels: Kernels) -> None:
    """More tiles of 128 pixels than the 264 blocks that share them."""
    part = Part.random(
        "pointwise_conv", (1, 8, 2, 16920), dtype=torch.float16, layout="channels_last"
    )
    output = part.forward(kernels)
    part.check_results(output, {})


@pytest.mark.parametrize("op", CONVOLUTIONS)
@pytest.mark.parametrize("out", [1, 5, 72])
def test_other_numbers_of_outputs(kernels: Kernels, op: str, out: int) -> None:
    for layout in ("contiguous", "channels_last"):
        Part.random(op, (1, 8, 3, 4), out, layout=layout).check(kernels)


@parts
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (2, 3)], ids=str)
def test_thin_images(kernels: Kernels, op: str, shape: tuple[int, int]) -> None:
    Part.random(op, (2, 4, *shape), layout="channels_last").check(kernels)
    if op in RESIZED:
        for size in ((1, 1), (5, 4), (1, 7)):
            Part.random(op, (2, 4, *shape), None, size).check(kernels)


@pytest.mark.parametrize("op", RESIZED)
@pytest.mark.parametrize("size", [(2, 3), (6, 8), (11, 13), (3, 20)], ids=str)
def test_resizing_up_and_down(kernels: Kernels, op: str, size: tuple[int, int]) -> None:
    Part.random(op, (1, 4, 6, 7), None, size, layout="channels_last").check(kernels)


@parts
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_threads(kernels: Kernels, op: str, order: str) -> None:
    """More than one block, with the same bits in every order."""
    resized = op in RESIZED
    shape, size = ((2, 8, 9, 9), (10, 8)) if resized else ((2, 8, 13, 11), None)
    part = Part.random(op, shape, None, size, torch.bfloat16, "channels_last")
    part.check(kernels, (order, "forward"))


def test_ranges_of_pixels(kernels: Kernels) -> None:
    """The gradient of a weight sums two ranges, one of 512 pixels and one that is not full."""
    Part.random("pointwise_conv", (1, 3, 3, 200)).check(kernels, ORDERS[:2])


@parts
def test_layouts(kernels: Kernels, op: str) -> None:
    """Channels last with gaps, and one image in an odd layout beside dense ones."""
    dense = Part.random(op, (2, 8, 2, 3), dtype=torch.float16, layout="channels_last")
    for layout in LAYOUTS:
        other = Part.random(op, (2, 8, 2, 3), dtype=torch.float16, layout=layout)
        other.check(kernels)
        replace(dense, images=other.images).check(kernels)
        replace(dense, grad_output=other.grad_output).check(kernels)
    images = tuple(misaligned(image) for image in dense.images)
    replace(dense, images=images).check(kernels)
    replace(dense, grad_output=misaligned(dense.grad_output)).check(kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("from_feature", [False, True])
def test_gate_of_wide_images(kernels: Kernels, dtype: torch.dtype, from_feature: bool) -> None:
    for layout in ("contiguous", "channels_last"):
        gate = Part.random(
            "spatial_gate", (2, 8, 4, 5), dtype=dtype, layout=layout, from_feature=from_feature
        )
        gate.check(kernels)
        wide_gate(gate).check(kernels)


@pytest.mark.parametrize("op", [*CONVOLUTIONS, "spatial_gate"])
def test_without_bias_and_other_slopes(kernels: Kernels, op: str) -> None:
    part = Part.random(op, (1, 8, 4, 5), layout="channels_last")
    weight = part.parameters[0]
    replace(part, parameters=(weight, None)).check(kernels)
    for slope in (0.0, 1.0):
        replace(part, slope=slope).check(kernels)


@pytest.mark.parametrize("op", sorted({*CONVOLUTIONS, "spatial_gate"} - {*FORWARD_ONLY}))
def test_one_gradient_alone(kernels: Kernels, op: str) -> None:
    size = (7, 9) if op == "resize_conv" else None
    part = Part.random(op, (1, 8, 4, 5), None, size)
    output = part.forward(kernels)
    every = part.backward(kernels, output)
    for name in every:
        alone = part.backward(kernels, output, wanted=(name,))
        assert_same(alone[name], every[name])


# ---------------------------------------------------------------------------------------------- edges


@parts
def test_empty_batch(kernels: Kernels, op: str) -> None:
    part = Part.random(op, (0, 4, 3, 5))
    assert part.forward(kernels).numel() == 0
    if op in CONVOLUTIONS and op not in FORWARD_ONLY:
        grads = part.backward(kernels, part.forward(kernels))
        assert not grads["weight"].any()
        assert not grads["bias"].any()


def test_the_first_of_equal_maxima_and_the_last_nan_win(kernels: Kernels) -> None:
    equal = Part.random("pool_concat", (1, 8, 5, 6), layout="channels_last")
    same = torch.zeros_like(equal.images[0])
    spoilt = same.clone()
    spoilt[:, :, 1, 2], spoilt[:, :, 2, 3], spoilt[:, :, 4, 4] = math.nan, math.nan, -math.inf
    for image in (same, spoilt, same - math.inf):
        part = replace(equal, images=(image,))
        output, grad = part.reference(torch.float32)
        assert_same(part.forward(kernels).isnan(), output.isnan())
        grads = part.backward(kernels, output)
        torch.testing.assert_close(grads["input"], grad, rtol=1e-6, atol=1e-6)


@parts
def test_nan_stays_where_it_belongs(kernels: Kernels, op: str) -> None:
    """One pixel is NaN: so are the outputs that it reaches, and no others. None has a weight of zero."""
    size = (8, 10) if op in RESIZED else None
    for layout in ("contiguous", "channels_last"):
        part = Part.random(op, (2, 8, 4, 5), None, size, layout=layout)
        spoilt = part.images[0].clone()
        spoilt[0, :, 2, 3] = math.nan
        part = replace(part, images=(laid_out(spoilt, layout), *part.images[1:]))
        assert_same(part.forward(kernels).isnan(), part.reference()[0].isnan())


def test_pixels_without_weight_do_not_count(kernels: Kernels) -> None:
    """A resize to the same size is the identity, beside infinities too; forward and backward."""
    part = Part.random("resize_add", (1, 8, 4, 5), layout="channels_last")
    spoilt = part.images[0].clone()
    spoilt[:, :, ::2, ::3] = math.inf
    zeros = torch.zeros_like(part.images[1])
    part = replace(part, images=(spoilt, zeros), grad_output=spoilt)
    assert_same(part.forward(kernels), spoilt)
    assert_same(part.backward(kernels, spoilt)["input"], spoilt)


# ---------------------------------------------------------------------------- what the tests can see


@parts
def test_a_wrong_value_is_noticed(kernels: Kernels, op: str) -> None:
    part = Part.random(op, (1, 4, 4, 5))
    output = part.forward(kernels)
    results = {"output": output, **part.backward(kernels, output)}
    for name in results:
        wrong = {key: value.clone() for key, value in results.items()}
        wrong[name].view(-1)[0] += 1e-3
        with pytest.raises(AssertionError):
            part.check_results(wrong.pop("output"), wrong)
