"""Measure a network on folders of frames: PSNR and SSIM on Y, beside bicubic, and the gain that neighbours give."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .config import ConfigError
from .data.degrade import bicubic_upscale
from .metrics import psnr_y, ssim_y
from .model import MAFnet

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ClipScore:
    """Means over the measured frames of one clip, in dB and SSIM of the Y channel, no border crop."""

    clip: str
    frames: int
    psnr_y: float
    ssim_y: float
    bicubic_psnr_y: float
    bicubic_ssim_y: float
    copies_psnr_y: float | None = None  # the same network given copies of each frame as neighbours


def main_eval(
    model: str,
    folders: list[str],
    chunk: int = 15,
    overlap: int = 3,
    degradation: str = "BI",
    copies: bool = False,
    limit: int | None = None,
    output: str | None = None,
) -> list[ClipScore]:
    """Measure ``model`` on clip folders (each with GT and BIx4 or BDx4) and print a table."""
    net = MAFnet.from_pretrained(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if net.degradation != degradation:
        print(f"note: the weights were trained for {net.degradation}, measured on {degradation}")
    scores = []
    print(f"{'clip':24} {'frames':>6} {'bicubic':>15} {'model':>15} {'gain':>6}")
    for folder in folders:
        score = score_clip(net, Path(folder), degradation, chunk, overlap, copies, limit)
        scores.append(score)
        gain = score.psnr_y - score.bicubic_psnr_y
        print(
            f"{score.clip:24} {score.frames:6d} {score.bicubic_psnr_y:8.3f} {score.bicubic_ssim_y:.4f} "
            f"{score.psnr_y:8.3f} {score.ssim_y:.4f} {gain:+6.3f}"
        )
        if score.copies_psnr_y is not None:
            print(
                f"{'':24} temporal gain {score.psnr_y - score.copies_psnr_y:+.3f} dB "
                f"(copies of one frame: {score.copies_psnr_y:.3f})"
            )
    if output:
        Path(output).write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n")
    return scores


def score_clip(
    net: MAFnet,
    folder: Path,
    degradation: str = "BI",
    chunk: int = 15,
    overlap: int = 3,
    copies: bool = False,
    limit: int | None = None,
) -> ClipScore:
    """Measure one clip folder; ``copies`` adds the control with copies of each frame as its neighbours."""
    truth_files, input_files = _pairs(folder, f"{degradation}x4")
    if limit is not None:
        truth_files, input_files = truth_files[:limit], input_files[:limit]
    inputs = np.stack([_read(p) for p in input_files])
    rows = []
    for index, out in enumerate(upscale_frames(net, inputs, chunk, overlap)):
        truth = _truth(truth_files[index], inputs[index])
        cubic = bicubic_upscale(inputs[index])
        row = [psnr_y(out, truth), ssim_y(out, truth), psnr_y(cubic, truth), ssim_y(cubic, truth)]
        if copies:
            still = np.repeat(inputs[index : index + 1], 2 * net.temporal_radius + 1, 0)
            row.append(psnr_y(_center(net, still), truth))
        rows.append(row)
    means = np.mean(np.array(rows), 0).tolist()
    return ClipScore(folder.name, len(rows), *means)


def measure_folder(net: MAFnet, folder: str, frames: int, windows: int) -> float:
    """Mean PSNR on Y over ``windows`` evenly placed windows of ``frames`` frames: quick, for use while training."""
    truth_files, input_files = _pairs(Path(folder), "BIx4")
    starts = np.linspace(0, max(0, len(input_files) - frames), windows).astype(int)
    values = []
    for start in starts:
        inputs = np.stack([_read(p) for p in input_files[start : start + frames]])
        for i, out in enumerate(upscale_frames(net, inputs, frames, 0)):
            values.append(psnr_y(out, _truth(truth_files[start + i], inputs[i])))
    return float(np.mean(values))


def upscale_frames(net: MAFnet, frames: ByteArray, chunk: int, overlap: int) -> Iterator[ByteArray]:
    """(T, H, W, 3) uint8 -> each (4H, 4W, 3) uint8, in windows with ``overlap`` frames of context each side."""
    if chunk < 1 or overlap < 0:
        raise ConfigError(f"expected chunk >= 1 and overlap >= 0, got {chunk} and {overlap}")
    for start in range(0, len(frames), chunk):
        stop = min(start + chunk, len(frames))
        first, last = max(0, start - overlap), min(len(frames), stop + overlap)
        select = range(start - first, stop - first)
        yield from _run(net, frames[first:last], lambda x, s=select: net.reconstruct(x, s).frames)


def _center(net: MAFnet, frames: ByteArray) -> ByteArray:
    return next(_run(net, frames, lambda x: net(x, center_only=True)))


def _run(net: MAFnet, frames: ByteArray, call: Callable[[Tensor], Tensor]) -> Iterator[ByteArray]:
    device = next(net.parameters()).device
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).unsqueeze(0).to(device).float() / 255
    with torch.inference_mode():
        out = (
            call(x)[0]
            .clamp(0, 1)
            .mul(255)
            .add(0.5)
            .floor()
            .byte()
            .permute(0, 2, 3, 1)
            .cpu()
            .numpy()
        )
    yield from out


def _pairs(folder: Path, low: str) -> tuple[list[Path], list[Path]]:
    truth, inputs = (sorted((folder / name).glob("*.png")) for name in ("GT", low))
    if not truth or len(truth) != len(inputs):
        raise ConfigError(
            f"{folder}: expected as many PNG files in GT as in {low}, found {len(truth)} and {len(inputs)}"
        )
    return truth, inputs


def _truth(path: Path, low: ByteArray) -> ByteArray:
    """The ground truth, cropped to four times the input."""
    image = _read(path)
    height, width = 4 * low.shape[0], 4 * low.shape[1]
    if image.shape[0] < height or image.shape[1] < width:
        raise ConfigError(
            f"{path}: expected at least {width}x{height}, got {image.shape[1]}x{image.shape[0]}"
        )
    return image[:height, :width]


def _read(path: Path) -> ByteArray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
