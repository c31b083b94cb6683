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


class _Deformable(nn.Module):
    """In the place of a 3x3 convolution: offsets and mask from a head, as in detectors with DCNv2."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        import torchvision

        sizes = plain.in_channels, plain.out_channels
        stride = plain.stride[0]
        self.layer = torchvision.ops.DeformConv2d(*sizes, 3, stride, padding=1, bias=False)
        self.head = nn.Conv2d(plain.in_channels, 27, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.head(x).split([18, 9], 1)
        out: Tensor = self.layer(x, offset, mask.sigmoid())
        return out


def _detector() -> tuple[nn.Module, Tensor]:
    """RetinaNet's backbone and pyramid of features on a ResNet-18 whose last two stages are deformable."""
    from torchvision.models import resnet18
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    body = resnet18().eval()
    for stage in (body.layer3, body.layer4):
        for block in stage:
            block.conv1, block.conv2 = _Deformable(block.conv1), _Deformable(block.conv2)
    net = _resnet_fpn_extractor(body, trainable_layers=5)
    return _Last(net), torch.rand(1, 3, 256, 320)


class _Last(nn.Module):
    """The finest map of a pyramid of features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        finest: Tensor = self.net(x)["0"]
        return finest


CASES: dict[str, tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "torchvision DeformConv2d, 64 channels, 96x160": ("torchvision", _convolution),
    "torchvision ResNet-18 FPN, 4 deformable blocks, 256x320": ("torchvision", _detector),
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
