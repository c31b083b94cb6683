"""The sampler that all ops share, csrc/common/sampler.h, as a kernel runs it."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_on_cpu.emulator import Kernels, kernel_library, load, needs_emulator
from cuda_on_cpu.sampler_cases import sampler_checks

pytestmark = needs_emulator


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load(kernel_library("sampler", request.param))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_padding_and_interpolation(kernels: Kernels, dtype: type[np.floating]) -> None:
    for check in sampler_checks(dtype):
        check(kernels)
