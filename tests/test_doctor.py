"""doctor: what it says of a good, a switched-off, a missing and a broken build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mafnet_ops
from mafnet_ops import _library
from mafnet_ops.doctor import Report, doctor, main

PACKAGE = Path(mafnet_ops.__file__).parent
BUILT = _library.LOAD_ERRORS["cpu"] is None


def run_doctor(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m mafnet_ops.doctor`` of the package that lies in ``root``, as a new process."""
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "mafnet_ops.doctor"]
    return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A copy of the package without shared objects."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "mafnet_ops", ignore=ignore)
    return tmp_path


def test_report_has_every_public_op_on_both_devices() -> None:
    report = doctor()
    assert isinstance(report, Report)
    listed = {(entry.op, entry.device) for entry in report.ops}
    for op in ("flow_warp", "modulated_deform_conv2d", "self_attention"):
        assert {(op, "cpu"), (op, "cuda")} <= listed
    assert set(_library.op_names()) <= {op for op, _ in listed}
    assert all(entry.backend in ("native", "triton", "pytorch") for entry in report.ops)
    assert all(entry.reason for entry in report.ops)


@pytest.mark.skipif(not BUILT, reason="the extension is not built")
def test_built_extension_is_native_and_leaves_nothing_to_mend() -> None:
    report = doctor()
    on_cpu = {e.op: (e.backend, e.reason) for e in report.ops if e.device == "cpu"}
    assert on_cpu.pop("watch_offsets") == ("pytorch", "this op has no kernel of its own")
    assert set(on_cpu.values()) == {("native", "compiled CPU kernel")}, on_cpu
    assert dict(report.facts)["_C"] == "loaded"
    assert not any("Build the kernels" in line for line in report.advice)


def test_main_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert capsys.readouterr().out == f"{doctor()}\n"


def test_unknown_op_is_named() -> None:
    with pytest.raises(
        KeyError, match=r"backend: op: expected one of .*flow_warp.*, got flow_wrap"
    ):
        _library.backend("flow_wrap", "cpu")


def test_switched_off_extension(unbuilt: Path) -> None:
    done = run_doctor(unbuilt, MAFNET_DISABLE_EXT="1")
    assert done.returncode == 0 and done.stderr == ""
    assert "flow_warp" in done.stdout and "native" not in done.stdout
    assert "unset MAFNET_DISABLE_EXT" in done.stdout


def test_missing_extension_is_loud_and_says_why(unbuilt: Path) -> None:
    (unbuilt / "mafnet_ops/_build.json").write_text(
        '{"extension_missing_because": "no C++ compiler found"}'
    )
    done = run_doctor(unbuilt, MAFNET_DISABLE_EXT="0")
    assert done.returncode == 0
    assert "RuntimeWarning: mafnet_ops runs its slow PyTorch code" in done.stderr
    assert "no C++ compiler found" in done.stderr and "no C++ compiler found" in done.stdout
    assert _library.INSTALL_COMMAND in done.stdout
    assert "found in sys.modules" not in done.stderr


def test_broken_extension_keeps_the_loaders_words(unbuilt: Path) -> None:
    (unbuilt / "mafnet_ops/_C.abi3.so").write_bytes(b"not a library")
    done = run_doctor(unbuilt, MAFNET_DISABLE_EXT="0")
    assert done.returncode == 0
    assert "_C.abi3.so does not load: " in done.stdout
    assert "file too short" in done.stdout or "invalid ELF header" in done.stdout


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("avx2", "; avx2 at most, by MAFNET_SIMD"),
        ("avx-2", "; MAFNET_SIMD=avx-2 is ignored, it is "),
    ],
)
def test_lowered_vectors(wish: str, said: str) -> None:
    (line,) = re.findall("CPU vectors.*", run_doctor(PACKAGE.parent, MAFNET_SIMD=wish).stdout)
    assert said in line
