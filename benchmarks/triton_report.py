"""Hold the Triton kernels to the limits in triton_bars.toml; prints a table, exits 1 where one is broken.

    python benchmarks/triton_report.py             # every case of every architecture; part of `make kernels`
    python benchmarks/triton_report.py --archs 90a --cases 'bfloat16, (16|64), 64, rows'
    python benchmarks/triton_report.py --row 'self_attention_forward_kernel<bfloat16, 16, 64, rows>'

No GPU is needed. The host code runs as on a GPU, with tensors of a real size, but instead of a launch the kernel is
compiled: blocks, warps and what Triton knows of the arguments (16-byte alignment, strides of 1) are those of a call.
Without the alignment, as a compilation from types alone has it, there would be no asynchronous copies.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kernel_report
import sass
import torch
from kernel_report import HERE, Table, check, parse_bar, propose_row, tomllib
from sass import Kernel
from torch import Tensor

from mafnet_ops import self_attention_triton as host
from mafnet_ops.self_attention_triton import Device

DEVICES = {
    "80": Device((8, 0), 108, 163 * 1024),
    "90a": Device((9, 0), 132, 227 * 1024),
    "100": Device((10, 0), 148, 227 * 1024),
}


@dataclass(frozen=True)
class Case:
    """A call of self_attention, forward and backward."""

    dtype: torch.dtype
    width_qk: int
    width_v: int
    layout: str = "rows"  # rows (N, heads, L, D), planar (N, heads, D, L) or windows of rows
    precision: str = "highest"  # of fp32 products
    height: int = 180
    width: int = 320
    archs: tuple[str, ...] = ("90a",)

    def __str__(self) -> str:
        layout = "tf32" if self.precision == "high" else self.layout
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, {self.width_qk}, {self.width_v}, {layout}"

    def tensors(self) -> list[Tensor]:
        """Query, key, value, grad_out."""
        tokens = self.height * self.width
        widths = (self.width_qk, self.width_qk, self.width_v, self.width_v)
        if self.layout == "planar":
            shapes = [(1, 1, d, tokens) for d in widths]
            return [torch.empty(s, dtype=self.dtype).transpose(2, 3) for s in shapes]
        return [torch.empty((1, 1, tokens, d), dtype=self.dtype) for d in widths]

    def call(self) -> None:
        window = [32, self.height, self.width] if self.layout == "windows" else []
        query, key, value, grad_out = self.tensors()
        torch.set_float32_matmul_precision(self.precision)
        out, lse = host.forward(query, key, value, 1.0, window)
        host.backward(grad_out, query, key, value, out, lse, 1.0, window, False)
        if host.use_atomics(self.width_qk, False):
            host.backward(grad_out, query, key, value, out, lse, 1.0, window, True)


BF16, FP32 = torch.bfloat16, torch.float32
# Two widths on every architecture, what else there is on one: a compilation takes seconds.
CASES = (
    Case(BF16, 16, 64, archs=tuple(DEVICES)),
    Case(BF16, 64, 64, archs=tuple(DEVICES)),
    Case(BF16, 8, 64, "planar"),
    Case(BF16, 16, 64, "windows"),
    Case(BF16, 128, 128),
    Case(BF16, 256, 256),
    Case(torch.float16, 16, 64),
    Case(BF16, 16, 64, "small", height=64, width=64),  # keys in parts
    Case(FP32, 16, 64),
    Case(FP32, 64, 64),
    Case(FP32, 64, 64, precision="high"),
)


class NoDriver:
    """What Triton asks of a driver to compile."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(arch.rstrip("a")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_case(case: Case, arch: str) -> Iterator[Kernel]:
    """The kernels that a call launches on an architecture."""
    from triton.runtime.driver import driver

    driver.set_active(NoDriver(arch))
    compiled: dict[str, Any] = {}

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        atomic = ", atomic" if options.get("ATOMIC") else ""
        name = f"{kernel.__name__}<{case}{atomic}>"
        compiled[name] = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options)

    host.launch = compile_only
    host.device_of = lambda tensor: DEVICES[arch]
    host._check = lambda *arguments: None  # no CUDA tensors here
    case.call()
    for name, binary in compiled.items():
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / f"kernel.sm_{arch}.cubin"
            cubin.write_bytes(binary.asm["cubin"])
            (kernel,) = sass.read_cached(cubin, kernel_report.CACHE)
        yield replace(kernel, name=name, nvcc=triton_version(), shared=binary.metadata.shared)


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def read_table(path: Path) -> Table:
    data = tomllib.loads(path.read_text())
    bars = (parse_bar(row, data["archs"], data["defaults"]) for row in data["bar"])
    return Table(data["triton"], tuple(data["archs"]), (), tuple(bars), "Triton")


def narrowed(table: Table, archs: list[str], kernels: list[Kernel]) -> Table:
    """The part of the table for some architectures and the kernels of some cases."""
    bars = []
    for bar in table.bars:
        limits = {arch: limit for arch, limit in bar.limits.items() if arch in archs}
        bar = replace(bar, limits=limits)
        if any(bar.matches(kernel) for kernel in kernels):
            bars.append(bar)
    return replace(table, archs=tuple(archs), bars=tuple(bars))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--cases", metavar="REGEX", default="", help="only these cases")
    parser.add_argument("--bars", type=Path, default=HERE / "triton_bars.toml")
    parser.add_argument("--row", metavar="REGEX", help="print a row for these kernels as they are")
    parser.add_argument("--brief", action="store_true", help="only what is wrong")
    a = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(kernel_report.CACHE.parent / "triton"))
    chosen = [case for case in CASES if re.search(a.cases, str(case))]
    calls = [(case, arch) for arch in a.archs for case in chosen if arch in case.archs]
    kernels = [kernel for case, arch in calls for kernel in compile_case(case, arch)]
    if a.row:
        names = sorted({k.name for k in kernels if re.fullmatch(a.row, k.name)})
        print("\n\n".join(propose_row(kernels, name, "pipelined") for name in names))
        return 0
    table = read_table(a.bars)
    if a.cases or a.archs != list(DEVICES):
        table = narrowed(table, a.archs, kernels)
    return kernel_report.show(check(kernels, [], table), a.brief)


if __name__ == "__main__":
    sys.exit(main())
