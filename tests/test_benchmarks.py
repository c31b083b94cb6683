"""The benchmarks themselves: the gate, the clocks, the files they write, and the script for GPU owners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_evidence
import pytest
import run
import timing
import torch
from cases import CASES, Case, Implementation, Suite, flow_warp_cases
from gpu_evidence import Stage, load_finished, run_stage
from match import Gate
from test_packaging import ROOT
from timing import Times, cold_times, cpu_times, graph_times
from torch import Tensor

SCHEMAS = {
    name: json.loads((ROOT / f"benchmarks/{name}.schema.json").read_text())
    for name in ("results", "evidence")
}


def errors(document: object, schema: str) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.validators.validator_for(SCHEMAS[schema])(SCHEMAS[schema])
    return [error.message for error in validator.iter_errors(document)]


def run_benchmarks(
    monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str
) -> tuple[int, dict[str, Any]]:
    """The exit status of run.py on small inputs, and what it wrote."""
    threads = torch.get_num_threads()
    command = ["run.py", "--small", "--rounds=1", f"--output={output}", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    try:
        return run.main(), json.loads(output.read_text())
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def small_case() -> Case:
    return next(flow_warp_cases(Suite(small=True)))


# ------------------------------------------------------------------------------------- rows and schema


def test_a_small_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.backends.cudnn.allow_tf32 = True
    status, result = run_benchmarks(monkeypatch, tmp_path / "rows.json")
    assert not torch.backends.cudnn.allow_tf32  # what rivals run on, too
    assert status == 0
    assert errors(result, "results") == []
    rows = result["rows"]
    ours = [row for row in rows if row["impl"] == "mafnet_ops"]
    assert {row["op"] for row in ours} == set(CASES)
    for row in ours:
        assert row["matches"] and row["mode"] == "cpu" and row["n"] == 1
        assert row["ratio"] and row["frac_floor"] > 0
        assert (
            row["floor_us"] * 1e-6
            >= 0.99 * row["bytes_min"] / result["ceilings"]["copy_bytes_per_s"]
        )
    passes = {(row["op"], row["pass"]) for row in ours}
    assert len(passes) == 2 * len(CASES)


def test_the_schema_refuses_what_it_must(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, result = run_benchmarks(monkeypatch, tmp_path / "rows.json", "flow_warp")
    row = result["rows"][0]
    for change in ({"matches": False}, {"mode": "warm"}, {"n": -1}, {"bytes_min": 0}, {"speed": 1}):
        assert errors({**result, "rows": [{**row, **change}]}, "results") != [], change
    lacking = {k: v for k, v in row.items() if k != "rel_err"}
    assert errors({**result, "rows": [lacking]}, "results") != []
    environment = {k: v for k, v in result["environment"].items() if k != "commit"}
    assert errors({**result, "environment": environment}, "results") != []


def test_bytes_and_floor_of_a_case(small_case: Case) -> None:
    """Image and flow are read, the output is written; backward: three times the inputs, twice the output."""
    pixels = 12 * 17
    output = small_case.inputs[0]
    image, flow = 4 * 64 * pixels, 4 * 2 * pixels
    assert run.least_bytes(small_case, output, "forward") == 2 * image + flow
    assert run.least_bytes(small_case, output, "forward+backward") == 5 * image + 3 * flow


def test_published_results_follow_the_schema() -> None:
    """Every number in the repository: none without its commit, its device and its match."""
    for path in sorted((ROOT / "benchmarks/results").rglob("*.json")):
        schema = "evidence" if path.name.startswith("evidence--") else "results"
        document = json.loads(path.read_text())
        assert errors(document, schema) == [], path
        assert schema == "results" or not document["dry_run"], path


# --------------------------------------------------------------------------------------------- the gate


def wrong_value(image: Tensor, flow: Tensor) -> Tensor:
    return ours(image, flow) * (1 + 1e-5)


def wrong_gradient(image: Tensor, flow: Tensor) -> Tensor:
    return ours(image, flow.detach() + 0.999 * (flow - flow.detach()))


def not_a_number(image: Tensor, flow: Tensor) -> Tensor:
    out = ours(image, flow).clone()
    out.view(-1)[5] = float("nan")
    return out


def ours(image: Tensor, flow: Tensor) -> Tensor:
    import mafnet_ops

    out = mafnet_ops.flow_warp(image, flow)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize(
    ("planted", "passes"),
    [
        (wrong_value, {"forward", "forward+backward"}),
        (wrong_gradient, {"forward+backward"}),
        (not_a_number, {"forward", "forward+backward"}),
    ],
)
def test_what_does_not_match_is_not_timed_and_fails_the_run(
    planted: Any,
    passes: set[str],
    small_case: Case,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def planted_cases(suite: Suite) -> Iterator[Case]:
        rivals = small_case.implementations[1:]
        ours = Implementation("mafnet_ops", planted)
        yield replace(small_case, implementations=(ours, *rivals))

    monkeypatch.setattr(run, "CASES", {"flow_warp": planted_cases})
    status, result = run_benchmarks(monkeypatch, tmp_path / "rows.json")
    assert status == 1
    wrong = [row for row in result["rows"] if not row["matches"]]
    assert {row["pass"] for row in wrong} == passes
    assert all(row["impl"] == "mafnet_ops" and row["median_us"] is None for row in wrong)
    assert errors(result, "results") == []


def test_a_rival_that_computes_something_else_is_recorded_and_not_timed(
    small_case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cases(suite: Suite) -> Iterator[Case]:
        rival = Implementation("copy", lambda image, flow: image + 0 * flow.sum())
        yield replace(small_case, implementations=(small_case.implementations[0], rival))

    monkeypatch.setattr(run, "CASES", {"flow_warp": cases})
    status, result = run_benchmarks(monkeypatch, tmp_path / "rows.json")
    assert status == 0
    assert [row["n"] for row in result["rows"] if row["impl"] == "copy"] == [0, 0]


def test_half_precision_passes_the_gate_by_its_own_rounding_only() -> None:
    cases = list(flow_warp_cases(Suite(small=True)))
    low = next(case for case in cases if case.dtype == "bfloat16")
    gate = Gate(low, "cpu")
    assert gate.check(low.implementations[0], "forward+backward", ours=True).ok
    shifted = Implementation("off by one bit", lambda x, f: ours(x, f) * 1.0156)
    assert not gate.check(shifted, "forward", ours=True).ok


# ------------------------------------------------------------------------------------------- the clocks


def test_quantiles() -> None:
    times = Times((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (times.least, times.median, times.quantile(0.1)) == (1.0, 3.0, pytest.approx(1.4))
    assert Times((7.0,)).quantile(0.9) == 7.0


def test_the_cpu_clock_takes_turns() -> None:
    calls: list[str] = []
    times = cpu_times({n: lambda n=n: calls.append(n) for n in ("a", "b")}, rounds=3)  # type: ignore[misc]
    assert calls == ["a", "b"] * 4  # the first round warms up
    assert len(times["a"].samples) == 3


def test_slow_cases_get_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])

    def slow() -> None:
        now[0] += 10

    assert cpu_times({"slow": slow}, rounds=7)["slow"].samples == (10.0, 10.0, 10.0)


class FakeGpu:
    """Stands for the stream: flushes and calls advance its time, events read it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def spend(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.log.append(name)

    def event(self) -> Any:
        gpu = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: Any) -> float:
                return float(1e3 * (other.at - self.at))

        return Event()


def test_the_event_clock_times_calls_and_not_what_comes_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(timing, "_events", lambda n: [gpu.event() for _ in range(n)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    functions = {"a": lambda: gpu.spend("a", 0.01), "b": lambda: gpu.spend("b", 0.05)}
    times = timing._turns(functions, before=lambda: gpu.spend("flush", 1.0))
    assert times["a"].median == pytest.approx(0.01) and times["b"].median == pytest.approx(0.05)
    assert gpu.log[0::2] == ["flush"] * (len(gpu.log) // 2)
    turns = "".join(name for name in gpu.log if name != "flush")[10:]  # after the estimates
    assert turns == ("a" * 10 + "b" * 10) * timing.REPEATS


def test_rotating_inputs_are_more_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda: 60 << 20)
    assert timing.input_sets(8 << 20) * (8 << 20) >= 4 * (60 << 20)
    assert timing.input_sets(1 << 30) == 4
    assert timing.input_sets(1) == 256


@pytest.mark.gpu
def test_cuda_clocks_on_a_copy() -> None:
    """A copy of 256 MB takes as long by both clocks, and no less than any GPU's memory allows."""
    source = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    cold = cold_times({"copy": copy})["copy"].median
    graph = graph_times({"copy": [copy] * 4})["copy"].median
    assert 0.5 < cold / graph < 2
    assert 2 * source.numel() / graph < 20e12


# ------------------------------------------------------------------------------------------- evidence


def evidence(*arguments: str, results: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu_evidence.sh", f"--results={results}", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run_of_the_evidence(tmp_path: Path) -> None:
    done = evidence("--dry-run", results=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("evidence--*.json")
    document = json.loads(path.read_text())
    assert errors(document, "evidence") == []
    assert document["dry_run"] is True
    status = {stage["name"]: stage["status"] for stage in document["stages"]}
    assert list(status) == [stage.name for stage in gpu_evidence.STAGES]
    assert status == {s.name: "passed" if s.dry else "not_run" for s in gpu_evidence.STAGES}
    assert str(ROOT) not in path.read_text() and sys.prefix not in path.read_text()
    for op in CASES:
        (rows,) = tmp_path.glob(f"{op}--*.json")
        assert errors(json.loads(rows.read_text()), "results") == []
    again = evidence("--dry-run", "--stage=tests", "--stage=gradcheck", results=tmp_path)
    assert again.stdout.count("passed before") == 2
    assert json.loads(path.read_text()) == document


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_only_a_dry_run_goes(tmp_path: Path) -> None:
    done = evidence(results=tmp_path)
    assert done.returncode == 2 and "no CUDA device; --dry-run" in done.stderr


def python_stage(code: str, **fields: Any) -> Stage:
    return Stage(**{"name": "s", "seconds": 30, "command": ("python", "-c", code), **fields})


@pytest.mark.parametrize(
    ("stage", "status", "reason"),
    [
        (python_stage("print('3 passed')", requires=("3 passed",)), "passed", ""),
        (python_stage("import sys; print('x'); sys.exit(4)"), "failed", "exit status 4"),
        (
            python_stage("print('3 skipped')", requires=(r"\d+ passed",)),
            "failed",
            r"the output lacks '\\d+ passed'",
        ),
        (python_stage("import time; time.sleep(60)", seconds=1), "timeout", "longer than 1 s"),
        (python_stage("", needs="no-such-program"), "absent", "no no-such-program here"),
        (
            python_stage("", needs="tests/no_such_file.py"),
            "absent",
            "no tests/no_such_file.py here",
        ),
    ],
)
def test_status_of_a_stage(stage: Stage, status: str, reason: str, tmp_path: Path) -> None:
    record = run_stage(stage, tmp_path, "gpu", dry=False)
    assert (record["status"], record["reason"]) == (status, reason)
    assert record["seconds"] < 20


def test_no_stage_takes_longer_than_ten_minutes() -> None:
    assert all(stage.seconds < 600 for stage in gpu_evidence.STAGES)


def test_a_time_out_ends_the_children_too(tmp_path: Path) -> None:
    left = tmp_path / "still_here"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(left)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_stage(python_stage(parent, seconds=1), tmp_path, "", False)["status"] == "timeout"
    import time

    time.sleep(3)
    assert not left.exists()


def test_only_the_same_sources_on_the_same_device_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    mine = {"schema": 1, "dry_run": False, "environment": {"sources": "1", "device": "gpu"}}
    path.write_text(json.dumps({**mine, "stages": [{"name": "tests", "status": "passed"}]}))
    assert set(load_finished(path, mine)) == {"tests"}
    for key, value in (("sources", "2"), ("device", "other gpu")):
        environment = {**mine["environment"], key: value}  # type: ignore[dict-item]
        assert load_finished(path, {**mine, "environment": environment}) == {}
    assert load_finished(path, {**mine, "dry_run": True}) == {}
    assert load_finished(tmp_path / "none.json", mine) == {}
