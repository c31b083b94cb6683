"""The static bars of the Triton kernels: they hold, and a kernel that breaks one is caught."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass
import triton_report
from sass import Kernel, Loop
from test_packaging import ROOT

from mafnet_ops import self_attention_triton as host

pytest.importorskip("triton")
no_tools = ", ".join(sass.missing_tools())
needs_tools = pytest.mark.skipif(no_tools != "", reason=f"Triton bars need {no_tools}")
SCRIPT = ROOT / "benchmarks/triton_report.py"
BARS = ROOT / "benchmarks/triton_bars.toml"


def report(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets kernels, it does not compile them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), "--archs", "90a", "--cases", "bfloat16, 16, 64, rows"]
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True)


@needs_tools
@pytest.mark.slow
def test_kernels_hold_their_bars(tmp_path: Path) -> None:
    """One case of one architecture; `make kernels` does them all. What was compiled once is not again."""
    done = report("--brief")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kernels held to their bars, 0 problems" in done.stdout

    strict = tmp_path / "bars.toml"
    strict.write_text(BARS.read_text().replace("registers = ", "registers = 0\n# "))
    broken = report("--brief", "--bars", str(strict))
    assert broken.returncode == 1
    assert (
        "self_attention_forward_kernel<bfloat16, 16, 64, rows> sm_90a: registers" in broken.stdout
    )


@pytest.mark.parametrize("case", triton_report.CASES, ids=str)
def test_every_case_has_its_bars(case: triton_report.Case) -> None:
    """What `make kernels` would find minutes later."""
    rows = triton_report.tomllib.loads(BARS.read_text())["bar"]
    archs = {row["kernel"]: row.get("archs", list(triton_report.DEVICES)) for row in rows}
    kinds = ["forward", "backward_key_value", "backward_query"]
    names = [f"self_attention_{kind}_kernel<{case}>" for kind in kinds]
    if host.use_atomics(case.width_qk, False):
        names.append(f"self_attention_backward_key_value_kernel<{case}, atomic>")
    for name in names:
        assert set(case.archs) <= set(archs.get(name, ())), name


def test_the_pipelined_loop_is_chosen() -> None:
    loops = (
        Loop(True, {"slots": 90}),
        Loop(True, {"slots": 60, "cp.async": 2}),
        Loop(False, {"slots": 200}),
    )
    kernel = Kernel("f", "90a", "3.9.0", 1, 0, 0, 0, {"slots": 300}, loops)
    assert kernel.hot_loop("pipelined")["slots"] == 60
    assert kernel.hot_loop("innermost")["slots"] == 90
    without = Kernel("f", "90a", "3.9.0", 1, 0, 0, 0, {"slots": 300}, loops[:1])
    assert without.hot_loop("pipelined")["slots"] == 90
