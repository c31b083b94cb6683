"""docs/support.md from the tests of the contract: ``python tests/ops/support_matrix.py`` writes it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
DOCS_PAGE = ROOT / "docs" / "support.md"
Test = TypeVar("Test", bound=Callable[..., Any])

_ROWS: list[tuple[str, Callable[..., Any]]] = []


def feature(title: str) -> Callable[[Test], Test]:
    """Names what a test of the contract proves; ``{dtype}`` makes one row per dtype."""

    def register(test: Test) -> Test:
        _ROWS.append((title, test))
        return test

    return register


def _marks(test: Callable[..., Any]) -> list[Any]:
    return list(getattr(test, "pytestmark", []))


def _values(test: Callable[..., Any], argument: str) -> list[Any]:
    """What a test is parametrized with, each value with its own marks."""
    for mark in _marks(test):
        if mark.name == "parametrize" and mark.args[0] == argument:
            return list(mark.args[1])
    return []


def _is_gpu(parameter: Any) -> bool:
    return any(mark.name == "gpu" for mark in getattr(parameter, "marks", ()))


def _where(test: Callable[..., Any]) -> str:
    if any(mark.name == "gpu" for mark in _marks(test)):
        return "CUDA"
    return "CPU, CUDA" if any(map(_is_gpu, _values(test, "device"))) else "CPU"


def render() -> str:
    """The page: a row per feature, a column per op."""
    from contract import CONTRACTS

    lines = [
        "# Support matrix",
        "",
        "Generated from `tests/ops/test_contract.py` by `python tests/ops/support_matrix.py`; a test compares the two.",
        "`yes`: the test runs for this op on the CPU in every run of `make test`, and must pass. Where a row says",
        "CUDA, the same test is marked `gpu` and runs where there is one; `benchmarks/results/` says what has run.",
        "",
        "| | " + " | ".join(f"`{c.op}`" for c in CONTRACTS) + " | tested on |",
        "|---|" + "---|" * (len(CONTRACTS) + 1),
    ]
    for title, test in _ROWS:
        names = [str(d).removeprefix("torch.") for d in _values(test, "dtype")]
        for name in names if "{dtype}" in title else [""]:
            row = title.format(dtype=name)
            cells = [f"no: {c.refuses[row]}" if row in c.refuses else "yes" for c in CONTRACTS]
            lines.append("| " + " | ".join(itertools.chain([row], cells, [_where(test)])) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops")]
    import support_matrix  # the module that the tests register with, not __main__
    import test_contract  # noqa: F401

    DOCS_PAGE.write_text(support_matrix.render())
