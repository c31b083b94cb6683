"""Modulated deformable convolution (DCNv2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import _library, reference
from ._autograd import empty_like_input, fold, jvp_by_vjp, memory_format_of, unfold
from ._checks import (
    autocast_dtype,
    pair,
    require,
    require_same_device,
    require_same_dtype,
    require_shape,
    require_tensor,
)

_OP = "modulated_deform_conv2d"


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Modulated deformable convolution v2 (Zhu et al., "Deformable ConvNets v2", CVPR 2019, eq. 1).

    Every kernel tap k of every output pixel samples the input bilinearly at its regular position plus a
    learnt offset, times a learnt mask: ``y(p) = sum_k w_k * x(p * stride - padding + k * dilation + offset_k(p)) *
    mask_k(p)``. Outside the image the input is zero.

    Args:
        input: (N, C, H, W), floating point, any strides.
        offset: (N, 2 * G * K, H_out, W_out) with K = kernel_h * kernel_w taps and G offset groups, in input
            pixels. Channel ``2 * (g * K + k)`` is dy and the next one dx, as in torchvision and mmcv. Its dtype, like
            that of mask, is that of ``input``, a lower one, or fp32; coordinates are computed in fp32 (fp64 for
            double).
        mask: (N, G * K, H_out, W_out), or None for plain deformable convolution (v1).
        weight: (C_out, C / groups, kernel_h, kernel_w), the dtype of ``input``. ``groups`` follows from the shapes.
        bias: (C_out,) or None.
        stride, padding, dilation: ints or pairs (vertical, horizontal).

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input``, channels_last where ``input`` is.

    Gradients flow to input, offset, mask, weight and bias, any number of times (compiled code: once); forward
    mode, ``torch.func`` and vmap work. Second derivatives and forward mode go through PyTorch code in fp64. At an
    integer coordinate the gradient with respect to the offset is the right-hand one (of the cell [n, n + 1)).
    On the CPU all gradients have the same bits on every run and with any number of threads.

    A NaN offset gives NaN; an infinite or far one samples exactly zero, whatever the edge of the image holds. Under
    autocast features and weight run in autocast's dtype, offset and mask keep theirs.

    The CPU is deterministic. On CUDA the gradient of ``input`` is summed by atomics in no fixed order; under
    ``torch.use_deterministic_algorithms(True)`` its terms are rounded to integers of one scale, whose sums have
    none, with 8 bytes of workspace per element of ``input`` (16 in fp64).

    Raises:
        ValueError: a shape, stride, padding, dilation or device that does not fit.
        TypeError: a dtype that is not floating point, weight or bias in another dtype than input, or fp64 offset or
            mask beside an input of lower precision, which would be rounded silently.
    """
    low = autocast_dtype(input.device) if isinstance(input, Tensor) else None
    if low is not None and input.dtype != torch.float64:
        input, weight = input.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    geometry = _check(input, offset, mask, weight, bias, stride, padding, dilation)
    offset = _coordinates("offset", offset, input)
    mask = None if mask is None else _coordinates("mask", mask, input)
    if input.device.type not in _NATIVE_DEVICES:
        out = reference.modulated_deform_conv2d(input, offset, mask, weight, bias, *geometry)
        return out.contiguous(memory_format=memory_format_of(input))
    # Dynamo refuses a Function with a custom jvp and has no use for one.
    compiling = torch.compiler.is_compiling()
    function = _ModulatedDeformConv2d if compiling else _ModulatedDeformConv2dWithJvp
    flat = (*geometry[0], *geometry[1], *geometry[2])
    return function.apply(input, offset, mask, weight, bias, flat)


def _coordinates(argument: str, value: Tensor, input: Tensor) -> Tensor:
    """Offset or mask in a dtype that the kernels take: that of ``input``, or fp32 beside half precision."""
    compute = reference.coordinate_dtype(input.dtype)
    if value.dtype in (input.dtype, compute):
        return value
    if value.dtype == torch.float64:
        raise TypeError(
            f"{_OP}: {argument}: expected dtype {input.dtype} or float32, got {value.dtype}"
        )
    return value.to(compute)  # loses nothing


def _check(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    require_tensor(_OP, "input", input, 4)
    require_tensor(_OP, "offset", offset, 4)
    require_tensor(_OP, "weight", weight, 4)
    if mask is not None:
        require_tensor(_OP, "mask", mask, 4)
    if bias is not None:
        require_tensor(_OP, "bias", bias, 1)
    tensors = {"input": input, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
    require_same_device(_OP, "input", tensors)
    require_same_dtype(_OP, "input", {"input": input, "weight": weight, "bias": bias})

    stride_ = pair(_OP, "stride", stride, 1)
    padding_ = pair(_OP, "padding", padding, 0)
    dilation_ = pair(_OP, "dilation", dilation, 1)
    batch, channels, height, width = input.shape
    require(channels > 0, _OP, "input", "at least 1 channel", tuple(input.shape))
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    fits = group_channels > 0 and channels % group_channels == 0
    require(
        fits, _OP, "weight", f"shape[1] to divide the {channels} input channels", group_channels
    )
    groups = channels // group_channels
    require(
        out_channels % groups == 0,
        _OP,
        "weight",
        f"shape[0] a multiple of {groups} groups",
        out_channels,
    )
    taps = kernel_h * kernel_w
    require(taps > 0, _OP, "weight", "a kernel of at least 1 x 1", (kernel_h, kernel_w))
    # No divmod: Dynamo cannot trace it with dynamic shapes.
    offset_groups, rest = offset.shape[1] // (2 * taps), offset.shape[1] % (2 * taps)
    require(
        rest == 0 and offset_groups > 0 and channels % offset_groups == 0,
        _OP,
        "offset",
        f"2 * G * {taps} channels with G dividing the {channels} input channels",
        f"{offset.shape[1]} channels",
    )
    out_h = (height + 2 * padding_[0] - dilation_[0] * (kernel_h - 1) - 1) // stride_[0] + 1
    out_w = (width + 2 * padding_[1] - dilation_[1] * (kernel_w - 1) - 1) // stride_[1] + 1
    require(out_h > 0 and out_w > 0, _OP, "input", "an output of at least 1 x 1", (out_h, out_w))
    shape = (batch, offset.shape[1], out_h, out_w)
    require_shape(_OP, "offset", offset, shape, "(N, 2 * G * K, H_out, W_out)")
    if mask is not None:
        shape = (batch, offset_groups * taps, out_h, out_w)
        require_shape(_OP, "mask", mask, shape, "(N, G * K, H_out, W_out)")
    if bias is not None:
        require_shape(_OP, "bias", bias, (out_channels,), "(C_out,)")
    return stride_, padding_, dilation_


# ------------------------------------------------------------------------------------- schema and fake

_GEOMETRY = ", ".join(
    f"int {name}_{axis}" for name in ("stride", "padding", "dilation") for axis in "hw"
)
_ARGUMENTS = ("input", "offset", "mask", "weight", "bias")
_library.LIBRARY.define(
    "modulated_deform_conv2d_forward(Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
    f"Tensor? bias, {_GEOMETRY}) -> Tensor"
)
_library.LIBRARY.define(
    "modulated_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, "
    f"Tensor weight, {_GEOMETRY}, {', '.join(f'bool need_{name}' for name in _ARGUMENTS)}, "
    "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_NATIVE_DEVICES = _library.register_op(
    _OP, ("modulated_deform_conv2d_forward", "modulated_deform_conv2d_backward")
)


@torch.library.register_fake("mafnet_ops::modulated_deform_conv2d_forward", lib=_library.LIBRARY)
def _(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: int,
) -> Tensor:
    return empty_like_input(input, (input.shape[0], weight.shape[0], *offset.shape[2:]))


@torch.library.register_fake("mafnet_ops::modulated_deform_conv2d_backward", lib=_library.LIBRARY)
def _(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *options: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, needed: bool) -> tuple[int, ...]:
        return (tensor.shape[0] if needed else 0, *tensor.shape[1:])

    need_input, need_offset, need_mask, need_weight, need_bias = options[6:11]
    masked = offset if mask is None else mask
    return (
        empty_like_input(input, like(input, bool(need_input))),
        offset.new_empty(like(offset, bool(need_offset))),
        masked.new_empty(like(masked, mask is not None and bool(need_mask))),
        weight.new_empty(like(weight, bool(need_weight))),
        weight.new_empty((weight.shape[0] if need_bias else 0,)),
    )


@register_flop_formula(torch.ops.mafnet_ops.modulated_deform_conv2d_forward)
def _flops(
    input_shape: Any,
    offset_shape: Any,
    mask_shape: Any,
    weight_shape: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The matrix product, and eight operations per sample and channel; positions are not counted."""
    out_channels, group_channels, kernel_h, kernel_w = weight_shape
    samples = input_shape[0] * offset_shape[2] * offset_shape[3] * kernel_h * kernel_w
    return samples * (2 * out_channels * group_channels + 8 * input_shape[1])


# ------------------------------------------------------------------------------------------ autograd

# The tensors of every call below are (input, offset, mask, weight, bias), where mask and bias may be None;
# geometry is (stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w).
_Geometry = tuple[int, ...]
_Optional = Tensor | None


class _ModulatedDeformConv2d(torch.autograd.Function):
    """(input, offset, mask, weight, bias, geometry) -> output."""

    @staticmethod
    def forward(
        input: Tensor,
        offset: Tensor,
        mask: _Optional,
        weight: Tensor,
        bias: _Optional,
        geometry: _Geometry,
    ) -> Tensor:
        return torch.ops.mafnet_ops.modulated_deform_conv2d_forward(
            input, offset, mask, weight, bias, *geometry
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[_Optional, ...]:
        input, offset, mask, weight, _ = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:5])
        # Dynamo cannot nest Functions here; it differentiates once.
        function = (
            _backward if torch.compiler.is_compiling() else _ModulatedDeformConv2dBackward.apply
        )
        grads = function(grad, input, offset, mask, weight, ctx.geometry, needs)
        return (*(g if need else None for g, need in zip(grads, needs)), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """The new dimension joins the batch; samples with weights of their own go one by one."""
        *tensors, geometry = args
        function = _ModulatedDeformConv2dWithJvp.apply
        if in_dims[3] is None and in_dims[4] is None:
            folded = _fold_images(tensors, in_dims, info.batch_size, per_image=(0, 1, 2))
            return unfold(function(*folded, geometry), info.batch_size), 0
        parts = [_select(tensors, in_dims, i) for i in range(info.batch_size)]
        return torch.stack([function(*part, geometry) for part in parts]), 0


class _ModulatedDeformConv2dWithJvp(_ModulatedDeformConv2d):
    @staticmethod
    def jvp(ctx: Any, *tangents: _Optional) -> Tensor:
        present, primals, filled = _present(ctx.saved_for_forward, tangents)
        return jvp_by_vjp(_reference(present, ctx.geometry), primals, filled)


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: _Optional,
    weight: Tensor,
    geometry: _Geometry,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    return torch.ops.mafnet_ops.modulated_deform_conv2d_backward(
        grad,
        input,
        offset,
        mask,
        weight,
        *geometry,
        *needs,
        torch.are_deterministic_algorithms_enabled(),
    )


class _ModulatedDeformConv2dBackward(torch.autograd.Function):
    """The raw backward op, whose own gradient goes through the reference."""

    forward = staticmethod(_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.geometry, ctx.needs = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[_Optional, ...]:
        present, primals, _ = _present(ctx.saved_tensors, (None,) * 5)
        vjp: Any = torch.func.vjp(_reference_vjp(present, ctx.geometry, ctx.needs), *primals)[1]
        results = iter(vjp(tuple(g for g, need in zip(grads, ctx.needs) if need)))
        return (*(next(results) if there else None for there in present), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: _Optional) -> tuple[Tensor, ...]:
        present, primals, filled = _present(ctx.saved_for_forward, tangents)
        function = _reference_vjp(present, ctx.geometry, ctx.needs)
        results = iter(jvp_by_vjp(function, primals, filled))
        _, input, offset, mask, weight = ctx.saved_for_forward
        bias = weight[:, 0, 0, 0]
        outputs = (input, offset, offset if mask is None else mask, weight, bias)
        return tuple(
            next(results) if need else t.new_zeros((0, *t.shape[1:]))
            for need, t in zip(ctx.needs, outputs)
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        *tensors, geometry, needs = args
        function = _ModulatedDeformConv2dBackward.apply
        if in_dims[4] is None and not needs[3] and not needs[4]:
            folded = _fold_images(tensors, in_dims, info.batch_size, per_image=(0, 1, 2, 3))
            grads = function(*folded, geometry, needs)
            unfolded = [unfold(g, info.batch_size) for g in grads[:3]]
            unfolded += [g.new_empty((info.batch_size, *g.shape)) for g in grads[3:]]
        else:  # gradients of weight and bias are sums over the images: one by one
            parts = [_select(tensors, in_dims, i) for i in range(info.batch_size)]
            each = [function(*part, geometry, needs) for part in parts]
            unfolded = [torch.stack(same) for same in zip(*each)]
        return tuple(unfolded), (0,) * 5


def _present(
    primals: tuple[_Optional, ...], tangents: tuple[_Optional, ...]
) -> tuple[list[bool], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Which tensors are there, those, and their tangents with zeros for the missing ones."""
    pairs = [(p, t) for p, t in zip(primals, tangents) if p is not None]
    filled = tuple(torch.zeros_like(p) if t is None else t for p, t in pairs)
    return [p is not None for p in primals], tuple(p for p, _ in pairs), filled


def _reference(present: list[bool], geometry: _Geometry) -> Any:
    """The definition as a function of the tensors that are there, in fp64: differentiable any number of times."""

    def function(*tensors: Tensor) -> Tensor:
        values = iter(t.double() for t in tensors)
        input, offset, mask, weight, bias = (next(values) if there else None for there in present)
        assert input is not None and offset is not None and weight is not None
        out = reference.modulated_deform_conv2d(
            input, offset, mask, weight, bias, *zip(geometry[::2], geometry[1::2])
        )
        return out.to(tensors[0].dtype)

    return function


def _reference_vjp(present: list[bool], geometry: _Geometry, needs: tuple[bool, ...]) -> Any:
    """(grad_output, input, offset, mask, weight) -> the wanted gradients, by the reference."""
    # The bias adds to the output, so that its value is of no matter, and zeros serve.
    of_forward = [*present[1:], needs[4]]

    def backward(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        bias = [tensors[-1].new_zeros(tensors[-1].shape[0])] if needs[4] else []
        function = _reference(of_forward, geometry)
        vjp: Any = torch.func.vjp(function, *tensors, *bias)[1]
        grads = iter(vjp(grad_output))
        every = [next(grads) if there else None for there in of_forward]
        return tuple(g for g, need in zip(every, needs) if need and g is not None)

    return backward


def _fold_images(
    tensors: list[_Optional],
    in_dims: tuple[int | None, ...],
    batch: int,
    per_image: tuple[int, ...],
) -> list[_Optional]:
    """Merge the dimension that vmap added into the batch of images; the others are shared."""
    folded: list[_Optional] = []
    for position, (tensor, dim) in enumerate(zip(tensors, in_dims)):
        if tensor is None or position not in per_image:
            folded.append(tensor)
        else:
            folded.append(fold(tensor, dim, batch))
    return folded


def _select(
    tensors: list[_Optional], in_dims: tuple[int | None, ...], index: int
) -> list[_Optional]:
    return [t if t is None or d is None else t.select(d, index) for t, d in zip(tensors, in_dims)]


class ModulatedDeformConv2d(nn.Module):
    """The weight and bias of a :func:`modulated_deform_conv2d`; offset and mask come with each call.

    Parameter names, shapes and initialisation are those of torchvision's ``DeformConv2d`` and mmcv's
    ``ModulatedDeformConv2d``, so their state dicts load.
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
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            require(channels % groups == 0, _OP, name, f"a multiple of groups = {groups}", channels)
        self.kernel_size = pair(_OP, "kernel_size", kernel_size, 1)
        self.stride = pair(_OP, "stride", stride, 1)
        self.padding = pair(_OP, "padding", padding, 0)
        self.dilation = pair(_OP, "dilation", dilation, 1)
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return modulated_deform_conv2d(
            input, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )

    def extra_repr(self) -> str:
        out_channels, group_channels = self.weight.shape[:2]
        return (
            f"{group_channels * self.groups}, {out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )
