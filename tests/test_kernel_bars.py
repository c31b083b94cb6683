"""The static bars: every compiled kernel holds them, and a kernel that does not is caught."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kernel_report
import pytest
import sass
from kernel_report import Table, check, parse_bar, resident_warps
from sass import Function, Kernel, Loop
from test_packaging import CUDA, ROOT, SETUP

no_tools = ", ".join((["nvcc"] if CUDA is None else []) + sass.missing_tools())
needs_compiler = pytest.mark.skipif(no_tools != "", reason=f"kernel bars need {no_tools}")

GOOD = Kernel(
    name="blur_kernel<half, 1>",
    arch="90a",
    nvcc="13.0",
    registers=40,
    stack=0,
    shared=1024,
    threads=256,
    mix={"slots": 200, "LDG.128": 4},
    loops=(Loop(True, {"slots": 50, "LDG.128": 4}),),
)
ROW = {
    "kernel": r"blur_kernel<\w+, 1>",
    "registers": 40,
    "stack": 0,
    "shared": 1024,
    "local": 0,
    "warps": ">= 16",
    "loop.slots": 50,
    "loop.LDG.128": "== 4",
    "loop.div64": 0,
}


def table(*rows: dict[str, object], nvcc: str = "13.0") -> Table:
    archs = ["90a"]
    return Table(nvcc, tuple(archs), (), tuple(parse_bar(row, archs, {}) for row in rows))


# ------------------------------------------------------------------------------------------ the check


def test_a_kernel_that_holds_its_bars() -> None:
    report = check([GOOD], [], table(ROW))
    assert report.problems == [] and report.notes == []
    assert len(report.lines) == 1 and report.lines[0].endswith("ok")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"registers": 41}, "registers 41, bar <= 40"),
        ({"stack": 8}, "stack 8, bar <= 0"),
        ({"shared": 1025}, "shared 1025, bar <= 1024"),
        ({"threads": 1024, "shared": 200 * 1024}, "shared 204800, bar <= 1024"),
        ({"mix": {"slots": 200, "local": 1}}, "local 1, bar <= 0"),
        ({"loops": (Loop(True, {"slots": 51, "LDG.128": 4}),)}, "loop.slots 51, bar <= 50"),
        ({"loops": (Loop(True, {"slots": 50, "LDG.128": 3}),)}, "loop.LDG.128 3, bar == 4"),
        (
            {"loops": (Loop(True, {"slots": 50, "LDG.128": 4, "div64": 1}),)},
            "loop.div64 1, bar <= 0",
        ),
    ],
)
def test_a_broken_limit_is_named(change: dict[str, object], problem: str) -> None:
    report = check([replace(GOOD, **change)], [], table(ROW))
    assert [f"blur_kernel<half, 1> sm_90a: {problem}"] == report.problems
    assert report.lines[0].endswith("BROKEN")


def test_low_occupancy_is_caught() -> None:
    report = check([replace(GOOD, registers=255)], [], table({**ROW, "registers": 255}))
    assert report.problems == ["blur_kernel<half, 1> sm_90a: warps 8, bar >= 16"]


def test_every_kernel_has_exactly_one_row_and_every_row_a_kernel() -> None:
    other = replace(GOOD, name="other_kernel")
    assert check([GOOD, other], [], table(ROW)).problems == ["other_kernel sm_90a: 0 bars, not one"]
    twice = check([GOOD], [], table(ROW, {"kernel": "blur_.*"})).problems
    assert "blur_kernel<half, 1> sm_90a: 2 bars, not one" in twice
    unused = check([GOOD], [], table(ROW, {"kernel": "gone_kernel"})).problems
    assert unused == ["bar gone_kernel matches no kernel on sm_90a"]


def test_an_architecture_that_is_not_built_is_a_problem() -> None:
    wanted = Table("13.0", ("80", "90a"), ("120",), table(ROW).bars)
    problems = check([GOOD], [], wanted).problems
    assert problems == ["no machine code for sm_80", "no PTX for compute_120"]


def test_another_nvcc_is_said_and_held_to_resources_only() -> None:
    longer = replace(GOOD, nvcc="13.1", loops=(Loop(True, {"slots": 90}),))
    report = check([longer], [], table(ROW))
    assert report.problems == []
    assert "nvcc 13.1: the bars are for 13.0" in report.notes[0]
    spilling = replace(longer, stack=16)
    assert check([spilling], [], table(ROW)).problems == [
        "blur_kernel<half, 1> sm_90a: stack 16, bar <= 0"
    ]


def test_a_row_may_choose_the_loop_and_state_what_the_launch_adds() -> None:
    nested = replace(GOOD, threads=0, loops=(Loop(True, {"slots": 10}), Loop(False, {"slots": 90})))
    row = {
        "kernel": "blur_.*",
        "hot_loop": "longest",
        "threads": 128,
        "dynamic_shared": 72 * 1024,
        "shared": 73 * 1024,
        "warps": "== 12",
        "loop.slots": "== 90",
    }
    assert check([nested], [], table(row)).problems == []
    inner = {**row, "hot_loop": "innermost"}
    assert check([nested], [], table(inner)).problems == [
        "blur_kernel<half, 1> sm_90a: loop.slots 10, bar == 90"
    ]


def test_a_printed_row_holds_what_it_was_printed_from() -> None:
    row = kernel_report.propose_row([GOOD], r"blur_kernel<\w+, 1>")
    parsed = kernel_report.tomllib.loads(row)["bar"][0]
    assert parsed["archs"] == ["90a"]
    assert check([GOOD], [], table(parsed)).problems == []
    assert check([replace(GOOD, registers=41)], [], table(parsed)).problems != []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kernel": "k", "loop.slotz": 3}, "unknown metric 'loop.slotz'"),
        ({"kernel": "k", "registers": "about 40"}, "'about 40' is no limit"),
        ({"kernel": "k", "registers": [40, 40]}, "registers has not 1 values"),
    ],
)
def test_errors_of_the_table(row: dict[str, object], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        table(row)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "warps"),
    [
        ("90a", 32, 0, 256, 64),  # all that fit
        ("90a", 128, 0, 512, 16),  # registers
        ("90a", 129, 0, 512, 0),  # 17 rows of 8 registers: a block of 16 warps does not fit
        ("80", 64, 40 * 1024, 256, 32),  # shared memory and registers alike: 4 blocks
        ("75", 32, 0, 32, 16),  # 16 blocks of one warp
        ("86", 40, 0, 256, 48),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, threads: int, warps: int) -> None:
    assert resident_warps(arch, registers, shared, threads) == warps


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void mafnet::(anonymous namespace)::warp_kernel<__nv_bfloat16, (mafnet::Mode)2, (int)8>"
            "(mafnet::Params)",
            "warp_kernel<bfloat16, 2, 8>",
        ),
        ("void mafnet::warp_kernel<float, (bool)1>(float*, int)", "warp_kernel<float, 1>"),
        ("plain_kernel(float*)", "plain_kernel"),
    ],
)
def test_short_names(demangled: str, name: str) -> None:
    assert sass.short_name(demangled) == name


LISTING = """\
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128.SYS R4, [R2] ;
        /*0020*/              @P1 BRA `(.L_x_9) ;
.L_x_1:
        /*0030*/                   FFMA R0, R1, R2, R3 ;
.L_x_8:
        /*0040*/                   STL [R1], R0 ;
        /*0050*/                   BRA P0, `(.L_x_1) ;
        /*0060*/                   NOP ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_9:
        /*0090*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*00a0*/                   BRA `(.L_x_8) ;
.L_x_10:
        /*00b0*/                   BRA `(.L_x_10) ;
"""


def test_loops_are_natural_loops() -> None:
    """A block moved behind the end belongs to the loop that it returns into; its way back is no loop of its own.

    Jumping into the middle of the inner range makes that no loop: its first instruction can be gone round.
    """
    function = Function.parse(LISTING.splitlines())
    assert [function.successors[i] for i in (2, 5, 8, 10)] == [{3, 9}, {3, 6}, set(), {4}]
    ((header, outer),) = function.loops().items()
    mix = sass.count([function.instructions[i] for i in outer])
    assert mix == {"slots": 8, "LDG.128": 1, "FP32": 1, "local": 1, "div64": 1}
    assert function.way(header, outer) == 6  # without the call, and the NOP
    simple = LISTING.replace("`(.L_x_8)", "`(.L_x_1)")
    inner, outer = sorted(Function.parse(simple.splitlines()).loops().values(), key=len)
    assert inner < outer and len(inner) == 3


STORING = """\
.L_x_0:
        /*0000*/              @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/                   FFMA R0, R1, R2, R3 ;
        /*0020*/                   BRA P1, `(.L_x_1) ;
        /*0030*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R0 ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   FMUL R0, R1, R2 ;
        /*0060*/                   FMUL R0, R1, R2 ;
        /*0070*/                   NOP ;
        /*0080*/                   BRA P2, `(.L_x_3) ;
        /*0090*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R0 ;
        /*00a0*/                   FMUL R0, R1, R2 ;
.L_x_3:
        /*00b0*/                   BRA P3, `(.L_x_4) ;
        /*00c0*/                   STG.E [R2.64], R0 ;
.L_x_4:
        /*00d0*/             @!P1 CALL.REL.NOINC `(.L_x_5) ;
        /*00e0*/                   BRA `(.L_x_0) ;
.L_x_5:
        /*00f0*/                   EXIT ;
"""


def test_the_work_of_a_loop_is_the_shortest_way_that_writes_most() -> None:
    function = Function.parse(STORING.splitlines())
    assert function.successors[13] == {14, 15}  # a call within the function: a jump
    bodies = function.loops()
    assert set(bodies) == {0, 1} and 15 not in bodies[0]
    assert function.way(0, bodies[0]) == 7  # past all that writes
    # The sum and the store, by the way that takes 1 less, its loop once.
    assert function.work(0, bodies) == 9


def test_the_loop_that_stores() -> None:
    mixes = ({"slots": 9, "STG.64": 1}, {"slots": 7, "STG": 2}, {"slots": 5, "RED": 1})
    kernel = replace(GOOD, loops=tuple(Loop(True, mix) for mix in mixes))
    assert kernel.hot_loop("storing") == mixes[1]
    assert replace(GOOD, loops=()).hot_loop("storing") == {}


# ------------------------------------------------------------------------------------ planted kernels

PLANTED = r"""
__global__ void __launch_bounds__(128) clean_kernel(const float4* x, float* y, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) { float4 v = x[i]; sum += v.x + v.y + v.z + v.w; }
  y[threadIdx.x] = sum;
}
// 1024 threads leave 64 registers a thread; 96 values are alive at once.
__global__ void __launch_bounds__(1024) spilling_kernel(const float* x, float* y) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = v[i] * v[95 - i] + v[(i * 7) % 96];
}
__global__ void __launch_bounds__(128) indexed_kernel(const int* x, float* y) {
  float v[16] = {};
  for (int i = 0; i < 16; ++i) v[x[i] & 15] += i;
  y[threadIdx.x] = v[x[threadIdx.x] & 15];
}
__global__ void __launch_bounds__(128) dividing_kernel(const long long* x, long long* y, int n) {
  long long sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) sum += x[i] / x[i + 1];
  y[threadIdx.x] = sum;
}
__global__ void __launch_bounds__(128) retrying_kernel(const float* x, float* y) {
  __shared__ float sums[32];
  if (threadIdx.x < 32) sums[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&sums[__float2int_rn(x[threadIdx.x]) & 31], x[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x < 32) y[threadIdx.x] = sums[threadIdx.x];
}
"""


@needs_compiler
def test_planted_kernels_are_caught(tmp_path: Path) -> None:
    assert CUDA is not None
    source, cubin = tmp_path / "planted.cu", tmp_path / "planted.sm_90a.cubin"
    source.write_text(PLANTED)
    nvcc = [str(CUDA / "bin/nvcc"), "-O3", "-std=c++17", "-arch=sm_90a", "-cubin"]
    subprocess.run([*nvcc, str(source), "-o", str(cubin)], check=True)
    strict = {"stack": 0, "local": 0, "shared": 0, "CAS": 0, "loop.div64": 0, "registers": 64}
    bars = table({"kernel": r"\w+_kernel", **strict}, nvcc=sass.read_cubin(cubin)[0].nvcc)
    kernels = {k.name: k for k in sass.read_kernels(cubin, cache=tmp_path / "cache")}
    broken = {
        name: {p.split(": ")[1].split()[0] for p in check([kernel], [], bars).problems}
        for name, kernel in kernels.items()
    }
    assert broken == {
        "clean_kernel": set(),
        "spilling_kernel": {"stack", "local"},
        "indexed_kernel": {"stack", "local"},
        "dividing_kernel": {"loop.div64"},
        "retrying_kernel": {"shared", "CAS"},
    }
    clean = kernels["clean_kernel"]
    assert clean.threads == 128 and clean.hot_loop()["LDG.128"] == 1
    assert list(kernels.values()) == sass.read_kernels(cubin, cache=tmp_path / "cache")


# -------------------------------------------------------------------------------- the kernels of csrc


@needs_compiler
@pytest.mark.slow(minutes=10)
def test_all_kernels_hold_their_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make kernels`; incremental, and what was disassembled before is not again."""
    environment = {**os.environ, "MAFNET_CUDA": "1", "MAFNET_CUDA_ARCHS": SETUP.DEFAULT_ARCHS}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/kernels"]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--brief"])
    assert kernel_report.main() == 0
