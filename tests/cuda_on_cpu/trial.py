"""Runs a probe on a mutant in a process of its own: a kernel that lost a check may take its process along."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from cuda_on_cpu.build import JOBS
from cuda_on_cpu.emulator import Kernels

Probe = Callable[[Kernels], None]


def notices(probe: Probe, library: Path) -> bool:
    """Whether the probe fails on the library, in this process."""
    torch.set_num_threads(1)
    kernels = Kernels(library)
    kernels.timeout = 5.0
    try:
        probe(kernels)
    except AssertionError:
        return True
    return False


def which_are_noticed(probe: Probe, libraries: Sequence[Path]) -> list[bool]:
    """For each library, whether the probe fails on it or its process dies; JOBS at a time."""
    own = threading.local()
    pools: list[ProcessPoolExecutor] = []

    def one(library: Path) -> bool:
        if getattr(own, "pool", None) is None:
            own.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            pools.append(own.pool)
        try:
            return bool(own.pool.submit(notices, probe, library).result())
        except BrokenProcessPool:
            own.pool = None
            return True

    try:
        with ThreadPoolExecutor(JOBS) as threads:
            return list(threads.map(one, libraries))
    finally:
        for pool in pools:
            pool.shutdown()
