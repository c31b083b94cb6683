"""What the autograd Functions of the ops share: layouts of fake results, forward mode, vmap."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

Optional = Tensor | None


def memory_format_of(input: Tensor) -> torch.memory_format:
    """Of the results: channels last where ``input`` has them, as memory_format_of() in csrc/common/checks.h."""
    channels_last = input.shape[1] > 1 and input.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_like_input(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result of another shape, for a fake kernel."""
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input)
    )


def keep_signature(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``Function.apply`` asks for the signature of ``forward`` at every call; finding it takes longer than the call."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def jvp_by_vjp(function: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """J t as the gradient of u -> J^T u, which is linear: forward mode without nesting forward mode."""
    made: Any = torch.func.vjp(function, *primals)
    output, vjp = made[0], made[1]
    single = isinstance(output, Tensor)
    zeros = torch.zeros_like(output) if single else tuple(map(torch.zeros_like, output))
    vjp_of_vjp: Any = torch.func.vjp(vjp, zeros)[1]
    return vjp_of_vjp(tangents)[0]


def fold(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """Merge the dimension that vmap added into the batch of images."""
    moved = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def unfold(tensor: Tensor, batch: int) -> Tensor:
    """Take the batch of images apart again."""
    return tensor.unflatten(0, (batch, tensor.shape[0] // batch))


def fold_images(
    tensors: Sequence[Optional], dims: Sequence[int | None], batch: int, images: Container[int]
) -> list[Optional]:
    """:func:`fold` of the tensors at the positions ``images``; the others are shared and stay."""
    return [
        t if t is None or i not in images else fold(t, d, batch)
        for i, (t, d) in enumerate(zip(tensors, dims))
    ]


def select(tensors: Sequence[Optional], dims: Sequence[int | None], index: int) -> list[Optional]:
    """One sample of those that vmap added."""
    return [t if t is None or d is None else t.select(d, index) for t, d in zip(tensors, dims)]


def without_missing(
    primals: Sequence[Optional], tangents: Sequence[Optional]
) -> tuple[list[bool], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Which tensors are there, those, and their tangents with zeros for the missing ones."""
    pairs = [(p, t) for p, t in zip(primals, tangents) if p is not None]
    filled = tuple(torch.zeros_like(p) if t is None else t for p, t in pairs)
    return [p is not None for p in primals], tuple(p for p, _ in pairs), filled
