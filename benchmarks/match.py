"""The gate before every clock: outputs and gradients against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import Case, Implementation
from torch import Tensor

PASSES = ("forward", "forward+backward")

# Ours is held to twice the error of the definition in float32 with its results (and what the op's page says is
# rounded on the way) rounded to their dtypes, plus one rounding, plus the random walk of the float32 sums, which the
# definition may take in another order. A rival need only compute the same function: normalised coordinates and
# float32 sums miss by far less than this, and a coordinate rounded over the edge of a cell gives the slope of the
# cell beside it.
RIVAL_TOLERANCE = {"forward": 1e-2, "forward+backward": 1e-1}


@dataclass(frozen=True)
class Match:
    error: float  # relative, L2, the worst of the tensors
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def relative_error(actual: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp_min(1e-30))


def gradient_for(output: Tensor, dtype: torch.dtype) -> Tensor:
    """The incoming gradient, the same for everyone: random, representable in ``dtype``, laid out as the output."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).to(dtype)
    return torch.empty_like(output).copy_(gradient)


def run_pass(
    implementation: Implementation, inputs: tuple[Tensor, ...], pass_: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The output, then in the backward pass the gradient of every input. ``dtype`` is the case's."""
    if pass_ == "forward":
        with torch.no_grad():
            return (implementation.call(*implementation.prepare(*inputs)),)
    output = implementation.call(*implementation.prepare(*inputs))
    gradients = torch.autograd.grad(output, inputs, gradient_for(output, dtype))
    return (output.detach(), *gradients)


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(device, dtype).requires_grad_() for t in inputs)


class Gate:
    """The truth of one case, computed once. ``device`` is where; the CPU has the definition checked elsewhere."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        definition = Implementation("definition", case.definition)
        low = case.inputs[0].dtype
        inputs = cast(case.inputs, torch.float64, device)
        self.exact = run_pass(definition, inputs, PASSES[1], low)
        rounded = Implementation("definition", case.rounded or case.definition)
        single = run_pass(rounded, cast(inputs, torch.float32, device), PASSES[1], low)
        self.walk = case.terms**0.5 * torch.finfo(torch.float32).eps / 2
        dtypes = [low, *(t.dtype for t in case.inputs)]
        self.eps = [torch.finfo(dtype).eps for dtype in dtypes]
        self.baseline = [relative_error(s.to(d), e) for s, d, e in zip(single, dtypes, self.exact)]

    def check(self, implementation: Implementation, pass_: str, ours: bool) -> Match:
        """The tensor that is nearest to, or furthest beyond, what is allowed."""
        inputs = self.case.inputs
        results = run_pass(implementation, inputs, pass_, inputs[0].dtype)
        matches = []
        for result, exact, baseline, eps in zip(results, self.exact, self.baseline, self.eps):
            allowed = 2 * baseline + eps + self.walk if ours else RIVAL_TOLERANCE[pass_]
            matches.append(Match(relative_error(result.to(self.device), exact), allowed))
        return max(
            matches, key=lambda m: float("inf") if m.error != m.error else m.error / m.allowed
        )
