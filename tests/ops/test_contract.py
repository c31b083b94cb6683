"""The contract that all ops keep, heading by heading; ``docs/support.md`` is generated from this file.

Values against independent definitions are the business of each op's own tests. Here PyTorch in the same dtype is
the measure, and what every op must do alike: dtypes, layouts, edges, derivatives, transforms, determinism,
compilation, errors.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from contract import CONTRACTS, Contract, run
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, dtypes, laid_out, random_strides, sizes, strided
from support_matrix import DOCS_PAGE, feature, render
from tolerances import assert_as_accurate, assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mafnet_ops

SIZE = (5, 6)
ops = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.op)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _skip_refused(contract: Contract, feature: str) -> None:
    """Skip what the row of the op says that it does not do."""
    reason = contract.refuses.get(feature)
    if reason is not None:
        pytest.skip(reason)


def assert_accurate(contract: Contract, tensors: list[Tensor], actual: list[Tensor]) -> None:
    """Output and gradients as close to fp64 as those of PyTorch in the same dtypes."""
    tensors = [t.detach().contiguous() for t in tensors]
    exact = run(contract.baseline, [t.double() for t in tensors])
    baseline = run(contract.baseline, tensors)
    if contract.roundings > 1 and actual[0].dtype == torch.float64:
        baseline = [e + d for e, d in zip(exact, _errors_in_fp64(contract, tensors))]
    elif contract.kinks:
        baseline = _worst_of_neighbours(contract, tensors, baseline, exact)
    pixels = tensors[0].shape[0] * tensors[0].shape[2] * tensors[0].shape[3]
    for i, (a, b, e) in enumerate(zip(actual, baseline, exact)):
        what = "output" if i == 0 else f"gradient of argument {i - 1}"
        terms = contract.terms if i == 0 else contract.terms * max(pixels, 1)
        if a.dtype == torch.float64:
            # Both are rounded: two walks. Of one op, PyTorch's result stands for the exact one.
            assert_as_accurate(a, b if contract.roundings > 1 else e, e, what, 4 * terms)
        else:
            assert_as_accurate(a, b.to(a.dtype), e, what, terms, contract.roundings)


def _worst_of_neighbours(
    contract: Contract, tensors: list[Tensor], baseline: list[Tensor], exact: list[Tensor]
) -> list[Tensor]:
    """PyTorch's results with the largest errors, from these tensors and 16 neighbours, one rounding away.

    A gradient jumps where a rounding turns the sign before a leaky ReLU. With all maps in bf16 PyTorch's own error at
    one point says little: it allowed a tenth of what is usual beside it, and 6 % of all sizes had such a gradient.
    """

    def error(result: Tensor, truth: Tensor) -> float:
        return float((result - truth).abs().nan_to_num().amax()) if truth.numel() else 0.0

    def moved(t: Tensor) -> Tensor:
        signs = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2.0 - 1.0
        return (t.double() * (1 + signs * torch.finfo(t.dtype).eps)).to(t.dtype)

    generator = torch.Generator().manual_seed(0)
    worst = baseline
    for _ in range(16):
        results = run(contract.baseline, [moved(t) for t in tensors])
        worst = [
            max(w, r, key=lambda x, e=e: error(x, e)) for w, r, e in zip(worst, results, exact)
        ]
    return worst


def _errors_in_fp64(contract: Contract, tensors: list[Tensor]) -> list[Tensor]:
    """PyTorch's largest errors in fp64, of a network whose gradients cancel: those in fp32, by the ratio of the eps."""
    rounded = [t.float() for t in tensors]
    exact = run(contract.baseline, [t.double() for t in rounded])
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    pairs = zip(run(contract.baseline, rounded), exact)
    return [(single - e).abs().amax() * ratio if e.numel() else e for single, e in pairs]


# ------------------------------------------------------------------------------------ dtypes, layouts


@feature("forward and backward in {dtype}")
@ops
@devices
@each_dtype
def test_dtypes(contract: Contract, device: str, dtype: torch.dtype) -> None:
    tensors = contract.tensors(2, SIZE, dtype, device)
    actual = run(contract.call, tensors)
    assert [a.dtype for a in actual] == [dtype, *(t.dtype for t in tensors)]
    assert_accurate(contract, tensors, actual)


@feature("autocast to {dtype}")
@ops
@devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(contract: Contract, device: str, dtype: torch.dtype) -> None:
    """Features in the low dtype, coordinates in fp32: as good as calling it in these dtypes."""
    low = contract.tensors(2, SIZE, dtype, device)
    with torch.autocast(device, dtype):
        actual = contract.call(*low)
    assert actual.dtype == dtype
    assert_accurate(contract, low, [actual])


@feature("contiguous, channels_last and sliced arguments")
@ops
@devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(contract: Contract, device: str, layout: str) -> None:
    tensors = contract.tensors(2, SIZE, torch.float32, device)
    arranged = [laid_out(t, layout) if t.dim() == 4 else t for t in tensors]
    actual = run(contract.call, arranged)
    assert_accurate(contract, tensors, actual)
    if layout == "channels_last" and contract.op != "self_attention":
        assert actual[0].is_contiguous(memory_format=torch.channels_last)


@feature("any strides, any H and W")
@ops
@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=sizes(), batch=st.integers(1, 2), dtype=dtypes())
def test_random_shapes_strides_and_dtypes(
    contract: Contract, data: st.DataObject, size: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    tensors = contract.tensors(batch, size, dtype, "cpu")
    arranged = [strided(t, data.draw(random_strides())) for t in tensors]
    assert_accurate(contract, tensors, run(contract.call, arranged))


# ----------------------------------------------------------------------------------------------- edges


@feature("batch of 0")
@ops
@devices
def test_empty_batch(contract: Contract, device: str) -> None:
    tensors = contract.tensors(0, SIZE, torch.float32, device)
    output, *grads = run(contract.call, tensors)
    assert output.shape == contract.baseline(*tensors).shape
    for i, (grad, tensor) in enumerate(zip(grads, tensors)):
        assert grad.shape == tensor.shape
        if i not in contract.batched:
            assert_same(grad, torch.zeros_like(tensor))


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory is NaN, as long as deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@feature("every output written (fresh memory filled with NaN)")
@ops
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_is_written(
    contract: Contract, dtype: torch.dtype, layout: str, poison: None
) -> None:
    assert torch.empty(9).isnan().all()
    tensors = contract.tensors(2, SIZE, dtype, "cpu")
    arranged = [laid_out(t, layout) if t.dim() == 4 else t for t in tensors]
    for result in run(contract.call, arranged):
        assert result.isfinite().all()


# ------------------------------------------------------------------------------------------ derivatives


def any_order(device: str) -> dict[str, Any]:
    """Atomics on CUDA add in no fixed order, so that gradients may differ in their last bits from run to run."""
    return {"nondet_tol": 1e-10 if device == "cuda" else 0.0}


@feature("gradcheck, forward mode and vmap of the backward too")
@ops
@devices
def test_gradcheck(contract: Contract, device: str) -> None:
    tensors = contract.tensors(1, (2, 3), torch.float64, device)
    leaves = [t.requires_grad_() for t in tensors]
    options = {"check_forward_ad": True, "check_batched_grad": True, **any_order(device)}
    assert gradcheck(contract.call, leaves, fast_mode=True, **options)


@feature("an output changed in place, as by an inplace ReLU")
@ops
def test_output_changed_in_place(contract: Contract) -> None:
    """Backward does not read it."""
    _skip_refused(contract, "an output changed in place, as by an inplace ReLU")
    tensors = contract.tensors(1, (2, 3), torch.float64, "cpu")
    expected = run(lambda *t: contract.call(*t) * 2, tensors)
    for a, e in zip(run(lambda *t: contract.call(*t).mul_(2), tensors), expected):
        assert_same(a, e)


@feature("gradgradcheck")
@ops
@devices
def test_gradgradcheck(contract: Contract, device: str) -> None:
    tensors = contract.tensors(1, (2, 3), torch.float64, device)
    leaves = [t.requires_grad_() for t in tensors]
    assert gradgradcheck(contract.call, leaves, fast_mode=True, **any_order(device))


@feature("torch.func: grad, vjp, jacrev, jvp")
@ops
@each_dtype
def test_torch_func(contract: Contract, dtype: torch.dtype) -> None:
    tensors = contract.tensors(1, (2, 3), dtype, "cpu")
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = contract.call(*leaves)
    grad = (torch.arange(output.numel()) % 3 - 1).view(output.shape).to(dtype)
    expected = torch.autograd.grad(output, leaves, grad)
    value, vjp = torch.func.vjp(contract.call, *tensors)  # type: ignore[misc]
    assert_same(value, output)
    for a, e in zip(vjp(grad), expected):
        assert_same(a, e)
    if dtype != torch.float64:
        return
    (jacobian,) = torch.func.jacrev(contract.call, (0,))(*tensors)
    by_jacobian = (jacobian * grad.reshape(*grad.shape, 1, 1, 1, 1)).sum((0, 1, 2, 3))
    torch.testing.assert_close(by_jacobian, expected[0])
    tangents = tuple(torch.ones_like(t) for t in tensors)
    primal, tangent = torch.func.jvp(contract.call, tuple(tensors), tangents)  # type: ignore[misc]
    assert_same(primal, output)
    # <grad, J t> = <J^T grad, t>
    torch.testing.assert_close((grad * tangent).sum(), sum(e.sum() for e in expected))


@feature("torch.vmap")
@ops
def test_vmap(contract: Contract) -> None:
    several = [contract.make(2, SIZE) for _ in range(3)]
    several = [[t + 0.01 * k for t in tensors] for k, tensors in enumerate(several)]
    stacked = [torch.stack(column) for column in zip(*several)]
    batched = torch.vmap(contract.call)(*stacked)
    for one, tensors in zip(batched, several):
        torch.testing.assert_close(one, contract.call(*tensors))


# ----------------------------------------------------------------------------------------- determinism


@feature("the same bits for any number of threads")
@ops
@each_dtype
def test_threads(contract: Contract, dtype: torch.dtype) -> None:
    tensors = contract.tensors(2, (19, 33), dtype, "cpu")
    _skip_refused(contract, "the same bits for any number of threads")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(contract.call, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same(a, b)


@feature("torch.use_deterministic_algorithms")
@pytest.mark.gpu
@ops
@each_dtype
def test_deterministic_on_cuda(contract: Contract, dtype: torch.dtype, poison: None) -> None:
    tensors = contract.tensors(2, (19, 33), dtype, "cuda")
    for a, b in zip(*(run(contract.call, tensors) for _ in range(2))):
        assert_same(a, b)


# ---------------------------------------------------------------------------------- torch's machinery


@feature("CUDA graph capture, forward and backward")
@pytest.mark.gpu
@ops
def test_cuda_graph(contract: Contract) -> None:
    """A replay reads what lies in the captured tensors then."""
    tensors = contract.tensors(2, SIZE, torch.float32, "cuda")
    expected = run(contract.call, [t + 0.01 for t in tensors])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # torch asks for warm-up on a side stream
        run(contract.call, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(contract.call, tensors)
    for tensor in tensors:
        tensor += 0.01
    graph.replay()
    for a, e in zip(results, expected):
        torch.testing.assert_close(a, e)


@feature("opcheck of every raw op")
@ops
@devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(contract: Contract, device: str, dtype: torch.dtype) -> None:
    if mafnet_ops._library.backend(contract.op, device).name != "native":
        pytest.skip(f"{contract.op} has no native kernel on {device}")
    tensors = contract.tensors(2, SIZE, dtype, device)
    for name, arguments in contract.raw.items():
        op = getattr(torch.ops.mafnet_ops, name).default
        torch.library.opcheck(op, arguments(tensors))


@feature("torch.compile: one graph, dynamic shapes")
@ops
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(contract: Contract, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(contract.call, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for size in ((10, 7), (9, 5), (13, 11)):  # no size that the channels have, torch would tie them
        tensors = contract.tensors(2, size, torch.float32, "cpu")
        for a, b in zip(run(compiled, tensors), run(contract.call, tensors)):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "a new size was compiled again"


@feature("torch.export")
@ops
def test_export(contract: Contract) -> None:
    class Net(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return contract.call(*tensors)

    tensors = tuple(contract.tensors(2, SIZE, torch.float32, "cpu"))
    program = torch.export.export(Net(), tensors)
    torch.testing.assert_close(program.module()(*tensors), contract.call(*tensors))


@feature("activation checkpointing")
@ops
def test_checkpoint(contract: Contract) -> None:
    """Computed again in the backward, from one thread of autograd's: the same bits."""
    tensors = contract.tensors(2, SIZE, torch.float32, "cpu")

    def checkpointed(*leaves: Tensor) -> Tensor:
        output: Tensor = checkpoint(contract.call, *leaves, use_reentrant=False)
        return output

    for a, b in zip(run(checkpointed, tensors), run(contract.call, tensors)):
        assert_same(a, b)


@feature("torch.autograd.detect_anomaly")
@ops
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode(contract: Contract) -> None:
    tensors = contract.tensors(2, SIZE, torch.float32, "cpu")
    expected = run(contract.call, tensors)
    with torch.autograd.detect_anomaly():
        for a, b in zip(run(contract.call, tensors), expected):
            assert_same(a, b)


@feature("called from several threads at once")
@ops
def test_concurrent_calls(contract: Contract) -> None:
    """Each thread has its own tensors and gets what it would get alone."""
    several = [[t + k for t in contract.tensors(2, SIZE, torch.float32, "cpu")] for k in range(4)]
    expected = [run(contract.call, tensors) for tensors in several]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for results, e in zip(pool.map(lambda t: run(contract.call, t), several), expected):
                for a, b in zip(results, e):
                    assert_same(a, b)


@feature("counted by torch's FLOP counter")
@ops
def test_flops(contract: Contract) -> None:
    with FlopCounterMode(display=False) as counter:
        contract.call(*contract.tensors(2, SIZE, torch.float32, "cpu"))
    assert counter.get_total_flops() > 0


# ---------------------------------------------------------------------------------------------- errors


def _wrong(contract: Contract) -> Iterator[tuple[str, list[Any], type[Exception]]]:
    """Every argument made wrong in every way, one at a time."""
    tensors = contract.tensors(2, SIZE, torch.float32, "cpu")
    for i, tensor in enumerate(tensors):
        for what, value, kind in (
            ("no tensor", "text", TypeError),
            ("integer dtype", tensor.long(), TypeError),
            ("complex dtype", tensor.to(torch.complex64), TypeError),
            ("dimensions", tensor.unsqueeze(0), ValueError),
            ("device", tensor.to("meta"), ValueError),
            ("layout", tensor.to_sparse(), ValueError),
        ):
            yield f"argument {i}, {what}", [*tensors[:i], value, *tensors[i + 1 :]], kind


@feature("one clear error for each wrong argument")
@ops
@pytest.mark.parametrize("autocast", [False, True])
def test_errors(contract: Contract, autocast: bool) -> None:
    """Op, argument, what was expected, what came; autocast makes no floating point of what is none."""
    message = re.compile(rf"{contract.op}: [a-z0-9_\[\]]+: expected .+, got .+", re.DOTALL)
    for what, arguments, kind in _wrong(contract):
        with torch.autocast("cpu", torch.bfloat16, autocast), pytest.raises(kind) as caught:
            contract.call(*arguments)
        assert message.fullmatch(str(caught.value)), f"{what}: {caught.value}"


@pytest.mark.parametrize("wrong", ["text", [1], {}], ids=str)
@pytest.mark.parametrize(
    ("op", "argument"),
    [
        ("flow_warp", "interpolation"),
        ("deform_align", "max_residue_magnitude"),
        ("self_attention", "scale"),
        ("self_attention", "window"),
        ("pyramid_spatial_attention", "negative_slope"),
    ],
)
def test_errors_of_options(op: str, argument: str, wrong: object) -> None:
    contract = next(c for c in CONTRACTS if c.op == op)
    tensors: list[Any] = contract.tensors(1, SIZE, torch.float32, "cpu")
    if op == "pyramid_spatial_attention":
        tensors = [tensors[0], tensors[1:9], tensors[9:]]
    with pytest.raises((TypeError, ValueError), match=f"^{op}: {argument}: expected .*, got "):
        getattr(mafnet_ops, op)(*tensors, **{argument: wrong})


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (mafnet_ops.ModulatedDeformConv2d, "groups"),
        (mafnet_ops.ModulatedDeformConv2d, "in_channels"),
        (mafnet_ops.ModulatedDeformConv2d, "out_channels"),
        (mafnet_ops.DeformAlign, "kernel_size"),
        (mafnet_ops.DeformAlign, "parts"),
        (mafnet_ops.SecondOrderDeformAlign, "deform_groups"),
        (mafnet_ops.ModulatedDeformConv2dPack, "deform_groups"),
        (mafnet_ops.SelfAttention, "channels"),
        (mafnet_ops.SelfAttention, "window"),
        (mafnet_ops.SelfAttention, "reduction"),
        (mafnet_ops.NonLocalBlock, "channels"),
        (mafnet_ops.NonLocalBlock, "inter_channels"),
        (mafnet_ops.ChannelAttention, "channels"),
        (mafnet_ops.ChannelAttention, "reduction"),
        (mafnet_ops.ChannelAttention, "kernel"),
        (mafnet_ops.PyramidSpatialAttention, "channels"),
        (mafnet_ops.TemporalSpatialAttention, "channels"),
    ],
)
@pytest.mark.parametrize("size", [0, 1.5, "8"])
def test_errors_of_a_module(module: Callable[..., object], name: str, size: object) -> None:
    deformable = "in_channels" in inspect.signature(module).parameters
    sizes = {"in_channels": 4, "out_channels": 4} if deformable else {"channels": 4}
    with pytest.raises(ValueError, match=rf"^\w+: {name}: expected .*, got '?{size}'?$"):
        module(**{**sizes, name: size})


@pytest.mark.parametrize(
    "module",
    [
        mafnet_ops.ModulatedDeformConv2d(4, 6, (3, 1), 2, groups=2),
        mafnet_ops.DeformAlign(4, 6, max_residue_magnitude=3.0),
        mafnet_ops.SelfAttention(8, window=4),
        mafnet_ops.PyramidSpatialAttention(4, mask_from="feature"),
        mafnet_ops.ChannelAttention(4, 2, 3),
    ],
    ids=lambda m: type(m).__name__,
)
def test_modules_copy_and_pickle(module: torch.nn.Module) -> None:
    """With their options; a copy shares no parameter."""
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(same) == repr(module)
        options = [k for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))]
        assert {k: vars(same)[k] for k in options} == {k: vars(module)[k] for k in options}
        for (name, a), (other, b) in zip(same.named_parameters(), module.named_parameters()):
            assert name == other and a.data_ptr() != b.data_ptr()
            assert_same(a, b)


def test_every_op_is_in_the_contract() -> None:
    assert {c.op for c in CONTRACTS} == set(mafnet_ops._library.op_names())


def test_docs_page_is_generated() -> None:
    assert DOCS_PAGE.read_text() == render(), "run: python tests/ops/support_matrix.py"
