"""The Python in README and docs runs, the README's figures are the measured ones, and it names the two commands."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mafnet_ops
from mafnet.config import from_dict, load_toml
from mafnet.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "mafnet/*/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def each_block(language: str) -> pytest.MarkDecorator:
    every = [
        pytest.param(block, id=f"{page}-{index}")
        for page in PAGES
        for index, block in enumerate(blocks(page, language))
    ]
    return pytest.mark.parametrize("block", every)


def quality_table() -> ModuleType:
    path = ROOT / "benchmarks" / "quality_table.py"
    spec = importlib.util.spec_from_file_location("quality_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_names(*libraries: str) -> AbstractContextManager[None]:
    """In the place of ``patch``, for libraries that are not there."""
    assert set(libraries) <= set(mafnet_ops.compat.LIBRARIES)
    return nullcontext()


@each_block("python")
def test_python_examples_run_and_say_the_right_shapes(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "torch.onnx" in block:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mafnet_ops.compat, "patch", check_names)
    # What stands for the reader's own in some of them.
    names: dict[str, object] = {"net": torch.nn.Conv2d(3, 3, 1), "frames": torch.rand(1, 3, 8, 8)}
    exec(compile(block, "example", "exec"), names)
    for name, shape in re.findall(r"(\w+) = .*#\s*(\([\d, ]+\))", block):
        assert tuple(names[name].shape) == eval(shape), name  # type: ignore[attr-defined]


@each_block("toml")
def test_recipes_can_be_trained(block: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(block)
    config = from_dict(TrainConfig, load_toml(tmp_path / "my.toml"), "my.toml")
    assert config.stages


def test_there_are_examples_for_ops_and_network() -> None:
    assert len(blocks(Path("README.md"), "python")) >= 2
    assert "from mafnet_ops import" in README and "from mafnet import MAFnet" in README
    assert "make demo" in README and "make test" in README


def test_results_are_those_that_were_measured() -> None:
    module = quality_table()
    figures = json.loads(module.FIGURES.read_text())
    assert module.insert(README, module.render(figures)) == README


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page.parent / target).exists(), target
