"""The network under DistributedDataParallel, the ops under fully sharded parameters."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from small_model import build
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mafnet_ops

CLIPS = 2


def _frames() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(CLIPS, 2, 3, 12, 9, generator=generator, dtype=torch.float64)


def _leave(rank: int, folder: str) -> NoReturn:
    """Ends a process once all are done, without destructors: that of gloo's process group may wait for a thread of its
    own while it holds the lock of the interpreter, which that thread wants (seen with torch 2.13, rarely)."""
    Path(folder, f"done {rank}").touch()
    while len(list(Path(folder).glob("done *"))) < CLIPS:
        time.sleep(0.01)
    os._exit(0)


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
    _leave(rank, folder)


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


class Aligned(nn.Module):
    """Every op that owns parameters, at one size."""

    def __init__(self) -> None:
        super().__init__()
        self.align = mafnet_ops.DeformAlign(4, 4, max_residue_magnitude=0.25)
        self.convolution = mafnet_ops.ModulatedDeformConv2d(4, 4, 3, padding=1)
        self.attention = mafnet_ops.SelfAttention(4, 2, window=4)
        self.pyramid = mafnet_ops.PyramidSpatialAttention(4)

    def forward(self, image: Tensor) -> Tensor:
        raw = image.repeat(1, 7, 1, 1)[:, :27]
        warped = mafnet_ops.flow_warp(image, raw[:, :2].permute(0, 2, 3, 1))
        aligned = self.align(warped, raw)
        convolved = self.convolution(aligned, raw[:, :18], raw[:, 18:].sigmoid())
        out: Tensor = self.pyramid(self.attention(convolved))
        return out


def _aligned() -> Aligned:
    torch.manual_seed(0)
    net = Aligned().double()
    nn.init.ones_(net.attention.gamma)
    return net


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(CLIPS, 4, 9, 7, generator=generator, dtype=torch.float64)


def _train_in_shards(rank: int, folder: str) -> None:
    """Two steps of SGD on one image, the parameters of every module and their gradients cut in two."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=CLIPS
    )
    net = _aligned()
    mesh = init_device_mesh("cpu", (CLIPS,))
    for part in (*net.children(), net):
        fully_shard(part, mesh=mesh)
    _step_twice(net, _images()[rank : rank + 1])
    whole = {name: value.full_tensor() for name, value in net.state_dict().items()}
    if rank == 0:
        torch.save(whole, f"{folder}/parameters.pt")
    _leave(rank, folder)


def _step_twice(net: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
def test_sharded_parameters_train_as_whole_ones(tmp_path: Path) -> None:
    """fully_shard hands the ops parameters that it gathers before a call and takes apart after it."""
    multiprocessing.spawn(_train_in_shards, (str(tmp_path),), nprocs=CLIPS)
    actual = torch.load(tmp_path / "parameters.pt")
    net, start = _aligned(), _aligned().state_dict()
    _step_twice(net, _images())
    assert actual.keys() == start.keys()
    for name, expected in net.state_dict().items():
        # What all keys share, softmax does not see.
        moved = not torch.equal(expected, start[name])
        assert moved or name == "attention.key.bias", f"{name} did not move"
        torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-12, msg=name)
