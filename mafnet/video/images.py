"""Single images and folders of frames: 8 and 16 bits, grey or colour, with or without alpha."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .colour import repack
from .errors import VideoError

READABLE = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
WRITABLE = {".png", ".jpg", ".jpeg", ".webp"}
_UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    av.FFmpegError,
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH_BYTE = 24  # of IHDR: signature 8, chunk length and name 8, width and height 8


@dataclass
class Picture:
    """An image: `rgb` (3, H, W) and `alpha` (1, H, W) or None, float32 in [0, 1].

    `depth` is 8 or 16 bits, `grey` says that the file had one channel, `icc` is its colour profile.
    """

    rgb: Tensor
    alpha: Tensor | None
    depth: int
    grey: bool
    icc: bytes | None = None


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p.lower()) for p in parts if p]


def list_frames(folder: Path) -> list[Path]:
    """The images of a folder in natural order; VideoError if none, or two with one name."""
    frames = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in READABLE and p.name[0] != "."),
        key=natural_key,
    )
    if not frames:
        raise VideoError(f"{folder}: no image in this folder ({', '.join(sorted(READABLE))})")
    seen: dict[str, Path] = {}
    for path in frames:
        if path.stem in seen:
            raise VideoError(f"{folder}: {seen[path.stem].name} and {path.name} share one name")
        seen[path.stem] = path
    return frames


def load_picture(path: Path) -> Picture:
    """Read an image file, turned upright by its EXIF tag. Raises VideoError naming the file."""
    try:
        if _is_deep_png(path):
            return _load_deep_png(path)
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise VideoError(f"{path}: an animation of {image.n_frames} frames, not one image")
            return _from_pillow(path, image)
    except _UNREADABLE as error:
        raise VideoError(f"{path}: cannot be read as an image: {error}") from error


def save_picture(path: Path, picture: Picture, suffix: str) -> None:
    """Write in the format of `suffix`; 16 bits and alpha only where the format holds them."""
    deep = picture.depth == 16 and suffix == ".png"
    channels = [picture.rgb.mean(0, keepdim=True) if picture.grey else picture.rgb]
    if picture.alpha is not None:
        if suffix in (".jpg", ".jpeg"):
            raise VideoError(f"{path}: JPEG holds no alpha channel; write .png or .webp")
        if picture.grey and deep:
            channels = [picture.rgb]
        channels.append(picture.alpha)
    peak = 65535 if deep else 255
    pixels = torch.cat(channels).clamp(0, 1).permute(1, 2, 0).mul(peak).add(0.5).floor()
    array = pixels.cpu().numpy().astype(np.uint16 if deep else np.uint8)
    try:
        if deep:
            path.write_bytes(_encode_deep_png(array))
        else:
            _save_pillow(path, array.squeeze(2) if array.shape[2] == 1 else array, suffix, picture)
    except OSError as error:
        raise VideoError(f"{path}: cannot be written: {error}") from error


def upscale_alpha(alpha: Tensor | None, scale: int) -> Tensor | None:
    """Bicubic, as the network knows colours only."""
    if alpha is None:
        return None
    return F.interpolate(alpha[None], scale_factor=scale, mode="bicubic")[0].clamp(0, 1)


def _from_pillow(path: Path, image: Image.Image) -> Picture:
    icc = image.info.get("icc_profile")
    deep = image.mode.startswith(("I", "F"))
    if deep:
        raise VideoError(
            f"{path}: {image.mode} pixels are read from PNG only; convert to 16-bit PNG"
        )
    upright = ImageOps.exif_transpose(image)
    has_alpha = "A" in upright.getbands() or "transparency" in upright.info
    grey = upright.mode in ("1", "L", "LA")
    converted = upright.convert("RGBA" if has_alpha else "RGB")
    planes = torch.from_numpy(np.array(converted)).permute(2, 0, 1).float() / 255
    return Picture(planes[:3], planes[3:] if has_alpha else None, 8, grey, icc)


def _save_pillow(path: Path, array: np.ndarray, suffix: str, picture: Picture) -> None:
    options: dict[str, object] = {}
    if picture.icc is not None:
        options["icc_profile"] = picture.icc
    kind = {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
    if kind == "JPEG":
        options |= {"quality": 95, "subsampling": 0}
    elif kind == "WEBP":
        options |= {"quality": 95}
    Image.fromarray(array).save(path, kind, **options)


def _is_deep_png(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(PNG_DEPTH_BYTE + 1)
    return head.startswith(PNG_SIGNATURE) and head[PNG_DEPTH_BYTE:] == b"\x10"


def _load_deep_png(path: Path) -> Picture:
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    grey = frame.format.name.startswith(("gray", "ya"))
    has_alpha = frame.format.name.startswith(("rgba", "ya"))
    stored = repack(frame, "rgba64le" if has_alpha else "rgb48le")
    plane = stored.planes[0]
    channels = 4 if has_alpha else 3
    rows = np.frombuffer(memoryview(plane), np.uint16).reshape(plane.height, -1)
    pixels = rows[:, : plane.width * channels].reshape(plane.height, plane.width, channels)
    planes = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 65535
    return Picture(planes[:3], planes[3:] if has_alpha else None, 16, grey)


def _encode_deep_png(array: np.ndarray) -> bytes:
    height, width, channels = array.shape
    name = {1: "gray16be", 3: "rgb48be", 4: "rgba64be"}[channels]
    frame = av.VideoFrame(width, height, name)
    plane = frame.planes[0]
    rows = np.zeros((height, plane.line_size // 2), ">u2")
    rows[:, : width * channels] = array.reshape(height, -1)
    plane.update(rows.tobytes())
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, name
    encoder.time_base = Fraction(1)
    frame.pts = 0
    return b"".join(bytes(p) for p in [*encoder.encode(frame), *encoder.encode(None)])
