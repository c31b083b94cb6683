"""NonLocalBlock against the formula of the paper written out, and the state dicts of other implementations."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import uniform
from torch import Tensor, nn

from mafnet_ops import NonLocalBlock, SelfAttention


def randomised(module: nn.Module) -> Any:
    """Every parameter and statistic drawn, so that none hides behind its initial value."""
    for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(uniform(*tensor.shape, seed=i) + 0.1)
    return module.double().eval()


def written_out(block: NonLocalBlock, x: Tensor, scale: float) -> Tensor:
    """Scores between all pixels, a softmax over the keys, the values summed, one pixel at a time."""

    def embed(conv: nn.Conv2d | None, pooled: bool) -> Tensor:
        y = x if conv is None else F.conv2d(x, conv.weight, conv.bias)
        return (F.max_pool2d(y, 2) if pooled and block.sub_sample else y).flatten(2)

    query, key, value = (
        embed(block.theta, False),
        embed(block.phi, True),
        embed(block.g, True),
    )
    columns = []
    for p in range(query.shape[2]):
        scores = (query[:, :, p, None] * key).sum(1) * scale
        columns.append((value * scores.softmax(1)[:, None]).sum(2))
    y = torch.stack(columns, 2).view(x.shape[0], -1, *x.shape[2:])
    y = F.conv2d(y, block.conv_out.weight, block.conv_out.bias)
    if block.norm is not None:
        n = block.norm
        assert n.running_mean is not None and n.running_var is not None
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
    return x + y


@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian"])
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("use_scale", [False, True])
def test_equals_the_formula(mode: str, sub_sample: bool, batch_norm: bool, use_scale: bool) -> None:
    block = randomised(NonLocalBlock(6, 4, mode, sub_sample, batch_norm, use_scale))
    if block.norm is not None:
        block.norm.running_var.abs_()
    x = uniform(2, 6, 5, 7, seed=50)
    width = 4 if mode == "embedded_gaussian" else 6
    expected = written_out(block, x, width**-0.5 if use_scale else 1.0)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_untrained_block_is_the_identity() -> None:
    x = uniform(1, 5, 4, 3).float()
    assert torch.equal(NonLocalBlock(5)(x), x)
    assert torch.equal(NonLocalBlock(5, batch_norm=True).eval()(x), x)


OTHERS = {
    "mmcv": {"theta": "theta.conv", "phi": "phi.conv", "g": "g.conv", "conv_out": "conv_out.conv"},
    "mmcv, sub-sampled": {
        "theta": "theta.conv",
        "phi": "phi.0.conv",
        "g": "g.0.conv",
        "conv_out": "conv_out.conv",
        "norm": "conv_out.bn",
    },
    "NONLocalBlock2D": {"theta": "theta", "phi": "phi", "g": "g", "conv_out": "W"},
    "NONLocalBlock2D, sub-sampled, normalised": {
        "theta": "theta",
        "phi": "phi.0",
        "g": "g.0",
        "conv_out": "W.0",
        "norm": "W.1",
    },
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_loads_the_state_dict_of(names: dict[str, str]) -> None:
    block = randomised(NonLocalBlock(4, batch_norm="norm" in names))
    theirs = {}
    for name, tensor in block.state_dict().items():
        layer, rest = name.split(".", 1)
        theirs[f"body.3.{names[layer]}.{rest}"] = tensor
    fresh = nn.ModuleDict({"body": nn.Sequential(*map(nn.Identity, range(3)))}).double()
    body = fresh["body"]
    assert isinstance(body, nn.Sequential)
    body.append(NonLocalBlock(4, batch_norm="norm" in names).double())
    fresh.load_state_dict(theirs)
    assert all(torch.equal(body[3].state_dict()[k], v) for k, v in block.state_dict().items())


def test_sagan_state_dict_loads() -> None:
    block = randomised(SelfAttention(16))
    theirs = {
        (f"{name.split('.')[0]}_conv.{name.split('.')[1]}" if "." in name else name): tensor
        for name, tensor in block.state_dict().items()
    }
    assert set(theirs) >= {"query_conv.weight", "key_conv.bias", "value_conv.weight", "gamma"}
    fresh = SelfAttention(16).double()
    fresh.load_state_dict(theirs)
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in block.state_dict().items())


def test_names_of_nobody_are_refused() -> None:
    state = NonLocalBlock(4).state_dict()
    state["theta.scale"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*theta\.scale"):
        NonLocalBlock(4).load_state_dict(state)


def test_copies_keep_the_names() -> None:
    theirs = {k.replace("conv_out", "W"): v for k, v in NonLocalBlock(4).state_dict().items()}
    for block in (copy.deepcopy(NonLocalBlock(4)), pickle.loads(pickle.dumps(NonLocalBlock(4)))):
        block.load_state_dict(theirs)
        assert torch.equal(block.theta.weight, theirs["theta.weight"])


def test_errors() -> None:
    with pytest.raises(ValueError, match="NonLocalBlock: mode: expected 'embedded_gaussian' or"):
        NonLocalBlock(4, mode="dot_product")
    with pytest.raises(ValueError, match="NonLocalBlock: inter_channels: expected None or an int"):
        NonLocalBlock(4, inter_channels=0)
    with pytest.raises(ValueError, match="NonLocalBlock: input: expected H and W of at least 2"):
        NonLocalBlock(4, sub_sample=True)(torch.zeros(1, 4, 1, 5))
