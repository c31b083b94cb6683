"""torchvision's deformable convolution: ``torchvision.ops.deform_conv2d`` and ``DeformConv2d``."""

from __future__ import annotations

from torch import Tensor

from ..modulated_deform_conv2d import ModulatedDeformConv2d, modulated_deform_conv2d

__all__ = ["DeformConv2d", "deform_conv2d"]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`mafnet_ops.modulated_deform_conv2d` with torchvision's order of arguments.

    Shapes are torchvision's: offset (N, 2 * G * K, H_out, W_out), dy before dx; mask (N, G * K, H_out, W_out) or None.
    """
    return modulated_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation)


class DeformConv2d(ModulatedDeformConv2d):
    """torchvision's module: its parameters, its initialisation, ``forward(input, offset, mask=None)``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
