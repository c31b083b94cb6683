"""Clocks. On the CPU: interleaved process times. On CUDA: cold calls by events, and replays of a graph.

Every clock runs all functions in turn, several times over, so that a change of the machine's mood meets all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Function = Callable[[], object]

REPEATS = 3  # turns of each function on CUDA
SECONDS_PER_TURN = 0.1
MIN_FLUSH_BYTES = 256 << 20
CPU_BUDGET = 20.0  # seconds for one case on the CPU, after which three rounds are enough


@dataclass(frozen=True)
class Times:
    """Samples in seconds."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The sample below which a fraction ``q`` lies, interpolated."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)


def cpu_times(functions: dict[str, Function], rounds: int) -> dict[str, Times]:
    """Process time (all threads added up) of every function, once per round, in turn.

    Wall time on a shared machine swings by a factor of two; the least process time repeats. One warm-up round.
    Slow cases get fewer rounds, three at least.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.process_time()
    for round_ in range(rounds + 1):
        if round_ > 3 and time.process_time() - begin > CPU_BUDGET:
            break
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_ > 0:
                samples[name].append(time.process_time() - start)
    return {name: Times(tuple(s)) for name, s in samples.items()}


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties().L2_cache_size)


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def _event_times(function: Function, count: int, before: Function) -> list[float]:
    """Seconds of ``count`` calls, each after ``before``, which is not timed; on the current stream."""
    starts, ends = _events(count), _events(count)
    for start, end in zip(starts, ends):
        before()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends)]


def _turns(functions: dict[str, Function], before: Function) -> dict[str, Times]:
    counts = {}
    for name, function in functions.items():
        once = statistics.median(_event_times(function, 5, before)[2:])  # two to warm up
        counts[name] = max(10, min(1000, int(SECONDS_PER_TURN / max(once, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            samples[name] += _event_times(function, counts[name], before)
    return {name: Times(tuple(s)) for name, s in samples.items()}


def cold_times(functions: dict[str, Function]) -> dict[str, Times]:
    """Single calls with an L2 full of something else. Writing it keeps the GPU busy while the call is launched."""
    flush = torch.empty(max(MIN_FLUSH_BYTES, 2 * l2_bytes()), dtype=torch.int8, device="cuda")
    return _turns(functions, lambda: flush.zero_())


def input_sets(bytes_per_set: int) -> int:
    """How many copies of the inputs to rotate so that none is still in L2 when its turn comes again."""
    return min(256, max(4, -(-4 * l2_bytes() // max(bytes_per_set, 1))))


def graph_times(functions: dict[str, list[Function]], calls: int = 20) -> dict[str, Times]:
    """Time per call inside a CUDA graph, free of launches; each name has one function per set of inputs."""
    graphs = {}
    for name, rotating in functions.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up outside the default stream, as capture asks
            for function in rotating:
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(max(calls, len(rotating))):
                rotating[i % len(rotating)]()
        graphs[name] = graph
    timed = _turns({name: graph.replay for name, graph in graphs.items()}, lambda: None)
    return {
        name: Times(tuple(s / max(calls, len(functions[name])) for s in times.samples))
        for name, times in timed.items()
    }
