"""What is measured: each case builds its inputs and names the implementations, ours first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mafnet_ops
from mafnet_ops import reference

Implementation = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape. ``inputs`` that require a gradient are differentiated in the backward pass."""

    op: str
    name: str
    inputs: tuple[Tensor, ...]
    implementations: dict[str, Implementation]
    definition: Implementation  # called in fp64 for the match
    tolerance: float  # relative L2 error that passes


def grid_sample_warp(image: Tensor, flow: Tensor) -> Tensor:
    """The recipe that people use: build the grid, normalise, sample."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack(
        [
            2 * (x + flow[..., 0]) / max(width - 1, 1) - 1,
            2 * (y + flow[..., 1]) / max(height - 1, 1) - 1,
        ],
        -1,
    )
    # In half precision its coordinates are garbage on images of this size: sampled in fp32, as under autocast.
    wide = image.to(grid.dtype)
    return F.grid_sample(wide, grid, "bilinear", "zeros", align_corners=True).to(image.dtype)


def smooth_flow(height: int, width: int) -> Tensor:
    """Pixels that move like their neighbours, by about 4 pixels: optical flow between two frames."""
    coarse = 4 * torch.randn(1, 2, max(height // 40, 2), max(width // 40, 2))
    flow = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return flow.permute(0, 2, 3, 1).contiguous()


def flow_warp_cases() -> list[Case]:
    """Both layouts, smooth and independent flow, and half precision under a smooth one."""
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    kinds = [
        ("smooth", torch.float32),
        ("noise", torch.float32),
        ("smooth", torch.bfloat16),
        ("smooth", torch.float16),
    ]
    cases = []
    for height, width in ((180, 320), (720, 1280)):
        for layout, memory_format in formats.items():
            for kind, dtype in kinds:
                torch.manual_seed(0)
                image = torch.randn(1, 64, height, width).to(dtype, memory_format=memory_format)
                noise = 3 * torch.randn(1, height, width, 2)
                flow = smooth_flow(height, width) if kind == "smooth" else noise
                cases.append(
                    Case(
                        "flow_warp",
                        f"{height}x{width} {layout} {str(dtype)[6:]} {kind}",
                        (image.requires_grad_(), flow.requires_grad_()),
                        {"mafnet_ops": mafnet_ops.flow_warp, "F.grid_sample": grid_sample_warp},
                        reference.flow_warp,
                        # the rival's normalised coordinates are off by up to 1e-4 px
                        tolerance=max(1e-3, torch.finfo(dtype).eps),
                    )
                )
    return cases


def _torchvision_deform_conv2d() -> Implementation | None:
    try:
        from torchvision.ops import deform_conv2d
    except ImportError:
        return None

    def run(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return deform_conv2d(image, offset, weight, bias, 1, 1, 1, mask)

    return run


def modulated_deform_conv2d_cases() -> list[Case]:
    def ours(*inputs: Tensor) -> Tensor:
        return mafnet_ops.modulated_deform_conv2d(*inputs, 1, 1)

    def definition(*inputs: Tensor) -> Tensor:
        return reference.modulated_deform_conv2d(*inputs, (1, 1), (1, 1), (1, 1))

    rivals: dict[str, Implementation | None] = {
        "torchvision": _torchvision_deform_conv2d(),
        "PyTorch path": definition,
    }
    cases = []
    for batch, height, width, groups in ((1, 64, 64, 8), (8, 64, 64, 8), (1, 180, 320, 8)):
        torch.manual_seed(0)
        shape = (batch, 9 * groups, height, width)
        inputs: list[Any] = [
            torch.randn(batch, 64, height, width),
            2 * torch.randn(batch, 18 * groups, height, width),
            torch.rand(shape),
            torch.randn(64, 64, 3, 3) / 24,
            torch.randn(64),
        ]
        cases.append(
            Case(
                "modulated_deform_conv2d",
                f"{batch}x64x{height}x{width} dg{groups}",
                tuple(t.requires_grad_() for t in inputs),
                {"mafnet_ops": ours, **{k: v for k, v in rivals.items() if v is not None}},
                definition,
                tolerance=1e-4,
            )
        )
    return cases


CASES: dict[str, Callable[[], list[Case]]] = {
    "flow_warp": flow_warp_cases,
    "modulated_deform_conv2d": modulated_deform_conv2d_cases,
}
