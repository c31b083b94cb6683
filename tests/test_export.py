"""Export: every op and whole networks as ONNX in onnxruntime beside PyTorch, at sizes that the trace did not see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import build, run
from strategies import uniform
from torch import Tensor, nn

import mafnet_ops
from mafnet import MAFnet
from mafnet.cli import main
from mafnet.export import ExportError, export_onnx
from mafnet_ops import onnx as onnx_ops

SIZES = ((9, 11), (16, 8), (5, 7))
WARPS = [
    *((i, p) for i in ("bilinear", "nearest") for p in ("zeros", "border", "reflection")),
    ("bicubic", "zeros"),
]


class EveryOp(nn.Module):
    """All ops on one image (1, 8, H, W), with what they need made of it; no sampled point is near a knot."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = mafnet_ops.ModulatedDeformConv2d(8, 4, (3, 5), 2, (1, 2), 1, groups=2)
        self.plain = mafnet_ops.ModulatedDeformConv2d(8, 4, 3, padding=1, bias=False)
        self.align = mafnet_ops.DeformAlign(8, 4, max_residue_magnitude=0.25)
        self.attention = mafnet_ops.SelfAttention(8, 4, window=8)
        self.everywhere = mafnet_ops.SelfAttention(8, 4)
        self.pyramid = mafnet_ops.PyramidSpatialAttention(8)
        for gamma in (self.attention.gamma, self.everywhere.gamma):
            nn.init.ones_(gamma)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        # Multiples of 1/4 plus 1/8, up to two pixels.
        offset = (image.repeat(1, 8, 1, 1) * 8).round() / 4 + 1 / 8  # (1, 64, H, W)
        flow = offset[:, :2].permute(0, 2, 3, 1)
        half = offset[:, :60, ::2, ::2]
        mask = image.repeat(1, 4, 1, 1)[:, :30, ::2, ::2].sigmoid()
        warped = [mafnet_ops.flow_warp(image, flow, *modes) for modes in WARPS]
        _, inside = mafnet_ops.flow_warp(image, flow, return_mask=True)
        return (
            *warped,
            inside,
            self.convolution(image, half, mask),
            self.plain(image, offset[:, :36]),
            self.align(image, offset[:, :54], flow, flow.flip(3)),
            self.attention(image),
            self.everywhere(image),
            self.pyramid(image),
        )


def session(path: Path) -> Any:
    return pytest.importorskip("onnxruntime").InferenceSession(str(path))


def operators(path: Path) -> set[str]:
    import onnx

    graph = onnx.load(path).graph
    return {node.op_type for node in graph.node}


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "deform_conv"), [(19, True), (22, True), (20, False)])
def test_every_op_in_onnxruntime(tmp_path: Path, opset: int, deform_conv: bool) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net, path = EveryOp().eval(), tmp_path / "ops.onnx"
    dynamic = torch.export.Dim.DYNAMIC(min=4)
    with onnx_ops.standard_ops(deform_conv), torch.no_grad():
        example = uniform(1, 8, 21, 27).float()
        program = torch.export.export(
            net,
            (example,),
            dynamic_shapes={"image": {2: dynamic, 3: dynamic}},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        torch.onnx.export(program, f=path, opset_version=opset, dynamo=True, verbose=False)
    assert ("DeformConv" in operators(path)) == deform_conv
    assert "GridSample" in operators(path)
    runtime = session(path)
    for size in SIZES:
        image = uniform(1, 8, *size, seed=3).float()
        for i, (actual, expected) in enumerate(
            zip(runtime.run(None, {"image": image.numpy()}), net(image))
        ):
            # fp32 throughout; GridSample's coordinates are relative, so off by eps of the size in pixels.
            difference = (torch.from_numpy(actual) - expected).abs().max()
            assert difference < 1e-5 * max(1.0, expected.abs().max().item()), f"output {i}, {size}"


def test_the_decomposition_is_the_convolution() -> None:
    """GridSample in the place of DeformConv, in fp64: groups, offset groups, stride, padding, dilation, no mask."""
    input, weight = uniform(2, 8, 9, 11), uniform(6, 4, 3, 2, seed=1)
    offset, mask = uniform(2, 24, 5, 6, seed=2) * 3, uniform(2, 12, 5, 6, seed=3)
    options = {"stride": 2, "padding": (2, 1), "dilation": (2, 1)}
    for m, bias in ((mask, uniform(6, seed=4)), (None, None)):
        arguments = input, offset, m, weight, bias
        expected = mafnet_ops.modulated_deform_conv2d(*arguments, **options)  # type: ignore[arg-type]
        actual = onnx_ops.sampled_deform_conv2d(*arguments, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected)


def test_standard_ops_are_taken_out_again() -> None:
    """Also after an error, and from the modules that imported the functions."""
    functions = {name: getattr(mafnet_ops, name) for name in ("flow_warp", "deform_align")}
    model = sys.modules[MAFnet.__module__]
    with pytest.raises(RuntimeError, match="inside"), onnx_ops.standard_ops():
        assert mafnet_ops.flow_warp is not functions["flow_warp"]
        assert vars(model)["flow_warp"] is mafnet_ops.flow_warp
        raise RuntimeError("inside")
    for name, function in functions.items():
        assert getattr(mafnet_ops, name) is function
    assert vars(model)["flow_warp"] is functions["flow_warp"]
    assert onnx_ops.flow_warp is not functions["flow_warp"]
    assert (
        mafnet_ops._library.backend("flow_warp", "cpu").name == "native"
        or mafnet_ops._library.disabled()
    )
    tensors = uniform(1, 3, 8, 7), uniform(1, 8, 7, 2, seed=1)
    assert torch.equal(mafnet_ops.flow_warp(*tensors), functions["flow_warp"](*tensors))


@pytest.mark.slow
def test_a_whole_network_in_onnxruntime(tmp_path: Path) -> None:
    """Of every part one, since a node costs the converter a twentieth of a second."""
    pytest.importorskip("onnxscript")
    net, path = build(blocks=1, block_layers=1, flow_levels=2), tmp_path / "net.onnx"
    export_onnx(net, path, frames=2)
    assert "DeformConv" in operators(path)
    runtime = session(path)
    assert [tmp_path / "net.onnx"] == list(tmp_path.iterdir())
    for size in ((20, 26), (33, 24), (16, 40)):
        frames = torch.rand(1, 2, 3, *size)
        (actual,) = runtime.run(None, {"frames": frames.numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), run(net, frames), rtol=1e-4, atol=1e-4)


class OneConvolution(nn.Module):
    """A deformable convolution as a network of frames (1, T, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = mafnet_ops.ModulatedDeformConv2d(3, 3, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        offset = frames[:, 0].repeat(1, 6, 1, 1)
        upscaled: Tensor = self.convolution(frames[:, 0], offset)
        return upscaled[:, None]


def test_a_network_for_runtimes_without_deform_conv(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net, path = OneConvolution(), tmp_path / "net.onnx"
    export_onnx(net, path, frames=1, deform_conv=False)
    assert "GridSample" in operators(path) and "DeformConv" not in operators(path)
    frames = torch.rand(1, 1, 3, 20, 26)
    (actual,) = session(path).run(None, {"frames": frames.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(actual), net(frames), rtol=1e-4, atol=1e-4)


class Saved:
    """In the place of a converted network."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save(self, path: Path, external_data: bool) -> None:
        Path(path).write_bytes(b"network")
        if self.error is not None:
            raise self.error


def test_the_file_is_whole_and_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readable by whom a new file is readable; a save that breaks off leaves what was there."""
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("mafnet.export.export_program", lambda *_: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Saved())
    path, ordinary = tmp_path / "net.onnx", tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    export_onnx(build(), path)
    assert path.stat().st_mode == ordinary.stat().st_mode
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Saved(OSError("disk full")))
    path.write_bytes(b"earlier")
    with pytest.raises(OSError, match="disk full"):
        export_onnx(build(), path)
    assert path.read_bytes() == b"earlier"
    assert set(tmp_path.iterdir()) == {path, ordinary}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 18}, "--opset: expected at least 19, the first with DeformConv, got 18"),
        ({"frames": 0}, "--frames: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_exported(options: dict[str, int], message: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match=message):
        export_onnx(build(), tmp_path / "net.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"the folder .*none does not exist"):
        export_onnx(build(), tmp_path / "none" / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("padding_mode", ["border", "reflection"])
def test_bicubic_warps_that_onnx_lays_out_otherwise_are_refused(padding_mode: str) -> None:
    image, flow = uniform(1, 3, 8, 7), uniform(1, 8, 7, 2, seed=1)
    with (
        onnx_ops.standard_ops(),
        pytest.raises(ValueError, match="padding_mode: expected zeros with bicubic in ONNX, got"),
    ):
        mafnet_ops.flow_warp(image, flow, "bicubic", padding_mode)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mafnet.export.NEEDED", ("no_such_package",))
    with pytest.raises(ExportError, match=r"needs no_such_package: pip install 'mafnet\[onnx\]'"):
        export_onnx(build(), tmp_path / "net.onnx")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("mafnet.export.export_onnx", lambda net, *options: calls.append(options))
    path = tmp_path / "a.onnx"
    assert main(f"export --onnx {path} --frames 3 --opset 22 --no-deform-conv".split()) == 0
    assert main(f"export --onnx {path}".split()) == 0
    assert calls == [(path, 3, 22, False), (path, 5, 20, True)]
