"""Measure a network on folders of frames: PSNR and SSIM on Y, beside bicubic, and the gain that neighbours give."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .config import ConfigError
from .data.degrade import bicubic_upscale
from .data.folders import (
    Degradation,
    EvalClip,
    folder_of_clips,
    frame_folder,
    paired_folders,
    vimeo_septuplets,
)
from .metrics import psnr_y, ssim_y
from .model import MAFnet
from .video.stream import windows

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
    overlap: int = 1,
    degradation: Degradation = "BI",
    copies: bool = False,
    limit: int | None = None,
    output: str | None = None,
) -> list[ClipScore]:
    """Measure ``model`` on every clip of ``folders`` (see :func:`clips_in`) and print a table."""
    if output and not Path(output).parent.is_dir():
        raise ConfigError(f"{output}: the folder {Path(output).parent} does not exist")
    net = MAFnet.from_pretrained(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if net.degradation != degradation:
        print(f"note: the weights were trained for {net.degradation}, measured on {degradation}")
    clips = [clip for folder in folders for clip in clips_in(Path(folder), degradation)]
    print(f"{'clip':24} {'frames':>6} {'bicubic':>15} {'model':>15} {'gain':>6}")
    scores = []
    for clip in clips:
        scores.append(score_clip(net, clip, degradation, chunk, overlap, copies, limit))
        print(_row(scores[-1]), flush=True)
    if len(scores) > 1:
        print(_row(mean_score(scores)))
    if output:
        Path(output).write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n")
    return scores


def clips_in(folder: Path, degradation: Degradation = "BI") -> list[EvalClip]:
    """The clips of a folder in any of the usual layouts.

    ``GT`` and ``BIx4`` (or ``BDx4``) folders, with or without clip folders in them (Vid4); ``sequences`` (Vimeo-90K);
    a folder of frames; a folder of such folders (REDS4). Without low-resolution files the frames are degraded.
    """
    if (folder / "GT").is_dir():
        return paired_folders(folder, lr=f"{degradation}x4")
    if (folder / "sequences").is_dir():
        return vimeo_septuplets(folder)
    if folder.is_dir() and any(path.is_file() for path in folder.iterdir()):
        return [frame_folder(folder)]
    return folder_of_clips(folder)


def _row(score: ClipScore) -> str:
    gain = score.psnr_y - score.bicubic_psnr_y
    text = (
        f"{score.clip:24} {score.frames:6d} {score.bicubic_psnr_y:8.3f} {score.bicubic_ssim_y:.4f} "
        f"{score.psnr_y:8.3f} {score.ssim_y:.4f} {gain:+6.3f}"
    )
    if score.copies_psnr_y is None:
        return text
    temporal = score.psnr_y - score.copies_psnr_y
    return f"{text}\n{'':24} copies of one frame {score.copies_psnr_y:.3f}: temporal gain {temporal:+.3f} dB"


def mean_score(scores: list[ClipScore]) -> ClipScore:
    """The mean over clips, each clip weighing the same."""
    values = np.mean([_values(s) for s in scores], 0).tolist()
    return ClipScore("mean of clips", sum(s.frames for s in scores), *values)


def _values(score: ClipScore) -> list[float]:
    values = [score.psnr_y, score.ssim_y, score.bicubic_psnr_y, score.bicubic_ssim_y]
    return values if score.copies_psnr_y is None else [*values, score.copies_psnr_y]


def score_clip(
    net: MAFnet,
    clip: EvalClip,
    degradation: Degradation = "BI",
    chunk: int = 15,
    overlap: int = 1,
    copies: bool = False,
    limit: int | None = None,
) -> ClipScore:
    """Measure one clip; ``copies`` adds the control with copies of each frame as its neighbours."""
    truths, inputs = clip.gt()[:limit], clip.lr(degradation)[:limit]
    rows = []
    for index, out in enumerate(upscale_frames(net, inputs, chunk, overlap)):
        if index not in clip.scored:
            continue
        truth, cubic = truths[index], bicubic_upscale(inputs[index])
        row = [psnr_y(out, truth), ssim_y(out, truth), psnr_y(cubic, truth), ssim_y(cubic, truth)]
        if copies:
            still = np.repeat(inputs[index : index + 1], 2 * net.temporal_radius + 1, 0)
            row.append(psnr_y(_center(net, still), truth))
        rows.append(row)
    return ClipScore(clip.name, len(rows), *np.mean(rows, 0).tolist())


def measure_windows(net: MAFnet, clip: EvalClip, frames: int, windows: int) -> float:
    """Mean PSNR on Y over evenly placed windows of ``frames`` frames: quick, for use while training."""
    truths, inputs = clip.gt(), clip.lr()
    values = []
    for start in np.linspace(0, max(0, len(inputs) - frames), windows).astype(int):
        window = inputs[start : start + frames]
        for i, out in enumerate(upscale_frames(net, window, frames, 0)):
            values.append(psnr_y(out, truths[start + i]))
    return float(np.mean(values))


def upscale_frames(net: MAFnet, frames: ByteArray, chunk: int, overlap: int) -> Iterator[ByteArray]:
    """(T, H, W, 3) uint8 -> each (4H, 4W, 3) uint8, in windows with ``overlap`` frames of context each side."""
    if chunk < 1 or overlap < 0:
        raise ConfigError(f"expected chunk >= 1 and overlap >= 0, got {chunk} and {overlap}")
    for items, keep in windows(frames, chunk, overlap):
        yield from _upscale(net, np.stack(items), range(keep.start, keep.stop))


def _center(net: MAFnet, frames: ByteArray) -> ByteArray:
    return _upscale(net, frames, [len(frames) // 2])[0]


def _upscale(net: MAFnet, frames: ByteArray, select: Sequence[int]) -> ByteArray:
    """(T, H, W, 3) uint8 -> the selected frames, (S, 4H, 4W, 3) uint8."""
    device = next(net.parameters()).device
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).unsqueeze(0).to(device).float() / 255
    with torch.inference_mode():
        out = net.reconstruct(x, select).frames[0]
        levels = (out.clamp(0, 1) * 255 + 0.5).floor().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()
