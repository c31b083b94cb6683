"""No CPU kernel touches memory beyond its arguments: each ends where a page begins that cannot be read.

In a process of its own, since a read beyond the end is a crash. It prints the case before it runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from contract import CONTRACTS

import mafnet_ops

PROGRAM = """
import ctypes, mmap, sys
import torch
from contract import CONTRACTS
from strategies import DTYPES, laid_out

libc = ctypes.CDLL(None, use_errno=True)

def at_the_end(tensor):
    '''A copy with the same strides, whose last element is followed by a page without access.'''
    size = tensor.untyped_storage().nbytes()
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, length + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ctypes.c_void_p(start + length), mmap.PAGESIZE, 0) == 0
    storage = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=length - size)
    copy = storage.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)

contract = next(c for c in CONTRACTS if c.op == sys.argv[1])
for size in ((8, 12), (5, 7), (4, 33)):  # 96 pixels are two tiles of most products
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            print(size, dtype, layout, flush=True)
            tensors = [t.contiguous() for t in contract.tensors(2, size, dtype, "cpu")]
            laid = [laid_out(t, layout) if t.dim() == 4 else t for t in tensors]
            leaves = [at_the_end(t).requires_grad_() for t in laid]
            output = contract.call(*leaves)
            grad = torch.ones_like(output)
            torch.autograd.grad(output, leaves, at_the_end(grad))
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
@pytest.mark.parametrize("op", [c.op for c in CONTRACTS])
def test_nothing_is_read_beyond_the_arguments(op: str) -> None:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(
        [str(Path(mafnet_ops.__file__).parents[1]), str(tests), str(tests / "ops")]
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, op],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("done\n"), f"after {done.stdout[-200:]}\n{done.stderr[-2000:]}"
