"""Deformable alignment: a raw offset head, base flows and a modulated deformable convolution as one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library, reference
from ._checks import require, require_same_device, require_shape, require_tensor
from .modulated_deform_conv2d import ModulatedDeformConv2d, modulated_deform_conv2d

_OP = "deform_align"


def deform_align(
    input: Tensor,
    raw: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    flow_1: Tensor | None = None,
    flow_2: Tensor | None = None,
    max_residue_magnitude: float = 10.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Flow-guided deformable alignment (Chan et al., "BasicVSR++", CVPR 2022, section 3.2).

    ``offset = max_residue_magnitude * tanh(raw_offset) + base flow``, ``mask = sigmoid(raw_mask)``, then
    :func:`modulated_deform_conv2d`.

    Args:
        input: (N, C, H, W), floating point.
        raw: (N, 3 * G * K, H_out, W_out), the output of the offset head as it is (27 * G channels for 3 x 3):
            first 2 * G * K offset channels in (dy, dx) pairs, then G * K mask channels.
        weight: (C_out, C / groups, kernel_h, kernel_w).
        bias: (C_out,) or None.
        flow_1, flow_2: base flows (N, H_out, W_out, 2) in input pixels, channel 0 = x, or None. One flow serves all G
            offset groups; of two, ``flow_1`` serves the first half of the groups and ``flow_2`` the second.
        max_residue_magnitude: bound on the learnt part of the offset, in pixels.
        stride, padding, dilation: as :func:`modulated_deform_conv2d`; the default padding keeps the size at 3 x 3.

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input``. Gradients flow to input, raw, weight, bias and flows.

    Raises:
        ValueError: a shape or device that does not fit; ``flow_2`` without ``flow_1``; an odd G with two flows.
        TypeError: a dtype that is not floating point.
    """
    require_tensor(_OP, "input", input, 4)
    require_tensor(_OP, "raw", raw, 4)
    require_tensor(_OP, "weight", weight, 4)
    taps = weight.shape[2] * weight.shape[3]
    require(taps > 0, _OP, "weight", "a kernel of at least 1 x 1", tuple(weight.shape[2:]))
    groups, rest = raw.shape[1] // (3 * taps), raw.shape[1] % (3 * taps)
    expected = f"a positive multiple of 3 * {taps} channels"
    require(rest == 0 and groups > 0, _OP, "raw", expected, f"{raw.shape[1]} channels")
    require(
        flow_2 is None or flow_1 is not None, _OP, "flow_1", "a tensor where flow_2 is given", None
    )
    require(
        flow_2 is None or groups % 2 == 0,
        _OP,
        "raw",
        "an even number of offset groups for two flows",
        groups,
    )
    shape = (raw.shape[0], *raw.shape[2:], 2)
    for name, flow in (("flow_1", flow_1), ("flow_2", flow_2)):
        if flow is not None:
            require_tensor(_OP, name, flow, 4)
            require_shape(_OP, name, flow, shape, "(N, H_out, W_out, 2)")
    if bias is not None:
        require_tensor(_OP, "bias", bias, 1)
    tensors = {"input": input, "raw": raw, "weight": weight, "bias": bias}
    require_same_device(_OP, "input", {**tensors, "flow_1": flow_1, "flow_2": flow_2})
    offset, mask = reference.deform_align_offsets(raw, flow_1, flow_2, max_residue_magnitude)
    return modulated_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation)


def _backend(device_type: str) -> _library.Backend:
    """The convolution decides; its prologue is PyTorch on every device."""
    convolution = _library.backend("modulated_deform_conv2d", device_type)
    return _library.Backend(
        convolution.name, f"prologue in PyTorch, then modulated_deform_conv2d: {convolution.reason}"
    )


_library.register_op(_OP, other=_backend)


class DeformAlign(ModulatedDeformConv2d):
    """The weight and bias of a :func:`deform_align`; raw head output and flows come with each call."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        groups: int = 1,
        max_residue_magnitude: float = 10.0,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups
        )
        self.max_residue_magnitude = max_residue_magnitude

    def forward(
        self, input: Tensor, raw: Tensor, flow_1: Tensor | None = None, flow_2: Tensor | None = None
    ) -> Tensor:
        return deform_align(
            input,
            raw,
            self.weight,
            self.bias,
            flow_1,
            flow_2,
            self.max_residue_magnitude,
            self.stride,
            self.padding,
            self.dilation,
        )

    @torch.no_grad()
    def init_identity(self) -> None:
        """Start near a copy: with zero raw output (mask 1/2) the bias and all but a twentieth of the drawn weight
        are gone, and each group passes its input through."""
        out_channels, group_channels, kernel_h, kernel_w = self.weight.shape
        require(
            out_channels == group_channels * self.groups,
            _OP,
            "out_channels",
            "in_channels",
            out_channels,
        )
        self.weight.mul_(0.1)
        centre = self.weight[:, :, kernel_h // 2, kernel_w // 2]
        centre += 2 * torch.eye(group_channels, device=centre.device).repeat(self.groups, 1)
        if self.bias is not None:
            self.bias.zero_()
