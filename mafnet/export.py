"""A trained network as one ONNX file for other runtimes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mafnet_ops import onnx as onnx_ops

NEEDED = ("onnx", "onnxscript")
SMALLEST, LARGEST = 16, 8192  # pixels of height and width


class ExportError(Exception):
    """The network cannot be exported as asked, said in one line."""


class _Clip(nn.Module):
    """The network as a function of one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, frames: Tensor) -> Tensor:
        upscaled: Tensor = self.net(frames)
        return upscaled


def export_program(net: nn.Module, frames: int) -> ExportedProgram:
    """Trace clips (1, ``frames``, 3, H, W) -> (1, ``frames``, 3, 4H, 4W) in eval mode, for any H and W."""
    if frames < 1:
        raise ExportError(f"--frames: expected at least 1, got {frames}")
    # No size of the example may be one that the network's channels or windows have: torch would take them for one.
    example = torch.rand(1, frames, 3, 75, 91, dtype=next(net.parameters()).dtype)
    size = {axis: Dim.DYNAMIC(min=SMALLEST, max=LARGEST) for axis in (3, 4)}
    with torch.no_grad():
        return torch.export.export(
            _Clip(net).eval(),
            (example,),
            dynamic_shapes={"frames": size},
            # Sizes that rounding up and down makes are beyond what torch proves: checked when it runs.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def export_onnx(
    net: nn.Module,
    path: str | Path,
    frames: int = 5,
    opset: int = 20,
    deform_conv: bool = True,
) -> None:
    """Write ``path``: input ``frames`` (1, T, 3, H, W) in [0, 1], output ``upscaled`` (1, T, 3, 4H, 4W), any H and W.

    Args:
        frames: T; a network with a recurrence is unrolled over it.
        opset: of ONNX, 19 at least.
        deform_conv: False writes deformable convolutions with GridSample, for runtimes without DeformConv.

    Raises:
        ExportError: an older opset, packages missing, or no folder to write to.
    """
    path = Path(path)
    if opset < onnx_ops.OLDEST_OPSET:
        raise ExportError(
            f"--opset: expected at least {onnx_ops.OLDEST_OPSET}, the first with DeformConv, got {opset}"
        )
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; name the file")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {', '.join(missing)}: pip install 'mafnet[onnx]'")
    with onnx_ops.standard_ops(deform_conv):
        program = export_program(net, frames)
        model = torch.onnx.export(
            program,
            input_names=["frames"],
            output_names=["upscaled"],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert model is not None
    # Under another name until it is whole.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        model.save(part, external_data=False)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
