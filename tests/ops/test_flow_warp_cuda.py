"""The CUDA kernels of flow_warp, run on the CPU by the emulator in tests/cuda_on_cpu.

The fast build gives values, in three orders of the threads; the checked build also watches every access. Both are
held to the reference in fp64. Outputs come poisoned, so one that is not written is a NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_on_cpu.emulator import ORDERS, Kernels, emulate, needs_emulator
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor

from mafnet_ops import reference

pytestmark = needs_emulator

INTERPOLATIONS = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")
LAYOUTS = ("contiguous", "channels_last", "strided", "strided_pixels")
# dtype of the features, of the flow
DTYPES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
TERMS = 16  # taps of the largest stencil
NAMES = ("output", "grad_input", "grad_flow")

interpolations = pytest.mark.parametrize("interpolation", INTERPOLATIONS)
paddings = pytest.mark.parametrize("padding_mode", PADDINGS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair)
)


@pytest.fixture(scope="module", params=["fast", "checked"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return emulate("flow_warp", checked=request.param == "checked")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; between the elements of a strided one lie NaNs."""
    n, c, h, w = tensor.shape
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return tensor.new_full((n, w + 1, c, 2 * h), math.nan)[:, 1:, :, ::2].permute(
            0, 2, 3, 1
        ).copy_(tensor)  # fmt: skip
    if (
        layout == "strided_pixels"
    ):  # channels last, pixels apart: vectors of 16 bytes are misaligned
        return tensor.new_full((n, h, w + 1, c + 3), math.nan)[:, :, :w, :c].permute(
            0, 3, 1, 2
        ).copy_(tensor)  # fmt: skip
    return tensor.contiguous()


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
        return Warp(*(t.to(dtype) for t in tensors), self.interpolation, self.padding_mode)

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output and gradients by differentiable PyTorch, in the dtype of the arguments."""
        x, f = self.input.detach().requires_grad_(), self.flow.detach().requires_grad_()
        output = reference.flow_warp(x, f, self.interpolation, self.padding_mode)
        assert isinstance(output, Tensor)
        return output.detach(), *torch.autograd.grad(output, (x, f), self.grad_output)

    def numbers(self) -> dict[str, int]:
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

    def forward(self, kernels: Kernels, order: str = "forward") -> tuple[Tensor, Tensor]:
        """Output and mask."""
        n, height, width, _ = self.flow.shape
        output = self.like_input(height, width, self.input.dtype)
        mask = torch.zeros(n, 1, height, width, dtype=self.input.dtype)
        arrays = {"input": self.input, "flow": self.flow, "output": output, "mask": mask}
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
        arrays = {"input": self.input, "flow": self.flow, "grad_output": self.dense_gradient()}
        arrays |= {name: gradients[name] for name in wanted}
        report = kernels.run("flow_warp_backward", order=order, **arrays, **self.numbers())
        report.raise_if_any()
        return accumulators, grad_flow

    def dense_gradient(self) -> Tensor:
        """grad_output as binding.cpp hands it over."""
        last = self.numbers()["channels_last"]
        if last and self.grad_output.stride(1) == 1:
            return self.grad_output
        memory_format = torch.channels_last if last else torch.contiguous_format
        return self.grad_output.contiguous(memory_format=memory_format)

    def check(self, kernels: Kernels, orders: tuple[str, ...] = ("random",)) -> None:
        """Forward and backward against the reference."""
        exact = self.to(torch.float64).reference()
        first: tuple[Tensor, Tensor] | None = None
        for order in orders:
            output, mask = self.forward(kernels, order)
            results = (output, *self.backward(kernels, order))
            assert_same(mask.double(), self.exact_mask())
            if first is not None:  # no sum of the forward depends on the order
                assert_same(output, first[0])
            first = first or (output, mask)
            self.check_results(results, exact)

    def exact_mask(self) -> Tensor:
        result = reference.flow_warp(self.input.double(), self.flow.double(), return_mask=True)
        return result[1]

    def check_results(self, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
        pixels = max(1, self.flow.shape[1] * self.flow.shape[2])
        if self.input.dtype == torch.float64:
            # grad_input may sum all pixels, grad_flow the channels; bicubic weights are at most 1.3
            terms = (TERMS, TERMS * pixels, TERMS * max(1, self.input.shape[1]))
            for actual, expected, count in zip(results, exact, terms):
                assert_rounding_only(actual, expected, count, 4)
            return
        # fp32 arithmetic, rounded once to what the kernel writes
        baseline = self.to(torch.float32).reference()
        terms = (1, TERMS * pixels, TERMS * max(1, self.input.shape[1]))
        for name, actual, base, expected, count in zip(NAMES, results, baseline, exact, terms):
            assert_as_accurate(actual, base.to(actual.dtype), expected, name, count)


# ------------------------------------------------------------------------------ values and gradients


@dtypes
@interpolations
@paddings
def test_matches_the_reference(
    kernels: Kernels,
    dtypes: tuple[torch.dtype, torch.dtype],
    interpolation: str,
    padding_mode: str,
) -> None:
    for layout in LAYOUTS:
        case = Warp.random((2, 16, 5, 7), None, dtypes, layout, interpolation, padding_mode)
        case.check(kernels)


@layouts
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 40, 65, 72])
def test_channels_around_vectors_and_groups(kernels: Kernels, layout: str, channels: int) -> None:
    """Vectors are of 4 or 8 channels, a group of 8 lanes moves 32 or 64 at a time."""
    for dtype in (torch.float32, torch.float16):
        Warp.random((1, channels, 5, 6), None, (dtype, torch.float32), layout).check(kernels)


@layouts
@pytest.mark.parametrize("pixels", [1, 31, 32, 33, 255, 256, 257])
def test_pixels_around_warps_and_blocks(kernels: Kernels, layout: str, pixels: int) -> None:
    """Blocks have 256 threads: one a pixel, one for 4 channels of a pixel, or one of 8 for a pixel."""
    orders = ORDERS if pixels in (33, 257) else ORDERS[1:2]
    Warp.random((1, 4, 6, 9), (1, pixels), layout=layout).check(kernels, orders)


@interpolations
@paddings
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (2, 3)], ids=str)
def test_thin_images(
    kernels: Kernels, interpolation: str, padding_mode: str, shape: tuple[int, int]
) -> None:
    for layout in ("contiguous", "channels_last"):
        options = (torch.float32, torch.float32), layout, interpolation, padding_mode
        Warp.random((2, 4, *shape), None, *options).check(kernels)
        Warp.random((2, 4, *shape), (3, 2), *options).check(kernels)


@pytest.mark.parametrize("order", ORDERS)
@interpolations
def test_every_order_of_threads(kernels: Kernels, order: str, interpolation: str) -> None:
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            case = Warp.random((2, 24, 9, 33), None, (dtype, torch.float32), layout, interpolation)
            case.check(kernels, (order,))


@layouts
def test_strided_flow(kernels: Kernels, layout: str) -> None:
    case = Warp.random((2, 8, 5, 7), layout=layout)
    planes = case.flow.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # as a network makes it
    replace(case, flow=planes).check(kernels)
    apart = case.flow.new_full((2, 5, 14, 5), math.nan)[:, :, ::2, 1:5:3].copy_(case.flow)
    replace(case, flow=apart).check(kernels)


def test_misaligned_storage(kernels: Kernels) -> None:
    """A slice of a larger tensor that begins off 16 bytes must not be moved in vectors."""
    case = Warp.random((1, 16, 5, 6), None, (torch.float16, torch.float32), "channels_last")
    for name in ("input", "grad_output"):
        tensor: Tensor = getattr(case, name)
        storage = tensor.new_zeros(tensor.numel() + 8)
        start = (storage.data_ptr() // 2 + 4) % 8  # elements: 8 bytes off a multiple of 16
        view = storage[-start % 8 :][: tensor.numel()].view(1, 5, 6, 16).permute(0, 3, 1, 2)
        assert view.data_ptr() % 16 == 8
        replace(case, **{name: view.copy_(tensor)}).check(kernels)


@pytest.mark.parametrize("wanted", ["grad_input", "grad_flow"])
@layouts
def test_one_gradient_alone(kernels: Kernels, wanted: str, layout: str) -> None:
    case = Warp.random((2, 8, 5, 7), layout=layout, interpolation="bicubic")
    alone = case.backward(kernels, wanted=(wanted,))
    both = case.backward(kernels)
    index = NAMES.index(wanted) - 1
    assert_same(alone[index], both[index])
    assert_same(alone[1 - index], torch.zeros_like(both[1 - index]))


# ---------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    "shape", [((0, 4, 5, 6), (5, 6)), ((2, 4, 5, 6), (0, 6)), ((2, 0, 5, 6), (5, 6))], ids=str
)
def test_empty(kernels: Kernels, shape: tuple[tuple[int, int, int, int], tuple[int, int]]) -> None:
    case = Warp.random(*shape)
    output, mask = case.forward(kernels)
    assert output.numel() == 0
    assert mask.shape == (shape[0][0], 1, *shape[1])
    for gradient in case.backward(kernels):
        assert_same(gradient, torch.zeros_like(gradient))


@interpolations
@paddings
@pytest.mark.parametrize("value", [1e9, -1e9, 3e38, -3e38, math.inf, -math.inf, math.nan])
def test_far_infinite_and_nan_flow(
    kernels: Kernels, interpolation: str, padding_mode: str, value: float
) -> None:
    """Some pixels go astray: theirs is what PyTorch's code gives, and nothing else changes."""
    for layout in ("contiguous", "channels_last"):
        case = Warp.random(
            (1, 4, 5, 6), layout=layout, interpolation=interpolation, padding_mode=padding_mode
        )
        astray = torch.zeros(1, 5, 6, 2, dtype=torch.bool)
        astray[0, 1, 2, 0] = astray[0, 3, 4, 1] = True
        case = replace(case, flow=case.flow.masked_fill(astray, value))
        bad = astray.any(3)
        clean = replace(
            case,
            flow=case.flow.masked_fill(astray, 0),
            grad_output=case.grad_output.masked_fill(bad[:, None], 0),
        )
        output, mask = case.forward(kernels, "random")
        grad_input, grad_flow = case.backward(kernels, "random")
        expected, clean_mask = clean.forward(kernels)
        rows, columns = bad[0].nonzero(as_tuple=True)
        kept = (~bad)[:, None].expand_as(output)
        assert_same(output[kept], expected[kept])
        assert_same(mask, clean_mask.masked_fill(bad[:, None], 0))
        astray_output = output[0, :, rows, columns]
        if math.isnan(value) or (math.isinf(value) and padding_mode == "reflection"):
            assert astray_output.isnan().all()
            assert_same(grad_input, clean.backward(kernels, "random")[0])  # scatters nothing
        elif padding_mode == "zeros":
            assert (astray_output == 0).all()
            assert_same(grad_input, clean.backward(kernels, "random")[0])
        else:
            assert astray_output.isfinite().all()
            assert grad_input.isfinite().all()
        kept_flow = (~bad)[..., None].expand_as(grad_flow)
        assert_same(grad_flow[kept_flow], clean.backward(kernels)[1][kept_flow])


# ---------------------------------------------------------------------------- what the tests can see


def test_a_wrong_value_is_noticed(kernels: Kernels) -> None:
    """The comparison of check() fails for an error of two roundings in one element."""
    case = Warp.random((1, 4, 5, 6))
    exact = case.to(torch.float64).reference()
    results = (case.forward(kernels)[0], *case.backward(kernels))
    case.check_results(results, exact)
    for index in range(3):
        wrong = [result.clone() for result in results]
        wrong[index].view(-1)[0] += 1e-3
        with pytest.raises(AssertionError):
            case.check_results(tuple(wrong), exact)
