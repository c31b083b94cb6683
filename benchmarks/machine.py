"""Facts that every result carries: what ran, on what, and how fast that can copy and multiply."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timing
import torch

import mafnet_ops
from mafnet_ops import _library

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "mafnet_ops", "tests", "benchmarks")


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def source_digest() -> str:
    """Of every source file: names what ran where there is no git, and with changes that are not committed."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".toml"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def version_of(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def nvidia_smi(*fields: str) -> dict[str, str]:
    """A query only: nothing is ever set."""
    line = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = line.splitlines()[0].split(", ") if line else []
    return dict(zip(fields, values))


def clocks() -> dict[str, str]:
    return nvidia_smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def environment(device: str) -> dict[str, Any]:
    nvcc = output_of("nvcc", "--version").splitlines()
    facts: dict[str, Any] = {
        "version": mafnet_ops.__version__,
        "commit": commit(),
        "sources": source_digest(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "nvcc": nvcc[-1] if nvcc else None,
        "driver": None,
        "backends": {op: _library.backend(op, device).name for op in sorted(_library.op_names())},
    }
    if device == "cuda":
        facts["driver"] = nvidia_smi("driver_version").get("driver_version")
        facts["clocks_before"] = clocks()
    return facts


def _seconds(device: str, function: Callable[[], object]) -> float:
    functions = {"": function}
    if device == "cuda":
        return timing.cold_times(functions)[""].median
    return timing.cpu_times(functions, rounds=5)[""].least


def copy_rate(device: str, size: int | None = None) -> float:
    """Bytes per second, read and written, of the fastest way to copy: what no kernel gets past."""
    size = size or (1 << 30 if device == "cuda" else 64 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _seconds(device, lambda: target.copy_(source))


def multiply_rate(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, float]:
    """Operations per second of a large matrix product of random numbers, per dtype; TF32 stays off."""
    n = 8192 if device == "cuda" else 768
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = product) -> None:
            torch.mm(a, b, out=out)

        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / _seconds(device, multiply)
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    facts = environment(device)
    facts["copy_bytes_per_s"] = copy_rate(device)
    facts["multiply_flops_per_s"] = multiply_rate(device, (torch.float32, torch.bfloat16))
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
