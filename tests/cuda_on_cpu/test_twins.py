"""The CPU twins of the tensor-core primitives, of cp.async and of split_floor, and the wiring of the inline PTX.

The oracle of the layouts is golden/fragment_layouts.txt, numbers from NVIDIA's own CuTe library; that of the
wiring is what nvcc makes of the kernels in kernels/twins.cu.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import CSRC, HERE
from cuda_on_cpu.emulator import Kernels, kernel_library, load, needs_emulator

pytestmark = needs_emulator

# name: (K, dtype of A and B, bits of one)
MMA = {
    "f16_k16": (16, torch.float16, 0x3C00),
    "bf16_k16": (16, torch.bfloat16, 0x3F80),
    "f16_k8": (8, torch.float16, 0x3C00),
    "tf32_k8": (8, torch.float32, 0x3F800000),
}


def layouts() -> dict[str, np.ndarray]:
    """Name -> element number, by lane and value."""
    lines = (HERE / "golden" / "fragment_layouts.txt").read_text().splitlines()
    rows = (line.split() for line in lines if not line.startswith("#"))
    return {name: np.array(numbers, int).reshape(32, -1) for name, *numbers in rows}


LAYOUTS = layouts()


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def twins(request: pytest.FixtureRequest) -> Kernels:
    return load(kernel_library("twins", request.param))


def bits(matrix: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The matrix in dtype, as unsigned integers; tf32 with noise in the bits that are ignored."""
    tensor = torch.from_numpy(matrix).to(dtype)
    if dtype == torch.float32:
        return tensor.numpy().view(np.uint32)
    return tensor.view(torch.uint16).numpy()


def values(pattern: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What the tensor core sees in bits()."""
    if dtype == torch.float32:
        return (pattern & 0xFFFFE000).view(np.float32).astype(np.float64)
    return torch.from_numpy(pattern).view(dtype).double().numpy()


class Multiplication:
    """One mma on matrices: takes fragments apart and puts them together by the golden layouts."""

    def __init__(self, kernels: Kernels, name: str) -> None:
        self.kernels, self.name = kernels, name
        self.k, self.dtype, self.one = MMA[name]
        self.a, self.b, self.d = (LAYOUTS[f"{name}.{part}"] for part in "abd")

    def fragment_a(self, a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a[self.a % 16, self.a // 16])

    def fragment_b(self, b: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(b[self.b // 8, self.b % 8])

    def __call__(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        d = np.ascontiguousarray(c[self.d % 16, self.d // 16], np.float32)
        self.kernels.run(self.name, a=a.view(np.uint32), b=b.view(np.uint32), d=d).raise_if_any()
        result = np.full((16, 8), np.nan)
        result[self.d % 16, self.d // 16] = d
        return result


@pytest.mark.parametrize("name", MMA)
def test_mma_multiplies_and_adds(twins: Kernels, name: str) -> None:
    mma = Multiplication(twins, name)
    rng = np.random.default_rng(0)
    a, b = (bits(rng.standard_normal(shape), mma.dtype) for shape in ((16, mma.k), (mma.k, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    got = mma(mma.fragment_a(a), mma.fragment_b(b), c)
    x, y = values(a, mma.dtype), values(b, mma.dtype)
    terms = np.abs(x) @ np.abs(y) + np.abs(c)
    assert (np.abs(got - (x @ y + c)) <= (mma.k + 1) * np.finfo(np.float32).eps * terms).all()


@pytest.mark.parametrize("name", MMA)
def test_each_fragment_element_alone(twins: Kernels, name: str) -> None:
    """A one in one register half of one lane picks one row of B, or one column of A."""
    mma = Multiplication(twins, name)
    a, b = (bits(np.arange(1.0, n + 1), mma.dtype) for n in (16 * mma.k, mma.k * 8))
    a, b, zeros = a.reshape(16, mma.k), b.reshape(mma.k, 8), np.zeros((16, 8), np.float32)
    for lane, value in np.ndindex(*mma.a.shape):
        hot = np.zeros(mma.a.shape, a.dtype)
        hot[lane, value] = mma.one
        row, column = mma.a[lane, value] % 16, mma.a[lane, value] // 16
        expected = np.zeros((16, 8))
        expected[row] = values(b, mma.dtype)[column]
        assert np.array_equal(mma(hot, mma.fragment_b(b), zeros), expected), (lane, value)
    for lane, value in np.ndindex(*mma.b.shape):
        hot = np.zeros(mma.b.shape, a.dtype)
        hot[lane, value] = mma.one
        row, column = mma.b[lane, value] // 8, mma.b[lane, value] % 8
        expected = np.zeros((16, 8))
        expected[:, column] = values(a, mma.dtype)[:, row]
        assert np.array_equal(mma(mma.fragment_a(a), hot, zeros), expected), (lane, value)


def test_rounding_to_tf32(twins: Kernels) -> None:
    """To the nearest of 11 bits; what has as many stays, as do infinity and NaN. A tie goes to the even one, or away
    from zero below sm_90: only one that is both is tried."""
    one = 0x3F800000
    bits = [one, one + 0xFFF, one + 0xFFF, one + 0x1001, one + 0x2000, one + 0x3000, 0x3FFFFFFF]
    near = [one, one, one, one + 0x2000, one + 0x2000, one + 0x4000, 0x40000000]
    # 0x7FFFFFFF: the NaN that a GPU makes, to which nothing can be added without a carry into the sign
    same = [0, 1 << 13, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]
    pattern = np.array((bits + same) * 2 + 8 * [0], np.uint32)
    expected = np.array((near + same) * 2 + 8 * [0], np.uint32)
    for both in (pattern, expected):
        both[12:24] |= 0x80000000
    rounded = np.zeros(32, np.float32)
    twins.run("to_tf32", values=pattern.view(np.float32), rounded=rounded).raise_if_any()
    wanted = expected.view(np.float32)
    assert np.array_equal(rounded, wanted, equal_nan=True)
    numbers = ~np.isnan(wanted)  # signs of zeros too
    assert np.array_equal(rounded.view(np.uint32)[numbers], expected[numbers])


def test_splitting_off_the_floor(twins: Kernels) -> None:
    """Exact up to 2^22; what lies beyond, and NaN, gives no index of an image."""
    limit = 2.0**22
    near = [0, -0.0, 0.25, 0.75, 1, 7.5, -0.25, -1, -1.5, 1e6 + 0.5, -1e6 - 0.5, limit - 1, -limit]
    far = [1e7, 1e9, 2.0**31, 1e10, 3e38, np.inf]
    values = np.array([*near, *far, *(-v for v in far), np.nan, *6 * [0]], np.float32)
    wholes, parts = np.zeros(32, np.int32), np.zeros(32, np.float32)
    twins.run("split_floor", values=values, wholes=wholes, parts=parts).raise_if_any()
    exact = np.abs(values) <= limit
    assert np.array_equal(wholes[exact], np.floor(values[exact]))
    assert np.array_equal(parts[exact], values[exact] - np.floor(values[exact]))
    assert ((wholes[~exact] < 0) | (wholes[~exact] >= limit)).all()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("ldmatrix")])
def test_ldmatrix(twins: Kernels, name: str) -> None:
    layout = LAYOUTS[name]
    rows = np.arange(32 * layout.shape[1], dtype=np.uint16) * 7
    loaded = np.zeros((32, layout.shape[1] // 2), np.uint32)
    twins.run(name, rows=rows, loaded=loaded).raise_if_any()
    assert np.array_equal(loaded.view(np.uint16), rows[layout])


@pytest.mark.parametrize("valid", [False, True])
def test_cp_async_copies_and_fills_with_zeros(twins: Kernels, valid: bool) -> None:
    source = np.arange(256, dtype=np.uint32).reshape(2, 32, 4) + 1
    target = np.zeros_like(source)
    twins.run("cp_async", source=source, target=target, valid=valid).raise_if_any()
    assert np.array_equal(target, source * np.array([1, valid], np.uint32)[:, None, None])


# ------------------------------------------------------------------------------ the inline PTX's wiring


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the inline PTX is not looked at")
Register = str
Place = tuple[
    int, int
]  # the parameter that points to an array, and the element after the lane's first


class Ptx:
    """What one kernel of nvcc's output loads, computes and stores."""

    def __init__(self, text: str) -> None:
        self.parameter: dict[Register, int] = {}
        self.loaded: dict[Register, Place] = {}
        self.stored: dict[Place, Register] = {}
        for line in text.splitlines():
            self._follow(line.strip())

    def _follow(self, line: str) -> None:
        if m := re.match(r"ld\.param\.u64\s+(%\w+), \[\w+_param_(\d+)\]", line):
            self.parameter[m[1]] = int(m[2])
        elif m := re.match(r"(?:cvta\.to\.global|add\.s)\S+\s+(%\w+), (%\w+)", line):
            if m[2] in self.parameter:
                self.parameter[m[1]] = self.parameter[m[2]]
        elif m := re.match(r"ld\.global\S+\s+(%\w+), \[(%\w+)(?:\+(\d+))?\]", line):
            self.loaded[m[1]] = (self.parameter[m[2]], int(m[3] or 0) // 4)
        elif m := re.match(r"st\.global\S+\s+\[(%\w+)(?:\+(\d+))?\], (%\w+)", line):
            self.stored[self.parameter[m[1]], int(m[2] or 0) // 4] = m[3]
        elif (m := re.match(r"mov\.\S+\s+(%\w+), (%\w+);", line)) and m[2] in self.loaded:
            self.loaded[m[1]] = self.loaded[m[2]]


def registers(text: str) -> list[list[Register]]:
    return [re.findall(r"%\w+", group) for group in re.findall(r"\{([^}]*)\}", text)]


@pytest.fixture(scope="module", params=["75", "80", "90a"])
def ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kernel name -> its PTX."""
    output = tmp_path_factory.mktemp("ptx") / "twins.ptx"
    command = [nvcc() or "", "-std=c++17", f"-arch=sm_{request.param}", f"-I{CSRC}", "-ptx"]
    subprocess.run([*command, str(HERE / "kernels" / "twins.cu"), "-o", str(output)], check=True)
    return kernels_of(output)


def kernels_of(output: Path) -> dict[str, str]:
    parts = re.split(r"\.visible \.entry ", output.read_text())
    return {part[: part.index("(")]: part for part in parts[1:]}


def one(kernels: dict[str, str], word: str) -> str:
    (text,) = [text for name, text in kernels.items() if word in name]
    return text


def wrongly_wired(text: str, a: int, b: int) -> bool:
    """Whether the only mma of a kernel gets its operands elsewhere than from the arrays in order."""
    (instruction,) = re.findall(r"mma\.sync.*;", text)
    d_out, a_in, b_in, d_in = registers(instruction)
    kernel = Ptx(text)
    return not (
        [kernel.loaded.get(r) for r in a_in] == [(0, i) for i in range(a)]
        and [kernel.loaded.get(r) for r in b_in] == [(1, i) for i in range(b)]
        and [kernel.loaded.get(r) for r in d_in] == [(2, i) for i in range(4)]
        and [kernel.stored.get((2, i)) for i in range(4)] == d_out
    )


@needs_nvcc
def test_mma_operands_are_wired_in_order(ptx: dict[str, str]) -> None:
    small = one(ptx, "mma_f16_k8")
    assert "m16n8k8.row.col.f32.f16.f16.f32" in small
    assert not wrongly_wired(small, 2, 1)
    large = {"mma_f16_k16": "m16n8k16.row.col.f32.f16.f16.f32"}
    large["mma_bf16_k16"] = "m16n8k16.row.col.f32.bf16.bf16.f32"
    large["mma_tf32_k8"] = "m16n8k8.row.col.f32.tf32.tf32.f32"
    if ".m16n8k16" not in "".join(ptx.values()):  # sm_75: two halves along K, and traps
        first, second = re.findall(r"mma\.sync.*;", one(ptx, "mma_f16_k16"))
        kernel = Ptx(one(ptx, "mma_f16_k16"))
        for instruction, half in ((first, 0), (second, 1)):
            _, a_in, b_in, _ = registers(instruction)
            assert [kernel.loaded[r] for r in a_in] == [(0, 2 * half), (0, 2 * half + 1)]
            assert [kernel.loaded[r] for r in b_in] == [(1, half)]
        for name in ("mma_bf16_k16", "mma_tf32_k8", "round_to_tf32"):
            assert "trap" in one(ptx, name)
        return
    assert re.search(r"cvt\.rna?\.tf32\.f32", one(ptx, "round_to_tf32"))
    for name, shape in large.items():
        assert shape in one(ptx, name)
        assert not wrongly_wired(one(ptx, name), 4, 2), name


@needs_nvcc
def test_swapped_operands_are_noticed(ptx: dict[str, str]) -> None:
    text = one(ptx, "mma_f16_k8")
    (instruction,) = re.findall(r"mma\.sync.*;", text)
    _, (first, second), _, _ = registers(instruction)
    swapped = instruction.replace(f"{{{first}, {second}}}", f"{{{second}, {first}}}")
    assert swapped != instruction
    assert wrongly_wired(text.replace(instruction, swapped), 2, 1)


@needs_nvcc
def test_ldmatrix_results_are_wired_in_order(ptx: dict[str, str]) -> None:
    found = 0
    for name, text in ptx.items():
        for instruction in re.findall(r"ldmatrix.*;", text):
            (results,) = registers(instruction)
            stored = Ptx(text).stored
            assert [stored.get((1, i)) for i in range(len(results))] == results, name
            assert (".trans" in instruction) == ("Lb1" in name), name
            assert f".x{len(results)}" in instruction and f"ILi{len(results)}" in name
            found += 1
    assert found == 4


@needs_nvcc
def test_copies_are_grouped_and_read_nothing_where_not_valid(ptx: dict[str, str]) -> None:
    text = one(ptx, "copy_async")
    if "cp.async" not in text:  # sm_75: plain loads, the second behind a branch
        assert re.search(r"@%p\d+ bra.*ld\.global\.v4", text, re.DOTALL)
        return
    always, sometimes = re.findall(r"cp\.async\.cg.*, 16, (%r\d+);", text)
    assert re.search(rf"mov\.\w+\s+{always}, 16;", text)
    assert re.search(rf"selp\.\w+\s+{sometimes}, (?:0, 16|16, 0), %p", text)
    groups = re.findall(r"cp\.async\.(\w+_group *\d*);", text)
    assert groups == ["commit_group", "commit_group", "wait_group 1", "wait_group 0"]


@needs_nvcc
def test_the_floor_is_rounded_down(ptx: dict[str, str]) -> None:
    assert "add.rm.f32" in one(ptx, "split_floors")


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "runs", "lacks"),
    [
        ("compute_75,code=[sm_75,compute_75]", (), (75, 80, 90, 120)),
        ("compute_80,code=[sm_80,compute_80]", (80, 86, 90, 120), (75,)),
        ("compute_86,code=sm_86", (86, 89), (80,)),
        ("compute_90a,code=sm_90a", (90,), (75, 89)),
    ],
)
def test_bfloat16_is_for_devices_that_have_code_of_it(
    code: str, runs: tuple[int, ...], lacks: tuple[int, ...], tmp_path: Path
) -> None:
    """Where PTX of sm_75 is all that a new device can run, that has traps in the place of bfloat16."""
    asked = [f"mafnet::runs_bfloat16_code({c})" for c in runs]
    asked += [f"!mafnet::runs_bfloat16_code({c})" for c in lacks]
    source = tmp_path / "asked.cu"
    lines = ['#include "common/prims.cuh"', *(f"static_assert({a});" for a in asked)]
    source.write_text("\n".join(lines))
    command = [nvcc() or "", "-std=c++17", f"-gencode=arch={code}", f"-I{CSRC}", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
