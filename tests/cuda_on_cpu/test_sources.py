"""CUDA-only syntax stays in csrc/common/prims.cuh, which is what lets the emulator run every other line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda_on_cpu.build import CSRC, HERE
from cuda_on_cpu.mutants import without_comments

PRIMITIVES = CSRC / "common" / "prims.cuh"
FORBIDDEN = {
    "inline PTX": r"\basm\b",
    "bare __shared__ (write SHARED or DYN_SHARED)": r"\b__shared__\b",
    "<<<...>>> (write launch)": r"<<<",
    "a choice by architecture": r"__CUDA_ARCH__",
    "an address conversion": r"__cvta",
    "dynamic parallelism or cooperative groups": r"cooperative_groups|cudaLaunch",
    "a CUDA header": r'#\s*include\s+[<"](?:cuda|cub|cutlass|cute|mma\.h|curand|thrust)',
}
TORCH = r'#\s*include\s+[<"](?:torch|ATen|c10)/'
NOT_EMULATED = r"\b(?:wgmma|mbarrier|__cluster_dims__|cp\.async\.bulk|__nv_isClusterShared)"


def kernel_files() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*.cu*") if p != PRIMITIVES)


def broken_rules(text: str) -> list[str]:
    """The rules that a kernel file breaks; comments and #pragma do not count."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    rules = {**FORBIDDEN, "a torch header": TORCH, "what the emulator lacks": NOT_EMULATED}
    return [rule for rule, pattern in rules.items() if re.search(pattern, code)]


def test_there_are_kernel_files() -> None:
    assert kernel_files()


@pytest.mark.parametrize("path", kernel_files(), ids=lambda p: str(p.relative_to(CSRC)))
def test_kernel_files_keep_to_the_primitives(path: Path) -> None:
    assert broken_rules(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        'asm volatile("bar.sync 0;");',
        "__shared__ float tile[32];",
        "kernel<<<grid, block>>>(p);",
        "#if __CUDA_ARCH__ >= 800",
        "__cvta_generic_to_shared(p);",
        "#include <cuda_fp16.h>",
        "#include <torch/csrc/stable/tensor.h>",
        "mbarrier_init();",
    ],
)
def test_each_rule_is_noticed(line: str) -> None:
    assert broken_rules(f"int x;\n{line}\n") != []
    assert broken_rules(f"int x;  // {line}\n") == []


def test_host_headers_of_kernels_are_free_of_torch_and_cuda() -> None:
    """What a kernel file includes, it includes on the emulator too."""
    for path in kernel_files():
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            header = CSRC / name
            assert header.exists(), f"{path.name} includes {name}"
            if header != PRIMITIVES:
                assert broken_rules(header.read_text()) == [], name


def test_each_primitive_has_a_twin() -> None:
    """The names that prims.cuh defines for nvcc and for the emulator are the same."""
    halves = PRIMITIVES.read_text().split('\n#else\n\n#include "cuda_on_cpu.h"\n')
    assert len(halves) == 2
    cuda, twins = (without_comments(half) for half in halves)
    twins = twins[: twins.index("to_accumulator")]
    pattern = r"^(?:DEVICE \w+|int) (\w+)\("
    helpers = {"shared_address"}
    names = [set(re.findall(pattern, half, re.MULTILINE)) for half in (cuda, twins)]
    assert names[0] - helpers == names[1]
    macros = [set(re.findall(r"#define (\w+)", half)) for half in halves]
    assert macros[0] == macros[1] == {"DEVICE", "SHARED", "DYN_SHARED"}


def test_the_emulator_is_in_no_wheel() -> None:
    """Its folder holds no package of the distribution."""
    assert HERE.parent.name == "tests"
    setup = (HERE.parent.parent / "pyproject.toml").read_text()
    assert 'include = ["mafnet", "mafnet.*", "mafnet_ops", "mafnet_ops.*"]' in setup
