"""Interleaved minima of process time: the one figure that repeats on a shared CPU."""

from __future__ import annotations

import time
from collections.abc import Callable


def interleaved_minima(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run every function once per round, in turn, and return each one's least process time in seconds.

    One warm-up round is not counted. Process time adds up the threads of the process.
    """
    best = dict.fromkeys(functions, float("inf"))
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_ > 0:
                best[name] = min(best[name], time.process_time() - start)
    return best
