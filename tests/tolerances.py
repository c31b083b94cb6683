"""How far a result may be from the truth. Every bound follows from a dtype and from arithmetic, none is tuned."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bits: shape, dtype, values, and NaN where NaN is expected."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_rounding_only(
    actual: Tensor, expected: Tensor, terms: int, magnitude: float = 1.0
) -> None:
    """``actual`` is the sum of at most ``terms`` terms, each at most ``magnitude``, in its own dtype.

    A sum of n terms is off by at most n * eps * (sum of the absolute terms), whatever the order; the sum of the
    absolute terms is at most n * magnitude. NaN must be where NaN is expected.
    """
    _assert_comparable(actual, expected)
    bound = terms * terms * torch.finfo(actual.dtype).eps * magnitude
    error = _largest_error(actual, expected)
    assert error <= bound, f"error {error:.3e} is above the rounding of {terms} terms, {bound:.3e}"


def assert_as_accurate(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    what: str = "",
    terms: int = 1,
    roundings: int = 1,
) -> None:
    """err(actual) <= 2 * err(baseline) + rounding floor.

    ``baseline`` is PyTorch's result in the dtype of ``actual``, ``exact`` the result in fp64 from the same inputs;
    errors are largest absolute differences to ``exact``. The floor is for a baseline that is exact by luck: one
    rounding to the dtype of ``actual`` (a random walk of ``roundings`` where a network keeps its maps in it), and a
    random walk of ``terms`` fp32 roundings for an element that is a sum of so many terms, each at the largest value.
    NaN must be where ``exact`` has NaN.
    """
    assert actual.dtype == baseline.dtype, f"{what}: {actual.dtype}, baseline {baseline.dtype}"
    assert exact.dtype == torch.float64, f"{what}: the exact result is {exact.dtype}"
    _assert_comparable(actual, exact, what)
    error, allowed = _largest_error(actual, exact), 2 * _largest_error(baseline, exact)
    finite = exact[exact.isfinite()]
    if finite.numel():
        accumulator = torch.promote_types(actual.dtype, torch.float32)
        summing = math.sqrt(terms - 1) * torch.finfo(accumulator).eps
        rounding = math.sqrt(roundings) * torch.finfo(actual.dtype).eps
        allowed += (rounding + summing) / 2 * finite.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e} to fp64, allowed are {allowed:.3e}"


def _assert_comparable(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    wrong = (actual.isnan() != expected.isnan()).nonzero()
    assert len(wrong) == 0, f"{what}: NaN on one side only, first at {wrong[0].tolist()}"


def _largest_error(actual: Tensor, expected: Tensor) -> float:
    a, b = actual.double(), expected.double()
    unequal = ~((a == b) | (a.isnan() & b.isnan()))  # infinities and NaN that agree are no error
    difference = (a - b)[unequal].abs()
    return difference.max().item() if difference.numel() else 0.0
