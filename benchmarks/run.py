"""Time the ops beside what people use now, each only after it matched float64 in the same run.

python benchmarks/run.py                         # the CPU, one thread
python benchmarks/run.py --device cuda --output results.json
python benchmarks/run.py --small --match-only    # the gate alone, on tiny inputs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch
from cases import CASES, DTYPES, Case, Implementation, Suite
from match import PASSES, Gate, gradient_for
from timing import Function, Times, cold_times, cpu_times, graph_times, input_sets
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One implementation in one pass under one clock; the schema of results.schema.json. Times are microseconds."""

    op: str
    impl: str
    pass_: str
    shape: str
    dtype: str
    layout: str
    distribution: str
    mode: str  # cpu, cold, graph; none where nothing was timed
    matches: bool
    rel_err: float | None  # None: not a number
    allowed_err: float
    bytes_min: int
    flops: int
    median_us: float | None = None
    min_us: float | None = None
    p10: float | None = None
    p90: float | None = None
    n: int = 0
    floor_us: float | None = None
    floor_kind: str | None = None
    frac_floor: float | None = None
    ratio: dict[str, float] | None = None  # ours: each rival's time over it
    peak_mem_mb: float | None = None
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"pass" if k == "pass_" else k: v for k, v in fields.items()}


@dataclass(frozen=True)
class Ceilings:
    """Measured in this run; what no implementation can go below."""

    copy_bytes_per_s: float
    multiply_flops_per_s: dict[str, float]

    def floor(self, row: Row) -> tuple[float, str]:
        """Microseconds, and what they are spent on."""
        copying = row.bytes_min / self.copy_bytes_per_s
        multiplying = row.flops / self.multiply_flops_per_s[row.dtype]
        return (
            (copying * 1e6, "copy") if copying >= multiplying else (multiplying * 1e6, "multiply")
        )


def least_bytes(case: Case, output: Tensor, pass_: str) -> int:
    """Every input is read and every result written once; backward reads the inputs again, and one gradient."""
    read = sum(t.numel() * t.element_size() for t in case.inputs)
    written = output.numel() * output.element_size()
    return read + written if pass_ == "forward" else 3 * read + 2 * written


def timed_function(
    implementation: Implementation, inputs: tuple[Tensor, ...], pass_: str
) -> Function:
    """One call as a closure; what ``prepare`` makes is there before the clock starts."""
    with torch.no_grad():
        prepared = tuple(t.detach() for t in implementation.prepare(*inputs))
    if pass_ == "forward":

        def forward() -> None:
            with torch.no_grad():
                implementation.call(*prepared)

        return forward
    leaves = tuple(t.requires_grad_() for t in prepared)
    gradient = gradient_for(implementation.call(*leaves), inputs[0].dtype)
    return lambda: torch.autograd.grad(implementation.call(*leaves), leaves, gradient)


def peak_megabytes(function: Function) -> float:
    """Memory beyond what was there before; CUDA only."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def with_times(row: Row, times: Times, ceilings: Ceilings) -> Row:
    floor, kind = ceilings.floor(row)
    # The least time repeats on a shared CPU; on a GPU the median is what a user sees.
    seconds = times.least if row.mode == "cpu" else times.median
    return replace(
        row,
        median_us=times.median * 1e6,
        min_us=times.least * 1e6,
        p10=times.quantile(0.1) * 1e6,
        p90=times.quantile(0.9) * 1e6,
        n=len(times.samples),
        floor_us=floor,
        floor_kind=kind,
        frac_floor=floor / (seconds * 1e6) if seconds else None,
    )


def with_ratios(rows: list[Row]) -> list[Row]:
    """Adds to our row of one clock how many times longer each rival took."""

    def time_of(row: Row) -> float:
        time = row.min_us if row.mode == "cpu" else row.median_us
        assert time is not None
        return time

    timed = [row for row in rows if row.n]
    ours = timed[0] if timed and timed[0] is rows[0] else None
    if ours is None or time_of(ours) == 0:
        return rows
    ratio = {row.impl: time_of(row) / time_of(ours) for row in timed[1:]}
    return [replace(ours, ratio=ratio), *rows[1:]]


def clocks_of(
    case: Case, pass_: str, implementations: list[Implementation], device: str, rounds: int
) -> Iterator[tuple[str, dict[str, Times], str | None]]:
    """Each clock's name, its times, and why there are none."""
    single = {i.name: timed_function(i, case.inputs, pass_) for i in implementations}
    if device == "cpu":
        yield "cpu", cpu_times(single, rounds), None
        return
    yield "cold", cold_times(single), None
    size = sum(t.numel() * t.element_size() for t in case.inputs)
    sets = [
        tuple(t.detach().clone().requires_grad_() for t in case.inputs)
        for _ in range(input_sets(size))
    ]
    for implementation in implementations:
        rotating = [timed_function(implementation, inputs, pass_) for inputs in sets]
        try:
            yield "graph", graph_times({implementation.name: rotating}), None
        except RuntimeError as error:  # not every rival can be captured: say so in the row
            torch.cuda.synchronize()
            yield "graph", {}, f"{implementation.name}: no graph: {str(error).splitlines()[0]}"


def measure(case: Case, a: argparse.Namespace, ceilings: Ceilings | None) -> list[Row]:
    """The rows of one case. Without ceilings only the gate runs."""
    gate = Gate(case, "cpu" if a.small else a.device)
    rows: list[Row] = []
    for pass_ in PASSES:
        gated = []
        for i, implementation in enumerate(case.implementations):
            match = gate.check(implementation, pass_, ours=i == 0)
            gated.append(
                Row(
                    op=case.op,
                    impl=implementation.name,
                    pass_=pass_,
                    shape=case.shape,
                    dtype=case.dtype,
                    layout=case.layout,
                    distribution=case.distribution,
                    mode="none",
                    matches=match.ok,
                    rel_err=match.error if match.error == match.error else None,
                    allowed_err=match.allowed,
                    bytes_min=least_bytes(case, gate.exact[0].to(case.inputs[0].dtype), pass_),
                    flops=case.flops * (1 if pass_ == "forward" else 3),
                )
            )
        rows += time_rows(case, pass_, gated, a, ceilings) if ceilings else gated
    return rows


def time_rows(
    case: Case, pass_: str, gated: list[Row], a: argparse.Namespace, ceilings: Ceilings
) -> list[Row]:
    """The gated rows under each clock; those that do not match are kept as they are."""
    matching = [i for i, row in zip(case.implementations, gated) if row.matches]
    peaks: dict[str, float] = {}
    if a.device == "cuda":
        for i in matching:
            peaks[i.name] = peak_megabytes(timed_function(i, case.inputs, pass_))
    by_mode: dict[str, tuple[dict[str, Times], list[str]]] = {}
    for mode, times, reason in clocks_of(case, pass_, matching, a.device, a.rounds):
        found, reasons = by_mode.setdefault(mode, ({}, []))
        found.update(times)
        reasons += [reason] if reason else []
    rows = []
    for mode, (found, reasons) in by_mode.items():
        of_mode = []
        for row in gated:
            row = replace(row, mode=mode, peak_mem_mb=peaks.get(row.impl))
            notes = [r for r in reasons if r.startswith(f"{row.impl}:")]
            row = replace(row, note=notes[0] if notes else None)
            times_ = found.get(row.impl)
            of_mode.append(with_times(row, times_, ceilings) if times_ else row)
        rows += with_ratios(of_mode)
    return rows


def describe(row: Row) -> str:
    name = f"{row.op} {row.shape} {row.dtype} {row.layout}, {row.distribution}"
    head = f"{name:84} {row.pass_:16} {row.mode:5} {row.impl:20}"
    if not row.matches:
        return f"{head}  NO MATCH: error {row.rel_err}, allowed {row.allowed_err:.1e}"
    time = row.min_us if row.mode == "cpu" else row.median_us
    if time is None:
        return f"{head}  error {row.rel_err:.1e}  {row.note or ''}"
    ratio = ", ".join(f"{k} {v:.2f}x" for k, v in (row.ratio or {}).items())
    floor = f"{100 * (row.frac_floor or 0):3.0f}% of {row.floor_kind}"
    return f"{head} {time:11.1f} us {floor:>16}  error {row.rel_err:.1e}  {ratio}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="tiny inputs, truth on the CPU")
    parser.add_argument("--match-only", action="store_true", help="the gate, without clocks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="of the CPU clock")
    parser.add_argument("--output", type=Path, help="write the rows there as JSON")
    a = parser.parse_args()
    for op in a.ops:
        if op not in CASES:
            parser.error(f"no cases for {op!r}; ops: {', '.join(CASES)}")
    torch.set_num_threads(a.threads)
    # TF32 by default, unlike matrix products.
    torch.backends.cudnn.allow_tf32 = False
    environment = machine.environment(a.device)
    print(", ".join(f"{op}: {name}" for op, name in environment["backends"].items()), flush=True)
    suite = Suite(a.device, a.small)
    ceilings = None
    if not a.match_only:
        dtypes = [DTYPES[name] for name in suite.dtypes]
        ceilings = Ceilings(machine.copy_rate(a.device), machine.multiply_rate(a.device, dtypes))
    rows: list[Row] = []
    for op in a.ops or CASES:
        for case in CASES[op](suite):
            for row in measure(case, a, ceilings):
                rows.append(row)
                print(describe(row), flush=True)
    if a.device == "cuda":
        environment["clocks_after"] = machine.clocks()
    if a.output:
        result = {
            "schema": 1,
            "environment": environment,
            "ceilings": asdict(ceilings) if ceilings else None,
            "rows": [row.as_json() for row in rows],
        }
        a.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    wrong = [row for row in rows if row.impl == "mafnet_ops" and not row.matches]
    if wrong:
        print(f"{len(wrong)} rows of mafnet_ops do not match the definition")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
