"""Autograd for ops that are one raw forward and one raw backward op with one output tensor.

``register_op`` of ``_library`` says whether an op has kernels; ``call`` here runs them. Derivatives beyond the first
go through the op's reference, so that they are right though no kernel computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._autograd import (
    Optional,
    fold_images,
    jvp_by_vjp,
    keep_signature,
    select,
    unfold,
    without_missing,
)

Options = tuple[Any, ...]


@dataclass(frozen=True)
class NativeOp:
    """What an op computes from tensors, of which some may be None, and options, which are no tensors."""

    forward: Callable[..., Tensor]
    """(*tensors, *options) -> output"""
    backward: Callable[..., tuple[Tensor, ...]]
    """(grad_output, tensors, output, options, needs) -> a gradient per tensor; of no elements where not needed"""
    reference: Callable[..., Tensor]
    """As ``forward``, in differentiable PyTorch."""
    tensors: int
    """How many tensors, at most 5."""
    per_image: tuple[int, ...]
    """Positions of the tensors whose first dimension counts images; the others are parameters."""
    added: tuple[int, ...] = ()
    """Positions of the tensors that are added to the output: its gradient is theirs, and ``backward`` is not asked."""
    keeps_output: bool = True
    """Whether ``backward`` reads the output. Where not it gets None, and the caller may write over the output."""


OPS: dict[str, NativeOp] = {}
"""Every op that ``call`` knows; Functions take the name, which torch.compile can hold on to."""


def call(name: str, tensors: tuple[Optional, ...], options: Options = ()) -> Tensor:
    """Run the native op ``name``, differentiably."""
    # Dynamo refuses a Function with a custom jvp and has no use for one.
    compiling = torch.compiler.is_compiling()
    if not compiling and not _is_watched(tensors):
        return OPS[name].forward(*tensors, *options)
    function = _Forward if compiling else _ForwardWithJvp
    return function.apply(name, options, *tensors, *(None,) * (5 - len(tensors)))


def _is_watched(tensors: tuple[Optional, ...]) -> bool:
    """Whether autograd, forward mode or torch.func must see the call; a Function takes longer than a small map."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Forward(torch.autograd.Function):
    """(name, options, five tensors or None) -> output. Dynamo tells a context by the number of arguments."""

    @staticmethod
    @keep_signature
    def forward(
        name: str,
        options: Options,
        a: Optional,
        b: Optional,
        c: Optional,
        d: Optional,
        e: Optional,
    ) -> Tensor:
        op = OPS[name]
        return op.forward(*(a, b, c, d, e)[: op.tensors], *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, ctx.options, *tensors = inputs
        ctx.save_for_backward(output if OPS[ctx.name].keeps_output else None, *tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional, ...]:
        output, *tensors = ctx.saved_tensors
        added = OPS[ctx.name].added
        wanted = ctx.needs_input_grad[2:]
        needs = tuple(need and i not in added for i, need in enumerate(wanted))
        plain = torch.compiler.is_compiling() or not _is_watched((grad, output, *tensors))
        backward = _gradients if plain else _Backward.apply
        grads = backward(ctx.name, ctx.options, needs, grad, output, *tensors)
        results = [g if need else None for g, need in zip(grads, needs)]
        results += [None] * (len(needs) - len(results))
        for i in added:
            results[i] = grad if wanted[i] else None
        return (None, None, *results)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], name: str, options: Options, *tensors: Optional
    ) -> tuple[Tensor, int]:
        dims, batch = in_dims[2:], info.batch_size
        images = OPS[name].per_image
        if all(d is None for i, d in enumerate(dims) if i not in images):
            folded = fold_images(tensors, dims, batch, images)
            return unfold(_ForwardWithJvp.apply(name, options, *folded), batch), 0
        each = [select(tensors, dims, i) for i in range(batch)]
        return torch.stack([_ForwardWithJvp.apply(name, options, *one) for one in each]), 0


class _ForwardWithJvp(_Forward):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Without what ``Function.apply`` does first, binding arguments to names, which takes longer than the call."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        primals = ctx.saved_for_forward
        present, given, filled = without_missing(primals, tangents[2:])
        return jvp_by_vjp(_reference(ctx.name, ctx.options, present), given, filled)


def _gradients(
    name: str,
    options: Options,
    needs: tuple[bool, ...],
    grad: Tensor,
    output: Optional,
    *tensors: Optional,
) -> tuple[Tensor, ...]:
    op = OPS[name]
    used = op.tensors
    return op.backward(grad, tensors[:used], output, options, needs[:used])


def _five_gradients(*args: Any) -> tuple[Tensor, ...]:
    grads, grad = _gradients(*args), args[3]
    return (*grads, *(grad.new_empty(0) for _ in range(5 - len(grads))))


class _Backward(torch.autograd.Function):
    """The raw backward op, whose own gradient goes through the reference; ``output`` follows from the tensors."""

    forward = staticmethod(keep_signature(_five_gradients))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.options, ctx.needs, grad, _, *tensors = inputs
        ctx.save_for_backward(grad, *tensors)
        ctx.save_for_forward(grad, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Optional, ...]:
        present, primals, _ = without_missing(ctx.saved_tensors, (None,) * len(ctx.saved_tensors))
        function = _reference_vjp(ctx.name, ctx.options, present[1:], ctx.needs)
        vjp: Any = torch.func.vjp(function, *primals)[1]
        results = iter(vjp(tuple(g for g, need in zip(grads, ctx.needs) if need)))
        first, *rest = (next(results) if there else None for there in present)
        return (None, None, None, first, None, *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        primals = ctx.saved_for_forward
        present, given, filled = without_missing(primals, (tangents[3], *tangents[5:]))
        function = _reference_vjp(ctx.name, ctx.options, present[1:], ctx.needs)
        results = iter(jvp_by_vjp(function, given, filled))
        return tuple(
            next(results)
            if need
            else primals[0].new_zeros((0, *(() if t is None else t.shape[1:])))
            for need, t in zip(ctx.needs, primals[1:])
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        name, options, needs, *tensors = args
        dims, batch = in_dims[3:], info.batch_size
        images = (0, 1, *(i + 2 for i in OPS[name].per_image))
        parameters = [i for i in range(2, len(tensors)) if i not in images]
        if all(dims[i] is None and not needs[i - 2] for i in parameters):
            folded = fold_images(tensors, dims, batch, images)
            grads = _Backward.apply(name, options, needs, *folded)
            results = [
                unfold(g, batch) if need else g.new_empty((batch, *g.shape))
                for g, need in zip(grads, needs)
            ]
        else:  # gradients of parameters are sums over the images: one by one
            each = [select(tensors, dims, i) for i in range(batch)]
            parts = [_Backward.apply(name, options, needs, *one) for one in each]
            results = [torch.stack(same) for same in zip(*parts)]
        return tuple(results), (0,) * len(results)


def _reference(name: str, options: Options, present: list[bool]) -> Any:
    """The definition as a function of the tensors that are there."""

    def function(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        op = OPS[name]
        every = [next(given) if there else None for there in present]
        return op.reference(*every[: op.tensors], *options)

    return function


def _reference_vjp(
    name: str, options: Options, present: list[bool], needs: tuple[bool, ...]
) -> Any:
    """(grad_output, *tensors) -> the wanted gradients, by the reference."""

    def backward(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        vjp: Any = torch.func.vjp(_reference(name, options, present), *tensors)[1]
        grads = iter(vjp(grad_output))
        every = [next(grads) if there else None for there in present]
        return tuple(g for g, need in zip(every, needs) if need and g is not None)

    return backward
