"""What must notice the loss of any condition of csrc/common that kernels are compiled with."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from cuda_on_cpu import test_twins
from cuda_on_cpu.build import HERE, Library
from cuda_on_cpu.emulator import Check
from cuda_on_cpu.sampler_cases import sampler_checks

IDLE: dict[tuple[str, str], str] = {}


def library(csrc: Path) -> Library:
    """Small kernels around the headers: tried in those of an op, they would make all of its mutants slower."""
    kernels = tuple(HERE / "kernels" / name for name in ("sampler.cu", "twins.cu"))
    return Library(kernels, checked=True, csrc=csrc)


def probe() -> list[Check]:
    return [
        *sampler_checks(np.float32),
        test_twins.test_rounding_to_tf32,
        test_twins.test_splitting_off_the_floor,
        partial(test_twins.test_cp_async_copies_and_fills_with_zeros, valid=False),
    ]
