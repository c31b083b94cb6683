"""Run every check that needs a GPU, stage by stage, and record what happened as JSON.

    benchmarks/gpu_evidence.sh                  # all stages; those that passed before are skipped
    benchmarks/gpu_evidence.sh --stage memcheck # one alone; no stage takes longer than ten minutes
    benchmarks/gpu_evidence.sh --dry-run        # on the CPU: what can run does, on small inputs

A stage that fails does not stop the others. Needs Python with torch and pytest; the network is not used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
import torch
from cases import CASES
from machine import ROOT

TAIL = 6000  # characters of output kept for each stage
TWINS = "tests/cuda_on_cpu/twins_on_device.py"  # exits 0 where the device agrees with the emulator's twins
TRITON_TESTS = (
    "tests/ops/test_self_attention_triton.py"  # compile for minutes: a stage of their own
)
GPU, CPU = "--device=cuda", "--device=cpu"


@dataclass(frozen=True)
class Stage:
    """One command with a time limit. The word `python` is this interpreter, `{results}` the folder of results."""

    name: str
    seconds: int
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()  # what stands in for it without a GPU; empty: nothing can
    needs: str = ""  # a program, or a file of the project; without it the stage is absent
    optional: bool = False  # its failure is recorded, but does not fail the whole
    # What the output must match beside an exit status of 0: skipped tests are no passed tests.
    requires: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def sanitizer(tool: str) -> Stage:
    run = ("python", "benchmarks/run.py", GPU, "--small", "--match-only")
    return Stage(
        name=tool,
        seconds=540,
        command=("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *run),
        needs="compute-sanitizer",
        requires=(
            r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards",
            r"flow_warp: native",  # else there was none of our kernels to look at
        ),
        # Each tensor its own allocation, so that a step over its end is seen.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def tests(name: str, *chosen: str, dry: str) -> Stage:
    run = ("python", "-m", "pytest", "-q", "-m", "gpu")
    return Stage(
        name=name,
        seconds=580,
        command=(*run, *chosen),
        dry=(*run, dry),
        requires=(r"\d+ passed", r"GPU tests skipped: 0\b"),
    )


def benchmark(op: str) -> Stage:
    run, file = (
        ("python", "benchmarks/run.py", op, "--output"),
        f"{{results}}/{op}--{{device}}.json",
    )
    return Stage(
        name=f"benchmark-{op}",
        seconds=580,
        command=(*run, file, GPU),
        dry=(*run, file, CPU, "--small", "--rounds=2"),
    )


STAGES = (
    Stage(
        name="environment",
        seconds=120,
        command=("python", "benchmarks/machine.py", GPU),
        dry=("python", "benchmarks/machine.py", CPU),
    ),
    Stage(
        name="build",
        seconds=580,
        command=("python", "benchmarks/gpu_build.py", GPU),
        dry=("python", "benchmarks/gpu_build.py", CPU),
    ),
    tests("tests", "tests", f"--ignore={TRITON_TESTS}", dry="tests/ops"),
    tests("tests-triton", TRITON_TESTS, dry=TRITON_TESTS),
    Stage(
        name="gradcheck",
        seconds=300,
        command=("python", "benchmarks/gradcheck.py", GPU),
        dry=("python", "benchmarks/gradcheck.py", CPU),
    ),
    Stage(name="twins", seconds=300, command=("python", TWINS), needs=TWINS),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    sanitizer("initcheck"),
    *(benchmark(op) for op in CASES),
    Stage(
        name="ncu",
        seconds=580,
        command=(
            *("ncu", "--clock-control", "none", "--launch-count", "12"),
            *("--csv", "--log-file", "{results}/ncu--{device}.csv"),
            *("--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"),
            *(
                "--section",
                "Occupancy",
                "--kernel-name",
                "regex:flow_warp|deform_conv2d|self_attention",
            ),
            *("python", "benchmarks/run.py", GPU, "--match-only"),
        ),
        needs="ncu",
        optional=True,
    ),
)


def find_needed(name: str) -> bool:
    if "/" in name:
        return (ROOT / name).exists()
    return shutil.which(name, path=search_path()) is not None


def search_path() -> str:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = (toolkit / "bin", toolkit / "extras/compute-sanitizer")
    return os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])


def without_machine_paths(text: str) -> str:
    names = ((str(ROOT), "."), (sys.prefix, "<python>"), (str(Path.home()), "~"))
    for path, name in names:
        if len(path) > 1:
            text = text.replace(path, name)
    return text


def run_command(
    command: list[str], seconds: float, extra: dict[str, str]
) -> tuple[int | None, str, float]:
    """Exit status (None: out of time), output, seconds. Children of the command end with it."""
    environment = {**os.environ, "PATH": search_path(), "PYTHONUNBUFFERED": "1", **extra}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable if word == "python" else word for word in command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        rc: int | None
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            rc = None
        output.seek(0)
        return rc, output.read(), time.monotonic() - start


def run_stage(stage: Stage, results: Path, device: str, dry: bool) -> dict[str, Any]:
    """The record of one stage."""
    record: dict[str, Any] = {
        "name": stage.name,
        "command": list(stage.command),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "rc": None,
        "output_tail": "",
    }
    if dry and not stage.dry:
        return {**record, "status": "not_run", "reason": "a dry run has no GPU"}
    if stage.needs and not find_needed(stage.needs):
        return {**record, "status": "absent", "reason": f"no {stage.needs} here"}
    places = {"results": str(results), "device": slug(device)}
    command = [word.format(**places) for word in (stage.dry if dry else stage.command)]
    rc, output, seconds = run_command(command, stage.seconds, stage.environment)
    missing = [p for p in stage.requires if not dry and not re.search(p, output)]
    if rc is None:
        status, reason = "timeout", f"longer than {stage.seconds} s"
    elif rc != 0:
        status, reason = "failed", f"exit status {rc}"
    elif missing:
        status, reason = "failed", f"the output lacks {missing[0]!r}"
    else:
        status, reason = "passed", ""
    return {
        **record,
        "command": [without_machine_paths(word) for word in command],
        "status": status,
        "reason": reason,
        "seconds": round(seconds, 1),
        "rc": rc,
        "output_tail": without_machine_paths(output)[-TAIL:],
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load_finished(path: Path, evidence: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Records of an earlier run of the same sources on the same device, by stage."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    same = all(earlier[k] == evidence[k] for k in ("schema", "dry_run")) and all(
        earlier["environment"][k] == evidence["environment"][k] for k in ("sources", "device")
    )
    return {record["name"]: record for record in earlier["stages"]} if same else {}


def run_stages(stages: tuple[Stage, ...], a: argparse.Namespace, device: str) -> dict[str, Any]:
    """Runs what is wanted and not done; writes the file after each stage, so that nothing is lost."""
    evidence: dict[str, Any] = {
        "schema": 1,
        "dry_run": a.dry_run,
        "environment": machine.environment(device),
    }
    name = evidence["environment"]["device"]
    path: Path = a.results / f"evidence--{slug(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = load_finished(path, evidence)
    for stage in stages:
        if a.stage and stage.name not in a.stage:
            continue
        if not a.force and records.get(stage.name, {}).get("status") == "passed":
            print(f"{stage.name:34} passed before", flush=True)
            continue
        print(f"{stage.name:34} ...", end="", flush=True)
        records[stage.name] = record = run_stage(stage, a.results, name, a.dry_run)
        print(f" {record['status']} {record['reason']} ({record['seconds']} s)", flush=True)
        evidence["stages"] = [records[s.name] for s in stages if s.name in records]
        path.write_text(json.dumps(evidence, indent=1) + "\n")
    evidence["stages"] = [records[s.name] for s in stages if s.name in records]
    print(f"recorded in {path}")
    return evidence


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--stage", action="append", choices=names, help="only this; may be repeated"
    )
    parser.add_argument("--force", action="store_true", help="run again what passed before")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: prove the script itself")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/VERSION")
    a = parser.parse_args()
    if not a.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run does what can be done without one")
    default = ROOT / ("build/dry-run" if a.dry_run else "benchmarks/results")
    a.results = (a.results or default / machine.mafnet_ops.__version__).resolve()
    evidence = run_stages(STAGES, a, "cpu" if a.dry_run else "cuda")
    optional = {stage.name for stage in STAGES if stage.optional}
    bad = [
        record["name"]
        for record in evidence["stages"]
        if record["status"] in ("failed", "timeout") and record["name"] not in optional
    ]
    if bad:
        print(f"failed: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
