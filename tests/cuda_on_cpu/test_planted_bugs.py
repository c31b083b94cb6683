"""Kernels with a bug planted must be caught, with the right kind of report; the correct ones must not be.

A checker that no longer checks fails here. The fast build has no instrumentation: what it must catch, by a report
or by wrong values, is listed for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu.emulator import ORDERS, Kernels, Report, kernel_library, load, needs_emulator

pytestmark = needs_emulator


@dataclass(frozen=True)
class Planted:
    """An entry and a kind of report that each build makes; "values": wrong results; None: it may pass."""

    file: str
    entry: str
    checked: str
    fast: str | None = None


PLANTED = (
    Planted("reduce", "row_sum missing barrier", "race"),
    Planted("reduce", "row_sum missing atomic", "race"),
    Planted("reduce", "row_sum mask of lanes that do not come", "warp mask", "warp mask"),
    Planted("reduce", "row_sum shuffle from outside the mask", "warp mask", "warp mask"),
    Planted("reduce", "row_sum shared write past the end", "out of bounds", "out of bounds"),
    Planted("reduce", "transpose missing warp barrier", "race", "values"),
    Planted("reduce", "transpose shared read past the end", "out of bounds", "values"),
    Planted("gemm", "gemm missing barrier after wait", "race"),
    Planted("gemm", "gemm missing barrier before refill", "race"),
    Planted("gemm", "gemm short wait", "cp.async", "values"),
    Planted("gemm", "gemm swapped fragments", "values", "values"),
    Planted("gemm", "gemm swapped accumulators", "values", "values"),
    Planted("gemm", "gemm rows not checked", "out of bounds"),
    Planted("gemm", "gemm row of the other buffer", "race", "values"),
    Planted("gemm", "gemm grid too small", "unwritten output", "values"),
    Planted("gemm", "gemm copy to misaligned address", "misaligned access", "misaligned access"),
    Planted("misuse", "uninitialised_shared", "uninitialised", "values"),
    Planted("misuse", "write_to_an_input", "write to an input"),
    Planted("misuse", "global_read_past_the_end", "out of bounds", "out of bounds"),
    Planted("misuse", "global_write_past_the_end", "out of bounds", "out of bounds"),
    Planted("misuse", "global_read_before_the_beginning", "out of bounds"),
    Planted("misuse", "misaligned_vector", "misaligned access"),
    Planted("misuse", "misaligned_atomic", "misaligned access", "misaligned access"),
    Planted("misuse", "unwritten_output", "unwritten output", "values"),
    Planted("misuse", "output_read_before_written", "uninitialised", "values"),
    Planted("misuse", "nan_to_int", "undefined behaviour"),
    Planted("misuse", "division_by_zero", "undefined behaviour", "undefined behaviour"),
    Planted("misuse", "barrier_some_have_left", "deadlock", "deadlock"),
    Planted("misuse", "barrier_in_both_branches", "divergent barrier", "divergent barrier"),
    Planted("misuse", "copy_never_waited_for", "cp.async", "cp.async"),
    Planted("misuse", "matrix_row_misaligned", "misaligned access", "misaligned access"),
    Planted("misuse", "waits_for_nobody", "timeout", "timeout"),
    Planted("misuse", "too_much_static_shared", "launch", "launch"),
    Planted("misuse", "warp_reads_another_warps_write", "race"),
    Planted("misuse", "blocks_write_the_same", "race"),
    Planted("misuse", "block_reads_what_another_writes", "race"),
    Planted("misuse", "plain_read_beside_atomics", "race"),
    Planted("misuse", "too_many_threads", "launch", "launch"),
    Planted("misuse", "too_little_scratch", "out of bounds", "out of bounds"),
    Planted("misuse", "scratch_read_before_written", "uninitialised", "values"),
)
CORRECT = (
    ("reduce", "row_sum"),
    ("reduce", "transpose"),
    ("gemm", "gemm"),
    ("misuse", "correct"),
    ("misuse", "through_scratch"),
)
BUILDS = (False, True)

builds = pytest.mark.parametrize("checked", BUILDS, ids=["fast", "checked"])


def run(kernels: Kernels, entry: str, order: str) -> tuple[Report, bool]:
    """The report, and whether the results are right."""
    rng = np.random.default_rng(0)
    name = entry.split()[0]
    if name == "row_sum":
        rows = rng.integers(-9, 9, (5, 700)).astype(np.float32)  # sums are exact in any order
        sums, total = np.zeros(5, np.float32), np.zeros(1, np.float32)
        report = kernels.run(entry, order=order, rows=rows, sums=sums, total=total)
        return report, bool((sums == rows.sum(1)).all() and total[0] == rows.sum())
    if name == "transpose":
        tiles = rng.standard_normal((3, 32, 32)).astype(np.float32)
        result = np.zeros_like(tiles)
        report = kernels.run(entry, order=order, source=tiles, target=result)
        return report, np.array_equal(result, tiles.swapaxes(1, 2))
    if name == "gemm":
        a = rng.integers(-4, 5, (100, 88)).astype(np.float16)  # products and sums are exact
        b = rng.integers(-4, 5, (88, 72)).astype(np.float16)
        c = np.zeros((100, 72), np.float32)
        report = kernels.run(entry, order=order, a=a, b=b, c=c)
        return report, np.array_equal(c, a.astype(np.float32) @ b.astype(np.float32))
    numbers, output = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    counter = np.zeros(2, np.int32)
    timeout = 0.5 if entry == "waits_for_nobody" else None
    report = kernels.run(
        entry, order=order, timeout=timeout, input=numbers, output=output, counter=counter
    )
    expected = numbers[::-1] if entry == "correct" else numbers
    return report, np.array_equal(output, expected)


@builds
@pytest.mark.parametrize(("file", "entry"), CORRECT, ids=[entry for _, entry in CORRECT])
def test_correct_kernels_are_clean_in_every_order(file: str, entry: str, checked: bool) -> None:
    kernels = load(kernel_library(file, checked))
    for order in ORDERS:
        report, right = run(kernels, entry, order)
        report.raise_if_any()
        assert right


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: p.entry)
def test_checked_build_reports(planted: Planted, order: str) -> None:
    """In any order of the threads: a race is seen even where it does no harm."""
    kernels = load(kernel_library(planted.file, True))
    report, right = run(kernels, planted.entry, order)
    if planted.checked == "values":
        assert not report.findings and not right
    else:
        assert planted.checked in report.kinds, report


@pytest.mark.parametrize("planted", [p for p in PLANTED if p.fast], ids=lambda p: p.entry)
def test_fast_build_reports(planted: Planted) -> None:
    kernels = load(kernel_library(planted.file, False))
    results = [run(kernels, planted.entry, order) for order in ORDERS]
    if planted.fast == "values":
        assert any(not right for _, right in results)
    else:
        assert all(planted.fast in report.kinds for report, _ in results), results


@builds
def test_a_launch_is_stopped_at_any_moment(checked: bool) -> None:
    """Also within the checker and the allocator, which must be whole for the next launch."""
    kernels = load(kernel_library("misuse", checked))
    for microseconds in range(1, 4000, 20):
        report = kernels.run(
            "waits_for_nobody",
            timeout=microseconds * 1e-6,
            input=np.zeros(64, np.float32),
            output=np.zeros(64, np.float32),
            counter=np.zeros(2, np.int32),
        )
        assert report.kinds == {"timeout"}


@builds
def test_every_planted_kernel_is_listed(checked: bool) -> None:
    listed = {(p.file, p.entry) for p in PLANTED} | set(CORRECT)
    for file in ("reduce", "gemm", "misuse"):
        entries = load(kernel_library(file, checked)).entries
        assert {(file, entry) for entry in entries} == {key for key in listed if key[0] == file}


def test_reports_name_kernel_line_array_and_both_threads() -> None:
    kernels = load(kernel_library("reduce", True))
    report, _ = run(kernels, "transpose missing warp barrier", "forward")
    text = next(f.text for f in report.findings if f.kind == "race")
    assert "block (0,0,0) thread (" in text and "shared 'tile' byte" in text
    assert text.count("reduce.cu:") == 2 and "read by thread 0 at" in text
    kernels = load(kernel_library("misuse", True))
    report, _ = run(kernels, "global_write_past_the_end", "forward")
    assert "past the end of 'output'" in report.findings[-1].text
    with pytest.raises(AssertionError, match="out of bounds: block"):
        report.raise_if_any()


def test_reading_between_the_elements_of_a_strided_array() -> None:
    kernels = load(kernel_library("misuse", True))
    wide = np.arange(128, dtype=np.float32)
    output, counter = np.zeros(64, np.float32), np.zeros(2, np.int32)
    report = kernels.run("correct", input=wide[::2], output=output, counter=counter)
    assert report.kinds == {"out of bounds"}
    assert "between the elements" in report.findings[0].text


def test_arguments_are_checked() -> None:
    kernels = load(kernel_library("misuse", False))
    arrays: dict[str, Any] = {"input": np.zeros(64, np.float32), "output": np.zeros(64, np.float32)}
    with pytest.raises(ValueError, match="no array 'counter' was given"):
        kernels.run("correct", **arrays)
    arrays["counter"] = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="'extra' is not one"):
        kernels.run("correct", extra=1, **arrays)
    with pytest.raises(KeyError, match="no entry 'other'"):
        kernels.run("other", **arrays)


def test_shared_memory_limit_of_an_architecture() -> None:
    kernels = load(kernel_library("misuse", False))
    arrays: dict[str, Any] = {"input": np.zeros(64, np.float32), "output": np.zeros(64, np.float32)}
    report = kernels.run("correct", shared_limit=300, counter=np.zeros(2, np.int32), **arrays)
    assert report.kinds == {"launch"} and report.status != 0
