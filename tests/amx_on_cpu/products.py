"""The products of csrc/common/cpu_gemm_bf16.cpp and csrc/self_attention/cpu_tile_products.cpp by themselves.

Factors are small whole numbers, so that sums are exact in any order. As a program: does the check again and again,
each time with another of the library's tile instructions left out or its rows misplaced, and prints those that no
check noticed, or no check came by.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

TILE, DEPTH = 16, 32  # rows or columns of a tile, and how deep it is
LEFT_OUT, MISPLACED = 1, 2  # as in emulator.cpp


class Products:
    """products.so of build.py."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        assert self.library.probe_level() == 4, "not at the level of AMX"
        self.library.amx_on_cpu_change.argtypes = [ctypes.c_uint64, ctypes.c_int]

    def multiply_bf16(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, add: bool) -> None:
        """c (+)= a b in floats; c has rows up to a multiple of 16, and may have more columns."""
        rows, depth = a.shape
        pointers = (x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, c))
        at_a, at_b, at_c = pointers
        row = ctypes.c_int64(c.strides[0] // 4)
        self.library.probe_multiply_bf16(at_a, at_b, rows, depth, b.shape[1], at_c, row, add)

    def multiply_tiles(
        self, a: np.ndarray, b: np.ndarray, steps: np.ndarray, c: np.ndarray, add: bool
    ) -> None:
        """c[m, n] (+)= the sum of a[m, i] b[j, n] over steps (i, j), where these are tiles."""
        left = bfloat16(a)
        pairs = b.reshape(*b.shape[:2], DEPTH // 2, 2, TILE).swapaxes(-1, -2)
        right = bfloat16(np.ascontiguousarray(pairs))
        along = [a.shape[1] * TILE * DEPTH, TILE * DEPTH, TILE * DEPTH, b.shape[1] * TILE * DEPTH]
        layout = (ctypes.c_int64 * 6)(*along, c.strides[0] // 4, c.strides[1] // 4)
        at_a, at_b, at_steps, at_c = (
            x.ctypes.data_as(ctypes.c_void_p) for x in (left, right, steps, c)
        )
        self.library.probe_multiply_tiles(
            at_a, at_b, at_steps, len(steps), a.shape[0], b.shape[1], at_c, layout, add
        )


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper halves of floats that have no digits below."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def whole_numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def check_bf16(products: Products, rows: int, depth: int, columns: int, add: bool) -> None:
    """Also that nothing is written beside the sums and the rows that fill up their last tile."""
    a, b = whole_numbers(1, rows, depth), whole_numbers(2, depth, columns)
    filled = -(-rows // TILE) * TILE
    c = whole_numbers(3, filled + 1, columns + TILE)
    before = c.copy()
    products.multiply_bf16(a, b, c, add)
    expected = a @ b + (before[:rows, :columns] if add else 0)
    assert np.array_equal(c[:rows, :columns], expected), (rows, depth, columns, add)
    assert np.array_equal(c[filled:], before[filled:])
    assert np.array_equal(c[:, columns:], before[:, columns:])


STEPS = (
    [(0, 0)],
    [(1, 1), (0, 1), (0, 2), (0, 0), (1, 0), (2, 0)],  # of three pieces
    [(0, 0), (1, 1), (2, 2)],
)


def check_tiles(products: Products, rows: int, columns: int, add: bool) -> None:
    for steps in STEPS:
        a, b = whole_numbers(1, rows, 3, TILE, DEPTH), whole_numbers(2, 3, columns, DEPTH, TILE)
        c = whole_numbers(3, rows, columns + 1, TILE, TILE)
        before = c.copy()
        products.multiply_tiles(a, b, np.array(steps, dtype=np.int32), c[:, :columns], add)
        expected = sum(
            np.einsum("mrk,nkc->mnrc", a[:, i], b[j].astype(np.float64)) for i, j in steps
        )
        expected = expected + (before[:, :columns] if add else 0)
        assert np.array_equal(c[:, :columns], expected), (rows, columns, add, steps)
        assert np.array_equal(c[:, columns:], before[:, columns:])


def check_arithmetic(products: Products) -> None:
    """Every bit of the sums, as Intel's manual has it: even and odd depths by themselves, nothing below 2^-126."""

    def flushed(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float32)

    def wide(seed: int, scale: float, *shape: int) -> np.ndarray:
        powers = np.exp2(whole_numbers(seed, *shape).astype(np.float64))
        return (whole_numbers(seed + 1, *shape) * powers * scale).astype(np.float32)

    for scale in (1.0, 2.0**-73, 2.0**-130):  # sums, then factors around the least
        a, b = wide(1, scale, TILE, DEPTH), wide(3, min(scale, 2.0**-62), DEPTH, TILE)
        c = wide(5, scale * 2.0**-62, 1, 1, TILE, TILE)
        halves = np.zeros((2, TILE, TILE), np.float32)
        left, right = (flushed(x).astype(np.float64) for x in (a, b))
        for k in range(DEPTH):
            halves[k % 2] = flushed((halves[k % 2] + np.outer(left[:, k], right[k])).astype("f4"))
        expected = flushed(flushed(c[0, 0]) + flushed(halves[0] + halves[1]))
        steps = np.zeros((1, 2), np.int32)
        products.multiply_tiles(a[None, None], b[None, None], steps, c, True)
        assert np.array_equal(c[0, 0], expected), scale


def check(products: Products) -> None:
    """All there is to the two files: one and two tiles of rows and columns, and one more."""
    for add in (False, True):
        for rows in (1, 16, 17, 32, 33):
            for columns in (16, 32, 48):
                for depth in (1, 31, 32, 33, 96):
                    check_bf16(products, rows, depth, columns, add)
        for rows in (1, 2, 3):
            for columns in (1, 2, 3):
                check_tiles(products, rows, columns, add)


def tile_instructions(path: Path) -> list[tuple[int, str]]:
    """Where the kernels' instructions lie in the library, without those of the functions for misuse."""
    listing = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True).stdout
    found, function = [], ""
    for line in listing.splitlines():
        if label := re.match(r"[0-9a-f]+ <(\w+)>:", line):
            function = label[1]
        code = re.match(r" *([0-9a-f]+):.*\t((?:ldtile|tile|tdp)\w*.*)", line)
        if code and not function.startswith("misuse") and "configure" not in function:
            found.append((int(code[1], 16), f"{code[2].split('#')[0].strip()} in {function}"))
    return found


def survives(products: Products, at: int, how: int) -> bool:
    """Whether the check holds in a process of its own with an instruction changed."""
    child = os.fork()
    if child == 0:
        os.closerange(2, 256)  # no reports
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        products.library.amx_on_cpu_change(at, how)
        try:
            check(products)
        except AssertionError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(path: str) -> None:
    products = Products(Path(path))
    check_arithmetic(products)
    check(products)
    instructions = tile_instructions(products.path)
    survivors = []
    for at, name in instructions:
        changes = [LEFT_OUT] + [MISPLACED] * ("loadd" in name or "stored" in name)
        survivors += [
            f"{at:#x} {name}: change {how}" for how in changes if survives(products, at, how)
        ]
    print(f"{len(instructions)} instructions, not noticed: {len(survivors)}", *survivors, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
