"""Modules with an offset head of their own on top of :func:`deform_align`: those of BasicVSR++ and EDVR.

Parameters have the names and shapes that the fields' checkpoints use: ``weight``, ``bias`` and ``conv_offset``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import require, require_count
from .deform_align import DeformAlign


class SecondOrderDeformAlign(DeformAlign):
    """Second-order flow-guided alignment (Chan et al., "BasicVSR++", CVPR 2022).

    Four convolutions predict residues about two flows and masks from the features to align to and the flows;
    :func:`deform_align` does the rest. At first the residues are zero and the masks one half.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        deform_groups: int = 16,
        max_residue_magnitude: float = 10.0,
        feature_channels: int | None = None,
    ) -> None:
        """``feature_channels``: of ``features`` in a call; by default three times ``out_channels``."""
        super().__init__(
            in_channels, out_channels, kernel_size, max_residue_magnitude=max_residue_magnitude
        )
        _require_groups(in_channels, deform_groups)
        widths = [feature_channels or 3 * out_channels, *[out_channels] * 3]
        widths[0] += 4  # the flows
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Conv2d(width, out_channels, 3, padding=1), nn.LeakyReLU(0.1, True)]
        taps = self.kernel_size[0] * self.kernel_size[1]
        head = nn.Conv2d(out_channels, 3 * taps * deform_groups, 3, padding=1)
        self.conv_offset = nn.Sequential(*layers, head)
        _zero(head)

    def forward(  # type: ignore[override]
        self, input: Tensor, features: Tensor, flow_1: Tensor, flow_2: Tensor
    ) -> Tensor:
        """Input (N, C, H, W), two states side by side, each aligned by its flow (N, H, W, 2) in pixels."""
        planes = [flow.permute(0, 3, 1, 2).to(features.dtype) for flow in (flow_1, flow_2)]
        raw = self.conv_offset(torch.cat([features, *planes], 1))
        return super().forward(input, raw, flow_1, flow_2)


class ModulatedDeformConv2dPack(DeformAlign):
    """DCNv2 with its own offset head, one convolution: EDVR's and mmcv's pack. Offsets have no bound.

    At first it is half of a convolution: offsets are zero, masks one half.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            groups,
            max_residue_magnitude=None,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=bias,
        )
        _require_groups(in_channels, deform_groups)
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels,
            3 * taps * deform_groups,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        _zero(self.conv_offset)

    def forward(self, input: Tensor, features: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Offsets and masks are predicted from ``features``, by default from the input itself."""
        return super().forward(input, self.conv_offset(input if features is None else features))


def _require_groups(in_channels: int, deform_groups: int) -> None:
    require_count("deform_align", "deform_groups", deform_groups)
    expected = f"a multiple of deform_groups = {deform_groups}"
    require(in_channels % deform_groups == 0, "deform_align", "in_channels", expected, in_channels)


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
