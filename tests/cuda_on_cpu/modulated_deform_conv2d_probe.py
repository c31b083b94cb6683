"""What must notice the loss of any barrier or condition of the kernels of modulated_deform_conv2d."""

from __future__ import annotations

from cuda_on_cpu import (
    deform_align_cases,
    modulated_deform_conv2d_backward_cases,
    modulated_deform_conv2d_cases,
    modulated_deform_conv2d_tensor_core_cases,
)
from cuda_on_cpu.emulator import Check

_LARGE = "images of this size are too large for a test"
_DENSE = "output is allocated densely: channels last and aligned wherever input is"
_POSITION = "saves a position that is there already"
_BOUNDS = "the way that asks where corners lie serves every sample"
IDLE = {
    **{
        (f"{file}.cu", "offset_group != sampled_group"): _POSITION
        for file in ("forward", "backward_weight")
    },
    (
        "backward.cu",
        "p.grad_input != nullptr || p.grad_offset != nullptr || p.grad_mask != nullptr || "
        "p.flow_partials != nullptr",
    ): "saves gradients that nobody wants",
    ("backward_fixed_point.cu", "threadIdx.x == 0"): "saves maxima of the same number",
    ("backward_fixed_point.cu", "channels_last"): "the order in which a maximum is taken",
    ("backward_fixed_point.cu", "p.raw.used"): "saves a maximum of which no scale is made",
    ("forward_tensor_core.cu", "has_bfloat16_tensor_cores()"): "the emulator has them",
    ("forward_tensor_core.cu", "p.output_stride[1] == 1"): _DENSE,
    ("tensor_core.cuh", "has_bfloat16_tensor_cores()"): "the emulator has them",
    **{
        ("tensor_core.cuh", limit): _LARGE
        for limit in (
            "dtype == Dtype::kFloat32",
            "coordinates_fit",
            "fits(2 * planes, pixels, offset[1], offset[2], p.offset_dtype)",
            "fits(planes, pixels, mask[1], mask[2], p.mask_dtype)",
            *(
                f"fits(2, pixels, p.raw.flow_stride[{i}][2], p.raw.flow_stride[{i}][1], p.raw.flow_dtype)"
                for i in (0, 1)
            ),
            "fits(p.height, columns, p.input_stride[2], 1, p.dtype)",
            "pixels <= kMostPixels",
            "p.height <= kMostPositions",
            "p.width <= kMostPositions",
        )
    },
    **{
        ("tensor_core.cuh", some): "the strides of an empty array are 0 here"
        for some in ("p.height > 0", "p.width > 0", "p.batch * p.pixels() > 0")
    },
    (
        "tensor_core.cuh",
        "p.out_channels % kLaneChannels == 0",
    ): "else neither a dense output nor grad_output is aligned",
    ("backward_tensor_core.cu", "!inner"): _BOUNDS,
    ("backward_tensor_core.cu", "p.grad_input == nullptr"): _BOUNDS,
    ("backward_weight_tensor_core.cu", "sums_bias"): "saves sums that nobody stores",
    (
        "forward_tensor_core.cu",
        "is_aligned(p.output, p.output_stride[0], p.output_stride[2])",
    ): _DENSE,
}


def probe() -> list[Check]:
    return [
        *modulated_deform_conv2d_cases.probe(),
        *modulated_deform_conv2d_tensor_core_cases.probe(),
        *deform_align_cases.probe(),
        *modulated_deform_conv2d_backward_cases.probe(),
    ]
