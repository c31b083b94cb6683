"""Ops inside a package that AOTInductor has compiled: one for all heights and widths, with the same results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from strategies import uniform
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import mafnet_ops

CHANNELS = 6


class Aligned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.align = mafnet_ops.DeformAlign(CHANNELS, CHANNELS, max_residue_magnitude=0.25)
        self.attention = mafnet_ops.SelfAttention(CHANNELS, 2, window=8)
        nn.init.ones_(self.attention.gamma)

    def forward(self, image: Tensor, flow: Tensor, raw: Tensor) -> Tensor:
        warped = mafnet_ops.flow_warp(image, flow, "bilinear", "border")
        out: Tensor = self.attention(self.align(warped, raw, flow))
        return out


def arguments(height: int, width: int) -> tuple[Tensor, ...]:
    return (
        uniform(1, CHANNELS, height, width).float(),
        uniform(1, height, width, 2, seed=1).float(),
        uniform(1, 27, height, width, seed=2).float(),
    )


@pytest.mark.slow
def test_packaged_ops_are_the_ops(tmp_path: Path) -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor finds no C++ compiler: {error}")
    net = Aligned().eval()
    size = torch.export.Dim.DYNAMIC(min=4, max=4096)
    with torch.no_grad(), config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        program = torch.export.export(
            net,
            arguments(21, 29),
            dynamic_shapes=({2: size, 3: size}, {1: size, 2: size}, {2: size, 3: size}),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        called = {str(node.target) for node in program.graph.nodes}
        for op in ("flow_warp", "deform_align", "self_attention"):
            assert f"mafnet_ops.{op}_forward.default" in called
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "ops.pt2")
        )
        packaged = torch._inductor.aoti_load_package(path)
        for height, width in ((21, 29), (33, 17), (9, 50)):
            tensors = arguments(height, width)
            torch.testing.assert_close(packaged(*tensors), net(*tensors))
