"""The modules with offset heads, and the counters of their offsets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_rounding_only, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mafnet_ops import (
    DeformAlign,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    OffsetHealth,
    SecondOrderDeformAlign,
    modulated_deform_conv2d,
    reference,
    watch_offsets,
)

DOUBLE = torch.float64


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1


def randomise(module: nn.Module) -> nn.Module:
    """No layer is left at zero."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(uniform(*parameter.shape, seed=i) / parameter[0].numel() ** 0.5)
    return module


# ------------------------------------------------------------------------------------------ modules


def test_second_order_has_the_parameters_of_the_field() -> None:
    module = SecondOrderDeformAlign(32, 16, deform_groups=16)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    layers = {0: (16, 52), 2: (16, 16), 4: (16, 16), 6: (432, 16)}
    expected = {"weight": (16, 32, 3, 3), "bias": (16,)}
    for i, (out, width) in layers.items():
        expected[f"conv_offset.{i}.weight"] = (out, width, 3, 3)
        expected[f"conv_offset.{i}.bias"] = (out,)
    assert shapes == expected
    assert not module.conv_offset[6].weight.any() and not module.conv_offset[6].bias.any()


def test_second_order_is_the_paper_s_recipe() -> None:
    """As BasicVSR++ writes it, on planes of flow: chunk, tanh, flip, repeat, add."""
    module = randomise(SecondOrderDeformAlign(8, 4, deform_groups=4, max_residue_magnitude=3.0))
    module = module.double()
    image, features = uniform(2, 8, 6, 7), uniform(2, 12, 6, 7, seed=1)
    flows = [3 * uniform(2, 2, 6, 7, seed=s) for s in (2, 3)]
    out = module(image, features, *(flow.permute(0, 2, 3, 1) for flow in flows))
    raw = module.conv_offset(torch.cat([features, *flows], 1))
    first, second, mask = raw.chunk(3, 1)
    halves = (3 * torch.cat([first, second], 1).tanh()).chunk(2, 1)
    offset = torch.cat([h + f.flip(1).repeat(1, 18, 1, 1) for h, f in zip(halves, flows)], 1)
    expected = modulated_deform_conv2d(
        image, offset, mask.sigmoid(), module.weight, module.bias, padding=1
    )
    assert_rounding_only(out, expected, 4 * 72 + 4, 10)


@pytest.mark.parametrize("with_features", [False, True])
def test_pack_is_its_recipe(with_features: bool) -> None:
    """Raw offsets in pixels, however large, and a sigmoid mask."""
    module = randomise(ModulatedDeformConv2dPack(8, 6, 3, 2, 1, deform_groups=4)).double()
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {
        "weight": (6, 8, 3, 3),
        "bias": (6,),
        "conv_offset.weight": (108, 8, 3, 3),
        "conv_offset.bias": (108,),
    }
    image = 20 * uniform(2, 8, 9, 8)
    features = 30 * uniform(2, 8, 9, 8, seed=1) if with_features else image
    out = module(image, features) if with_features else module(image)
    raw = module.conv_offset(features)
    assert raw.abs().max() > 3
    first, second, mask = raw.chunk(3, 1)
    offset = torch.cat([first, second], 1)
    expected = modulated_deform_conv2d(
        image, offset, mask.sigmoid(), module.weight, module.bias, 2, 1
    )
    assert_rounding_only(out, expected, 4 * 72 + 4, 200)


def test_packs_start_as_half_of_a_convolution() -> None:
    module = ModulatedDeformConv2dPack(8, 6, padding=1).double()
    image = uniform(2, 8, 5, 6)
    assert module.bias is not None
    expected = F.conv2d(image, module.weight / 2, module.bias, padding=1)
    assert_rounding_only(module(image), expected, 4 * 72 + 4, 2)


def test_unbounded_gradients_are_those_of_the_definition() -> None:
    module = randomise(ModulatedDeformConv2dPack(4, 4, padding=1, deform_groups=2)).double()
    image = uniform(1, 4, 5, 6).requires_grad_()
    raw = module.conv_offset(image)
    grads = []
    for function in (modulated_deform_conv2d, reference.modulated_deform_conv2d):
        offset, mask = reference.deform_align_offsets(raw, None, None, math.inf)
        out = function(image, offset, mask, module.weight, module.bias, (1, 1), (1, 1), (1, 1))
        grads.append(torch.autograd.grad(out.sum(), image, retain_graph=True)[0])
    (fused,) = torch.autograd.grad(module(image).sum(), image)
    assert_rounding_only(fused, grads[0], 9 * 54, 10)
    assert_rounding_only(fused, grads[1], 9 * 54, 10)


def test_second_order_needs_channels_for_its_groups() -> None:
    message = "^deform_align: in_channels: expected a multiple of deform_groups = 16, got 24$"
    with pytest.raises(ValueError, match=message):
        SecondOrderDeformAlign(24, 24)


# --------------------------------------------------------------------------------------------- health


def test_health_counts() -> None:
    health = OffsetHealth(threshold=3.0)
    health(torch.tensor([0.0, 3.0, -3.5, 1e9, math.inf, -math.inf, math.nan]))
    assert health.read() == {"far": 2, "not_finite": 3, "seen": 7}
    health(torch.full((2, 4), 4.0, dtype=torch.bfloat16))
    assert health.read() == {"far": 10, "not_finite": 3, "seen": 15}
    health.reset()
    assert health.read() == {"far": 0, "not_finite": 0, "seen": 0}
    assert not health.state_dict()


def test_health_is_off_by_default_and_changes_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = ModulatedDeformConv2d(4, 4, padding=1)
            self.align = DeformAlign(4, 4, max_residue_magnitude=2.0)
            self.pack = ModulatedDeformConv2dPack(4, 4, padding=1)

        def forward(self, x: Tensor, offset: Tensor, raw: Tensor, flow: Tensor) -> Tensor:
            return self.pack(self.align(self.plain(x, offset), raw, flow))

    net = randomise(Net())
    assert net.plain.health is None
    given = [
        torch.rand(1, 4, 5, 6),
        torch.full((1, 18, 5, 6), 60.0),
        torch.zeros(1, 27, 5, 6),
        torch.full((1, 5, 6, 2), 49.0),
    ]
    given[3][0, 0, 0] = math.nan
    given[2][0, :18, 4, 5] = 9.0  # 2 px more than the flow
    keys = set(net.state_dict())
    before = net(*given)
    watched = watch_offsets(net)
    assert sorted(watched) == ["align", "pack", "plain"]
    assert set(net.state_dict()) == keys
    assert_same(net(*given), before)
    assert watched["plain"].read() == {"far": 18 * 30, "not_finite": 0, "seen": 18 * 30}
    assert watched["align"].read() == {"far": 18, "not_finite": 18, "seen": 18 * 30}
    net.plain.health = None
    net(*given)
    assert watched["plain"].read()["seen"] == 18 * 30
    assert watched["align"].read()["seen"] == 2 * 18 * 30


def test_health_under_compile_and_autograd() -> None:
    module = DeformAlign(4, 4, max_residue_magnitude=60.0)
    health = watch_offsets(module)[""]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    raw = torch.full((1, 27, 5, 6), 5.0, requires_grad=True)
    for calls in (1, 2):
        compiled(torch.rand(1, 4, 5, 6), raw).sum().backward()
        assert health.read() == {"far": 540 * calls, "not_finite": 0, "seen": 540 * calls}
    assert counter.frame_count == 1
    assert not health.counts.requires_grad and raw.grad is not None
