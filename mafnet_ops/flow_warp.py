"""Backward warp by a flow in pixels."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _library, reference
from ._autograd import empty_like_input, fold, jvp_by_vjp, unfold
from ._checks import require, require_same_device, require_shape, require_tensor

_OP = "flow_warp"
_INTERPOLATIONS = {"bilinear": 0, "nearest": 1, "bicubic": 2}
_PADDING_MODES = {"zeros": 0, "border": 1, "reflection": 2}


@overload
def flow_warp(
    input: Tensor,
    flow: Tensor,
    interpolation: str = ...,
    padding_mode: str = ...,
    return_mask: Literal[False] = ...,
) -> Tensor: ...
@overload
def flow_warp(
    input: Tensor,
    flow: Tensor,
    interpolation: str = ...,
    padding_mode: str = ...,
    *,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def flow_warp(
    input: Tensor,
    flow: Tensor,
    interpolation: str = ...,
    padding_mode: str = ...,
    return_mask: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def flow_warp(
    input: Tensor,
    flow: Tensor,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample ``input`` where ``flow`` points: ``output(n, c, p) = input(n, c, p + flow(n, p))``.

    Pixel centres are at integers, so a zero flow is exactly the identity and an integer flow an exact
    shift, in every dtype; ``F.grid_sample`` with ``align_corners=True`` has the same geometry but rounds
    its normalised coordinates.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16, any strides; H and W at least 1.
        flow: (N, H_out, W_out, 2) in pixels, channel 0 is x (to the right), channel 1 is y (down). Its
            dtype is that of ``input`` or a lower one, or float32 beside a half-precision input. The
            output has its height and width, usually those of ``input``.
        interpolation: "bilinear", "nearest" (ties to even) or "bicubic" (Keys, a = -0.75).
        padding_mode: what lies outside the image: "zeros", "border" (the nearest edge pixel) or
            "reflection" (about the centres of the edge pixels).
        return_mask: also return where the flow stays inside.

    Returns:
        (N, C, H_out, W_out) in the dtype of ``input``, channels_last where ``input`` is. With
        ``return_mask`` also a mask (N, 1, H_out, W_out) in that dtype: 1 where the sampled point lies in
        [0, W - 1] x [0, H - 1], else 0; it carries no gradient.

    Coordinates and sums are fp32 (fp64 for float64), whatever the dtype. A NaN in the flow gives NaN there
    and sends nothing to the gradient of ``input``. Infinite or far flow samples the padding: 0, the edge
    pixel, or for reflection some pixel of the image (NaN for an infinite flow).

    Gradients flow to ``input`` and ``flow``, any number of times; forward mode, ``torch.func`` and vmap
    work. Where the sampled point falls on a pixel centre the gradient of the flow is that of the cell to
    the right or below (the other one where reflection has turned the axis round).
    On the CPU it is deterministic. On CUDA the gradient of ``input`` is summed by fp32 atomics, in no fixed
    order; under ``torch.use_deterministic_algorithms(True)`` its terms are sorted first (16 bytes of
    workspace a tap).

    Raises:
        TypeError: input or flow is no tensor, or has a dtype that does not fit.
        ValueError: a shape, device, interpolation or padding mode that does not fit.
    """
    flow = _check(input, flow, interpolation, padding_mode)
    if input.device.type not in _NATIVE_DEVICES:
        return reference.flow_warp(input, flow, interpolation, padding_mode, return_mask)
    # Dynamo refuses a Function with a custom jvp and has no use for one.
    function = _FlowWarp if torch.compiler.is_compiling() else _FlowWarpWithJvp
    output, mask = function.apply(
        input, flow, _INTERPOLATIONS[interpolation], _PADDING_MODES[padding_mode], return_mask
    )
    return (output, mask) if return_mask else output


def _check(input: Tensor, flow: Tensor, interpolation: str, padding_mode: str) -> Tensor:
    """Raise unless the arguments fit; the flow in a dtype that the kernels take."""
    require_tensor(_OP, "input", input, 4)
    require_tensor(_OP, "flow", flow, 4)
    require_same_device(_OP, "input", {"input": input, "flow": flow})
    height, width = input.shape[2:]
    require(height > 0 and width > 0, _OP, "input", "H and W of at least 1", tuple(input.shape))
    shape = (input.shape[0], flow.shape[1], flow.shape[2], 2)
    require_shape(_OP, "flow", flow, shape, "(N, H_out, W_out, 2)")
    _require_choice("interpolation", interpolation, _INTERPOLATIONS)
    _require_choice("padding_mode", padding_mode, _PADDING_MODES)
    if flow.dtype == input.dtype or flow.dtype == reference.coordinate_dtype(input.dtype):
        return flow
    if torch.promote_types(flow.dtype, torch.float32) == torch.float64:
        raise TypeError(f"{_OP}: flow: expected dtype {input.dtype} or float32, got {flow.dtype}")
    return flow.to(reference.coordinate_dtype(input.dtype))  # loses nothing


def _require_choice(argument: str, value: str, choices: dict[str, int]) -> None:
    known = isinstance(value, str) and value in choices
    require(known, _OP, argument, f"one of {', '.join(choices)}", repr(value))


# ------------------------------------------------------------------------------------- schema and fake

_library.LIBRARY.define(
    "flow_warp_forward(Tensor input, Tensor flow, int interpolation, int padding_mode, "
    "bool return_mask) -> (Tensor, Tensor)"
)
_library.LIBRARY.define(
    "flow_warp_backward(Tensor grad_output, Tensor input, Tensor flow, int interpolation, "
    "int padding_mode, bool need_input, bool need_flow, bool deterministic) -> (Tensor, Tensor)"
)
_NATIVE_DEVICES = _library.register_op(_OP, ("flow_warp_forward", "flow_warp_backward"))


@torch.library.register_fake("mafnet_ops::flow_warp_forward", lib=_library.LIBRARY)
def _(
    input: Tensor, flow: Tensor, interpolation: int, padding_mode: int, return_mask: bool
) -> tuple[Tensor, Tensor]:
    batch, out_height, out_width, _ = flow.shape
    output = empty_like_input(input, (batch, input.shape[1], out_height, out_width))
    mask = input.new_empty((batch if return_mask else 0, 1, out_height, out_width))
    return output, mask


@torch.library.register_fake("mafnet_ops::flow_warp_backward", lib=_library.LIBRARY)
def _(
    grad_output: Tensor,
    input: Tensor,
    flow: Tensor,
    interpolation: int,
    padding_mode: int,
    need_input: bool,
    need_flow: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = input.shape
    grad_input = empty_like_input(input, (batch if need_input else 0, channels, height, width))
    grad_flow = flow.new_empty((batch if need_flow else 0, *flow.shape[1:]))
    return grad_input, grad_flow


@register_flop_formula(torch.ops.mafnet_ops.flow_warp_forward)
def _flops(input_shape: Any, flow_shape: Any, interpolation: int, *args: Any, **kwargs: Any) -> int:
    """Two operations per tap and output element; the positions are not counted."""
    taps = {0: 4, 1: 1, 2: 16}[interpolation]
    return 2 * taps * input_shape[0] * input_shape[1] * flow_shape[1] * flow_shape[2]


# ------------------------------------------------------------------------------------------ autograd


def _reference(interpolation: int, padding_mode: int) -> Any:
    """The definition as a differentiable function of input and flow."""
    names = list(_INTERPOLATIONS)[interpolation], list(_PADDING_MODES)[padding_mode]
    return lambda input, flow: reference.flow_warp(input, flow, *names)


class _FlowWarp(torch.autograd.Function):
    """(input, flow, interpolation, padding_mode, return_mask) -> (output, mask)."""

    @staticmethod
    def forward(
        input: Tensor, flow: Tensor, interpolation: int, padding_mode: int, return_mask: bool
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.mafnet_ops.flow_warp_forward(
            input, flow, interpolation, padding_mode, return_mask
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, flow, ctx.interpolation, ctx.padding_mode, _ = inputs
        ctx.save_for_backward(input, flow)
        ctx.save_for_forward(input, flow)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        input, flow = ctx.saved_tensors
        need_input, need_flow = ctx.needs_input_grad[:2]
        backward = (
            torch.ops.mafnet_ops.flow_warp_backward
            if torch.compiler.is_compiling()
            else _FlowWarpBackward.apply
        )
        options = ctx.interpolation, ctx.padding_mode, need_input, need_flow
        deterministic = torch.are_deterministic_algorithms_enabled()
        grad_input, grad_flow = backward(grads[0], input, flow, *options, deterministic)
        return (
            grad_input if need_input else None,
            grad_flow if need_flow else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, flow: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = [fold(t, d, info.batch_size) for t, d in zip((input, flow), in_dims[:2])]
        output, mask = _FlowWarpWithJvp.apply(*tensors, *options)
        batch = info.batch_size
        if mask.shape[0] == 0:
            mask = mask.new_empty((batch, *mask.shape))
        else:
            mask = unfold(mask, batch)
        return (unfold(output, batch), mask), (0, 0)


class _FlowWarpWithJvp(_FlowWarp):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        primals = ctx.saved_for_forward
        filled = tuple(
            torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents[:2])
        )
        return jvp_by_vjp(_reference(ctx.interpolation, ctx.padding_mode), primals, filled), None


class _FlowWarpBackward(torch.autograd.Function):
    """The raw backward op, whose own gradient goes through the reference."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        flow: Tensor,
        interpolation: int,
        padding_mode: int,
        need_input: bool,
        need_flow: bool,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        options = interpolation, padding_mode, need_input, need_flow, deterministic
        return torch.ops.mafnet_ops.flow_warp_backward(grad_output, input, flow, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad_output, input, flow, ctx.interpolation, ctx.padding_mode, *needs = inputs
        ctx.needs = needs[:2]
        ctx.save_for_backward(grad_output, input, flow)
        ctx.save_for_forward(grad_output, input, flow)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        function = _reference_vjp(ctx.interpolation, ctx.padding_mode, ctx.needs)
        vjp: Any = torch.func.vjp(function, *ctx.saved_tensors)[1]
        wanted = tuple(g for g, need in zip(grads, ctx.needs) if need)
        return (*vjp(wanted), None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        primals = ctx.saved_for_forward
        filled = tuple(
            torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents[:3])
        )
        function = _reference_vjp(ctx.interpolation, ctx.padding_mode, ctx.needs)
        results = iter(jvp_by_vjp(function, primals, filled))
        unwanted = (p.new_zeros((0, *p.shape[1:])) for p in primals[1:])
        first, second = (next(results) if need else none for need, none in zip(ctx.needs, unwanted))
        return first, second

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        batch = info.batch_size
        tensors = [fold(t, d, batch) for t, d in zip(args[:3], in_dims[:3])]
        grads = _FlowWarpBackward.apply(*tensors, *args[3:])
        unfolded = [
            unfold(g, batch) if need else g.new_empty((batch, *g.shape))
            for g, need in zip(grads, args[5:7])
        ]
        return (unfolded[0], unfolded[1]), (0, 0)


def _reference_vjp(interpolation: int, padding_mode: int, needs: list[bool]) -> Any:
    """(grad_output, input, flow) -> the wanted ones of (grad_input, grad_flow), by the reference."""
    function = _reference(interpolation, padding_mode)

    def backward(grad_output: Tensor, input: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
        grads = torch.func.vjp(function, input, flow)[1](grad_output)
        return tuple(g for g, need in zip(grads, needs) if need)

    return backward
