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

_GPU_SKIPPED = pytest.StashKey[int]()


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[_GPU_SKIPPED] = 0
    if torch.cuda.is_available():
        return
    config.stash[_GPU_SKIPPED] = len(gpu_items)
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    return _gpu_line(config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.write_line(_gpu_line(config))


def _gpu_line(config: pytest.Config) -> str:
    skipped = config.stash.get(_GPU_SKIPPED, 0)
    return f"GPU tests skipped: {skipped}" + (" (no CUDA device)" if skipped else "")
