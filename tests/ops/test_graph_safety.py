"""No op waits for the device: what its path contains must be possible inside a CUDA graph.

CUDA refuses a synchronisation while it captures; where there is no CUDA device the sources are read instead.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sorted(
    p for p in (ROOT / "mafnet_ops").glob("*.py") if p.name not in ("doctor.py", "_library.py")
)
NATIVE = sorted((ROOT / "csrc").rglob("*.c*")) + sorted((ROOT / "csrc").rglob("*.h"))
WAITS_IN_PYTHON = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "synchronize",
    "unique",
    "masked_select",
}
SAID = {"offset_health.py": ["tolist"]}  # OffsetHealth.read, whose purpose it is
WAITS_IN_CUDA = re.compile(
    r"cuda\w*Synchronize|cudaMemcpy(?!\w*Async)|cudaMalloc\b|cudaFree\b|cudaStreamDefault|_local_scalar_dense|\.item<"
)


def waits(source: str) -> list[str]:
    """Method calls of ``source`` that read a tensor on the host, as line:name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    methods = [(c.lineno, c.func.attr) for c in calls if isinstance(c.func, ast.Attribute)]
    return [f"{line}:{name}" for line, name in methods if name in WAITS_IN_PYTHON]


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.name)
def test_python_does_not_read_tensors(path: Path) -> None:
    found = [wait.split(":")[1] for wait in waits(path.read_text())]
    assert found == SAID.get(path.name, [])


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_native_code_does_not_synchronize(path: Path) -> None:
    code = re.sub(r"//[^\n]*", "", path.read_text())
    assert not WAITS_IN_CUDA.findall(code)


def test_the_search_finds_what_it_looks_for() -> None:
    assert waits("x.max().item()\ny = x.cpu()") == ["1:item", "2:cpu"]
    assert not waits("device.type == 'cpu'")
    for bad in ("cudaStreamSynchronize(s)", "cudaDeviceSynchronize()", "cudaMemcpy(a, b, n, k)"):
        assert WAITS_IN_CUDA.search(bad)
    assert not WAITS_IN_CUDA.search("cudaMemcpyAsync(a, b, n, k, s)")
