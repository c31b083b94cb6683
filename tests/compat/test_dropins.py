"""The drop-ins without the libraries: parameters by name and shape, argument orders, defaults, odd cases."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import uniform
from tolerances import assert_same
from torch import Tensor, nn

import mafnet_ops
from mafnet_ops.compat import basicsr, mmagic, mmcv, torchvision


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


CONVOLUTION = {"weight": (6, 4, 3, 5), "bias": (6,)}
HEAD = {"conv_offset.weight": (90, 8, 3, 5), "conv_offset.bias": (90,)}  # 2 groups * 15 taps * 3
PLAIN_HEAD = {"conv_offset.weight": (60, 8, 3, 5), "conv_offset.bias": (60,)}
GEOMETRY = (8, 6, (3, 5), 2, (1, 2), 1, 2)  # channels, kernel, stride, padding, dilation, groups
SECOND_ORDER = (
    {"weight": (4, 8, 3, 3), "bias": (4,)}
    | {
        f"conv_offset.{i}.{name}": shape
        for i, inputs, outputs in ((0, 16, 4), (2, 4, 4), (4, 4, 4), (6, 54, 54))
        for name, shape in (("weight", (outputs, min(inputs, 16), 3, 3)), ("bias", (outputs,)))
    }
    | {"conv_offset.6.weight": (54, 4, 3, 3)}
)

MODULES: list[tuple[nn.Module, dict[str, tuple[int, ...]]]] = [
    (torchvision.DeformConv2d(*GEOMETRY[:4], padding=1, groups=2), CONVOLUTION),
    (mmcv.ModulatedDeformConv2d(*GEOMETRY, 2), CONVOLUTION),
    (mmcv.ModulatedDeformConv2d(*GEOMETRY, 2, False), {"weight": (6, 4, 3, 5)}),
    (mmcv.ModulatedDeformConv2dPack(*GEOMETRY, deform_groups=2), CONVOLUTION | HEAD),
    (mmcv.DeformConv2d(*GEOMETRY, 2), {"weight": (6, 4, 3, 5)}),
    (mmcv.DeformConv2dPack(*GEOMETRY, 2), {"weight": (6, 4, 3, 5)} | PLAIN_HEAD),
    (basicsr.ModulatedDeformConv(*GEOMETRY, deformable_groups=2), CONVOLUTION),
    (basicsr.ModulatedDeformConvPack(*GEOMETRY, deformable_groups=2), CONVOLUTION | HEAD),
    (basicsr.DCNv2Pack(*GEOMETRY, deformable_groups=2), CONVOLUTION | HEAD),
    (basicsr.SecondOrderDeformableAlignment(8, 4, 3, deformable_groups=2), SECOND_ORDER),
    (mmagic.SecondOrderDeformableAlignment(8, 4, 3, deform_groups=2), SECOND_ORDER),
]


@pytest.mark.parametrize(("module", "expected"), MODULES, ids=lambda v: type(v).__name__)
def test_parameters(module: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    assert shapes(module) == expected


def test_parameters_of_tsa_fusion() -> None:
    """Published EDVR checkpoints have these."""
    expected = {"feat_fusion": (4, 20, 1, 1), "spatial_attn1": (4, 20, 1, 1)}
    expected |= {f"temporal_attn{i}": (4, 4, 3, 3) for i in (1, 2)}
    for name, inputs, kernel in (
        ("2", 8, 1), ("3", 4, 3), ("4", 4, 1), ("5", 4, 3), ("_l1", 4, 1), ("_l2", 8, 3),
        ("_l3", 4, 3), ("_add1", 4, 1), ("_add2", 4, 1),
    ):  # fmt: skip
        expected[f"spatial_attn{name}"] = (4, inputs, kernel, kernel)
    weights = shapes(basicsr.TSAFusion(4, 5, 2))
    assert {k.removesuffix(".weight"): v for k, v in weights.items() if "weight" in k} == expected


def test_parameters_of_pcd_alignment() -> None:
    names = {
        *(f"offset_conv{i}.l{j}.conv" for i in (1, 2, 3) for j in (1, 2, 3) if (i, j) != (3, 3)),
        *(f"dcn_pack.l{j}{part}" for j in (1, 2, 3) for part in ("", ".conv_offset")),
        *(f"feat_conv.l{j}.conv" for j in (1, 2)),
        *(f"cas_offset_conv{i}.conv" for i in (1, 2)),
        *("cas_dcnpack", "cas_dcnpack.conv_offset"),
    }
    found = shapes(mmagic.PCDAlignment(4, 2))
    assert set(found) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert found["dcn_pack.l1.conv_offset.weight"] == (54, 4, 3, 3)
    assert found["offset_conv2.l3.conv.weight"] == (4, 4, 3, 3)
    assert found["offset_conv2.l2.conv.weight"] == (4, 8, 3, 3)


def _arguments() -> dict[str, Tensor]:
    return {
        "input": uniform(2, 8, 9, 7),
        "offset": uniform(2, 60, 5, 4, seed=1),
        "mask": uniform(2, 30, 5, 4, seed=2),
        "weight": uniform(6, 4, 3, 5, seed=3),
        "bias": uniform(6, seed=4),
    }


MODULATED: list[Callable[..., Tensor]] = [
    lambda x, o, m, w, b: torchvision.deform_conv2d(x, o, w, b, (2, 2), (1, 2), (1, 1), m),
    lambda x, o, m, w, b: mmcv.modulated_deform_conv2d(x, o, m, w, b, 2, (1, 2), 1, 2, 2),
    lambda x, o, m, w, b: basicsr.modulated_deform_conv(x, o, m, w, b, 2, (1, 2), 1, 2, 2),
]
PLAIN: list[Callable[..., Tensor]] = [
    lambda x, o, w: torchvision.deform_conv2d(x, o, w, None, (2, 2), (1, 2)),
    lambda x, o, w: mmcv.deform_conv2d(x, o, w, 2, (1, 2), 1, 2, 2, False, 1),
    lambda x, o, w: basicsr.deform_conv(x, o, w, 2, (1, 2), 1, 2, 2, 64),
]


@pytest.mark.parametrize("function", MODULATED)
def test_argument_order(function: Callable[..., Tensor]) -> None:
    a = _arguments()
    assert_same(
        function(*a.values()), mafnet_ops.modulated_deform_conv2d(**a, stride=2, padding=(1, 2))
    )


@pytest.mark.parametrize("function", PLAIN)
def test_argument_order_without_mask(function: Callable[..., Tensor]) -> None:
    a = _arguments() | {"mask": None, "bias": None}
    expected = mafnet_ops.modulated_deform_conv2d(**a, stride=2, padding=(1, 2))  # type: ignore[arg-type]
    assert_same(function(a["input"], a["offset"], a["weight"]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 1}, "groups: expected the 8 input channels / 4 of the weight, got 1"),
        (
            {"deform_groups": 4},
            "deform_groups: expected the 60 offset channels / (2 * 15 taps), got 4",
        ),
    ],
)
def test_groups_that_contradict_the_shapes(options: dict[str, int], message: str) -> None:
    arguments: dict[str, Any] = _arguments() | {"stride": 2, "padding": (1, 2)}
    with pytest.raises(ValueError, match=re.escape(message)):
        mmcv.modulated_deform_conv2d(**arguments, **({"groups": 2, "deform_groups": 2} | options))


def test_the_offset_decides_the_dtype() -> None:
    """mmcv's way with autocast: an fp16 offset head before fp32 weights gives fp16."""
    a = _arguments() | {"offset": _arguments()["offset"].half()}
    out = mmcv.modulated_deform_conv2d(*a.values(), 2, (1, 2), 1, 2, 2)
    assert out.dtype == torch.float16


@pytest.mark.parametrize(
    "module",
    [
        mmcv.DeformConv2dPack(4, 6, 3, padding=1),
        mmcv.ModulatedDeformConv2dPack(4, 6, 3, padding=1),
        basicsr.ModulatedDeformConvPack(4, 6, 3, padding=1),
        basicsr.DCNv2Pack(4, 6, 3, padding=1),
        mmagic.ModulatedDCNPack(4, 6, 3, padding=1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_new_pack_is_a_convolution(module: nn.Module) -> None:
    """The offsets start at 0, the masks at 1/2."""
    x = uniform(2, 4, 6, 5).float()
    features = (x,) if "forward(x)" in _signature(module) else (x, x)
    scale = 1.0 if isinstance(module, mmcv.DeformConv2d) else 0.5
    weight: Tensor = module.weight  # type: ignore[assignment]
    torch.testing.assert_close(module(*features), F.conv2d(x, weight * scale, padding=1))


def _signature(module: nn.Module) -> str:
    names = module.forward.__code__.co_varnames[1 : module.forward.__code__.co_argcount]
    return f"forward({', '.join(names)})"


def test_an_image_smaller_than_the_kernel() -> None:
    """mmcv pads image and offsets to the kernel and cuts the result back to what the image would have given."""
    module = mmcv.DeformConv2d(2, 3, 3, padding=1)
    x, offset = uniform(1, 2, 2, 1).float(), torch.zeros(1, 18, 2, 1)
    torch.testing.assert_close(module(x, offset), F.conv2d(x, module.weight, padding=1))


@pytest.mark.parametrize("warp", [basicsr.flow_warp, mmagic.flow_warp])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_flow_warp(
    warp: Callable[..., Tensor], mode: str, padding: str, align_corners: bool
) -> None:
    """Against grid_sample by the libraries' normalisation, in fp64 and off the places where a rounding decides."""
    x, flow = uniform(2, 3, 9, 7), uniform(2, 9, 7, 2, seed=1) * 8
    y, xs = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    grid = torch.stack([xs, y], 2) + flow
    grid = 2 * grid / torch.tensor([6.0, 8.0]) - 1
    expected = F.grid_sample(x, grid, mode, padding, align_corners)
    torch.testing.assert_close(warp(x, flow, mode, padding, align_corners), expected)
    with pytest.raises(ValueError, match=re.escape("flow_warp: flow: expected H, W = (9, 7), got")):
        warp(x, flow[:, 1:])


def test_second_order_alignment_is_the_formula() -> None:
    module = mmagic.SecondOrderDeformableAlignment(
        8, 4, 3, padding=1, deform_groups=2, max_residue_magnitude=3
    ).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, extra = uniform(2, 8, 5, 6), uniform(2, 12, 5, 6, seed=1)
    flows = [uniform(2, 2, 5, 6, seed=s) * 3 for s in (2, 3)]
    raw = module.conv_offset(torch.cat([extra, *flows], 1))
    offset = 3 * raw[:, :36].tanh()
    offset = offset + torch.cat([f.flip(1).repeat(1, 9, 1, 1) for f in flows], 1)
    expected = mafnet_ops.modulated_deform_conv2d(
        x, offset, raw[:, 36:].sigmoid(), module.weight, module.bias, padding=1
    )
    torch.testing.assert_close(module(x, extra, *flows), expected)


def test_pcd_alignment_at_the_start_is_its_convolutions() -> None:
    """Offsets are zero in a new network, so that every pack is a convolution with half its weight."""
    net = mmagic.PCDAlignment(4, 2).double()
    neighbor = [uniform(1, 4, 8 // s, 12 // s, seed=s) for s in (1, 2, 4)]
    middle = [uniform(1, 4, 8 // s, 12 // s, seed=9 + s) for s in (1, 2, 4)]

    def pack(name: str, x: Tensor) -> Tensor:
        layer: Any = net.get_submodule(name)
        return F.conv2d(x, layer.weight / 2, padding=1)

    def conv(name: str, x: Tensor) -> Tensor:
        layer: Any = net.get_submodule(name)
        return F.conv2d(x, layer.weight, padding=1)

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    level_3 = F.leaky_relu(pack("dcn_pack.l3", neighbor[2]), 0.1)
    merged = torch.cat([pack("dcn_pack.l2", neighbor[1]), up(level_3)], 1)
    level_2 = F.leaky_relu(conv("feat_conv.l2.conv", merged), 0.1)
    merged = torch.cat([pack("dcn_pack.l1", neighbor[0]), up(level_2)], 1)
    expected = F.leaky_relu(pack("cas_dcnpack", conv("feat_conv.l1.conv", merged)), 0.1)
    torch.testing.assert_close(net(neighbor, middle), expected)
    with pytest.raises(ValueError, match="PCDAlignment: act_cfg: expected type LeakyReLU"):
        mmagic.PCDAlignment(act_cfg={"type": "ReLU"})
