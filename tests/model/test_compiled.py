"""The whole network compiled: one graph for every height and width, by eager nodes and by inductor's code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_model import build, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mafnet import MAFnet

# No size that the channels or windows have, torch would tie them; multiples of the window, less and more.
SIZES = ((20, 26), (33, 25), (17, 41))
FRAMES = 2


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def clip(height: int, width: int) -> Tensor:
    return torch.rand(1, FRAMES, 3, height, width)


def small() -> MAFnet:
    """Every part, few layers of each: symbolic sizes take their time in every node."""
    return build(flow_levels=2, blocks=1, block_layers=1, lstm_at="lr")


def assert_one_graph(net: MAFnet, backend: str, rtol: float, atol: float) -> None:
    """``net`` compiled by ``backend`` without a graph break, once for all sizes, as accurate as ``net``."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        frames = clip(*size)
        with torch.no_grad():
            actual = compiled(frames)
        torch.testing.assert_close(actual, run(net, frames), rtol=rtol, atol=atol)
        assert counter.frame_count == 1
    ops = {str(node.target) for node in counter.graphs[0].graph.nodes}
    for op in ("flow_warp", "deform_align", "self_attention", "pool_concat_conv", "spatial_gate"):
        assert any(op in name for name in ops), f"{op} is not in the graph as a kernel"


@pytest.mark.slow
def test_one_graph_for_all_sizes() -> None:
    """Nodes run as they were traced: the same bits as without a compiler."""
    assert_one_graph(small(), "eager", rtol=0, atol=0)
