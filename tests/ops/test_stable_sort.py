"""``stable_sort`` of csrc/common/checks.h: only the CUDA library calls it, here a library of the test's own does."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from test_packaging import ROOT, SETUP

SOURCE = """
#include "common/checks.h"

namespace {
std::tuple<mafnet::Tensor, mafnet::Tensor> sort(const mafnet::Tensor& tensor) {
  return mafnet::stable_sort(tensor);
}
}  // namespace

STABLE_TORCH_LIBRARY(mafnet_sort_test, module) { module.def("sort(Tensor tensor) -> (Tensor, Tensor)"); }
STABLE_TORCH_LIBRARY_IMPL(mafnet_sort_test, CPU, module) { module.impl("sort", TORCH_BOX(&sort)); }
"""


@pytest.mark.slow
@pytest.mark.skipif(SETUP.find_compiler() is None, reason="no C++ compiler on this machine")
def test_equal_numbers_keep_their_order(tmp_path: Path) -> None:
    source, library = tmp_path / "sort.cpp", tmp_path / "sort.so"
    source.write_text(SOURCE)
    include = SETUP.find_torch_include()
    command = [*SETUP.find_compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-Icsrc"]
    command += [f"-DTORCH_TARGET_VERSION={SETUP.TORCH_TARGET}", "-isystem", str(include)]
    command += ["-isystem", sysconfig.get_paths()["include"], str(source), "-o", str(library)]
    command += [f"-L{include.parent / 'lib'}", "-ltorch_cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    numbers = torch.randint(5, (1, 1, 3, 1000))
    for _ in range(3):  # whoever frees a handle twice, or never, is met here
        values, places = torch.ops.mafnet_sort_test.sort(numbers)
    expected = numbers.sort(dim=-1, stable=True)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)
