"""Calls of channel attention's CUDA kernels on the emulator, with what must come out.

For tests/ops/test_channel_attention_cuda.py and for channel_attention_probe.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from cuda_on_cpu import flow_warp_cases
from cuda_on_cpu.emulator import Kernels
from tolerances import assert_as_accurate, assert_same
from torch import Tensor

from mafnet_ops import reference

Shape = tuple[int, int, int, int]
# Planes of pixels side by side. The stride of rows, of channels or of images is no multiple of 16 bytes, while the
# others are; in "padded" all are; in "every_other" the pixels of a row do not follow each other.
PLANES = ("rows", "channels", "images", "padded", "every_other")
LAYOUTS = (*flow_warp_cases.LAYOUTS, *PLANES)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def placed(tensor: Tensor, strides: tuple[int, ...], off: int = 0) -> Tensor:
    """The same values with other strides, between NaNs, ``off`` bytes beside a multiple of 16."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides)) if tensor.numel() else 0
    size = tensor.element_size()
    storage = tensor.new_full((extent + 32 // size,), math.nan)
    skipped = (off - storage.data_ptr()) % 16 // size
    return storage[skipped:].as_strided(tensor.shape, strides).copy_(tensor)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout not in PLANES:
        return flow_warp_cases.laid_out(tensor, layout)
    _, channels, height, width = tensor.shape
    step = 1 + (layout == "every_other")
    row = -(-width * step // 8) * 8 + 8 + 3 * (layout == "rows")
    plane = -(-height * row // 8) * 8 + 3 * (layout == "channels")
    image = -(-channels * plane // 8) * 8 + 3 * (layout == "images")
    return placed(tensor, (image, plane, row, step))


def result_like(tensor: Tensor) -> Tensor:
    """What binding.cpp allocates: channels last where the image has them last."""
    last = tensor.shape[1] > 1 and tensor.stride(1) == 1
    memory_format = torch.channels_last if last else torch.contiguous_format
    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return zeros.contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class Channels:
    """Arguments of all four calls."""

    input: Tensor
    grad_output: Tensor
    gate: Tensor
    grad_statistics: Tensor
    misaligned: str = ""  # which image, a result perhaps, vectors of 16 bytes do not fit

    @staticmethod
    def random(
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        **options: Any,
    ) -> Channels:
        images = (laid_out(uniform(*shape, seed=s).to(dtype), layout) for s in (0, 1))
        gate, grad = uniform(*shape[:2], seed=2), uniform(shape[0], 2, shape[1], seed=3)
        return Channels(*images, gate.to(dtype), grad.to(dtype), **options)

    # -------------------------------------------------------------------------------------- calls

    def place(self, name: str, image: Tensor) -> Tensor:
        return placed(image, image.stride(), 8) if name == self.misaligned else image

    def most_workspace(self) -> int:
        """Bytes that a call may ask for: two sums of each 8 pixels, at most 1024 times, and two gradients."""
        batch, channels, height, width = self.input.shape
        element = 8 if self.input.dtype == torch.float64 else 4
        return element * batch * channels * (2 * min(1024, -(-height * width // 8)) + 2)

    def run(
        self, kernels: Kernels, entry: str, order: str, launches: int, **arrays: Tensor
    ) -> None:
        report = kernels.run(
            entry,
            order=order,
            input=self.place("input", self.input),
            **arrays,
            **(
                {}
                if entry == "channel_scale_forward"
                else {"most_workspace": self.most_workspace()}
            ),
        )
        report.raise_if_any()
        assert report.launches == (launches if self.input.numel() else 0)

    def statistics(self, kernels: Kernels, order: str = "forward") -> Tensor:
        """(N, 2, C)"""
        statistics = torch.zeros_like(self.grad_statistics)
        self.run(kernels, "channel_statistics_forward", order, 2, statistics=statistics)
        return statistics

    def statistics_backward(self, kernels: Kernels, order: str = "forward") -> Tensor:
        grad_input = self.place("grad_input", result_like(self.input))
        self.run(
            kernels,
            "channel_statistics_backward",
            order,
            3,
            statistics=reference.channel_statistics(self.input),
            grad_statistics=self.grad_statistics,
            grad_input=grad_input,
        )
        return grad_input

    def scale(self, kernels: Kernels, order: str = "forward") -> Tensor:
        output = self.place("output", result_like(self.input))
        self.run(kernels, "channel_scale_forward", order, 1, gate=self.gate, output=output)
        return output

    def scale_backward(
        self,
        kernels: Kernels,
        order: str = "forward",
        wanted: tuple[str, ...] = ("grad_input", "grad_gate"),
    ) -> dict[str, Tensor]:
        made = {"grad_input": result_like(self.input), "grad_gate": torch.zeros_like(self.gate)}
        grads = {name: self.place(name, made[name]) for name in wanted}
        launches = 2 if "grad_gate" in wanted else len(wanted)
        grad_output = self.place("grad_output", self.grad_output)
        arrays = {"gate": self.gate, "grad_output": grad_output, **grads}
        self.run(kernels, "channel_scale_backward", order, launches, **arrays)
        return grads

    # ------------------------------------------------------------------------------------- checks

    def results(self, kernels: Kernels, order: str) -> dict[str, Tensor]:
        statistics = self.statistics(kernels, order)
        return {
            "mean": statistics[:, 0],
            "max": statistics[:, 1],
            "grad_of_statistics": self.statistics_backward(kernels, order),
            "output": self.scale(kernels, order),
            **self.scale_backward(kernels, order),
        }

    def reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by PyTorch, in a dtype."""
        x, gate = (t.detach().to(dtype).requires_grad_() for t in (self.input, self.gate))
        statistics, output = reference.channel_statistics(x), reference.channel_scale(x, gate)
        (of_statistics,) = torch.autograd.grad(statistics, x, self.grad_statistics.to(dtype))
        grads = torch.autograd.grad(output, (x, gate), self.grad_output.to(dtype))
        return {
            "mean": statistics[:, 0].detach(),
            "max": statistics[:, 1].detach(),
            "grad_of_statistics": of_statistics,
            "output": output.detach(),
            "grad_input": grads[0],
            "grad_gate": grads[1],
        }

    def check(self, kernels: Kernels, orders: tuple[str, ...] = ("random",)) -> None:
        """All against the reference, the same bits in every order."""
        every = [self.results(kernels, order) for order in orders]
        for other in every[1:]:
            for name, result in every[0].items():
                assert_same(other[name], result)
        self.check_results(every[0])

    def check_results(self, results: dict[str, Tensor]) -> None:
        exact, baseline = self.reference(torch.float64), self.reference(torch.float32)
        pixels = math.prod(self.input.shape[2:])
        for name, actual in results.items():
            dtype = actual.dtype
            base = exact[name] if dtype == torch.float64 else baseline[name]
            if name == "max":
                assert_same(actual, exact[name].to(dtype))
                continue
            terms = pixels if name in ("mean", "grad_gate") else 3
            assert_as_accurate(actual, base.to(dtype), exact[name], name, terms)
