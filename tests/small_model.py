"""A small MAFnet for tests, with every part awake."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mafnet import MAFnet, ModelConfig

TINY = ModelConfig(
    channels=8,
    blocks=2,
    block_layers=2,
    growth=4,
    ca_reduction=4,
    self_attention_reduction=4,
    self_attention_window=8,
    flow_channels=4,
    flow_width=8,
    flow_levels=3,
    deform_groups=2,
    hr_channels=4,
)


def build(**changes: Any) -> MAFnet:
    """A small network with every part awake: zero-initialised parts are given values."""
    torch.manual_seed(0)
    net = MAFnet(dataclasses.replace(TINY, **changes))
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
        for name, parameter in net.named_parameters():
            if "channel.from_" in name and name.endswith("0.bias"):
                parameter.fill_(0.5)  # both of two hidden units must be on
    return net.eval()


def run(net: MAFnet, frames: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return net(frames, **options)
