"""What the deformable ops take on the CPU beyond their inputs and outputs has a bound, whatever the size of the image.

The rise of the process's largest resident set over what stays, in a process of its own with two threads. The image is
as wide as 1080p and has an eighth of its rows: what a task holds depends on the width, on channels and on kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mafnet_ops

BAR = 64e6

PROGRAM = """
import sys
import torch
import mafnet_ops

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

def backward(channels, height, width):
    image = torch.randn(1, channels, height, width)
    weight = torch.randn(channels, channels, 3, 3)
    same_size = (1,) * 6
    if sys.argv[1] == "modulated_deform_conv2d":
        offset, mask = torch.randn(1, 144, height, width), torch.rand(1, 72, height, width)
        op = torch.ops.mafnet_ops.modulated_deform_conv2d_backward
        arguments = image, image, 2 * offset, mask, weight, *same_size, *[True] * 5, False
    else:
        raw, flow = torch.randn(1, 216, height, width), 2 * torch.randn(1, height, width, 2)
        op = torch.ops.mafnet_ops.deform_align_backward
        arguments = image, image, raw, flow, None, weight, 2.0, *same_size, 1, *[True] * 6, False
    open("/proc/self/clear_refs", "w").write("5")  # the largest resident set is the present one
    before = status("VmRSS:")
    outputs = op(*arguments)
    return status("VmHWM:") - before - sum(t.numel() * t.element_size() for t in outputs)

torch.set_num_threads(2)
backward(8, 16, 16)  # threads, code
print(backward(128, 135, 1920))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc of Linux")
@pytest.mark.parametrize("op", ["modulated_deform_conv2d", "deform_align"])
def test_backward_at_1080p(op: str) -> None:
    if mafnet_ops._library.backend(op, "cpu").name != "native":
        pytest.skip("the compiled CPU kernel is not built")
    root = str(Path(mafnet_ops.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", PROGRAM, op]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    extra = int(done.stdout)
    assert 1e6 < extra <= BAR, f"{extra / 1e6:.1f} MB"
