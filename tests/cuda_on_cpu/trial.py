"""Tries all mutants of a library, in processes of their own: a kernel that lost a check may take its process along.

A probe is a list of checks. First they run on the kernels as they stand, which say where each mutant would have made
something else happen: a condition that was false, a barrier. Only these checks can notice it, and they are tried until
one fails, those that are done soonest first.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cuda_on_cpu.build import JOBS
from cuda_on_cpu.emulator import Check, Kernels

Probe = Callable[[], Sequence[Check]]
FEW = 3
TIMEOUT = 3.0  # seconds of CPU for a call, most of which take a hundredth of one


@functools.cache
def loaded(library: Path) -> Kernels:
    torch.set_num_threads(1)
    kernels = Kernels(library)
    kernels.timeout = TIMEOUT
    return kernels


@functools.cache
def checks_of(probe: Probe) -> Sequence[Check]:
    return probe()


@dataclass(frozen=True)
class Passed:
    """How a check went on the kernels as they stand."""

    seconds: float
    seen: frozenset[int]  # mutants


def passes(probe: Probe, library: Path, number: int) -> Passed:
    """Runs a check on the kernels as they stand, in this process; it must pass."""
    kernels = loaded(library)
    kernels.mutant = None
    kernels.take_seen()
    start = time.process_time()
    checks_of(probe)[number](kernels)
    return Passed(time.process_time() - start, kernels.take_seen())


def notices(probe: Probe, library: Path, mutant: int, order: Sequence[int]) -> bool:
    """Whether one of the checks fails on the mutant, in this process."""
    kernels = loaded(library)
    kernels.mutant = mutant
    checks = checks_of(probe)
    for number in order:
        try:
            checks[number](kernels)
        except AssertionError:
            return True
    return False


class Worker:
    """A process that is started again after its end."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Of BrokenProcessPool only the second counts: the first may be due to an earlier call."""
        if self._pool is not None:
            try:
                return self._pool.submit(function, *arguments).result()
            except BrokenProcessPool:
                self.close()
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def which_are_noticed(
    probe: Probe, library: Path, mutants: int, idle: Container[int] = ()
) -> list[bool]:
    """For each mutant whether a check fails on it or its process dies; JOBS at a time.

    Those that are said to be idle, which would pass every check, are tried on the quickest FEW alone.
    """
    own = threading.local()
    workers: list[Worker] = []

    def start() -> None:
        own.worker = Worker()
        workers.append(own.worker)

    def one(mutant: int) -> bool:
        order = [i for i in soonest_first if mutant in passed[i].seen]
        order = order[:FEW] if mutant in idle else order
        try:
            return bool(order) and own.worker.call(notices, probe, library, mutant, order)
        except BrokenProcessPool:
            return True

    try:
        with ThreadPoolExecutor(JOBS, initializer=start) as threads:
            passed: list[Passed] = list(
                threads.map(
                    lambda number: own.worker.call(passes, probe, library, number),
                    range(len(probe())),
                )
            )
            soonest_first = sorted(range(len(passed)), key=lambda i: passed[i].seconds)
            return list(threads.map(one, range(mutants)))
    finally:
        for worker in workers:
            worker.close()
