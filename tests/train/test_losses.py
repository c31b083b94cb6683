"""Losses: values, their float32 arithmetic and the gradient where the root is steepest."""

from __future__ import annotations

import math

import pytest
import torch

from mafnet.losses import charbonnier, l1, paper_loss, reconstruction_loss

HALVES = [torch.float16, torch.bfloat16]


def test_values_by_hand() -> None:
    prediction, target = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.0, 0.25, 1.0])
    assert l1(prediction, target).item() == pytest.approx(1.25 / 3, rel=1e-6)
    expected = (1e-3 + math.hypot(0.75, 1e-3) + math.hypot(0.5, 1e-3)) / 3
    assert charbonnier(prediction, target, eps=1e-3).item() == pytest.approx(expected, rel=1e-6)
    # At the default epsilon the three terms are 1e-6, 0.75 and 0.5.
    assert charbonnier(prediction, target).item() == pytest.approx(1.250001 / 3, rel=2e-7)
    both = l1(prediction, target) + charbonnier(prediction, target)
    assert paper_loss(prediction, target).item() == both.item()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("loss", [charbonnier, l1, paper_loss])
def test_gradient_is_finite_and_zero_where_nothing_differs(loss, dtype: torch.dtype) -> None:
    prediction = torch.full((4,), 0.5, dtype=dtype, requires_grad=True)
    loss(prediction, torch.full((4,), 0.5, dtype=dtype)).backward()
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [0.0] * 4


def test_half_precision_root_would_fail() -> None:
    """Why the loss is in float32: the same formula in float16 has no gradient at 0."""
    difference = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    torch.sqrt(difference * difference + 1e-12).sum().backward()
    assert difference.grad is not None and difference.grad.isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", [charbonnier, l1, paper_loss])
def test_computes_in_float32(loss, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(1000, generator=generator).to(dtype)
    target = torch.rand(1000, generator=generator).to(dtype)
    exact = loss(prediction.float(), target.float())
    assert loss(prediction, target).dtype == torch.float32
    assert loss(prediction, target).item() == exact.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(prediction, target).item() == exact.item()


def test_gradient_equals_the_formula() -> None:
    prediction = torch.tensor([3e-6, -2e-6, 0.5], requires_grad=True)
    charbonnier(prediction, torch.zeros(3)).backward()
    expected = [d / math.hypot(d, 1e-6) / 3 for d in (3e-6, -2e-6, 0.5)]
    assert prediction.grad is not None
    # Squares, sum, root and quotient: half a dozen float32 roundings.
    assert prediction.grad.tolist() == pytest.approx(expected, rel=6 * 2**-23)


def test_names() -> None:
    prediction, target = torch.rand(2, 3), torch.rand(2, 3)
    for name, loss in (("charbonnier", charbonnier), ("l1", l1), ("paper", paper_loss)):
        assert reconstruction_loss(name, prediction, target) == loss(prediction, target)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loss: expected one of charbonnier, l1, paper, got 'x'"):
        reconstruction_loss("x", prediction, target)  # type: ignore[arg-type]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"charbonnier: target: expected shape \(2, 3\).*\(3,\)"):
        charbonnier(torch.rand(2, 3), torch.rand(3))
