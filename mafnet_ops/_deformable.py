"""What modulated_deform_conv2d and deform_align share: argument rules and the autograd Functions of a pair of raw ops.

The tensors of such an op are (input, coordinates..., weight, bias); those that may be missing are None there. The raw
forward op takes them and then numbers, the options. The raw backward op takes the gradient of the output, the tensors
but the bias, the options, one bool per tensor for the gradients wanted, and ``deterministic``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._autograd import Optional, fold_images, jvp_by_vjp, select, unfold, without_missing
from ._checks import (
    autocast_dtype,
    pair,
    require,
    require_same_device,
    require_same_dtype,
    require_shape,
    require_tensor,
)

Options = tuple[Any, ...]
Geometry = tuple[int, int, int, int, int, int]
"""Stride, padding and dilation, each vertical and horizontal."""

GEOMETRY_SCHEMA = ", ".join(
    f"int {name}_{axis}" for name in ("stride", "padding", "dilation") for axis in "hw"
)


def pairs(geometry: Geometry) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding and dilation, as the definition takes them."""
    return geometry[0:2], geometry[2:4], geometry[4:6]


def as_autocast_wants(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three, which must be floating point, in the dtype of autocast; as they are beside an fp64 input."""
    require_tensor(op, "input", input, 4)
    require_tensor(op, "weight", weight, 4)
    if bias is not None:
        require_tensor(op, "bias", bias, 1)
    low = autocast_dtype(input.device)
    if low is None or input.dtype == torch.float64:
        return input, weight, bias
    return input.to(low), weight.to(low), None if bias is None else bias.to(low)


def check_convolution(
    op: str,
    tensors: dict[str, Any],
    coordinates: str,
    planes: int,
    geometry: Sequence[int | Sequence[int]],
    parts: int = 1,
) -> Geometry:
    """Raise unless input, weight, bias (or None) and the tensor named ``coordinates``, which has ``planes`` channels
    for each tap and offset group, make a deformable convolution; ``parts`` of the input share the offset groups."""
    input, weight, bias, offset = (
        tensors[name] for name in ("input", "weight", "bias", coordinates)
    )
    require_tensor(op, coordinates, offset, 4)
    require_same_device(op, "input", tensors)
    require_same_dtype(op, "input", {"input": input, "weight": weight, "bias": bias})

    stride = pair(op, "stride", geometry[0], 1)
    padding = pair(op, "padding", geometry[1], 0)
    dilation = pair(op, "dilation", geometry[2], 1)
    batch, channels, height, width = input.shape
    require(channels > 0, op, "input", "at least 1 channel", tuple(input.shape))
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    fits = group_channels > 0 and channels % group_channels == 0
    expected = f"shape[1] to divide the {channels} input channels"
    require(fits, op, "weight", expected, group_channels)
    groups = channels // group_channels
    expected = f"shape[0] a multiple of {groups} groups"
    require(out_channels % groups == 0, op, "weight", expected, out_channels)
    taps = kernel_h * kernel_w
    require(taps > 0, op, "weight", "a kernel of at least 1 x 1", (kernel_h, kernel_w))
    # No divmod: Dynamo cannot trace it with dynamic shapes.
    offset_groups, rest = offset.shape[1] // (planes * taps), offset.shape[1] % (planes * taps)
    shared = (
        f"{channels} input channels" if parts == 1 else f"{channels // parts} channels of a part"
    )
    require(
        rest == 0 and offset_groups > 0 and channels % (parts * offset_groups) == 0,
        op,
        coordinates,
        f"{planes} * G * {taps} channels with G dividing the {shared}",
        f"{offset.shape[1]} channels",
    )
    out_h = (height + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    require(out_h > 0 and out_w > 0, op, "input", "an output of at least 1 x 1", (out_h, out_w))
    shape = (batch, offset.shape[1], out_h, out_w)
    require_shape(op, coordinates, offset, shape, f"(N, {planes} * G * K, H_out, W_out)")
    if bias is not None:
        require_shape(op, "bias", bias, (out_channels,), "(C_out,)")
    return (*stride, *padding, *dilation)


def coordinates(op: str, argument: str, value: Tensor, input: Tensor) -> Tensor:
    """Offset, mask or flow in a dtype that the kernels take: that of ``input``, or fp32 beside half precision."""
    compute = reference.coordinate_dtype(input.dtype)
    if value.dtype in (input.dtype, compute):
        return value
    if value.dtype == torch.float64:
        raise TypeError(
            f"{op}: {argument}: expected dtype {input.dtype} or float32, got {value.dtype}"
        )
    return value.to(compute)  # loses nothing


@torch.compiler.assume_constant_result  # Dynamo cannot read it; compiled code keeps what it met
def tf32_is_allowed() -> bool:
    """Whether fp32 products on CUDA may round to TF32: torch's setting for matrix products."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@dataclass(frozen=True)
class Functions:
    """The autograd Functions of an op, each applied to (*tensors, options)."""

    raw: Callable[..., Tensor]
    plain: type[torch.autograd.Function]
    with_jvp: type[torch.autograd.Function]

    def apply(self, *arguments: Any) -> Tensor:
        *tensors, options = arguments
        options = (*options, tf32_is_allowed())
        if not torch.compiler.is_compiling():
            return self.with_jvp.apply(*tensors, options)
        # Dynamo refuses a Function with a custom jvp and has no use for one. Where it needs no gradients it counts
        # the parameters that forward names, of which there are none.
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return self.plain.apply(*tensors, options)
        return self.raw(*tensors, *options)


def make_functions(
    raw_forward: Callable[..., Tensor],
    raw_backward: Callable[..., tuple[Tensor, ...]],
    definition: Callable[..., Tensor],
) -> Functions:
    """The Functions over two raw ops; ``definition(*tensors, options)`` is the same in PyTorch, for second
    derivatives and forward mode."""

    def run_backward(*arguments: Any) -> tuple[Tensor, ...]:
        """(grad_output, *tensors but the bias, options, needs) -> a gradient for each tensor."""
        *tensors, options, needs = arguments
        deterministic = torch.are_deterministic_algorithms_enabled()
        return raw_backward(*tensors, *options, *needs, deterministic)

    class Backward(torch.autograd.Function):
        """The raw backward op, whose own gradient goes through the definition."""

        forward = staticmethod(run_backward)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            *tensors, ctx.options, ctx.needs = inputs
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.empty = [(g.shape, g.dtype) for g in output]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Optional, ...]:
            saved = ctx.saved_tensors
            present, primals, _ = without_missing(saved, (None,) * len(saved))
            function = _definition_vjp(definition, present, ctx.options, ctx.needs)
            vjp: Any = torch.func.vjp(function, *primals)[1]
            results = iter(vjp(tuple(g for g, need in zip(grads, ctx.needs) if need)))
            return (*(next(results) if there else None for there in present), None, None)

        @staticmethod
        def jvp(ctx: Any, *tangents: Optional) -> tuple[Tensor, ...]:
            present, primals, filled = without_missing(ctx.saved_for_forward, tangents)
            function = _definition_vjp(definition, present, ctx.options, ctx.needs)
            results = iter(jvp_by_vjp(function, primals, filled))
            return tuple(
                next(results) if need else primals[0].new_zeros(shape, dtype=dtype)
                for need, (shape, dtype) in zip(ctx.needs, ctx.empty)
            )

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[int | None, ...], *args: Any
        ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
            *tensors, options, needs = args
            images = len(tensors) - 1  # all but the weight
            if in_dims[images] is None and not any(needs[-2:]):
                folded = fold_images(tensors, in_dims, info.batch_size, range(images))
                grads = Backward.apply(*folded, options, needs)
                unfolded = [unfold(g, info.batch_size) for g in grads[:-2]]
                unfolded += [g.new_empty((info.batch_size, *g.shape)) for g in grads[-2:]]
            else:  # gradients of weight and bias are sums over the images: one by one
                parts = [select(tensors, in_dims, i) for i in range(info.batch_size)]
                each = [Backward.apply(*part, options, needs) for part in parts]
                unfolded = [torch.stack(same) for same in zip(*each)]
            return tuple(unfolded), (0,) * len(unfolded)

    class Forward(torch.autograd.Function):
        """(*tensors, (*options, whether TF32 is allowed)) -> output."""

        @staticmethod
        def forward(*arguments: Any) -> Tensor:
            *tensors, options = arguments
            return raw_forward(*tensors, *options)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, options = inputs
            ctx.options = options[:-1]  # TF32 is of the forward alone
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> tuple[Optional, ...]:
            *tensors, _ = ctx.saved_tensors
            # A tensor that is not there needs none.
            needs = tuple(ctx.needs_input_grad[:-1])
            # Dynamo cannot nest Functions here; it differentiates once.
            function = run_backward if torch.compiler.is_compiling() else Backward.apply
            grads = function(grad, *tensors, ctx.options, needs)
            return (*(g if need else None for g, need in zip(grads, needs)), None)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
            """The new dimension joins the batch; samples with weights of their own go one by one."""
            *tensors, options = args
            images = len(tensors) - 2  # all but weight and bias
            if in_dims[images] is None and in_dims[images + 1] is None:
                folded = fold_images(tensors, in_dims, info.batch_size, range(images))
                return unfold(ForwardWithJvp.apply(*folded, options), info.batch_size), 0
            parts = [select(tensors, in_dims, i) for i in range(info.batch_size)]
            return torch.stack([ForwardWithJvp.apply(*part, options) for part in parts]), 0

    class ForwardWithJvp(Forward):
        @staticmethod
        def jvp(ctx: Any, *tangents: Optional) -> Tensor:
            present, primals, filled = without_missing(ctx.saved_for_forward, tangents)
            return jvp_by_vjp(_in_double(definition, present, ctx.options), primals, filled)

    return Functions(raw_forward, Forward, ForwardWithJvp)


def _in_double(definition: Any, present: list[bool], options: Options) -> Any:
    """The definition as a function of the tensors that are there, in fp64: differentiable any number of times."""

    def function(*tensors: Tensor) -> Tensor:
        values = iter(t.double() for t in tensors)
        out = definition(*(next(values) if there else None for there in present), options)
        return out.to(tensors[0].dtype)

    return function


def _definition_vjp(
    definition: Any, present: list[bool], options: Options, needs: tuple[bool, ...]
) -> Any:
    """(grad_output, *tensors but the bias) -> the wanted gradients, by the definition."""
    # The bias adds to the output, so that its value is of no matter, and zeros serve.
    of_forward = [*present[1:], needs[-1]]

    def backward(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        bias = [tensors[-1].new_zeros(tensors[-1].shape[0])] if needs[-1] else []
        function = _in_double(definition, of_forward, options)
        vjp: Any = torch.func.vjp(function, *tensors, *bias)[1]
        grads = iter(vjp(grad_output))
        every = [next(grads) if there else None for there in of_forward]
        return tuple(g for g, need in zip(every, needs) if need and g is not None)

    return backward
