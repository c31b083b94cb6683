"""Runs the project's CUDA kernels on the CPU; README.md has the whole picture.

kernels = emulate("flow_warp", checked=True)
report = kernels.run("flow_warp_forward", input=..., flow=..., output=..., interpolation=0, ...)
report.raise_if_any()
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import CSRC, HERE, Library, build, remove_unused, why_not
from torch import Tensor

ORDERS = ("forward", "reverse", "random")
SHARED_LIMIT_SM90 = 227 << 10
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


@dataclass(frozen=True)
class Finding:
    """Something a kernel may not do: its kind, such as "race", and who did it where."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Report:
    """What a launch returned and what was found."""

    status: int
    findings: tuple[Finding, ...]
    launches: int = 0

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def raise_if_any(self) -> None:
        """AssertionError with every finding unless the launch was clean."""
        lines = [str(finding) for finding in self.findings]
        assert self.status == 0 and not lines, "\n".join([f"status {self.status}", *lines])


def as_array(value: Tensor | np.ndarray) -> np.ndarray:
    """The same memory as numpy sees it; bfloat16 as uint16."""
    if isinstance(value, np.ndarray):
        return value
    tensor = value.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Kernels:
    """The entries of one binding, in one build."""

    def __init__(self, path: Path) -> None:
        name = f"{path.parent.name}.kernels"  # pybind11 keeps one module per full name
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        self._module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(self._module)
        self.entries: tuple[str, ...] = tuple(self._module.entries())
        self.checked: bool = self._module.is_checked
        self.timeout = 60.0  # seconds of CPU for one call
        self.failing_launch: int | None = None  # which launch of a call fails
        self.mutant: int | None = None  # what the kernels lose, where they have switches
        self.last = Report(0, ())

    def run(
        self,
        entry: str,
        /,
        *,
        order: str = "forward",
        seed: int = 0,
        timeout: float | None = None,
        shared_limit: int = SHARED_LIMIT_SM90,
        **arguments: Tensor | np.ndarray | float,
    ) -> Report:
        """Calls an entry of the binding with named arrays and numbers; an argument of None is left out.

        Arrays that the binding declares out or in_out are changed in place; an out is poison (NaN, -1)
        where the kernel does not write it. Threads run in `order`: forward, reverse, or random by `seed`.
        """
        arrays = {
            k: as_array(v) for k, v in arguments.items() if isinstance(v, (Tensor, np.ndarray))
        }
        numbers = {k: float(v) for k, v in arguments.items() if isinstance(v, (int, float))}
        self._module.configure(
            order=order,
            seed=seed,
            timeout=timeout or self.timeout,
            shared_limit=shared_limit,
            failing_launch=-1 if self.failing_launch is None else self.failing_launch,
            mutant=-1 if self.mutant is None else self.mutant,
        )
        status, findings, launches = self._module.run(entry, arrays, numbers)
        self.last = Report(status, tuple(Finding(*finding) for finding in findings), launches)
        return self.last

    def take_seen(self) -> frozenset[int]:
        """The mutants that, since the last time, would have made something else happen somewhere."""
        return frozenset(self._module.take_seen())

    def check_failing_launches(self, call: Callable[[], object]) -> None:
        """A call of one entry ends with the launch that fails, and says so; each of them in turn."""
        for number in itertools.count():
            self.failing_launch = number
            try:
                with contextlib.suppress(AssertionError):  # of the results
                    call()
            finally:
                self.failing_launch = None
            if self.last.launches <= number:
                return
            assert self.last.launches == number + 1, "launches go on after one that fails"
            assert self.last.status == LAUNCH_FAILURE


Check = Callable[[Kernels], None]


def op_library(op: str, checked: bool, csrc: Path = CSRC) -> Library:
    """All CUDA sources of an op, with bindings/<op>.cpp."""
    kernels = tuple(sorted((csrc / op).glob("*.cu")))
    return Library(kernels, checked, (HERE / "bindings" / f"{op}.cpp",), csrc=csrc)


def kernel_library(name: str, checked: bool) -> Library:
    """kernels/<name>.cu, a kernel of these tests that holds its own binding."""
    return Library((HERE / "kernels" / f"{name}.cu",), checked)


@functools.cache
def load(library: Library) -> Kernels:
    """Builds and loads a library, once per process."""
    remove_unused()
    return Kernels(build([library])[0])


def emulate(op: str, *, checked: bool = False) -> Kernels:
    """The CUDA kernels of an op of csrc/ as they stand. Compiled on first use."""
    return load(op_library(op, checked))


needs_emulator = pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}")
