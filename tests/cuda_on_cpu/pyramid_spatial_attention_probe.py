"""What must notice the loss of any barrier or condition of the kernels of pyramid_spatial_attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from cuda_on_cpu.emulator import Check, Kernels
from cuda_on_cpu.flow_warp_cases import LAYOUTS, misaligned
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
from torch import Tensor

HALF = torch.float16
IDLE = {
    ("convolution_backward.cu", "p.grad_input.data != nullptr"): "workspace for nobody",
    ("convolution_backward.cu", "needs_map(p, form)"): "more workspace than is used",
    (
        "convolution_backward.cu",
        "(form == ConvForm::kPool || !is_same_size(p))",
    ): "more workspace than is used",
    (
        "convolution_backward.cu",
        "(is_same_size(p))",
    ): "a resize to the same size gives the same, slower",
    ("image.cuh", "channels_last"): "which thread does what",
    ("image.cuh", "kAccess == Access::kEither"): "saves code",
    ("image.cuh", "kAccess != Access::kVectors"): "saves code",
    ("resize.cu", "weight_y == 0"): "the weights' product is looked at again",
    (
        "tensor_core.cuh",
        "units > kMostUnits || tile == blockIdx.x",
    ): "saves reading the same weights again",
    ("tensor_core.cuh", "has_bfloat16_tensor_cores()"): "the emulator has them",
    (
        "tensor_core_pool.cuh",
        "second.pixels == 0",
    ): "an empty image lies anywhere here, so that it is refused before",
    ("weight_gradient.cuh", "p.wanted()"): "more workspace than is used",
    ("weight_gradient.cuh", "p.outputs == 0"): "nothing is launched for no outputs",
}


def every_other_channel(image: Tensor) -> Tensor:
    """The same image, in which the channels of a pixel do not follow each other."""
    return image.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2]


def check_empty(kernels: Kernels, op: str) -> None:
    empty = Part.random(op, (0, 4, 3, 5))
    output = empty.forward(kernels)
    empty.check_results(output, empty.backward(kernels, output))


def check_forward(kernels: Kernels, part: Part) -> None:
    part.check_results(part.forward(kernels), {})


def check_one_gradient(kernels: Kernels, part: Part, wanted: str) -> None:
    output = part.forward(kernels)
    part.check_results(output, part.backward(kernels, output, wanted=(wanted,)))


def check_failing_launches(kernels: Kernels, op: str) -> None:
    part = Part.random(op, (1, 4, 3, 4))
    if op in FORWARD_ONLY:
        kernels.check_failing_launches(lambda: part.forward(kernels))
    else:
        output = part.forward(kernels)
        kernels.check_failing_launches(lambda: part.backward(kernels, output))


def check_weightless_gradients(kernels: Kernels) -> None:
    """A resize to the same size weighs every neighbour by zero: a NaN stays where it is."""
    part = Part.random("resize_add", (1, 4, 3, 4), None, (3, 4))
    spoilt = part.grad_output.clone()
    spoilt[:, :, 1, 2] = torch.nan
    part = replace(part, grad_output=spoilt)
    assert_same(part.backward(kernels, part.forward(kernels))["input"], spoilt)


def probe() -> list[Check]:
    return [
        *probe_parts(),
        *probe_layouts(),
        *probe_sizes(),
        *probe_choices(),
        *probe_two_layers(),
    ]


def probe_parts() -> list[Check]:
    """Each part in both layouts and dtypes, on more than one step of pixels; an empty batch; no launch succeeds."""
    checks: list[Check] = []
    for op in PARTS:
        for dtype in (torch.float32, HALF):
            for layout in ("contiguous", "channels_last"):
                checks.append(Part.random(op, (2, 8, 5, 6), dtype=dtype, layout=layout).check)
        checks.append(partial(check_empty, op=op))
        checks.append(partial(check_failing_launches, op=op))
    return checks


def probe_layouts() -> list[Check]:
    """Gaps in memory; channels that fill no group, alone and with every pixel aligned."""
    checks: list[Check] = []
    for dtype in (torch.float32, HALF):
        for layout in LAYOUTS:
            checks += [
                Part.random("resize_add", (2, 16, 3, 4), dtype=dtype, layout=layout).check,
                Part.random("pointwise_conv", (2, 13, 2, 3), 8, None, dtype, layout).check,
            ]
    dense = Part.random("pointwise_conv", (2, 16, 2, 3), None, None, HALF, "channels_last")
    gate = Part.random("spatial_gate", (1, 8, 3, 4), None, None, HALF, "channels_last")
    for name in ("input", "mask", "output", "grad_output", "grad_input", "grad_mask"):
        checks.append(replace(gate, misaligned=name).check)
    checks += [replace(dense, misaligned=name).check for name in ("output", "grad_input")]
    summed = Part.random("resize_add_conv", (1, 8, 3, 4), None, (5, 6), HALF, "channels_last")
    checks += [replace(summed, misaligned=name).check for name in ("input", "other", "output")]
    return [
        *checks,
        Part.random("pointwise_conv", (2, 12, 2, 3), 8, None, HALF, "padded_pixels").check,
        replace(dense, images=(misaligned(dense.images[0]),)).check,
        replace(dense, grad_output=misaligned(dense.grad_output)).check,
        replace(dense, images=(every_other_channel(dense.images[0]),)).check,
        check_weightless_gradients,
    ]


def probe_sizes() -> list[Check]:
    """Tiles and steps that are not full, resizes along one axis, more weights than fit."""
    large = Part.random("pool_concat_conv", (1, 320, 3, 3), 8, None, HALF, "channels_last")
    return [
        Part.random("pointwise_conv", (1, 20, 3, 4), layout="channels_last").check,
        Part.random("pointwise_conv", (1, 72, 1, 3), 72, None, HALF, "channels_last").check,
        Part.random("pointwise_conv", (1, 8, 1, 3), 72).check,
        Part.random("pointwise_conv", (1, 4, 2, 300)).check,  # two ranges
        Part.random("pool_concat", (1, 4, 300, 1)).check,
        *(Part.random("resize_conv", (1, 4, 3, 4), None, size).check for size in ((5, 4), (3, 7))),
        Part.random("resize_conv", (1, 12, 3, 4), 8, (5, 6), HALF, "channels_last").check,
        Part.random("resize_add", (1, 4, 3, 4), None, (7, 6), layout="channels_last").check,
        partial(check_forward, part=large),
        *probe_patches(),
    ]


def probe_patches() -> list[Check]:
    """One more row or column than a patch has, two steps of channels, two tiles of outputs."""
    op = "pool_concat_conv_3x3"
    half = [((2, 8, 17, 3), 8), ((1, 8, 3, 33), 8), ((1, 40, 3, 3), 8), ((1, 8, 3, 3), 72)]
    single = [((2, 4, 17, 3), 4), ((1, 4, 3, 17), 4), ((1, 20, 3, 3), 4), ((1, 4, 3, 3), 72)]
    return [
        *(Part.random(op, shape, out, None, HALF, "channels_last").check for shape, out in half),
        *(Part.random(op, shape, out).check for shape, out in single),
    ]


def probe_choices() -> list[Check]:
    """Without bias, one gradient alone, the gate of the feature and of fp32 images."""
    checks: list[Check] = []
    for op in (*CONVOLUTIONS, "spatial_gate"):
        part = Part.random(op, (1, 8, 3, 4), None, (5, 6) if op in RESIZED else None)
        checks.append(replace(part, parameters=(part.parameters[0], None)).check)
        if op in FORWARD_ONLY:
            continue
        for name in ("input", "weight", "bias", *(("mask",) if op == "spatial_gate" else ())):
            checks.append(partial(check_one_gradient, part=part, wanted=name))
    gate = Part.random("spatial_gate", (1, 8, 3, 4), dtype=HALF)
    checks += [wide_gate(replace(gate, from_feature=how)).check for how in (False, True)]
    nan = Part.random("pool_concat", (1, 4, 3, 4))
    nan.images[0][:, :, 1, 1] = torch.nan
    return [*checks, nan.check]


def check_failing_launch_of_two_layers(kernels: Kernels) -> None:
    layers = TwoLayers.random((1, 8, 3, 4), 8, 8)
    output = layers.steps(kernels)
    kernels.check_failing_launches(lambda: layers.run(kernels, output))


def probe_two_layers() -> list[Check]:
    """Patches that are not full, two steps of channels; what has no kernel."""
    few = TwoLayers.random((1, 8, 3, 4), 8, 8)
    wrong = [(12, 8, 8), (8, 12, 8), (8, 8, 12), (72, 8, 8), (8, 72, 8), (8, 8, 72)]
    refused = [
        *(TwoLayers.random((1, i, 3, 4), middle, out) for i, middle, out in wrong),
        TwoLayers.random((1, 8, 3, 4), 8, 8, torch.float32),
        TwoLayers.random((1, 8, 3, 4), 8, 8, layout="contiguous"),
        TwoLayers.random((1, 12, 3, 4), 8, 8, layout="padded_pixels"),
        replace(few, misaligned=True),
    ]
    shapes = [(2, 8, 17, 3), (1, 40, 3, 33)]
    return [
        few.check,
        replace(few, first=(few.first[0], None)).check,
        *(TwoLayers.random(shape, 40, 40).check for shape in shapes),
        *(layers.check_refused for layers in refused),
        check_failing_launch_of_two_layers,
    ]
