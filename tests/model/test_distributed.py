"""The network under DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import build
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

CLIPS = 2


def _frames() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(CLIPS, 2, 3, 12, 9, generator=generator, dtype=torch.float64)


def _train(rank: int, folder: str) -> None:
    """One backward on one clip; the first process keeps the gradients."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=CLIPS
    )
    net = DistributedDataParallel(build().double())
    net(_frames()[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        grads = {name: p.grad for name, p in net.module.named_parameters()}
        torch.save(grads, f"{folder}/gradients.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_the_mean_over_processes(tmp_path: Path) -> None:
    """Two processes with a clip each, and one with both: every parameter takes part, none waits."""
    multiprocessing.spawn(_train, (str(tmp_path),), nprocs=CLIPS)
    actual = torch.load(tmp_path / "gradients.pt")
    net = build().double()
    net(_frames()).square().mean().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, grad in expected.items():
        assert grad is not None and actual[name] is not None, name
        torch.testing.assert_close(actual[name], grad, rtol=1e-9, atol=1e-12 * largest, msg=name)
