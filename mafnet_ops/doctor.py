"""What each op runs on here, why, and what to do about it: ``python -m mafnet_ops.doctor``."""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass

import torch

from . import _library
from ._version import __version__

SIMD_LEVELS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")  # as csrc/common/cpu_simd.cpp

# `python -m` finds this module imported by its package already, and would say so.
warnings.filterwarnings("ignore", message=r".*mafnet_ops\.doctor.* found in sys\.modules")


@dataclass(frozen=True)
class OpReport:
    """What runs one op on one kind of device: ``native``, ``triton`` or ``pytorch``."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The facts that decide which backend is used.

    Attributes:
        facts: name and value of versions, devices and compilers, as printed.
        ops: one entry per op and device type.
        advice: lines to act on, each with its exact command; empty where nothing is amiss.
    """

    facts: tuple[tuple[str, str], ...]
    ops: tuple[OpReport, ...]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        wide = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{wide}}  {value}" for name, value in self.facts]
        op_wide = max((len(entry.op) for entry in self.ops), default=0)
        lines += [
            "",
            *(f"{e.op:<{op_wide}}  {e.device:<4}  {e.backend:<7}  {e.reason}" for e in self.ops),
        ]
        if self.advice:
            lines += ["", *self.advice]
        return "\n".join(lines)


def doctor() -> Report:
    """Collect what decides the backends; ``print`` the result for people. Starts no CUDA context."""
    ops = [_op_report(op, device) for op in _public_ops() for device in ("cpu", "cuda")]
    return Report(facts=_facts(), ops=tuple(ops), advice=tuple(_advice()))


def _public_ops() -> list[str]:
    package = sys.modules[__package__]
    functions = [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]
    return [name for name in functions if name != "doctor"]


def _op_report(op: str, device: str) -> OpReport:
    registered = _library.op_of(op)
    if registered is not None:
        backend = _library.backend(registered, device)
    else:
        backend = _library.Backend("pytorch", "this op has no kernel of its own")
    return OpReport(op, device, backend.name, backend.reason)


def _facts() -> tuple[tuple[str, str], ...]:
    return (
        ("mafnet_ops", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__} ({torch.get_num_threads()} threads)"),
        ("torch CUDA", torch.version.cuda or "none: a build for the CPU"),
        ("CUDA device", _cuda_device()),
        ("CPU vectors", _vectors()),
        ("_C", _library.LOAD_ERRORS["cpu"] or "loaded"),
        ("_C_cuda", _library.LOAD_ERRORS["cuda"] or "loaded"),
        ("C++ compiler", _first_line("g++", "c++", "clang++")),
        ("nvcc", _last_line("nvcc")),
    )


def _vectors() -> str:
    """What the CPU has, and whether MAFNET_SIMD takes some of it away."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    products = [name for name in ("avx512_bf16", "amx_bf16") if known.get(name)]
    text = ", ".join([torch.backends.cpu.get_cpu_capability(), *products])
    wish = os.environ.get("MAFNET_SIMD")
    if wish is None:
        return text
    if wish not in SIMD_LEVELS:
        return f"{text}; MAFNET_SIMD={wish} is ignored, it is none of {', '.join(SIMD_LEVELS)}"
    return f"{text}; {wish} at most, by MAFNET_SIMD"


def _cuda_device() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _version_lines(program: str) -> list[str]:
    path = shutil.which(program)
    if path is None:
        return []
    result = subprocess.run([path, "--version"], capture_output=True, text=True)
    return result.stdout.strip().splitlines()


def _first_line(*programs: str) -> str:
    found = (lines[0] for lines in map(_version_lines, programs) if lines)
    return next(found, "none")


def _last_line(program: str) -> str:
    lines = _version_lines(program)
    return lines[-1] if lines else "none"


def _advice() -> list[str]:
    """One line per thing that can be mended, in the order to mend them."""
    if _library.disabled():
        return [
            "MAFNET_DISABLE_EXT=1 forces the PyTorch code. To use the kernels: unset MAFNET_DISABLE_EXT"
        ]
    advice = []
    if _library.LOAD_ERRORS["cpu"] is not None:
        if _first_line("g++", "c++", "clang++") == "none":
            advice.append(
                "There is no C++ compiler. On Debian or Ubuntu: apt install g++ python3-dev"
            )
        advice.append(
            f"Build the kernels, in a checkout of the project: {_library.INSTALL_COMMAND}"
        )
    if torch.version.cuda is not None and _library.LOAD_ERRORS["cuda"] is not None:
        advice.append(
            f"Build the CUDA kernels, in a checkout of the project: MAFNET_CUDA=1 {_library.INSTALL_COMMAND}"
        )
    return advice


def main() -> int:
    """Print the report; the exit status of the command."""
    print(doctor())
    return 0


if __name__ == "__main__":
    sys.exit(main())
