"""The checkers check: each is given an error of the size that it must just not let pass."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_as_accurate, assert_rounding_only, assert_same


def test_assert_same_sees_one_bit_nan_shape_and_dtype() -> None:
    x = torch.tensor([1.0, math.nan])
    assert_same(x, x.clone())
    others = (torch.tensor([1.0 + 2**-23, math.nan]), torch.tensor([1.0, 0.0]), x.double(), x[:1])
    for other in others:
        with pytest.raises(AssertionError):
            assert_same(other, x)


def test_rounding_bound() -> None:
    expected = torch.tensor([3.0, math.nan, math.inf], dtype=torch.float64)
    bound = 10 * 10 * 2.0**-52 * 0.5
    planted = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert_rounding_only(expected + 0.9 * bound * planted, expected, 10, 0.5)
    with pytest.raises(AssertionError, match="above the rounding of 10 terms"):
        assert_rounding_only(expected + 1.1 * bound * planted, expected, 10, 0.5)
    with pytest.raises(AssertionError, match="NaN on one side"):
        assert_rounding_only(expected.nan_to_num(0.0), expected, 10)
    with pytest.raises(AssertionError, match="error"):
        assert_rounding_only(expected.nan_to_num(math.nan, posinf=1.0), expected, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_accurate_allows_twice_the_baseline_and_no_more(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(1000, generator=generator, dtype=torch.float64)
    exact[3] = math.nan
    exact[0] = 1.0
    eps = torch.finfo(dtype).eps
    baseline = exact.to(dtype)
    assert_as_accurate(baseline, baseline, exact)
    baseline[0] = 1 + 4 * eps  # now 2 * 4 eps and half an eps of rounding are allowed
    actual = exact.to(dtype)
    actual[0] = 1 + 8 * eps
    assert_as_accurate(actual, baseline, exact)
    actual[0] = 1 + 9 * eps
    with pytest.raises(AssertionError, match="allowed are"):
        assert_as_accurate(actual, baseline, exact)
    actual[0] = math.nan
    with pytest.raises(AssertionError, match="NaN on one side"):
        assert_as_accurate(actual, baseline, exact)
    with pytest.raises(AssertionError, match="baseline"):
        assert_as_accurate(actual.double(), baseline, exact)
