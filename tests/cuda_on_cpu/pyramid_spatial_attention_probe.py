"""What must notice the loss of any barrier or condition of the kernels of pyramid_spatial_attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from cuda_on_cpu.emulator import Kernels
from cuda_on_cpu.flow_warp_cases import LAYOUTS, misaligned
from cuda_on_cpu.pyramid_spatial_attention_cases import CONVOLUTIONS, PARTS, Part, wide_gate

HALF = torch.float16


def probe(kernels: Kernels) -> None:
    probe_parts(kernels)
    probe_layouts(kernels)
    probe_sizes(kernels)
    probe_choices(kernels)


def probe_parts(kernels: Kernels) -> None:
    """Each part in both layouts and dtypes, on more than one step of pixels; an empty batch."""
    for op in PARTS:
        for dtype in (torch.float32, HALF):
            for layout in ("contiguous", "channels_last"):
                Part.random(op, (2, 8, 5, 6), dtype=dtype, layout=layout).check(kernels)
        empty = Part.random(op, (0, 4, 3, 5))
        output = empty.forward(kernels)
        grads = empty.backward(kernels, output)
        empty.check_results(output, grads)


def probe_layouts(kernels: Kernels) -> None:
    """Gaps in memory; channels that fill no group, alone and with every pixel aligned."""
    for dtype in (torch.float32, HALF):
        for layout in LAYOUTS:
            Part.random("resize_add", (2, 16, 3, 4), dtype=dtype, layout=layout).check(kernels)
            Part.random("pointwise_conv", (2, 13, 2, 3), 8, None, dtype, layout).check(kernels)
    Part.random("pointwise_conv", (2, 12, 2, 3), 8, None, HALF, "padded_pixels").check(kernels)
    dense = Part.random("pointwise_conv", (2, 16, 2, 3), None, None, HALF, "channels_last")
    replace(dense, images=(misaligned(dense.images[0]),)).check(kernels)
    replace(dense, grad_output=misaligned(dense.grad_output)).check(kernels)


def probe_sizes(kernels: Kernels) -> None:
    """Tiles and steps that are not full, resizes along one axis, more weights than fit."""
    Part.random("pointwise_conv", (1, 20, 3, 4), layout="channels_last").check(kernels)
    Part.random("pointwise_conv", (1, 72, 1, 3), 72, None, HALF, "channels_last").check(kernels)
    Part.random("pointwise_conv", (1, 8, 1, 3), 72).check(kernels)
    Part.random("pointwise_conv", (1, 4, 2, 300)).check(kernels)  # two ranges
    Part.random("pool_concat", (1, 4, 300, 1)).check(kernels)
    for size in ((5, 4), (3, 7)):
        Part.random("resize_conv", (1, 4, 3, 4), None, size).check(kernels)
    Part.random("resize_conv", (1, 12, 3, 4), 8, (5, 6), HALF, "channels_last").check(kernels)
    Part.random("resize_add", (1, 4, 3, 4), None, (7, 6), layout="channels_last").check(kernels)
    large = Part.random("pool_concat_conv", (1, 320, 3, 3), 8, None, HALF, "channels_last")
    large.check_results(large.forward(kernels), {})


def probe_choices(kernels: Kernels) -> None:
    """Without bias, one gradient alone, the gate of the feature and of fp32 images."""
    for op in (*CONVOLUTIONS, "spatial_gate"):
        part = Part.random(op, (1, 8, 3, 4), None, (5, 6) if op == "resize_conv" else None)
        without = replace(part, parameters=(part.parameters[0], None))
        without.check(kernels)
        output = part.forward(kernels)
        for name in ("input", "weight", "bias", *(("mask",) if op == "spatial_gate" else ())):
            part.check_results(output, part.backward(kernels, output, wanted=(name,)))
    gate = Part.random("spatial_gate", (1, 8, 3, 4), dtype=HALF)
    for from_feature in (False, True):
        wide_gate(replace(gate, from_feature=from_feature)).check(kernels)
    nan = Part.random("pool_concat", (1, 4, 3, 4))
    nan.images[0][:, :, 1, 1] = torch.nan
    nan.check(kernels)
