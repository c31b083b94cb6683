"""Calls of flow_warp's CUDA kernels on the emulator, with what must come out.

For tests/ops/test_flow_warp_cuda.py, and for the mutations of csrc/flow_warp, which probe() must notice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from cuda_on_cpu.emulator import Kernels
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor

from mafnet_ops import reference

INTERPOLATIONS = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")
# "strided" is a slice of a larger, transposed tensor. In the others channels are last, and the stride of pixels,
# rows or images is no multiple of 16 bytes, while the two other strides are; in "padded_pixels" all three are.
LAYOUTS = (
    "contiguous",
    "channels_last",
    "strided",
    "strided_pixels",
    "strided_rows",
    "strided_images",
    "padded_pixels",
)
TAPS = {"bilinear": 4, "nearest": 1, "bicubic": 16}
TERMS = 16  # taps of the largest stencil
NAMES = ("output", "grad_input", "grad_flow")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; between the elements of a strided one lie NaNs."""
    n, c, h, w = tensor.shape
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        larger = tensor.new_full((n, w + 1, c, 2 * h), math.nan)
        return larger[:, 1:, :, ::2].permute(0, 2, 3, 1).copy_(tensor)
    gaps = {"pixels": (0, 0, 3), "rows": (0, 3, 0), "images": (3, 0, 0)}
    gaps = {f"strided_{name}": gap for name, gap in gaps.items()} | {
        "padded_pixels": (0, 0, -c % 8)
    }
    if layout in gaps:
        per_image, per_row, per_pixel = gaps[layout]
        pixel = c + per_pixel
        row = -(-w * pixel // 8) * 8 + per_row
        strides = (-(-h * row // 8) * 8 + per_image, 1, row, pixel)
        storage = tensor.new_full((n * strides[0] + 1,), math.nan)
        return storage.as_strided(tensor.shape, strides).copy_(tensor)
    return tensor.contiguous()


def misaligned(tensor: Tensor) -> Tensor:
    """The same, channels last, in storage that begins 8 bytes off a multiple of 16."""
    n, c, h, w = tensor.shape
    size = tensor.element_size()
    storage = tensor.new_zeros(tensor.numel() + 16 // size)
    skipped = (8 - storage.data_ptr()) % 16 // size
    view = storage[skipped:][: tensor.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
    assert view.data_ptr() % 16 == 8
    return view.copy_(tensor)


@dataclass(frozen=True)
class Warp:
    """Arguments of one call."""

    input: Tensor
    flow: Tensor
    grad_output: Tensor
    interpolation: str = "bilinear"
    padding_mode: str = "zeros"

    @staticmethod
    def random(
        shape: tuple[int, int, int, int],
        out: tuple[int, int] | None = None,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
        layout: str = "contiguous",
        interpolation: str = "bilinear",
        padding_mode: str = "zeros",
        reach: float = 6.0,
    ) -> Warp:
        """Flows are odd multiples of 1/8, exact in all dtypes and off the pixel edges of "nearest"."""
        generator = torch.Generator().manual_seed(0)

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1

        out = out or shape[2:]
        flow = (uniform(shape[0], *out, 2) * reach * 4).round().div(4).add(1 / 8)
        input, grad = uniform(*shape).to(dtypes[0]), uniform(*shape[:2], *out).to(dtypes[0])
        return Warp(
            laid_out(input, layout),
            flow.to(dtypes[1]),
            laid_out(grad, layout),
            interpolation,
            padding_mode,
        )

    def to(self, dtype: torch.dtype) -> Warp:
        tensors = (self.input, self.flow, self.grad_output)
        input, flow, grad_output = (t.to(dtype) for t in tensors)
        return Warp(input, flow, grad_output, self.interpolation, self.padding_mode)

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output and gradients by differentiable PyTorch, in the dtype of the arguments."""
        x, f = self.input.detach().requires_grad_(), self.flow.detach().requires_grad_()
        output = reference.flow_warp(x, f, self.interpolation, self.padding_mode)
        assert isinstance(output, Tensor)
        grad_input, grad_flow = torch.autograd.grad(output, (x, f), self.grad_output)
        return output.detach(), grad_input, grad_flow

    # The mutations of the kernels ask for them again and again.

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.to(torch.float64).reference()

    @cached_property
    def baseline(self) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 arithmetic, to be rounded once to what the kernels write."""
        return self.to(torch.float32).reference()

    @cached_property
    def exact_mask(self) -> Tensor:
        return reference.flow_warp(self.input.double(), self.flow.double(), return_mask=True)[1]

    def numbers(self) -> dict[str, Any]:
        has_channels_last = self.input.shape[1] > 1 and self.input.stride(1) == 1
        return {
            "interpolation": INTERPOLATIONS.index(self.interpolation),
            "padding": PADDINGS.index(self.padding_mode),
            "channels_last": has_channels_last,
        }

    def like_input(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """What binding.cpp allocates: dense, channels last where the input has them last."""
        last = self.numbers()["channels_last"]
        memory_format = torch.channels_last if last else torch.contiguous_format
        shape = (*self.input.shape[:2], height, width)
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)

    def forward(
        self, kernels: Kernels, order: str = "forward", with_mask: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Output, and mask or zeros."""
        n, height, width, _ = self.flow.shape
        output = self.like_input(height, width, self.input.dtype)
        mask = torch.zeros(n, 1, height, width, dtype=self.input.dtype)
        arrays: dict[str, Any] = {"input": self.input, "flow": self.flow, "output": output}
        arrays |= {"mask": mask} if with_mask else {}
        report = kernels.run("flow_warp_forward", order=order, **arrays, **self.numbers())
        report.raise_if_any()
        return output, mask

    def backward(
        self, kernels: Kernels, order: str = "forward", wanted: tuple[str, ...] = NAMES[1:]
    ) -> tuple[Tensor, Tensor]:
        """The accumulators of grad_input, and grad_flow; zeros where they are not wanted."""
        double = self.input.dtype == torch.float64
        height, width = self.input.shape[2:]
        accumulators = self.like_input(height, width, torch.float64 if double else torch.float32)
        grad_flow = torch.zeros(self.flow.shape, dtype=self.flow.dtype)
        gradients = {"grad_input": accumulators, "grad_flow": grad_flow}
        arrays: dict[str, Any] = {
            "input": self.input,
            "flow": self.flow,
            "grad_output": self.dense_gradient(),
        }
        arrays |= {name: gradients[name] for name in wanted}
        report = kernels.run("flow_warp_backward", order=order, **arrays, **self.numbers())
        report.raise_if_any()
        return accumulators, grad_flow

    def deterministic_grad_input(self, kernels: Kernels, order: str = "forward") -> Tensor:
        """As binding.cpp does it: write the taps down, let torch sort them, gather."""
        n, height, width, _ = self.flow.shape
        taps = torch.empty(n, height * width * TAPS[self.interpolation], dtype=torch.int64)
        arrays: dict[str, Any] = {"input": self.input, "flow": self.flow}
        report = kernels.run(
            "flow_warp_backward_taps", order=order, taps=taps, **arrays, **self.numbers()
        )
        report.raise_if_any()
        arrays["sorted_taps"], arrays["tap_order"] = taps.sort(dim=1, stable=True)
        arrays["grad_output"] = self.dense_gradient()
        grad_input = self.like_input(*self.input.shape[2:], self.input.dtype)
        report = kernels.run(
            "flow_warp_backward_gather",
            order=order,
            grad_input=grad_input,
            **arrays,
            **self.numbers(),
        )
        report.raise_if_any()
        return grad_input

    def check_deterministic(self, kernels: Kernels, orders: tuple[str, ...] = ("random",)) -> None:
        """grad_input against the reference, the same bits in every order."""
        exact = self.exact[1]
        results = [self.deterministic_grad_input(kernels, order) for order in orders]
        for other in results[1:]:
            assert_same(other, results[0])
        terms = self.flow.shape[1] * self.flow.shape[2] * TAPS[self.interpolation]
        if self.input.dtype == torch.float64:
            # both are rounded: two walks
            assert_as_accurate(results[0], exact, exact, "grad_input", 4 * terms)
            return
        baseline = self.baseline[1].to(self.input.dtype)
        assert_as_accurate(results[0], baseline, exact, "grad_input", terms)

    def dense_gradient(self) -> Tensor:
        """grad_output as binding.cpp hands it over."""
        last = self.numbers()["channels_last"]
        if last and self.grad_output.stride(1) == 1:
            return self.grad_output
        memory_format = torch.channels_last if last else torch.contiguous_format
        return self.grad_output.contiguous(memory_format=memory_format)

    def check(self, kernels: Kernels, orders: tuple[str, ...] = ("random",)) -> None:
        """Forward and backward against the reference."""
        first: tuple[Tensor, Tensor] | None = None
        for order in orders:
            output, mask = self.forward(kernels, order)
            results = (output, *self.backward(kernels, order))
            assert_same(mask.double(), self.exact_mask)
            if first is not None:  # no sum of the forward depends on the order
                assert_same(output, first[0])
            first = first or (output, mask)
            self.check_results(results, self.exact)

    def check_results(self, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
        pixels = max(1, self.flow.shape[1] * self.flow.shape[2])
        if self.input.dtype == torch.float64:
            # grad_input may sum all pixels, grad_flow the channels; bicubic weights are at most 1.3
            terms = (TERMS, TERMS * pixels, TERMS * max(1, self.input.shape[1]))
            for actual, expected, count in zip(results, exact, terms):
                assert_rounding_only(actual, expected, count, 4)
            return
        terms = (1, TERMS * pixels, TERMS * max(1, self.input.shape[1]))
        for name, actual, base, expected, count in zip(NAMES, results, self.baseline, exact, terms):
            assert_as_accurate(actual, base.to(actual.dtype), expected, name, count)


def check_weightless_neighbours(kernels: Kernels, layout: str, interpolation: str) -> None:
    """At a pixel's centre no other pixel counts, not even an infinite one; forward and backward."""
    case = Warp.random((1, 8, 6, 7), layout=layout, interpolation=interpolation)
    spoilt = case.input.clone()
    spoilt[:, :, ::2, ::3], spoilt[:, :, 1, 1] = math.inf, math.nan
    case = replace(case, input=spoilt, grad_output=spoilt, flow=torch.zeros_like(case.flow))
    assert_same(case.forward(kernels)[0], spoilt)
    assert_same(case.backward(kernels, wanted=("grad_input",))[0], spoilt)
