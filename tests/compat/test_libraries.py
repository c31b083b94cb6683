"""Networks of the real libraries, unpatched and patched: with the same weights the same outputs and gradients."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from strategies import uniform
from tolerances import assert_as_accurate
from torch import Tensor, nn

from mafnet_ops.compat import basicsr as our_basicsr
from mafnet_ops.compat import mmagic as mmagic_drop_ins
from mafnet_ops.compat import mmcv as our_mmcv
from mafnet_ops.compat import patch
from mafnet_ops.compat import torchvision as our_torchvision


def liven(net: nn.Module) -> nn.Module:
    """Offset heads start at zero and hide what the offsets do: give them weights."""
    for name, parameter in net.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.1)
    return net


def results(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter that has one, for one fixed gradient of the output."""
    net.zero_grad()
    output = net(x)
    weights = torch.arange(output.numel(), dtype=torch.float64).mul(0.618).frac().mul(2).sub(1)
    (output * weights.view(output.shape).to(output.dtype)).sum().backward()
    grads = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


def assert_patched_is_the_same(net: nn.Module, x: Tensor, library: str, terms: int) -> None:
    """In fp64 patched equals unpatched to rounding; in fp32 it is as close to that.

    ``terms``: the products that an element of a layer sums; gradients of parameters sum over the pixels of all frames
    too. In fp64 errors add up over the layers. Fp32 takes the other side of a kink now and then (a ReLU, a sample that
    crosses a pixel), in theirs as in ours, which moves all gradients below by up to 1e-2: in which layer is luck, so
    gradients are compared together, each as a share of its largest value.
    """
    wide = copy.deepcopy(net).double()
    exact, theirs = results(wide, x.double()), results(net, x)
    with patch(library):
        ours_wide, ours = results(wide, x.double()), results(net, x)
    assert ours.keys() == theirs.keys() == exact.keys()
    layers = sum(parameter.ndim > 1 for parameter in net.parameters())
    summed = terms * (x.numel() // x.shape[-3])
    for name, expected in exact.items():
        assert_as_accurate(ours_wide[name], expected, expected, name, summed * layers)

    def shares(values: dict[str, Tensor]) -> Tensor:
        gradients = [values[k] / exact[k].abs().max().to(values[k].dtype) for k in exact]
        return torch.cat([g.flatten() for g in gradients])

    assert_as_accurate(ours["output"], theirs["output"], exact["output"], "output", terms)
    assert_as_accurate(shares(ours), shares(theirs), shares(exact), "gradients", summed)
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours), "nothing was replaced"
    after = results(net, x)
    assert all(torch.equal(after[k], theirs[k]) for k in theirs), "the patch was not undone"


@pytest.fixture
def edvr(basicsr: ModuleType) -> nn.Module:
    net = basicsr.archs.edvr_arch.EDVR(
        num_feat=8, num_extract_block=1, num_reconstruct_block=1, deformable_groups=4
    )
    return liven(net)


@pytest.mark.slow
def test_edvr(edvr: nn.Module) -> None:
    assert_patched_is_the_same(edvr, torch.rand(1, 5, 3, 16, 20), "basicsr", terms=9 * 40)


@pytest.mark.slow
def test_basicvsr_plus_plus(basicsr: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its alignment is left out where there is no CUDA device, since BasicSR has no CPU kernel; patched it has one."""
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: True)
        net = liven(basicsr.archs.basicvsrpp_arch.BasicVSRPlusPlus(8, 1))
    x = torch.rand(1, 3, 3, 64, 64)  # the smallest that it takes
    assert_patched_is_the_same(net, x, "basicsr", terms=9 * 40)


@pytest.mark.slow
def test_tof_warp(basicsr: ModuleType) -> None:
    net = basicsr.archs.tof_arch.TOFlow().eval()
    assert_patched_is_the_same(net, torch.rand(1, 7, 3, 32, 32), "basicsr", terms=49 * 64)


def test_basicsr_convolutions_run_on_the_cpu(basicsr: ModuleType) -> None:
    """Unpatched they raise there."""
    x, offset, mask = uniform(2, 4, 6, 5), uniform(2, 18, 6, 5, seed=1), uniform(2, 9, 6, 5, seed=2)
    dcn = basicsr.ops.dcn
    modulated = dcn.ModulatedDeformConv(4, 6, 3, padding=1).double()
    pack, plain = (
        liven(dcn.ModulatedDeformConvPack(4, 6, 3, padding=1)).double(),
        dcn.DeformConv(4, 6, 3, padding=1).double(),
    )
    with pytest.raises(NotImplementedError):
        modulated(x, offset, mask)
    with patch("basicsr"):
        values = modulated(x, offset, mask), pack(x), plain(x, offset)
    own = our_basicsr.ModulatedDeformConvPack(4, 6, 3, padding=1).double()
    own.load_state_dict(pack.state_dict())
    torch.testing.assert_close(values[1], own(x))
    function = our_torchvision.deform_conv2d
    expected = function(x, offset, modulated.weight, modulated.bias, padding=1, mask=mask)
    torch.testing.assert_close(values[0], expected)
    torch.testing.assert_close(values[2], function(x, offset, plain.weight, padding=1))


def test_pcd_alignment(basicsr: ModuleType) -> None:
    """mmagic's is BasicSR's with other names; here with offsets that do something."""
    theirs = liven(basicsr.archs.edvr_arch.PCDAlignment(8, 4)).double()
    ours = mmagic_drop_ins.PCDAlignment(8, 4).double()
    names = {name.replace(".conv.", "."): name for name in ours.state_dict()}
    ours.load_state_dict({names[k]: v for k, v in theirs.state_dict().items()})
    levels = [[uniform(1, 8, 12 // s, 16 // s, seed=s + k) for s in (1, 2, 4)] for k in (0, 9)]
    torch.testing.assert_close(ours(*levels), theirs(*levels))


class Detector(nn.Module):
    """A stem, a deformable layer as detectors have them in a late stage, and a dense head."""

    def __init__(self, convolution: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.offset = nn.Conv2d(8, 27 * 2, 3, 2, 1)
        self.layer = convolution(8, 12, 3, stride=2, padding=1, groups=2, bias=False)
        self.head = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        offset, mask = self.offset(x).split([36, 18], 1)
        return self.head(self.layer(x, 3 * offset, mask.sigmoid()))


def test_detector(torchvision: ModuleType) -> None:
    net = liven(Detector(torchvision.ops.DeformConv2d))
    assert_patched_is_the_same(net, torch.rand(2, 3, 41, 37), "torchvision", terms=9 * 8)
    ours = Detector(our_torchvision.DeformConv2d)
    ours.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 41, 37)
    with patch("torchvision"):
        torch.testing.assert_close(ours(x), net(x), rtol=0, atol=0)


def test_mmcv(mmcv_ops: ModuleType) -> None:
    """Networks written against mmcv run where it is not compiled."""
    net = liven(mmcv_ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2))
    ours = our_mmcv.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2)
    ours.load_state_dict(net.state_dict())
    x = torch.rand(2, 4, 7, 5)
    with patch("mmcv"):
        torch.testing.assert_close(net(x), ours(x), rtol=0, atol=0)


def test_mmagic(mmagic: ModuleType) -> None:
    """Its alignments and networks under patch("mmagic"), where mmcv has no compiled part."""
    editors = "mmagic.models.editors"
    edvr = importlib.import_module(f"{editors}.edvr.edvr_net")
    plus_plus = importlib.import_module(f"{editors}.basicvsr_plusplus_net.basicvsr_plusplus_net")
    warp = importlib.import_module("mmagic.models.utils.flow_warp")

    levels = [[uniform(1, 8, 12 // s, 16 // s, seed=s + k) for s in (1, 2, 4)] for k in (0, 9)]
    flows = [uniform(1, 2, 6, 5, seed=s) * 3 for s in (2, 3)]
    states = uniform(1, 8, 6, 5), uniform(1, 12, 6, 5, seed=1), *flows
    options = {"padding": 1, "deform_groups": 2, "max_residue_magnitude": 3}
    image, flow = uniform(2, 3, 9, 7), uniform(2, 9, 7, 2, seed=1) * 8
    expected = warp.flow_warp(image, flow)
    network = plus_plus.BasicVSRPlusPlusNet(8, 1)  # 16 groups of offsets share 16 channels
    frames = torch.rand(1, 2, 3, 64, 64)  # the smallest that it takes
    with pytest.raises(NotImplementedError):
        network(frames)
    pairs: list[tuple[Any, Any, Any]] = [
        (edvr.PCDAlignment(8, 4), mmagic_drop_ins.PCDAlignment(8, 4), levels),
        (
            plus_plus.SecondOrderDeformableAlignment(8, 4, 3, **options),
            mmagic_drop_ins.SecondOrderDeformableAlignment(8, 4, 3, **options),
            states,
        ),
    ]
    with patch("mmagic"):
        for theirs, ours, arguments in pairs:
            theirs = liven(theirs).double()
            ours.double().load_state_dict(theirs.state_dict())
            torch.testing.assert_close(theirs(*arguments), ours(*arguments))
        torch.testing.assert_close(plus_plus.flow_warp(image, flow), expected)
        assert network(frames).shape == (1, 2, 3, 256, 256)
    with pytest.raises(NotImplementedError):
        network(frames)


def _mean_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def test_half_precision_keeps_its_coordinates(torchvision: ModuleType) -> None:
    """torchvision adds an offset to a column in fp16, where beyond 512 that leaves halves of pixels.

    The share of an error that comes from coordinates: theirs is at least a quarter pixel somewhere, ours none. The
    gradient of an offset jumps where a sample crosses a pixel: in fp32 a share of 1500 * eps of them does.
    """
    x, weight = uniform(1, 4, 3, 1500).half(), uniform(4, 4, 3, 3, seed=2).half()
    offset, grad = uniform(1, 18, 3, 1500, seed=1).half(), uniform(1, 4, 3, 1500, seed=3).half()

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, offset, weight)]
        output = torchvision.ops.deform_conv2d(*leaves, padding=1)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    exact, theirs = run(torch.float64), run(torch.float16)
    with patch("torchvision"):
        ours = run(torch.float16)
    rounding = torch.finfo(torch.float16).eps
    crossing = math.sqrt(1500 * torch.finfo(torch.float32).eps)
    for name, our, their, expected in zip(("out", "x", "offset", "weight"), ours, theirs, exact):
        error, their_error = _mean_error(our, expected), _mean_error(their, expected)
        allowed = crossing if name == "offset" else rounding
        assert error < allowed, f"{name}: more than the rounding of the result"
        assert their_error > 20 * max(error, rounding), (
            f"{name}: say in the docs that theirs is right"
        )


def test_edvr_alignment_in_half_precision(basicsr: ModuleType) -> None:
    """The whole of DCNv2Pack in fp16, offsets of about a pixel: output and gradients."""
    net = liven(basicsr.archs.arch_util.DCNv2Pack(4, 4, 3, padding=1, deformable_groups=2)).half()
    features = [uniform(1, 4, 3, 1500, seed=s).half() for s in (0, 1)]

    def run(net: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in features]
        output = net(*leaves)
        grad = uniform(*output.shape, seed=2).to(dtype)
        return [output.detach(), *torch.autograd.grad(output, [*leaves, net.weight], grad)]

    theirs = run(net, torch.float16)
    with patch("basicsr"):
        ours = run(net, torch.float16)
        exact = run(copy.deepcopy(net).double(), torch.float64)
    for our, their, expected in zip(ours, theirs, exact):
        assert _mean_error(our, expected) < _mean_error(their, expected) / 4


SIGNATURES = [
    ("torchvision.ops", our_torchvision, ["deform_conv2d", "DeformConv2d"]),
    ("basicsr.ops.dcn", our_basicsr, ["ModulatedDeformConv"]),
    ("basicsr.archs.arch_util", our_basicsr, ["flow_warp"]),
    ("basicsr.archs.edvr_arch", our_basicsr, ["TSAFusion"]),
    ("mmcv.ops", our_mmcv, ["ModulatedDeformConv2d", "DeformConv2d"]),
]


@pytest.mark.parametrize(("module", "ours", "names"), SIGNATURES, ids=lambda v: str(v)[:24])
def test_signatures(
    module: str, ours: ModuleType, names: list[str], request: pytest.FixtureRequest
) -> None:
    """Names, order and defaults of the parameters of functions, constructors and forward."""
    library = module.partition(".")[0]
    request.getfixturevalue("mmcv_ops" if library == "mmcv" else library)

    def parameters(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    for name in names:
        their, our = getattr(__import__(module, fromlist=[name]), name), getattr(ours, name)
        assert parameters(our) == parameters(their), name
        if isinstance(their, type):
            assert parameters(our.forward) == parameters(their.forward), f"{name}.forward"
