"""Hold every compiled CUDA kernel to the limits in kernel_bars.toml; prints a table, exits 1 where one is broken.

    make kernels                                   # compiles for all architectures, then this
    python benchmarks/kernel_report.py LIBRARY     # a library, object or cubin that is there already
    python benchmarks/kernel_report.py --row 'flow_warp_.*<float, 2>'   # a row to start from

No GPU is needed: registers, spills, shared memory and instructions are read from the machine code.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sass
from sass import METRICS, Kernel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent / "build/kernels/mafnet_ops/_C_cuda.abi3.so"
CACHE = HERE.parent / "build/kernels/figures"

OPERATORS = {"<=": operator.le, "==": operator.eq, ">=": operator.ge}
RESOURCES = ("registers", "stack", "shared", "warps")
KNOWN_METRICS = {*RESOURCES, *METRICS, *(f"loop.{metric}" for metric in METRICS)}
# What another nvcc than the table's must meet too; instruction counts are its own affair.
ANY_COMPILER = ("registers", "stack", "shared", "warps", "local")
OPTIONS = ("kernel", "archs", "threads", "dynamic_shared", "hot_loop")


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM (CUDA programming guide, table of technical specifications)."""

    warps: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that each block takes for the system


_KIB = 1024
MULTIPROCESSORS = {
    "75": Multiprocessor(32, 16, 64 * _KIB, 0),
    "80": Multiprocessor(64, 32, 164 * _KIB, _KIB),
    "86": Multiprocessor(48, 16, 100 * _KIB, _KIB),
    "89": Multiprocessor(48, 24, 100 * _KIB, _KIB),
    "90a": Multiprocessor(64, 32, 228 * _KIB, _KIB),
    "100": Multiprocessor(64, 32, 228 * _KIB, _KIB),
    "120": Multiprocessor(48, 24, 100 * _KIB, _KIB),
}
REGISTERS_PER_SM = 65536
REGISTER_UNIT = 256  # registers are given to a warp in pieces of this many
WARP_UNIT = 4  # and a block's warps are rounded up to the SM's four schedulers


def resident_warps(arch: str, registers: int, shared: int, threads: int) -> int:
    """Warps that fit on one SM at a time."""
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PER_SM // per_warp // WARP_UNIT * WARP_UNIT // warps
    by_shared = sm.shared // max(shared + sm.reserved, 1)
    return warps * min(sm.warps // warps, sm.blocks, by_registers, by_shared)


Limit = tuple[str, int]  # operator and value


@dataclass(frozen=True)
class Bar:
    """One row of the table: a kernel pattern and the limits of its metrics for each architecture."""

    kernel: str
    limits: dict[str, dict[str, Limit]]  # by architecture, then by metric
    threads: int = 0  # per block, where the kernel has no launch bounds
    dynamic_shared: int = 0
    hot_loop: str = "innermost"

    def matches(self, kernel: Kernel) -> bool:
        return kernel.arch in self.limits and re.fullmatch(self.kernel, kernel.name) is not None

    def measure(self, kernel: Kernel) -> dict[str, int]:
        """Every metric of the kernel that a limit may name."""
        shared = kernel.shared + self.dynamic_shared
        threads = self.threads or kernel.threads
        loop = kernel.hot_loop(self.hot_loop)
        return {
            "registers": kernel.registers,
            "stack": kernel.stack,
            "shared": shared,
            "warps": resident_warps(kernel.arch, kernel.registers, shared, threads or 1024),
            **{metric: kernel.mix.get(metric, 0) for metric in METRICS},
            **{f"loop.{metric}": loop.get(metric, 0) for metric in METRICS},
        }


@dataclass(frozen=True)
class Table:
    nvcc: str  # the version whose instruction counts the limits are
    archs: tuple[str, ...]
    ptx: tuple[str, ...]
    bars: tuple[Bar, ...]
    compiler: str = "nvcc"


def parse_limit(value: Any) -> Limit:
    """A number is a maximum; a string says more, as ">= 16"."""
    if isinstance(value, int):
        return "<=", value
    found = re.fullmatch(r"(<=|==|>=) (\d+)", str(value))
    if found is None:
        raise SystemExit(f"kernel bars: {value!r} is no limit; write a number, or as '<= 3'")
    return found[1], int(found[2])


def parse_bar(row: dict[str, Any], archs: list[str], defaults: dict[str, Any]) -> Bar:
    archs = row.get("archs", archs)
    limits: dict[str, dict[str, Limit]] = {arch: {} for arch in archs}
    for metric, value in {**defaults, **row}.items():
        if metric in OPTIONS:
            continue
        if metric not in KNOWN_METRICS:
            raise SystemExit(f"kernel bars: {row['kernel']}: unknown metric {metric!r}")
        per_arch = value if isinstance(value, list) else [value] * len(archs)
        if len(per_arch) != len(archs):
            raise SystemExit(f"kernel bars: {row['kernel']}: {metric} has not {len(archs)} values")
        for arch, limit in zip(archs, per_arch):
            limits[arch][metric] = parse_limit(limit)
    options = {k: row[k] for k in OPTIONS if k in row and k not in ("kernel", "archs")}
    return Bar(row["kernel"], limits, **options)


def parse_table(path: Path) -> Table:
    data = tomllib.loads(path.read_text())
    bars = (parse_bar(row, data["archs"], data.get("defaults", {})) for row in data["bar"])
    return Table(data["nvcc"], tuple(data["archs"]), tuple(data["ptx"]), tuple(bars))


@dataclass
class Report:
    """What was checked: one line of the table per kernel and architecture, and everything that is wrong."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_limits(kernel: Kernel, bar: Bar, known_compiler: bool) -> tuple[str, list[str]]:
    """The kernel's line of the table, and its broken limits."""
    measured = bar.measure(kernel)
    broken = []
    for metric, (sign, value) in bar.limits[kernel.arch].items():
        compared = known_compiler or metric in ANY_COMPILER
        if compared and not OPERATORS[sign](measured[metric], value):
            broken.append(f"{metric} {measured[metric]}, bar {sign} {value}")
    most = MULTIPROCESSORS[kernel.arch].warps
    registers = "{0[0]} {0[1]}".format(bar.limits[kernel.arch].get("registers", ("-", "")))
    slots = "{0[0]} {0[1]}".format(bar.limits[kernel.arch].get("loop.slots", ("-", "")))
    line = (
        f"{kernel.name:54} {kernel.arch:>4} {kernel.registers:4} {registers:>7} {kernel.stack:6} "
        f"{measured['shared']:7} {measured['warps']:3}/{most} {measured['slots']:6} "
        f"{measured['loop.slots']:5} {slots:>7}  {'BROKEN' if broken else 'ok'}"
    )
    return line, [f"{kernel.name} sm_{kernel.arch}: {text}" for text in broken]


def check(kernels: list[Kernel], ptx: list[str], table: Table) -> Report:
    """Compare; a kernel without exactly one bar, and a bar without a kernel, are problems too."""
    report = Report()
    built = {kernel.arch for kernel in kernels}
    report.problems += [f"no machine code for sm_{a}" for a in table.archs if a not in built]
    report.problems += [f"no PTX for compute_{a}" for a in table.ptx if a not in ptx]
    compilers = {kernel.nvcc for kernel in kernels}
    if compilers != {table.nvcc}:
        report.notes.append(
            f"{table.compiler} {', '.join(sorted(compilers))}: the bars are for {table.nvcc}, so only "
            f"{', '.join(ANY_COMPILER)} are compared"
        )
    unused = {(i, arch) for i, bar in enumerate(table.bars) for arch in bar.limits}
    for kernel in kernels:
        rows = [i for i, bar in enumerate(table.bars) if bar.matches(kernel)]
        if len(rows) != 1:
            report.problems.append(f"{kernel.name} sm_{kernel.arch}: {len(rows)} bars, not one")
            continue
        unused.discard((rows[0], kernel.arch))
        line, broken = check_limits(kernel, table.bars[rows[0]], kernel.nvcc == table.nvcc)
        report.lines.append(line)
        report.problems += broken
    for i, arch in sorted(unused):
        report.problems.append(f"bar {table.bars[i].kernel} matches no kernel on sm_{arch}")
    return report


def propose_row(kernels: list[Kernel], pattern: str, hot_loop: str = "innermost") -> str:
    """A row for kernel_bars.toml from what is measured now, with the hot loops as comments; a person judges it."""
    bar = Bar(pattern, {}, hot_loop=hot_loop)
    archs = list(MULTIPROCESSORS)
    chosen = [k for k in kernels if re.fullmatch(pattern, k.name) and k.arch in archs]
    built = [arch for arch in archs if any(k.arch == arch for k in chosen)]

    def most(metric: str) -> list[int]:
        return [max(bar.measure(k)[metric] for k in chosen if k.arch == arch) for arch in built]

    slots = "loop.slots" if any(most("loop.slots")) else "slots"
    lines = ["[[bar]]", f"kernel = '{pattern}'"]
    lines += [f"archs = {json.dumps(built)}"] if built != archs else []
    lines.append(f"registers = {[-(-value // 8) * 8 for value in most('registers')]}")
    lines += [
        f"{m} = {most(m)}" for m in ("stack", "shared", "local", "CAS", "div64") if any(most(m))
    ]
    lines.append(f'"{slots}" = {[math.ceil(value * 1.05) for value in most(slots)]}')
    lines += [f"# {k.name} sm_{k.arch}: {k.hot_loop(hot_loop) or k.mix}" for k in chosen]
    return "\n".join(lines)


HEADER = (
    f"{'kernel':54} {'arch':>4} {'regs':>4} {'bar':>7} {'stack':>6} {'smem':>7} {'warps':>6} "
    f"{'slots':>6} {'loop':>5} {'bar':>7}"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--bars", type=Path, default=HERE / "kernel_bars.toml")
    parser.add_argument("--row", metavar="REGEX", help="print a row for these kernels as they are")
    parser.add_argument("--brief", action="store_true", help="only what is wrong")
    a = parser.parse_args()
    kernels = sass.read_kernels(a.library, CACHE)
    if a.row:
        print(propose_row(kernels, a.row))
        return 0
    return show(check(kernels, sass.ptx_archs(a.library), parse_table(a.bars)), a.brief)


def show(report: Report, brief: bool) -> int:
    """Print a report; the exit status."""
    if not brief:
        print("\n".join([HEADER, *report.lines]))
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"BROKEN: {problem}")
    print(f"{len(report.lines)} kernels held to their bars, {len(report.problems)} problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
