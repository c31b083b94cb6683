"""What only a GPU can show of the ops: streams, a second device, addresses, and more elements than 32 bits count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import CONTRACTS, Contract, run
from strategies import laid_out
from tolerances import assert_same
from torch import Tensor

from mafnet_ops import flow_warp, modulated_deform_conv2d

pytestmark = pytest.mark.gpu

SIZE = (19, 33)
ops = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.op)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Equal bits can be asked for; the fixture of all tests resets it."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def gigabytes_free(count: int) -> None:
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < count << 30:
        pytest.skip(f"less than {count} GiB of free memory")


@ops
def test_on_the_current_stream(contract: Contract) -> None:
    """The arguments arrive late on a side stream: a kernel on any other would read zeros."""
    tensors = contract.tensors(2, SIZE, torch.float32, "cuda")
    expected = run(contract.call, tensors)
    late = [torch.zeros_like(t) for t in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # clocks: a twentieth of a second
        for target, source in zip(late, tensors):
            target.copy_(source)
        results = run(contract.call, late)
    torch.cuda.current_stream().wait_stream(side)
    for actual, e in zip(results, expected):
        assert_same(actual, e)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_another_device_than_the_current(contract: Contract, dtype: torch.dtype) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    tensors = contract.tensors(2, SIZE, dtype, "cuda:1")
    results = run(contract.call, tensors)
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        for actual, e in zip(results, run(contract.call, tensors)):
            assert actual.device.index == 1
            assert_same(actual, e)


@ops
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_at_addresses_that_no_vector_may_begin_at(
    contract: Contract, layout: str, dtype: torch.dtype
) -> None:
    """A GPU refuses 16 bytes at an address that is no multiple of 16."""
    tensors = contract.tensors(2, SIZE, dtype, "cuda")
    tensors = [laid_out(t, layout) if t.dim() == 4 else t for t in tensors]
    moved = []
    for t in tensors:
        buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")
        moved.append(buffer.as_strided(t.shape, t.stride(), 1).copy_(t))
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = run(contract.call, [t.to(wide) for t in tensors])
    for actual, a, e in zip(run(contract.call, moved), run(contract.call, tensors), exact):
        aligned_error = float((a - e).abs().amax())
        rounding = 16 * torch.finfo(dtype).eps * float(e.abs().amax())
        assert float((actual - e).abs().amax()) <= 2 * aligned_error + rounding


@layouts
def test_warping_more_elements_than_32_bits_count(layout: str) -> None:
    """A flow of whole pixels is an exact shift, at the end of the tensors too, and so is its gradient."""
    gigabytes_free(40)
    side, far = 16_400, slice(-40, None)
    image = torch.empty(1, 8, side, side, dtype=torch.float16, device="cuda")
    image = image.to(memory_format=torch.channels_last) if layout == "channels_last" else image
    image = image.uniform_().requires_grad_()
    assert image.numel() > 2**31
    flow = torch.zeros(1, side, side, 2, device="cuda")
    flow -= torch.tensor([3.0, 2.0], device="cuda")
    warped = flow_warp(image, flow)
    assert_same(warped[..., far, far], image[..., -42:-2, -43:-3])
    torch.use_deterministic_algorithms(False)  # whose sort would take 30 GiB more
    (grad,) = torch.autograd.grad(warped, image, image.detach())
    assert_same(grad[..., -42:-2, -43:-3], image[..., far, far])


@pytest.mark.parametrize("side", [8190, 8200], ids=["tensor cores", "too large for them"])
def test_convolving_more_elements_than_31_bits_count(side: int) -> None:
    """Regular positions: a convolution. The smaller image has 2^32 bytes less a few, the most of tensor cores."""
    gigabytes_free(24)
    memory = torch.empty(1, side, side, 32, dtype=torch.float16, device="cuda").uniform_(-1, 1)
    image = memory.permute(0, 3, 1, 2)
    weight = torch.empty(8, 32, 3, 3, dtype=torch.float16, device="cuda").uniform_(-1, 1)
    offset = torch.zeros(1, 1, side, side, dtype=torch.float16, device="cuda").expand(1, 18, -1, -1)
    result = modulated_deform_conv2d(image, offset, None, weight, padding=1)
    corner = image[..., -41:, -41:]
    expected = F.conv2d(corner.double(), weight.double(), padding=1)[..., 1:, 1:]
    actual: Tensor = result[..., -40:, -40:].double()
    terms = F.conv2d(corner.double().abs(), weight.double().abs(), padding=1)[..., 1:, 1:]
    assert ((actual - expected).abs() <= torch.finfo(torch.float16).eps * terms).all()
