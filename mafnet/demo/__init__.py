"""`mafnet demo`: upscale the bundled clip, score it against its ground truth, draw a comparison."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mafnet.data.degrade import bicubic_upscale
from mafnet.metrics import psnr_y, ssim_y
from mafnet.video import EncodeSettings, UpscaleOptions, VideoError, upscale
from mafnet.video.read import VideoReader
from mafnet.video.run import pick_device
from mafnet.video.stream import Frame
from mafnet.video.tile import SuperResolver
from mafnet_ops._library import backend, op_names

Picture = npt.NDArray[np.uint8]

CLIPS = Path(__file__).parent
SHOWN_FRAME = 18  # of the comparison: the rabbit half risen before the grass
DETAIL = (slice(210, 330), slice(400, 560))  # rows and columns of the truth that are enlarged
DETAIL_ZOOM = 3
PANEL = (480, 270)
LABEL_HEIGHT = 28


@dataclass
class Scores:
    """PSNR (dB) and SSIM of every frame, on Y."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)

    def add(self, picture: Picture, truth: Picture) -> None:
        self.psnr.append(psnr_y(picture, truth))
        self.ssim.append(ssim_y(picture, truth))

    def line(self, name: str) -> str:
        return f"  {name:<10} {np.mean(self.psnr):6.2f} dB   {np.mean(self.ssim):.4f}"


class Comparison:
    """Watches the frames of the demo: scores each, keeps the one that is shown."""

    def __init__(self, truth: Iterator[Frame]) -> None:
        self._truth = truth
        self.ours, self.bicubic = Scores(), Scores()
        self.shown: dict[str, Picture] = {}
        self.seconds = 0.0  # spent here, not upscaling

    def __call__(self, frame: Frame, upscaled: Tensor) -> None:
        began = time.monotonic()
        truth = to_picture(next(self._truth).rgb)
        ours = to_picture(upscaled)
        bicubic = bicubic_upscale(to_picture(frame.rgb))
        if len(self.ours.psnr) == SHOWN_FRAME:
            self.shown = {"bicubic": bicubic, "MAFnet": ours, "ground truth": truth}
        self.ours.add(ours, truth)
        self.bicubic.add(bicubic, truth)
        self.seconds += time.monotonic() - began


def run_demo(
    output: Path,
    model: str = "lite",
    device: str = "auto",
    dtype: str = "auto",
    net: SuperResolver | None = None,
) -> None:
    """Write demo.mp4 and comparison.png into `output` (made if missing) and print the scores.

    `net` replaces the model that `model` names. Raises VideoError if `output` cannot be used.
    """
    try:
        output.mkdir(exist_ok=True)
    except OSError as error:
        raise VideoError(f"{output}: cannot be made a folder: {error.strerror}") from error
    options = UpscaleOptions(
        model=model,
        device=device,
        dtype=dtype,
        overwrite=True,
        encode=EncodeSettings(pixel_format="yuv420p"),  # plays everywhere
    )
    video, picture = output / "demo.mp4", output / "comparison.png"
    with VideoReader(CLIPS / "truth.mp4") as truth:
        comparison = Comparison(iter(truth))
        report = upscale(CLIPS / "input.mp4", video, options, net, comparison)
    draw_comparison(comparison.shown).save(picture)
    frames = report.frames
    print(f"{frames} frames, x4 to {report.size[0]}x{report.size[1]}; PSNR and SSIM on Y:")
    print(comparison.bicubic.line("bicubic"))
    print(comparison.ours.line("MAFnet"))
    seconds = (report.seconds - comparison.seconds) / frames
    print(f"  {seconds:.2f} s a frame, encoding included, {report.arithmetic}")
    for name, chosen in backends(device).items():
        print(f"  {name}: {chosen}")
    print(f"wrote {video} (with the clip's sound) and {picture}")


def backends(device: str) -> dict[str, str]:
    """What ran each operator, and why."""
    kind = pick_device(device).type
    chosen = {name: backend(name, kind) for name in op_names()}
    return {name: f"{ran.name} ({ran.reason})" for name, ran in chosen.items()}


def to_picture(rgb: Tensor) -> Picture:
    """(3, H, W) float in [0, 1], clamped here -> (H, W, 3) uint8."""
    pixels: Picture = rgb.clamp(0, 1).mul(255).add(0.5).floor().byte().permute(1, 2, 0).numpy()
    return pixels


def draw_comparison(pictures: dict[str, Picture]) -> Image.Image:
    """Two rows of labelled panels: the whole frames reduced, and an enlarged detail of each."""
    width, height = PANEL
    detail_height = (DETAIL[0].stop - DETAIL[0].start) * DETAIL_ZOOM
    sheet = Image.new("RGB", (width * len(pictures), LABEL_HEIGHT + height + detail_height))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    for index, (name, pixels) in enumerate(pictures.items()):
        left = index * width
        draw.text((left + 8, 3), name, fill="white", font=font)
        whole = Image.fromarray(pixels).resize(PANEL, Image.Resampling.BOX)
        sheet.paste(whole, (left, LABEL_HEIGHT))
        detail = Image.fromarray(pixels[DETAIL])
        detail = detail.resize((width, detail_height), Image.Resampling.NEAREST)
        sheet.paste(detail, (left, LABEL_HEIGHT + height))
    return sheet
