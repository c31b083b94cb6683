"""Tensors with chosen or drawn strides, and the hypothesis strategies of the op tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "strided")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def uniform(*shape: int, reach: float = 1.0, seed: int = 0) -> Tensor:
    """fp64, in [-reach, reach]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * reach


class Strides(NamedTuple):
    """How a tensor of any shape lies in memory; NaN lies between its elements."""

    order: tuple[int, ...]
    """The dimensions from the slowest to the fastest."""
    steps: tuple[int, ...]
    """Per dimension, how far apart its neighbours are in units of the densest packing."""
    offset: int
    """Elements before the first one."""


def strided(tensor: Tensor, strides: Strides) -> Tensor:
    """The same values in a view with these strides."""
    order = [d for d in strides.order if d < tensor.dim()]
    steps = [strides.steps[d] for d in order]
    sizes = [tensor.shape[d] * step for d, step in zip(order, steps)]
    storage = tensor.new_full((strides.offset + math.prod(sizes),), math.nan)
    view = storage[strides.offset :].view(sizes)
    view = view[tuple(slice(None, None, step) for step in steps)]
    back = [order.index(d) for d in range(tensor.dim())]
    return view.permute(back).copy_(tensor)


SLICED = Strides(order=(0, 2, 1, 3), steps=(1, 1, 2, 3), offset=1)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A 4-dimensional tensor in one of ``LAYOUTS``; "strided" is a slice of a larger, transposed tensor."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return strided(tensor, SLICED) if layout == "strided" else tensor.contiguous()


@st.composite
def random_strides(draw: st.DrawFn, dims: int = 4) -> Strides:
    """Any order of the dimensions, gaps between the elements, any start."""
    order = tuple(draw(st.permutations(range(dims))))
    steps = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    return Strides(order, tuple(steps), draw(st.integers(0, 5)))


def sizes(smallest: int = 1, largest: int = 9) -> st.SearchStrategy[tuple[int, int]]:
    """(height, width), with one pixel among them."""
    return st.tuples(st.integers(smallest, largest), st.integers(smallest, largest))


def dtypes(among: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(list(among))
