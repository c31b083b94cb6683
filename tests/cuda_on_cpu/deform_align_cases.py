"""Calls of deform_align on the emulator: the kernels of modulated_deform_conv2d on raw offsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from cuda_on_cpu.emulator import ORDERS, Check, Kernels
from cuda_on_cpu.modulated_deform_conv2d_cases import (
    DOUBLE,
    Case,
    backward_workspaces,
    double,
    forward,
    hold_packed_weight,
    packed_weight_bytes,
    poisoned,
    random_grad,
    workspace_sizes,
)
from oracles import align_offsets_loop, deform_conv2d_loop, deform_conv2d_torch
from tolerances import assert_as_accurate, assert_rounding_only, assert_same
from torch import Tensor

RESIDUE = 10.0
GRADS = ("input", "raw", "flow_1", "flow_2", "weight", "bias")


@dataclass(frozen=True)
class AlignCase:
    """A convolution whose offsets come from a head and from flows, for `parts` of its channels alike."""

    convolution: Case
    flows: int = 0
    parts: int = 1
    float_flow: bool = True  # beside half-precision features
    residue: float = RESIDUE  # infinite: no tanh

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        """Raw values whose offsets, with the flows, are those of the convolution's own case."""
        input, offset, mask, weight, bias = self.convolution.tensors(DOUBLE)
        assert mask is not None
        batch, pairs, *size = mask.shape
        generator = torch.Generator().manual_seed(11)
        flow_dtype = torch.promote_types(dtype, torch.float32) if self.float_flow else dtype
        flows = [
            (torch.rand(batch, *size, 2, generator=generator, dtype=DOUBLE) * 3 - 1.5).to(
                flow_dtype
            )
            for _ in range(self.flows)
        ]
        share = 2 * pairs // max(1, self.flows)
        for i, flow in enumerate(flows):
            base = flow.double().permute(0, 3, 1, 2).flip(1).repeat(1, share // 2, 1, 1)
            offset[:, i * share : (i + 1) * share] -= base
        if math.isfinite(self.residue):
            offset = (offset / self.residue).atanh()
        raw = torch.cat([offset, mask.clamp(0.02, 0.98).logit()], 1)
        raw = raw.to(dtype)
        if self.convolution.channels_last and not self.convolution.planar_offset:
            raw = raw.contiguous(memory_format=torch.channels_last)
        return {
            "input": input.to(dtype),
            "raw": raw,
            "flow_1": flows[0] if flows else None,
            "flow_2": flows[1] if len(flows) > 1 else None,
            "weight": weight.to(dtype),
            "bias": None if bias is None else bias.to(dtype),
        }


ALIGN_CASES = {
    "no flow": AlignCase(Case(offset_groups=2)),
    "one flow, kernel 3x2, stride 2x1": AlignCase(
        Case(size=(9, 8), kernel=(3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), 1
    ),
    "two flows, 2 groups": AlignCase(Case(channels=8, groups=2, offset_groups=4), 2),
    "one flow, 3 parts": AlignCase(Case(channels=12, offset_groups=2), 1, 3),
    "two flows, 2 parts over 3 groups, half flow": AlignCase(
        Case(channels=24, out_channels=3, groups=3, offset_groups=4, size=(4, 5)),
        2,
        2,
        float_flow=False,
    ),
    "one flow, 65 pixels, 17 to 65 channels": AlignCase(
        Case(1, 17, 65, (5, 13), (1, 1), padding=(0, 0), channels_last=True), 1
    ),
    "no bound, one flow": AlignCase(Case(offset_groups=2), 1, residue=math.inf),
    "one column": AlignCase(Case(size=(7, 1), kernel=(3, 1), padding=(1, 0)), 1),
}

# On the tensor cores in half precision.
ALIGN_TENSOR_CORE_CASES = {
    "64 channels, 16 offset groups, two flows": AlignCase(
        Case(2, 64, 64, (9, 8), offset_groups=16, channels_last=True), 2
    ),
    "128 channels, 8 offset groups, no flow, planar": AlignCase(
        Case(1, 128, 24, (4, 5), offset_groups=8, channels_last=True, planar_offset=True)
    ),
    "32 channels, no bound, two flows": AlignCase(
        Case(1, 32, 8, (4, 5), offset_groups=4, channels_last=True), 2, residue=math.inf
    ),
    "96 channels in 3 parts of 4 offset groups, one flow": AlignCase(
        Case(1, 96, 16, (4, 5), offset_groups=4, channels_last=True), 1, 3, float_flow=False
    ),
    "128 channels in 2 parts of 4 offset groups, two flows": AlignCase(
        Case(1, 128, 72, (5, 4), (1, 2), padding=(0, 1), offset_groups=4, channels_last=True), 2, 2
    ),
}
PARTS_AND_FLOWS = ALIGN_TENSOR_CORE_CASES["128 channels in 2 parts of 4 offset groups, two flows"]
# Parts of half a step, which the backward leaves to the generic kernel.
HALF_A_STEP = AlignCase(
    Case(1, 32, 8, (4, 5), (1, 2), padding=(0, 1), offset_groups=2, channels_last=True), 2, 2
)


def repeated(offset: Tensor, parts: int) -> Tensor:
    """Offsets or masks for every part."""
    return offset.repeat(1, parts, 1, 1)


def offsets_torch(case: AlignCase, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Offset and mask of all parts, differentiable, in fp32 at least."""
    raw = tensors["raw"].to(torch.promote_types(tensors["raw"].dtype, torch.float32))
    pairs = raw.shape[1] // 3
    offset = raw[:, : 2 * pairs]
    if math.isfinite(case.residue):
        offset = case.residue * offset.tanh()
    flows = [tensors[name] for name in ("flow_1", "flow_2") if tensors[name] is not None]
    if flows:
        base = [f.to(raw.dtype)[..., [1, 0]].permute(0, 3, 1, 2) for f in flows]
        offset = offset + torch.cat([b.repeat(1, pairs // len(flows), 1, 1) for b in base], 1)
    return repeated(offset, case.parts), repeated(raw[:, 2 * pairs :].sigmoid(), case.parts)


def convolved(case: AlignCase, tensors: dict[str, Any]) -> Tensor:
    offset, mask = offsets_torch(case, tensors)
    rest = tensors["weight"], tensors["bias"], *case.convolution.geometry
    return deform_conv2d_torch(tensors["input"], offset, mask, *rest)


def doubled(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(tensors, double(list(tensors.values()))))


def split(tensors: dict[str, Any]) -> list[Any]:
    """Input, offset, mask, weight, bias, as modulated_deform_conv2d has them."""
    raw = tensors["raw"]
    pairs = raw.shape[1] // 3
    parts = raw[:, : 2 * pairs], raw[:, 2 * pairs :]
    return [tensors["input"], *parts, tensors["weight"], tensors["bias"]]


def options_of(case: AlignCase, tensors: dict[str, Any]) -> dict[str, Any]:
    flows = {name: tensors[name] for name in ("flow_1", "flow_2")}
    return {**flows, "max_residue": case.residue, "parts": case.parts}


def align(
    kernels: Kernels,
    case: AlignCase,
    tensors: dict[str, Any],
    generic: bool = False,
    **options: Any,
) -> Tensor:
    options = {**options_of(case, tensors), **options}
    return forward(kernels, case.convolution, split(tensors), generic, **options)


def backward_arguments(
    case: AlignCase, tensors: dict[str, Any], grad_output: Tensor
) -> dict[str, Any]:
    input, offset, mask, weight, _ = split(tensors)
    arguments = {"input": input, "offset": offset, "mask": mask, "weight": weight}
    arguments |= {**case.convolution.numbers, **options_of(case, tensors)}
    return {**arguments, "grad_output": grad_output}


def align_backward(
    kernels: Kernels,
    case: AlignCase,
    tensors: dict[str, Any],
    grad_output: Tensor,
    wanted: Sequence[str] = GRADS,
    deterministic: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The wanted gradients that there are, by argument name, as the binding makes them."""
    arguments = backward_arguments(case, tensors, grad_output)
    input = tensors["input"]
    accumulator = torch.promote_types(input.dtype, torch.float32)
    present: dict[str, Tensor] = {}
    for name in wanted:
        value = tensors[name]
        if name == "input":
            present[name] = poisoned(input, *input.shape, dtype=accumulator).zero_()
        elif value is not None:
            present[name] = torch.full(value.shape, math.nan, dtype=value.dtype)
    workspaces = backward_workspaces(kernels, arguments, present.keys(), deterministic)
    targets: dict[str, Any] = {f"grad_{name}": grad for name, grad in present.items()}
    kernels.run("backward", **arguments, **targets, **workspaces, **options).raise_if_any()
    hold_packed_weight(workspaces)
    return {n: g.to(input.dtype) if n == "input" else g for n, g in present.items()}


@lru_cache(maxsize=64)
def expected_align(case: AlignCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the loops in fp64, and of PyTorch."""
    tensors = case.tensors(dtype)
    flows = tensors["flow_1"], tensors["flow_2"]
    taps = math.prod(case.convolution.kernel)
    offset, mask = align_offsets_loop(tensors["raw"], *flows, taps, case.residue)
    offset, mask = repeated(offset, case.parts), repeated(mask, case.parts)
    rest = tensors["weight"], tensors["bias"], *case.convolution.geometry
    exact = deform_conv2d_loop(tensors["input"], offset, mask, *rest)
    return exact, convolved(case, tensors)


@lru_cache(maxsize=64)
def expected_align_gradients(
    case: AlignCase, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the oracle in fp64, and in dtype."""
    tensors = case.tensors(dtype)
    grad_output = random_grad(case.convolution, split(tensors))
    exact = align_oracle(case, doubled(tensors), grad_output.double())
    return exact, align_oracle(case, tensors, grad_output)


def hold_align(actual: Tensor, case: AlignCase, what: str = "") -> None:
    exact, baseline = expected_align(case, actual.dtype)
    terms = case.convolution.terms
    if actual.dtype == DOUBLE:
        assert_rounding_only(actual, exact, terms, RESIDUE)
    else:
        assert_as_accurate(actual, baseline, exact, f"{actual.dtype} {what}", terms)


def align_oracle(case: AlignCase, tensors: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    convolved(case, leaves).backward(grad)  # type: ignore[no-untyped-call]
    return {n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}


def check_align(
    kernels: Kernels, case: AlignCase, dtype: torch.dtype, orders: Sequence[str] = ORDERS
) -> None:
    tensors = case.tensors(dtype)
    for order in orders:
        hold_align(align(kernels, case, tensors, order=order), case, order)


def check_align_backward(
    kernels: Kernels,
    case: AlignCase,
    dtype: torch.dtype,
    orders: Sequence[str] = ORDERS,
    deterministic: bool = False,
) -> None:
    """Against automatic differentiation in fp64; all but grad_input with the same bits in every order."""
    tensors = case.tensors(dtype)
    grad_output = random_grad(case.convolution, split(tensors))
    exact, baseline = expected_align_gradients(case, dtype)
    pixels = case.convolution.batch * math.prod(case.convolution.out_size)
    terms = max(case.convolution.terms, pixels, 2 * tensors["raw"].shape[1])
    first: dict[str, Tensor] = {}
    for seed, order in enumerate(orders):
        options: dict[str, Any] = {"deterministic": deterministic, "order": order, "seed": seed}
        actual = align_backward(kernels, case, tensors, grad_output, **options)
        assert actual.keys() == exact.keys()
        for name, grad in actual.items():
            if dtype == DOUBLE:
                assert_rounding_only(grad, exact[name], terms, RESIDUE)
            else:
                what = f"{dtype} {order} grad_{name}"
                assert_as_accurate(grad, baseline[name], exact[name], what, terms)
            if deterministic or name != "input":
                assert_same(grad, first.setdefault(name, grad))


def check_parts_on_tensor_cores(
    kernels: Kernels, case: AlignCase, dtype: torch.dtype, taken: bool, deterministic: bool = False
) -> None:
    """The backward, by tensor cores where parts are whole steps."""
    tensors = case.tensors(dtype)
    grad_output = random_grad(case.convolution, split(tensors))
    sizes = workspace_sizes(kernels, backward_arguments(case, tensors, grad_output))
    assert (sizes[3] > 0) == taken
    check_align_backward(kernels, case, dtype, ("random",), deterministic)


def check_align_alone(
    kernels: Kernels, wanted: str, case: AlignCase = ALIGN_CASES["two flows, 2 groups"]
) -> None:
    tensors = case.tensors(torch.float32)
    grad_output = random_grad(case.convolution, split(tensors))
    every = align_backward(kernels, case, tensors, grad_output)
    alone = align_backward(kernels, case, tensors, grad_output, (wanted,))
    assert_same(alone[wanted], every[wanted])
    assert alone.keys() == {wanted}


def check_zero_head(kernels: Kernels, case: AlignCase, dtype: torch.dtype) -> None:
    """Zeros of the head give, to the bit, no offset and a mask of one half."""
    case = replace(case, flows=0, parts=1)
    tensors = case.tensors(dtype)
    tensors["raw"] = tensors["raw"] * 0
    input, offset, mask, *rest = split(tensors)
    taken = packed_weight_bytes(kernels, case.convolution, split(tensors)) > 0
    assert taken == (dtype != DOUBLE and case.convolution.channels >= 32)
    actual = align(kernels, case, tensors)
    plain = [input, offset, torch.full_like(mask, 0.5), *rest]
    assert_same(actual, forward(kernels, case.convolution, plain))


def check_saturated_head(kernels: Kernels, dtype: torch.dtype, channels: int = 8) -> None:
    """Far raw values: offsets of the whole residue, masks of 0 and 1, gradients of 0; NaN stays in its pixel."""
    taken = channels >= 32
    case = AlignCase(
        Case(1, channels, 8, (6, 7), (1, 1), padding=(0, 0), channels_last=taken, offset_groups=2),
        flows=2,
    )
    tensors = case.tensors(dtype)
    tensors["flow_1"] = tensors["flow_1"] * 0 + 9
    tensors["flow_2"] = tensors["flow_2"] * 0 - 9
    raw = tensors["raw"]
    raw[:, :2], raw[:, 2:4] = -60.0, math.inf  # offsets of -1 and 1
    raw[:, 4], raw[:, 5] = math.inf, -math.inf  # open and closed
    input, offset, mask, *rest = split(tensors)
    offset = torch.cat([torch.full_like(offset[:, :2], -1), torch.full_like(offset[:, 2:], 1)], 1)
    mask = torch.cat([torch.ones_like(mask[:, :1]), torch.zeros_like(mask[:, 1:])], 1)
    expected = forward(kernels, case.convolution, [input, offset, mask, *rest])
    assert_same(align(kernels, case, tensors), expected)
    grad_output = random_grad(case.convolution, split(tensors))
    grads = align_backward(kernels, case, tensors, grad_output)
    assert not grads["raw"].any()
    assert grads["flow_1"].any() and not grads["flow_2"].any()
    raw[0, 2, 3, 4] = math.nan
    expected[0, :, 3, 4] = math.nan
    assert_same(align(kernels, case, tensors), expected)


def check_align_empty(kernels: Kernels) -> None:
    """No output channel, no image: zeros, or nothing."""
    for change in ({"out_channels": 0}, {"batch": 0}):
        case = ALIGN_CASES["two flows, 2 groups"]
        case = replace(case, convolution=replace(case.convolution, **change, bias=False))
        tensors = case.tensors(torch.float32)
        grad_output = random_grad(case.convolution, split(tensors))
        for name, grad in align_backward(kernels, case, tensors, grad_output).items():
            assert not grad.any(), name


def check_align_failing_launches(kernels: Kernels, case: AlignCase) -> None:
    tensors = case.tensors(torch.float32)
    grad_output = random_grad(case.convolution, split(tensors))
    kernels.check_failing_launches(lambda: align_backward(kernels, case, tensors, grad_output))


def probe() -> list[Check]:
    """In fp32 and fp16."""
    single, half = torch.float32, torch.float16
    two_flows = AlignCase(Case(channels=8, offset_groups=4, size=(2, 3), kernel=(1, 2)), 2)
    checks: list[Check] = [
        check_align_empty,
        partial(check_align_failing_launches, case=two_flows),
        *(
            partial(check_align_alone, wanted=wanted, case=two_flows)
            for wanted in ("raw", "flow_1", "flow_2")
        ),
        partial(check_saturated_head, dtype=single),
        partial(check_saturated_head, dtype=half, channels=64),
    ]
    random = ("random",)
    for name in ("no flow", "no bound, one flow", "two flows, 2 parts over 3 groups, half flow"):
        case = ALIGN_CASES[name]
        checks += [
            partial(check_align, case=case, dtype=half, orders=random),
            partial(check_align_backward, case=case, dtype=half, orders=random, deterministic=True),
        ]
    case = ALIGN_CASES["one flow, 65 pixels, 17 to 65 channels"]
    checks.append(partial(check_align_backward, case=case, dtype=single, orders=random))
    for name in (
        "64 channels, 16 offset groups, two flows",
        "96 channels in 3 parts of 4 offset groups, one flow",
    ):
        case = ALIGN_TENSOR_CORE_CASES[name]
        checks.append(partial(check_align, case=case, dtype=half, orders=random))
    for case, taken in ((PARTS_AND_FLOWS, True), (HALF_A_STEP, False)):
        checks.append(partial(check_parts_on_tensor_cores, case=case, dtype=half, taken=taken))
    return checks
