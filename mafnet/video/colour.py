"""YCbCr <-> RGB in float, by the matrix and range a stream is tagged with.

swscale only repacks pixel formats here; its own matrix conversion is off by up to one code on full
range and by several codes on more than 8 bits. Chroma of 4:2:0 and 4:2:2 is left-sited: co-sited
with even luma columns, midway between two luma rows, as in MPEG-2, H.264 and HEVC by default.
Numbers of matrices, primaries and transfers are the code points of ITU-T H.273.
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
import torch
from torch import Tensor

from .errors import VideoError

MATRIX_RGB, MATRIX_BT709, MATRIX_UNSPECIFIED, MATRIX_BT601 = 0, 1, 2, 6
RANGE_FULL = 2

# Luma weights (Kr, Kb) by matrix code point, H.273 table 4.
LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
# Formats whose planes are read and written directly, by log2 of the chroma subsampling (x, y).
CHROMA_CODES = {(0, 0): "444", (1, 0): "422", (1, 1): "420"}
PLANAR_DEPTHS = (9, 10, 12, 14, 16)


@dataclass(frozen=True)
class ColourTags:
    """How code values become colours. `full_range` is False for studio range (16-235 at 8 bits)."""

    matrix: int
    primaries: int
    transfer: int
    full_range: bool


@dataclass(frozen=True)
class PixelLayout:
    """What a pixel format holds: family ("yuv", "grey" or "rgb"), bits, log2 subsampling."""

    family: str
    depth: int
    sub_x: int = 0
    sub_y: int = 0

    @classmethod
    def of(cls, format_name: str) -> PixelLayout:
        pixels = av.VideoFormat(format_name, 16, 16)
        depth = max(component.bits for component in pixels.components)
        if pixels.is_rgb or pixels.has_palette:
            return cls("rgb", depth)
        if len(pixels.components) <= 2:
            return cls("grey", depth)
        sub_x = 16 // pixels.chroma_width(16) - 1
        sub_y = 16 // pixels.chroma_height(16) - 1
        if (sub_x, sub_y) not in CHROMA_CODES:  # 4:1:1, 4:4:0 and the like
            sub_x = sub_y = 0
        return cls("yuv", depth, sub_x, sub_y)

    def planar_name(self) -> str:
        """The pixel format with this content whose planes `unpack` and `pack` handle."""
        if self.family == "rgb":
            return "rgb24" if self.depth <= 8 else "rgb48le"
        depth = next((d for d in PLANAR_DEPTHS if d >= self.depth), 16)
        if self.family == "grey":
            return "gray" if self.depth <= 8 else f"gray{depth}le"
        code = f"yuv{CHROMA_CODES[self.sub_x, self.sub_y]}p"
        return code if self.depth <= 8 else f"{code}{depth}le"


def resolve_matrix(tagged: int, width: int, height: int, family: str) -> int:
    """The matrix to decode with. Untagged video: BT.709 above SD sizes, else BT.601."""
    if family == "rgb":
        return MATRIX_RGB
    if tagged in (MATRIX_UNSPECIFIED, MATRIX_RGB, 3):
        return MATRIX_BT709 if width >= 1280 or height > 576 else MATRIX_BT601
    if tagged not in LUMA_WEIGHTS:
        raise VideoError(f"colour matrix {tagged} (ITU-T H.273) is not supported")
    return tagged


def frame_to_rgb(frame: av.VideoFrame, tags: ColourTags) -> Tensor:
    """Decoded frame of any pixel format -> (3, H, W) float32 RGB in [0, 1], clamped."""
    layout = PixelLayout.of(frame.format.name)
    name = layout.planar_name()
    if frame.format.name not in (name, name.replace("yuv", "yuvj")):
        frame = repack(frame, name)
    planes = [torch.from_numpy(plane) for plane in _read_planes(frame)]
    if layout.family == "rgb":
        return planes[0].permute(2, 0, 1) / float(2 ** _stored_depth(name) - 1)
    offset, luma_span, centre, chroma_span = _code_values(_stored_depth(name), tags.full_range)
    luma = (planes[0] - offset) / luma_span
    if layout.family == "grey":
        return luma.clamp(0, 1).expand(3, -1, -1).contiguous()
    height, width = luma.shape
    cb, cr = (
        _upsample_chroma((plane - centre) / chroma_span, layout)[:height, :width]
        for plane in planes[1:]
    )
    kr, kb = LUMA_WEIGHTS[tags.matrix]
    red = luma + 2 * (1 - kr) * cr
    blue = luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return torch.stack([red, green, blue]).clamp_(0, 1)


def rgb_to_frame(rgb: Tensor, format_name: str, tags: ColourTags) -> av.VideoFrame:
    """(3, H, W) float RGB, clamped to [0, 1] here -> frame of `format_name`, rounded to nearest."""
    layout = PixelLayout.of(format_name)
    name = layout.planar_name()
    depth = _stored_depth(name)
    peak = 2**depth - 1
    rgb = rgb.detach().to("cpu", torch.float32).clamp(0, 1)
    if layout.family == "rgb":
        planes = [rgb.permute(1, 2, 0) * peak]
    else:
        offset, luma_span, centre, chroma_span = _code_values(depth, tags.full_range)
        kr, kb = LUMA_WEIGHTS[tags.matrix]
        red, green, blue = rgb
        luma = kr * red + (1 - kr - kb) * green + kb * blue
        planes = [luma * luma_span + offset]
        if layout.family == "yuv":
            for colour, weight in ((blue, kb), (red, kr)):
                chroma = _downsample_chroma((colour - luma) / (2 * (1 - weight)), layout)
                planes.append(chroma * chroma_span + centre)
    dtype = np.uint8 if depth == 8 else np.uint16
    arrays = [plane.add(0.5).floor_().clamp_(0, peak).numpy().astype(dtype) for plane in planes]
    frame = av.VideoFrame(rgb.shape[2], rgb.shape[1], name)
    _write_planes(frame, arrays)
    if name != format_name:
        frame = repack(frame, format_name)
    frame.colorspace = tags.matrix
    frame.color_range = RANGE_FULL if tags.full_range else 1
    frame.color_primaries = tags.primaries
    frame.color_trc = tags.transfer
    return frame


def repack(frame: av.VideoFrame, format_name: str) -> av.VideoFrame:
    """The same pixels in another layout.

    On one thread: libswscale 9.5 loses whole rows of small p010 pictures when it may use more.
    """
    return frame.reformat(format=format_name, threads=1)


def _stored_depth(planar_name: str) -> int:
    return max(component.bits for component in av.VideoFormat(planar_name, 16, 16).components)


def _code_values(depth: int, full_range: bool) -> tuple[float, float, float, float]:
    """(luma offset, luma span, chroma centre, chroma span) in code values."""
    centre = float(2 ** (depth - 1))
    if full_range:
        return 0.0, 2.0**depth - 1, centre, 2.0**depth - 1
    unit = 2.0 ** (depth - 8)
    return 16 * unit, 219 * unit, centre, 224 * unit


def _upsample_chroma(chroma: Tensor, layout: PixelLayout) -> Tensor:
    if layout.sub_x:  # co-sited: even columns are samples, odd ones lie halfway
        right = torch.cat([chroma[:, 1:], chroma[:, -1:]], 1)
        chroma = torch.stack([chroma, (chroma + right) / 2], 2).flatten(1)
    if layout.sub_y:  # luma rows lie a quarter of a chroma row above and below each sample
        above = torch.cat([chroma[:1], chroma[:-1]])
        below = torch.cat([chroma[1:], chroma[-1:]])
        chroma = torch.stack([0.75 * chroma + 0.25 * above, 0.75 * chroma + 0.25 * below], 1)
        chroma = chroma.flatten(0, 1)
    return chroma


def _downsample_chroma(chroma: Tensor, layout: PixelLayout) -> Tensor:
    if layout.sub_x:
        if chroma.shape[1] % 2:
            chroma = torch.cat([chroma, chroma[:, -1:]], 1)
        left = torch.cat([chroma[:, :1], chroma[:, 1:-1:2]], 1)
        chroma = 0.25 * left + 0.5 * chroma[:, ::2] + 0.25 * chroma[:, 1::2]
    if layout.sub_y:
        if chroma.shape[0] % 2:
            chroma = torch.cat([chroma, chroma[-1:]])
        chroma = (chroma[::2] + chroma[1::2]) / 2
    return chroma


def _read_planes(frame: av.VideoFrame) -> list[np.ndarray]:
    """Planes as float32 (h, w), or (h, w, 3) for packed RGB, without the rows' padding."""
    wide = _stored_depth(frame.format.name) > 8
    packed = frame.format.is_rgb
    arrays: list[np.ndarray] = []
    for plane in frame.planes:
        rows = np.frombuffer(memoryview(plane), np.uint16 if wide else np.uint8).reshape(
            plane.height, -1
        )
        pixels = rows[:, : plane.width * (3 if packed else 1)].astype(np.float32)
        arrays.append(pixels.reshape(plane.height, plane.width, 3) if packed else pixels)
    return arrays


def _write_planes(frame: av.VideoFrame, arrays: list[np.ndarray]) -> None:
    for plane, array in zip(frame.planes, arrays):
        rows = array.reshape(array.shape[0], -1)
        padded = np.zeros((plane.height, plane.line_size // rows.itemsize), rows.dtype)
        padded[:, : rows.shape[1]] = rows
        plane.update(padded.tobytes())
