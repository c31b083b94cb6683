"""The whole network compiled: one graph for every height and width, by eager nodes and by inductor's code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from small_model import build, run
from tolerances import assert_as_accurate, assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mafnet import MAFnet

# No size that the channels or windows have, torch would tie them; multiples of the window, less and more.
SIZES = ((20, 26), (33, 25), (17, 41))
FRAMES = 2


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def net() -> MAFnet:
    """Every part, few layers of each: symbolic sizes take their time in every node."""
    return build(flow_levels=2, blocks=1, block_layers=1, lstm_at="lr")


def at_all_sizes(compiled: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames of each size and what ``compiled`` makes of them, by one graph; H and W are its symbols."""
    for size in SIZES:
        frames = torch.rand(1, FRAMES, 3, *size)
        for dim in (3, 4):
            torch._dynamo.mark_dynamic(frames, dim)
        with torch.no_grad():
            yield frames, compiled(frames)
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_one_graph_for_all_sizes(net: MAFnet) -> None:
    """Nodes run as they were traced: the same bits as without a compiler; T is a symbol too."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for frames, actual in at_all_sizes(compiled):
        assert_same(actual, run(net, frames))
    assert counter.frame_count == 1
    ops = {str(node.target) for node in counter.graphs[0].graph.nodes}
    for op in ("flow_warp", "deform_align", "self_attention", "pool_concat_conv", "spatial_gate"):
        assert any(op in name for name in ops), f"{op} is not in the graph as a kernel"


@pytest.mark.slow
def test_inductor(net: MAFnet) -> None:
    """As accurate as without a compiler. Without vectors: to choose them costs inductor minutes of symbolic algebra."""
    layers = sum(parameter.ndim > 1 for parameter in net.parameters())
    with torch._inductor.config.patch({"cpp.simdlen": 1, "fx_graph_cache": False}):
        for frames, actual in at_all_sizes(torch.compile(net, fullgraph=True)):
            exact = run(copy.deepcopy(net).double(), frames.double())
            assert_as_accurate(actual, run(net, frames), exact, terms=9 * layers)
