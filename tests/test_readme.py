"""The README's Python runs, its figures are the measured ones, and it names the two commands."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def quality_table() -> ModuleType:
    path = ROOT / "benchmarks" / "quality_table.py"
    spec = importlib.util.spec_from_file_location("quality_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_examples_run_and_say_the_right_shapes(index: int) -> None:
    names: dict[str, object] = {}
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), names)
    claimed = re.findall(r"(\w+) = .*#\s*(\([\d, ]+\))", BLOCKS[index])
    for name, shape in claimed:
        assert tuple(names[name].shape) == eval(shape), name  # type: ignore[attr-defined]


def test_there_are_examples_for_ops_and_network() -> None:
    assert len(BLOCKS) >= 2
    assert "from mafnet_ops import" in README and "from mafnet import MAFnet" in README
    assert "make demo" in README and "make test" in README


def test_results_are_those_that_were_measured() -> None:
    module = quality_table()
    figures = json.loads(module.FIGURES.read_text())
    assert module.insert(README, module.render(figures)) == README


def test_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
