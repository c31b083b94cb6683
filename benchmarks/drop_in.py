"""Networks of other libraries on the CPU, unpatched and patched: time and peak memory, for docs/drop_in.md.

Needs the environment of ``make test-compat``; words on the command line select the cases whose names have one of them.
Every case runs in a process of its own, one thread; times are processor time, the least of several interleaved runs;
memory is how far the peak of the process grew over that before the run.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mafnet_ops.compat import patch

REPEATS = 3


def _basicsr(arch: str) -> Any:
    """A module of BasicSR 1.4.2, which imports something that torchvision has since moved."""
    import importlib

    from torchvision.transforms import functional

    moved = ModuleType("torchvision.transforms.functional_tensor")
    moved.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules[moved.__name__] = moved
    return importlib.import_module(f"basicsr.archs.{arch}")


def _edvr() -> tuple[nn.Module, Tensor]:
    net = _basicsr("edvr_arch").EDVR(num_feat=64, num_extract_block=2, num_reconstruct_block=2)
    return net, torch.rand(1, 5, 3, 64, 96)


def _basicvsrpp() -> tuple[nn.Module, Tensor]:
    module = _basicsr("basicvsrpp_arch")
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    net = module.BasicVSRPlusPlus(32, 2)  # it leaves its alignment out where there is no CUDA
    torch.cuda.is_available = available
    return net, torch.rand(1, 4, 3, 64, 96)


def _tof() -> tuple[nn.Module, Tensor]:
    return _basicsr("tof_arch").TOFlow().eval(), torch.rand(1, 7, 3, 64, 96)


class _Convolution(nn.Module):
    """torchvision's layer alone: 64 channels, 8 groups, 3 x 3."""

    def __init__(self) -> None:
        super().__init__()
        import torchvision

        self.layer = torchvision.ops.DeformConv2d(64, 64, 3, padding=1)
        self.offset = nn.Parameter(torch.rand(1, 144, 96, 160) * 4 - 2)
        self.mask = nn.Parameter(torch.rand(1, 72, 96, 160))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, self.offset, self.mask)
        return out


def _convolution() -> tuple[nn.Module, Tensor]:
    return _Convolution(), torch.rand(1, 64, 96, 160)


CASES: dict[str, tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "torchvision DeformConv2d, 64 channels, 96x160": ("torchvision", _convolution),
    "BasicSR EDVR, 64 channels, 5 frames of 64x96": ("basicsr", _edvr),
    "BasicSR BasicVSR++, 32 channels, 4 frames of 64x96": ("basicsr", _basicvsrpp),
    "BasicSR TOFlow, 7 frames of 64x96": ("basicsr", _tof),
}


def _run(net: nn.Module, x: Tensor, training: bool) -> None:
    with nullcontext() if training else torch.no_grad():
        output = net(x)
        if training:
            output.square().mean().backward()


def _time(name: str, training: bool) -> None:
    library, make = CASES[name]
    net, x = make()
    best = [float("inf")] * 2
    for _ in range(REPEATS):
        for i in (0, 1):
            with patch(library) if i else nullcontext():
                start = time.process_time()
                _run(net, x, training)
                best[i] = min(best[i], time.process_time() - start)
    print(*best)


def _memory(name: str, training: bool, patched: bool) -> None:
    library, make = CASES[name]
    net, x = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with patch(library) if patched else nullcontext():
        _run(net, x, training)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def _child(*arguments: str) -> list[float]:
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return [float(word) for word in subprocess.check_output(command, text=True).split()]


def main() -> None:
    print("| | | time | patched | | peak memory | patched |")
    print("|---|---|---|---|---|---|---|")
    wanted = sys.argv[1:] or [""]
    for name in (n for n in CASES if any(word in n for word in wanted)):
        for kind in ("forward", "training step"):
            theirs, ours = _child("time", name, kind)
            memory = [_child("memory", name, kind, flag)[0] for flag in ("", "patched")]
            print(
                f"| {name} | {kind} | {theirs:.2f} s | {ours:.2f} s | {theirs / ours:.2f}x "
                f"| {memory[0]:.0f} MiB | {memory[1]:.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1:2] == ["time"]:
        _time(sys.argv[2], sys.argv[3] != "forward")
    elif sys.argv[1:2] == ["memory"]:
        _memory(sys.argv[2], sys.argv[3] != "forward", bool(sys.argv[4]))
    else:
        main()
