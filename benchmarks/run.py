"""Time the ops beside what people use now, each only after it matched fp64 in the same run."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from cases import CASES, Case, Implementation
from timing import interleaved_minima
from torch import Tensor


def relative_error(implementation: Implementation, case: Case) -> float:
    with torch.no_grad():
        exact = case.definition(*(t.double() for t in case.inputs))
        out = implementation(*case.inputs).double()
    return float((out - exact).norm() / exact.norm())


def passes(implementation: Implementation, case: Case) -> dict[str, Callable[[], object]]:
    """The forward alone, and forward with backward, as closures to time."""
    grad = torch.ones_like(implementation(*case.inputs))

    def forward() -> None:
        with torch.no_grad():
            implementation(*case.inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(implementation(*case.inputs), case.inputs, grad)

    return {"forward": forward, "forward+backward": both}


def measure(case: Case, rounds: int) -> list[dict[str, object]]:
    errors = {name: relative_error(f, case) for name, f in case.implementations.items()}
    timed = {n: f for n, f in case.implementations.items() if errors[n] <= case.tolerance}
    rows: list[dict[str, object]] = []
    for pass_ in ("forward", "forward+backward"):
        times = interleaved_minima({n: passes(f, case)[pass_] for n, f in timed.items()}, rounds)
        for name, error in errors.items():
            row = {"op": case.op, "case": case.name, "pass": pass_, "implementation": name}
            row |= {"relative_error": error, "matches": name in timed}
            if name in timed:
                row["cpu_ms"] = round(1e3 * times[name], 3)
                if "mafnet_ops" in timed:
                    row["ours_faster_by"] = round(times[name] / times["mafnet_ops"], 2)
            rows.append(row)
    return rows


def environment(threads: int) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return {
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the rows there as JSON")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows: list[dict[str, object]] = []
    for op in a.ops or CASES:
        if op not in CASES:
            parser.error(f"no cases for {op!r}; ops: {', '.join(CASES)}")
        for case in CASES[op]():
            for row in measure(case, a.rounds):
                rows.append(row)
                time_ = f"{row['cpu_ms']:10.2f} ms" if row["matches"] else "  NO MATCH   "
                print(
                    f"{row['op']:24} {row['case']:28} {row['pass']:17} {row['implementation']:14} "
                    f"{time_} {row.get('ours_faster_by', ''):>7} error {row['relative_error']:.1e}",
                    flush=True,
                )
    if a.output:
        a.output.write_text(
            json.dumps({"environment": environment(a.threads), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
