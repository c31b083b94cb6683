"""Built-ins of CUDA on the emulator: warp operations, atomics, grids, orders, half-precision arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import HERE, Library, build
from cuda_on_cpu.emulator import ORDERS, Kernels, load, needs_emulator

pytestmark = needs_emulator

FILE = HERE / "kernels" / "features.cu"
LIBRARIES = {
    "fast": Library((FILE,), checked=False),
    "checked": Library((FILE,), checked=True),
    # what other CPUs than x86-64 run
    "portable": Library((FILE,), checked=False, defines=("CUEMU_PORTABLE_FIBERS",)),
}


@pytest.fixture(scope="module", params=LIBRARIES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load(LIBRARIES[request.param])


@pytest.mark.parametrize("order", ORDERS)
def test_warp_operations(kernels: Kernels, order: str) -> None:
    results = np.zeros((13, 64), np.int32)
    kernels.run("run_warp_operations", order=order, results=results).raise_if_any()
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    xor8 = lane ^ 9
    vote = [sum(1 << i for i in range(32) if (w + i) % 3 == 0) for w in (0, 32)]
    expected = [
        warp + 5,
        t // 8 * 8 + 20 % 8,
        np.where(lane >= 3, t - 3, t),
        np.where(lane % 16 + 5 < 16, t + 5, t),
        warp + (lane ^ 9),
        np.where(xor8 <= (lane | 7), warp + xor8, t),
        np.array(vote, np.uint32).view(np.int32)[t // 32],
        t // 32,
        t // 32,
        np.where(lane < 16, t ^ 1, t ^ 2),
        2 * (warp + 1) + 1,
        [
            v.bit_count() + 100 * (32 - v.bit_length()) + 10000 * (v & -v).bit_length()
            for v in map(int, t)
        ],
        np.full(64, 1000 + 1600 + 4),
    ]
    assert np.array_equal(results, np.array(expected))


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(kernels: Kernels, order: str) -> None:
    i, u, wide = np.zeros(4, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    f, d = np.zeros(8, np.float32), np.zeros(1)
    h, b = np.zeros(1, np.float16), torch.zeros(1, dtype=torch.bfloat16)
    kernels.run("run_atomics", order=order, i=i, u=u, l=wide, f=f, d=d, h=h, b=b).raise_if_any()
    assert list(i) == [128, 63, -63, 7]
    assert (u[0], wide[0], f[0], d[0]) == (192, 64 << 33, 32, 16)
    assert h[0] == 64 and b[0] == 64
    assert list(f[4:]) == [64, 128, 192, 256]


def test_a_grid_ends_before_the_next(kernels: Kernels) -> None:
    values = np.zeros(9, np.int32)
    kernels.run("run_grids", values=values).raise_if_any()
    assert list(values) == [*range(8), 28]


def test_orders(kernels: Kernels) -> None:
    def places(order: str, seed: int = 0) -> np.ndarray:
        result, counter = np.zeros(256, np.int32), np.zeros(1, np.int32)
        kernels.run("run_in_order", order=order, seed=seed, places=result, counter=counter)
        return result

    assert list(places("forward")) == list(range(256))
    assert list(places("reverse")) == list(range(255, -1, -1))
    one, again, other = places("random", 1), places("random", 1), places("random", 2)
    assert sorted(one) == list(range(256))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(set(np.argsort(one) // 64)) == 4 and list(one) != sorted(one)


def test_every_half_becomes_the_right_float(kernels: Kernels) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    half, bfloat16 = np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    kernels.run("run_to_float", bits=bits, as_half=half, as_bfloat16=bfloat16).raise_if_any()
    assert np.array_equal(half, bits.view(np.float16).astype(np.float32), equal_nan=True)
    expected = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    assert np.array_equal(bfloat16, expected, equal_nan=True)


def test_arithmetic_in_half_rounds_once(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * 10 ** rng.uniform(-9, 6, 20000)).astype(np.float32)
    ties = np.arange(2048, dtype=np.float32) / 2 + 1024  # halfway between two halves
    x = np.concatenate(
        [x, ties, np.array([0, -0.0, np.inf, -np.inf, np.nan, 65519, 65520, 1e-8], np.float32)]
    )
    y = rng.permutation(x)
    rounded = np.zeros((6, len(x)), np.uint16)
    kernels.run("run_round_and_combine", x=x, y=y, rounded=rounded).raise_if_any()
    for first, dtype in ((0, torch.float16), (3, torch.bfloat16)):
        a, b = (torch.from_numpy(v).to(dtype) for v in (x, y))
        exact = (a.double(), a.double() + b.double(), a.double() * b.double())
        for got, value in zip(rounded[first : first + 3], exact):
            # fp64 to fp32 first is what PyTorch does too; a sum or product of halves is exact in fp64
            expected = torch.from_numpy(_round_to_odd(value.numpy())).to(dtype).double()
            actual = torch.from_numpy(got).view(dtype).double()
            assert torch.equal(actual.nan_to_num(12345), expected.nan_to_num(12345)), dtype


def _round_to_odd(exact: np.ndarray) -> np.ndarray:
    """fp64 to fp32 such that a second rounding gives what one rounding would."""
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = exact.astype(np.float32)
        toward_zero = np.where(
            np.abs(nearest.astype(np.float64)) > np.abs(exact),
            np.nextafter(nearest, np.float32(0)),
            nearest,
        )
    inexact = (toward_zero.astype(np.float64) != exact) & np.isfinite(exact)
    pattern = toward_zero.astype(np.float32).view(np.uint32)
    return np.where(inexact, pattern | 1, pattern).astype(np.uint32).view(np.float32)


def test_builds_are_cached() -> None:
    first, second = build([LIBRARIES["fast"]]), build([LIBRARIES["fast"]])
    assert first == second
    assert build([LIBRARIES["checked"]]) != first
