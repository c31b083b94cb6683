"""EDVR's fusion: equal to the network of torch.nn modules, at any size, with the state dicts of BasicSR and mmagic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strategies import uniform
from tolerances import assert_rounding_only, assert_same
from torch import Tensor, nn

from mafnet_ops import TemporalSpatialAttention
from mafnet_ops.compat import basicsr, mmagic

WRAPPED = (
    "feat_fusion", "spatial_attn1", "spatial_attn2", "spatial_attn3", "spatial_attn4", "spatial_attn_l1",
    "spatial_attn_l2", "spatial_attn_l3", "spatial_attn_add1",
)  # fmt: skip
"""mmagic's convolutions with their activation: it calls their parameters ``spatial_attn1.conv.weight``."""
TERMS = 11 * 54  # convolutions in a row, products of one: 3 frames of 2 channels, or 9 taps of 4


def expected(net: nn.Module, frames: Tensor, doubling: bool) -> Tensor:
    """The definition by torch.nn.functional; ``doubling`` resizes by the factor 2, as EDVR does, else to a size."""

    def conv(name: str, x: Tensor) -> Tensor:
        layer = net.get_submodule(name)
        return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    def act(name: str, x: Tensor) -> Tensor:
        return F.leaky_relu(conv(name, x), 0.1)

    def pools(x: Tensor) -> Tensor:
        return torch.cat([F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1)], 1)

    def up(x: Tensor, like: Tensor) -> Tensor:
        if doubling:
            return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    middle = conv("temporal_attn1", frames[:, 1])
    weighed = []
    for t in range(frames.shape[1]):
        likeness = (conv("temporal_attn2", frames[:, t]) * middle).sum(1, keepdim=True)
        weighed.append(frames[:, t] * torch.sigmoid(likeness))
    x = torch.cat(weighed, 1)
    feature, half = act("feat_fusion", x), act("spatial_attn2", pools(act("spatial_attn1", x)))
    quarter = act("spatial_attn_l2", pools(act("spatial_attn_l1", half)))
    quarter = act("spatial_attn_l3", quarter)
    attention = act("spatial_attn4", act("spatial_attn3", half) + up(quarter, half))
    mask = conv("spatial_attn5", up(attention, frames))
    added = conv("spatial_attn_add2", act("spatial_attn_add1", mask))
    return feature * torch.sigmoid(mask) * 2 + added


def make(seed: int = 0) -> TemporalSpatialAttention:
    torch.manual_seed(seed)
    return TemporalSpatialAttention(2, frames=3, center=1).double()


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 4)])
def test_equals_edvr_where_that_works(size: tuple[int, int]) -> None:
    net, frames = make(), uniform(2, 3, 2, *size)
    assert_rounding_only(net(frames), expected(net, frames, doubling=True), TERMS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (6, 9), (23, 14)])
def test_any_size_values_and_gradients(size: tuple[int, int], layout: str) -> None:
    net, frames = make(), uniform(2, 3, 2, *size)
    if layout == "channels_last":
        frames = frames.transpose(2, 4).contiguous().transpose(2, 4)
    results = []
    for function in (net, lambda x: expected(net, x, doubling=False)):
        x = frames.clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(x)
        wanted = [x, *net.parameters()]
        results.append([out.detach(), *torch.autograd.grad(out, wanted, uniform(*out.shape))])
    terms = TERMS * size[0] * size[1]
    for i, (a, e) in enumerate(zip(*results)):
        assert_rounding_only(a, e, TERMS if i == 0 else terms)


def test_state_dicts_of_basicsr_and_mmagic() -> None:
    net = make()
    state = net.state_dict()
    names = {name.rpartition(".")[0] for name in state}
    assert names == {
        *WRAPPED,
        "temporal_attn1",
        "temporal_attn2",
        "spatial_attn5",
        "spatial_attn_add2",
    }
    wrapped = {
        f"{layer}.conv.{kind}" if layer in WRAPPED else name: tensor
        for name, tensor in state.items()
        for layer, _, kind in [name.rpartition(".")]
    }
    frames = uniform(1, 3, 2, 8, 8)
    theirs = mmagic.TSAFusion(2, 3, 1).double()
    assert set(theirs.state_dict()) == set(wrapped)
    theirs.load_state_dict(wrapped)
    other, ours = make(1), basicsr.TSAFusion(2, 3, 1).double()
    other.load_state_dict(dict(wrapped))
    ours.load_state_dict(state)
    for same in (other, ours, theirs):
        assert_same(same(frames), net(frames))


def test_the_slope_of_mmagic_is_kept() -> None:
    act = {"type": "LeakyReLU", "negative_slope": 0.3}
    torch.manual_seed(0)
    net = mmagic.TSAFusion(2, 3, 1, act_cfg=act)
    plain = mmagic.TSAFusion(2, 3, 1)
    plain.load_state_dict(net.state_dict())
    frames = uniform(1, 3, 2, 8, 8).float()
    assert not torch.equal(net(frames), plain(frames))


def test_the_center_decides() -> None:
    net, frames = make(), uniform(1, 3, 2, 5, 6)
    first = net(frames)
    net.center_frame_idx = 0
    assert not torch.equal(net(frames), first)
    with pytest.raises(ValueError, match="center: expected an index of 3 frames, got 3"):
        TemporalSpatialAttention(2, frames=3, center=3)
    with pytest.raises(ValueError, match="input: expected 5 dimensions"):
        net(frames[0])
