"""Calls of pyramid spatial attention's CUDA kernels on the emulator, with what must come out.

For tests/ops/test_pyramid_spatial_attention_cuda.py and for pyramid_spatial_attention_probe.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from cuda_on_cpu.emulator import Kernels, Report
from cuda_on_cpu.flow_warp_cases import laid_out, misaligned
from tolerances import assert_as_accurate, assert_same
from torch import Tensor

from mafnet_ops import reference

FORWARD_ONLY = ("resize_add_conv", "pool_concat_conv_3x3")  # backward is that of their steps
CONVOLUTIONS = ("pointwise_conv", "pool_concat_conv", "resize_conv", *FORWARD_ONLY)
PARTS = ("pool_concat", "resize_add", "spatial_gate", *CONVOLUTIONS)
RESIZED = ("resize_add", "resize_conv", "resize_add_conv")  # to any size
SECOND_IMAGE = {"resize_add": ("other",), "resize_add_conv": ("other",), "spatial_gate": ("mask",)}
Size = tuple[int, int]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def result_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What binding.cpp allocates beside an image: channels last where it has them last."""
    last = tensor.shape[1] > 1 and tensor.stride(1) == 1
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.zeros(shape, dtype=tensor.dtype).contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class Part:
    """Arguments of one of the parts: two images for what adds or gates, else one."""

    op: str
    images: tuple[Tensor, ...]
    parameters: tuple[Tensor | None, ...]  # weight and bias, or none
    grad_output: Tensor
    size: Size  # of the output
    slope: float = 0.1
    from_feature: bool = False
    misaligned: str = ""  # which image, a result perhaps, vectors of 16 bytes do not fit

    @staticmethod
    def random(
        op: str,
        shape: tuple[int, int, int, int],
        out: int | None = None,
        size: Size | None = None,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        **options: Any,
    ) -> Part:
        """``out`` channels (as many as come in) and ``size`` (that of the input) where the op has a choice."""
        n, channels, height, width = shape
        pooled = op.startswith("pool")
        size = ((height + 1) // 2, (width + 1) // 2) if pooled else size or (height, width)
        images = [uniform(*shape)]
        if op in SECOND_IMAGE:
            images.append(uniform(n, channels, *size, seed=1))
        out = 2 * channels if op == "pool_concat" else out or channels
        parameters: tuple[Tensor | None, ...] = ()
        if op not in ("pool_concat", "resize_add"):
            inputs = channels * (2 if pooled else 1)
            kernel = 3 if op in ("resize_conv", "pool_concat_conv_3x3") else 1
            weight = uniform(out, inputs, kernel, kernel, seed=2)
            weight = weight * (2 / max(1, inputs * kernel * kernel)) ** 0.5
            parameters = (weight.to(dtype), uniform(out, seed=3).to(dtype))
        placed = tuple(laid_out(i.to(dtype), layout) for i in images)
        grad = laid_out(uniform(n, out, *size, seed=4).to(dtype), layout)
        return Part(op, placed, parameters, grad, size, **options)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (*self.images, *self.parameters)

    def names(self) -> tuple[str, ...]:
        images = ("input", *SECOND_IMAGE.get(self.op, ()))
        return (*images, *("weight", "bias")[: len(self.parameters)])

    def define(self, *tensors: Any) -> Tensor:
        """The definition, of the tensors of ``names``."""
        if self.op == "spatial_gate":
            mask_from = "feature" if self.from_feature else "m"
            return reference.spatial_gate(*tensors, 2.0, self.slope, mask_from)
        if self.op == "resize_add_conv":
            tensors = (reference.resize_add(*tensors[:2]), *tensors[2:])
            return reference.pointwise_conv(*tensors, self.slope)
        options = (*self.size,) if self.op == "resize_conv" else ()
        slope = (self.slope,) if self.op in CONVOLUTIONS else ()
        define: Callable[..., Tensor] = getattr(reference, self.op.removesuffix("_3x3"))
        return define(*tensors, *options, *slope)

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Output and gradients by PyTorch, in a dtype; the output that backward is told is rounded."""
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_() for t in self.tensors
        ]
        output = self.define(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(output, wanted, self.grad_output.to(dtype))
        return (output.detach(), *grads)

    # ------------------------------------------------------------------------------------ calls

    def numbers(self) -> dict[str, float]:
        if self.op == "resize_add":
            return {}
        if self.op == "spatial_gate":
            feature = float(self.from_feature)
            return {"scale": 2.0, "negative_slope": self.slope, "from_feature": feature}
        out = self.grad_output.shape[1]
        height, width = self.size
        options = {"out_channels": out, "out_height": height, "out_width": width}
        return {**options, "negative_slope": self.slope}

    def place(self, name: str, image: Tensor) -> Tensor:
        return misaligned(image) if name == self.misaligned else image

    def given(self) -> dict[str, Tensor | None]:
        tensors = zip(self.names(), self.tensors)
        return {name: t if t is None else self.place(name, t) for name, t in tensors}

    def forward(self, kernels: Kernels, order: str = "forward") -> Tensor:
        like = self.images[1] if "other" in self.names() else self.images[0]
        output = self.place("output", result_like(like, tuple(self.grad_output.shape)))
        arrays: dict[str, Any] = self.given()
        report = kernels.run(
            f"{self.op}_forward", order=order, output=output, **arrays, **self.numbers()
        )
        report.raise_if_any()
        assert report.launches == (1 if output.numel() else 0)
        return output

    def backward(
        self,
        kernels: Kernels,
        output: Tensor,
        order: str = "forward",
        wanted: tuple[str, ...] | None = None,
    ) -> dict[str, Tensor]:
        """The wanted gradients by name, of all but resize_add's ``other``; none of FORWARD_ONLY."""
        if self.op in FORWARD_ONLY:
            return {}
        arrays: dict[str, Any] = {"grad_output": self.place("grad_output", self.grad_output)}
        given = self.given()
        if self.op == "resize_add":
            wanted, numbers = ("input",), {}
        else:
            numbers = self.numbers()
            if self.op != "pool_concat":
                numbers["most_workspace"] = self.most_workspace()
            if self.op in CONVOLUTIONS:
                arrays["output"] = self.place("output", output)
            forward_only = "bias" if self.op in CONVOLUTIONS else ""
            arrays |= {name: t for name, t in given.items() if name != forward_only}
        present = tuple(name for name, tensor in given.items() if tensor is not None)
        wanted = wanted if wanted is not None else present
        grads: dict[str, Tensor] = {}
        for name in wanted:
            tensor = given[name]
            assert tensor is not None
            image = name in ("input", "mask")
            shape = tuple(tensor.shape)
            grad = result_like(tensor, shape) if image else torch.zeros_like(tensor)
            grads[name] = self.place(f"grad_{name}", grad)
        arrays |= {f"grad_{name}": grad for name, grad in grads.items()}
        report = kernels.run(f"{self.op}_backward", order=order, **arrays, **numbers)
        report.raise_if_any()
        return grads

    def most_workspace(self) -> int:
        """Bytes that a backward may ask for: sums of each 512 pixels, and a map."""
        weight = self.parameters[0]
        assert weight is not None
        pixels = math.prod(self.size) * self.images[0].shape[0]
        sums = -(-pixels // 512) * (weight.numel() + weight.shape[0]) + 4
        element = 8 if weight.dtype == torch.float64 else 4
        return element * (sums + 2 * self.images[0].shape[1] * pixels)

    # ----------------------------------------------------------------------------------- checks

    def terms(self, name: str) -> int:
        """How many rounded terms an element of a result sums at most."""
        channels, out = self.images[0].shape[1], self.grad_output.shape[1]
        pixels = math.prod(self.size) * self.images[0].shape[0]
        taps = 9 * 4 if self.op == "resize_conv" else 9 if self.op.startswith("pool") else 4
        if name in ("weight", "bias"):
            return 1 + pixels * taps
        return 1 + taps * 9 * max(1, channels, out)

    def check(self, kernels: Kernels, orders: tuple[str, ...] = ("random",)) -> None:
        """Forward and backward against the reference, the same bits in every order.

        Backward is told the exact output: the sign of one near zero may differ, and the slope with it.
        """
        first: list[Tensor] = []
        exact = self.reference()[0]
        for order in orders:
            output = self.forward(kernels, order)
            grads = self.backward(kernels, torch.empty_like(output).copy_(exact), order)
            results = [output, *grads.values()]
            for one, other in zip(first, results):
                assert_same(other, one)
            first = first or results
        self.check_results(first[0], grads)

    def check_results(self, output: Tensor, grads: dict[str, Tensor]) -> None:
        exact = self.reference()
        baseline = exact if output.dtype == torch.float64 else self.reference(torch.float32)
        results = {"output": output, **grads}
        names = ["output", *(n for n, t in zip(self.names(), self.tensors) if t is not None)]
        for name, base, truth in zip(names, baseline, exact):
            if name in results:
                actual, as_written = results[name], base.to(results[name].dtype)
                # On tensor cores features are rounded too: values that are pooled, resized, or times a slope.
                roundings = 2 if torch.finfo(self.images[-1].dtype).bits == 16 else 1
                what = f"{self.op} {name}"
                assert_as_accurate(actual, as_written, truth, what, self.terms(name), roundings)


@dataclass(frozen=True)
class TwoLayers:
    """Arguments of conv_pool_conv, whose bits are those of its two steps."""

    input: Tensor
    first: tuple[Tensor, Tensor | None]  # weight and bias
    second: tuple[Tensor, Tensor | None]
    misaligned: bool = False  # the output

    @staticmethod
    def random(
        shape: tuple[int, int, int, int],
        middle: int,
        out: int,
        dtype: torch.dtype = torch.float16,
        layout: str = "channels_last",
    ) -> TwoLayers:
        first = Part.random("pointwise_conv", shape, middle, dtype=dtype, layout=layout)
        pooled = (shape[0], middle, *shape[2:])
        second = Part.random("pool_concat_conv", pooled, out, dtype=dtype)
        layers: Any = first.parameters, second.parameters
        return TwoLayers(first.images[0], *layers)

    def steps(self, kernels: Kernels) -> Tensor:
        n, _, height, width = self.input.shape
        (weight, _), (second, _) = self.first, self.second
        size = (height + 1) // 2, (width + 1) // 2
        shapes = (n, len(weight), height, width), (n, len(second), *size)
        dtype = self.input.dtype
        placed = [laid_out(torch.zeros(s, dtype=dtype), "channels_last") for s in shapes]
        first = Part("pointwise_conv", (self.input,), self.first, placed[0], (height, width))
        middle = first.forward(kernels)
        part = Part("pool_concat_conv", (middle,), self.second, placed[1], size)
        return part.forward(kernels)

    def run(self, kernels: Kernels, output: Tensor, order: str = "forward") -> Report:
        names = "first_weight", "first_bias", "weight", "bias"
        arrays: dict[str, Any] = dict(zip(names, (*self.first, *self.second)))
        return kernels.run(
            "conv_pool_conv_forward",
            order=order,
            input=self.input,
            output=misaligned(output) if self.misaligned else output,
            negative_slope=0.1,
            **arrays,
        )

    def check(self, kernels: Kernels, orders: tuple[str, ...] = ("random",)) -> None:
        expected = self.steps(kernels)
        for order in orders:
            output = torch.zeros_like(expected)
            report = self.run(kernels, output, order)
            report.raise_if_any()
            assert report.launches == (1 if output.numel() else 0)
            assert_same(output, expected)

    def check_refused(self, kernels: Kernels) -> None:
        """No kernel for it: the caller takes two steps."""
        report = self.run(kernels, self.steps(kernels))
        assert report.status == -1 and report.launches == 0


def wide_gate(part: Part) -> Part:
    """spatial_gate of fp32 images beside a mask in half precision, as under autocast."""
    assert part.op == "spatial_gate"
    input, mask = part.images
    return replace(part, images=(input.float(), mask), grad_output=part.grad_output.float())
