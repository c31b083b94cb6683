"""Seeds for every test, GPU tests that are skipped out loud, and memory that starts as NaN on demand."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, and torch.compile imports it too: Triton kernels run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

# As matrix products are. cuDNN's default is TF32: a kernel could be as far off as that and still pass beside PyTorch.
torch.backends.cudnn.allow_tf32 = False

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # They share the cores. Tests of what threads do set their own number.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

_NO_GPU = "no CUDA device"
_NO_AMX = "no emulated AMX"  # tests/amx_on_cpu says why


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--poison",
        action="store_true",
        help="fill fresh tensors with NaN, so that an output that a kernel leaves out is seen",
    )


@pytest.fixture(autouse=True)
def _seeds(request: pytest.FixtureRequest) -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    poison = request.config.getoption("--poison")
    torch.use_deterministic_algorithms(poison, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_minutes, reverse=True)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


def _minutes(item: pytest.Item) -> float:
    """What a test says of its length; the longest begins first, so that no worker is left alone with it at the end."""
    slow = item.get_closest_marker("slow")
    return 0.0 if slow is None else float(slow.kwargs.get("minutes", 0.2))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts reports: the tests may have run in other processes (pytest-xdist)."""
    reports = terminalreporter.getreports("skipped")
    for what, reason in (("GPU", _NO_GPU), ("AMX", _NO_AMX)):
        skipped = sum(reason in str(report.longrepr) for report in reports)
        terminalreporter.write_line(
            f"{what} tests skipped: {skipped}" + f" ({reason})" * (skipped > 0)
        )
