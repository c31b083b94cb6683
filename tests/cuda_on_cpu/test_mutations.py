"""No barrier and no condition of a kernel is idle: without it, a test of the op must fail.

What can be lost is found in the sources (mutants.py), in every file that a kernel is compiled from, so a new barrier or
bound check is tried as well. The kernels of an op are built once, checked, with a switch at each such place. The op
brings <op>_probe.py: probe(), a list of short checks, and IDLE, the few conditions that change no result: (file,
condition) -> why. csrc/common is tried as an op is, in small kernels that do nothing but call it.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import pytest
from cuda_on_cpu.build import CSRC, Library, build
from cuda_on_cpu.common_probe import library as common_library
from cuda_on_cpu.emulator import Check, Kernels, needs_emulator, op_library
from cuda_on_cpu.mutants import Mutant, find, kernel_files, with_switches
from cuda_on_cpu.trial import which_are_noticed

pytestmark = [needs_emulator, pytest.mark.slow(minutes=3)]


def case_of(name: str) -> str:
    """A case of dispatch_dtype or dispatch_interpolation, to be left out."""
    if name in ("kFloat64", "kBFloat16"):
        body = {"kFloat64": "double", "kBFloat16": "BFloat16"}[name]
        return f"    case Dtype::{name}:\n      return body(Type<{body}>{{}});\n"
    constant = f"InterpolationConstant<Interpolation::{name}>{{}}"
    return f"    case Interpolation::{name}:\n      return body({constant});\n"


# file -> cases that the probes do without: an op then compiles in half of the time
LEFT_OUT = {
    "common/dtype.h": ("kFloat64", "kBFloat16"),
    "common/sampler.h": ("kNearest", "kBicubic"),
}
FILES = kernel_files(CSRC)
FOLDERS = sorted({file.split("/")[0] for file in FILES})


class ProbeModule(Protocol):
    """<op>_probe.py, or common_probe.py."""

    IDLE: Mapping[tuple[str, str], str]

    @staticmethod
    def probe() -> Sequence[Check]: ...


def mutants_of(folder: str) -> list[Mutant]:
    files = [file for file in FILES if file.startswith(f"{folder}/")]
    return [mutant for file in files for mutant in find(CSRC, file)]


def key(mutant: Mutant) -> tuple[str, str]:
    return Path(mutant.file).name, mutant.removed


def write_switches(folder: Path, mutants: Sequence[Mutant]) -> None:
    """Changes the files of the mutants in a copy of their folder; they are numbered as they come."""
    for file in sorted({mutant.file for mutant in mutants}):
        numbered = [(number, m) for number, m in enumerate(mutants) if m.file == file]
        path = folder / file
        path.write_text(with_switches(path.read_text(), numbered))


def switched_copy(target: Path, folder: str, mutants: Sequence[Mutant]) -> Path:
    """csrc/common and the folder, without what LEFT_OUT says, and with a switch for every mutant."""
    for name in {"common", folder}:
        shutil.copytree(CSRC / name, target / name)
    write_switches(target, mutants)
    for file, names in LEFT_OUT.items():
        text = (target / file).read_text()
        for name in names:
            assert case_of(name) in text, f"{file} has no case {name} of this form any more"
            text = text.replace(case_of(name), "")
        (target / file).write_text(text)
    return target


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_barrier_and_condition_is_needed(folder: str, tmp_path: Path) -> None:
    tried = cast(ProbeModule, importlib.import_module(f"cuda_on_cpu.{folder}_probe"))
    mutants = mutants_of(folder)
    assert mutants
    gone = set(tried.IDLE) - {key(mutant) for mutant in mutants}
    assert not gone, f"listed as idle, but no longer there: {gone}"
    csrc = switched_copy(tmp_path, folder, mutants)
    kernels = common_library(csrc) if folder == "common" else op_library(folder, True, csrc)
    library = build([kernels])[0]
    idle = {number for number, mutant in enumerate(mutants) if key(mutant) in tried.IDLE}
    noticed = which_are_noticed(tried.probe, library, len(mutants), idle)
    wrong = []
    for number, (mutant, seen) in enumerate(zip(mutants, noticed)):
        if seen == (number in idle):
            what = "is listed as idle, but missed" if seen else "is not missed"
            wrong.append(f"{mutant} {what}")
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------ what the trial can see

KERNEL = """#include "binding.h"
#include "common/prims.cuh"

__global__ void add_neighbours(const float* input, float* output, int n) {
  SHARED(float, tile, [65]);
  const int i = threadIdx.x;
  tile[i] = i < n ? input[i] : 0;
  if (i == 0) tile[64] = 0;
  __syncthreads();
  if (i >= n || i >= 64) return;
  output[i] = tile[i] + ((i + 1 < 64 && n > 0) ? tile[i + 1] : 0);
}

CUEMU_ENTRY(neighbours) {
  const auto input = arguments.in("input"), output = arguments.out("output");
  if (input.shape[0] == 0) return 0;
  const int n = static_cast<int>(input.shape[0]);
  return mafnet::launch(add_neighbours, dim3(n / 50), dim3(64), 0, nullptr,
                        static_cast<const float*>(input.data), static_cast<float*>(output.data), n);
}
"""


def check_neighbours(kernels: Kernels) -> None:
    for size in (0, 50):
        numbers, output = np.arange(size, dtype=np.float32), np.zeros(size, np.float32)
        kernels.run("neighbours", input=numbers, output=output).raise_if_any()
        assert np.array_equal(output, numbers + np.append(numbers[1:], 0)[:size])


def neighbours_probe() -> list[Check]:
    return [check_neighbours]


def test_what_is_idle_is_not_missed(tmp_path: Path) -> None:
    """Of mutants in each other, each is tried alone; barriers count, and so does what the host decides."""
    shutil.copytree(CSRC / "common", tmp_path / "common")
    (tmp_path / "k.cu").write_text(KERNEL)
    mutants = find(tmp_path, "k.cu")
    write_switches(tmp_path, mutants)
    library = build([Library((tmp_path / "k.cu",), checked=True, csrc=tmp_path)])[0]
    noticed = which_are_noticed(neighbours_probe, library, len(mutants))
    assert [(mutant.removed, seen) for mutant, seen in zip(mutants, noticed)] == [
        ("i < n", True),
        ("i == 0", True),  # two threads write the same
        ("__syncthreads();", True),
        ("i >= n", True),
        ("i >= 64", False),  # no such thread
        ("(i + 1 < 64 && n > 0)", False),  # both are idle
        ("i + 1 < 64", False),  # all tiles have one more
        ("n > 0", False),  # or this would not run
        ("input.shape[0] == 0", True),  # a grid of no block
    ]


def test_finding_mutants(tmp_path: Path) -> None:
    """Barriers, waits, conditions and their operands are found; comments and constants are not."""
    (tmp_path / "k.cu").write_text(
        "if (i >= n) return;  // if (x) __syncthreads();\n"
        "__syncthreads();\n"
        "cp_async_wait<kStages - 2>();\n"
        "const bool used = a >= 0 && f(b, c) < 3;\n"
        "for (int c = 0; active && c < n; ++c) {}\n"
        "x = used ? y[i] : 0;\n"
        "if constexpr (kFlag && kOther) return;\n"
        "constexpr int n = kFlag ? 1 : mode == Mode::kSlow ? 2 : 3;\n"
        "__syncwarp(mask);\n"
        "f(x, is_inside(i, n) ? y[i] : 0);\n"
        "if (p != nullptr) *p = 1;\n"
        "if (!active[q] || (i & 3) != 0) continue;\n"
        "x *= kRaw ? 1 : 2;\n"
        "if (n == 1) {\n  x = 0;\n  return;\n}\n"
        "#if defined(__CUDACC__)\nif (x) return;\n#if A >= 800\nx = y ? 1 : 2;\n#endif\n#else\n"
        "x = z ? 1 : 2;\n#endif\n"
    )
    found = [(m.line, m.removed, m.value) for m in find(tmp_path, "k.cu")]
    assert found == [
        (1, "i >= n", False),
        (2, "__syncthreads();", None),
        (3, "cp_async_wait<kStages - 2>();", None),
        (4, "a >= 0", True),
        (4, "f(b, c) < 3", True),
        (5, "active", True),
        (5, "c < n", True),
        (6, "used", True),
        (9, "__syncwarp(mask);", None),
        (10, "is_inside(i, n)", True),
        (11, "p != nullptr", True),
        (12, "!active[q]", False),
        (12, "(i & 3) != 0", False),
        (14, "(n == 1)", False),
        (14, "n == 1", True),
        (24, "z", True),
    ]
    text = (tmp_path / "k.cu").read_text()
    switched = with_switches(text, list(enumerate(find(tmp_path, "k.cu"))))
    both = "(!::cuemu::mutant_is(13) && ::cuemu::sees(13, (((::cuemu::mutant_is(14) || "
    assert both + "::cuemu::sees(14, (n == 1), true)))), false))" in switched


def test_every_file_of_a_kernel_is_tried(tmp_path: Path) -> None:
    """What it includes, and what that includes; no more of the folders."""
    for file, text in (
        ("op/k.cu", '#include "op/k.cuh"\n'),
        ("op/k.cuh", '#include <cmath>\n\n#include "common/a.h"\n#include "cuda_on_cpu.h"\n'),
        ("op/binding.cpp", '#include "common/b.h"\n'),
        ("common/a.h", '#include "common/a.h"\n'),
        ("common/b.h", ""),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert kernel_files(tmp_path) == ["common/a.h", "op/k.cu", "op/k.cuh"]
    assert {"common/prims.cuh", "common/sampler.h"} <= set(FILES)
