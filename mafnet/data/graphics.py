"""Sheets of rendered text, tables, lines and shapes, so that signs and calendars are learnt.

Sheets are drawn for being seen at half to a third of their size (see ``synthesis``), which also
smooths what PIL draws without anti-aliasing.
"""

from __future__ import annotations

import string

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

ByteArray = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

_VOCABULARY = """
January February March April May June July August September October November December Monday
Tuesday Wednesday Thursday Friday Saturday Sunday OPEN CLOSED EXIT STOP SALE Hotel Station Street
Bakery Museum Library Garden Bridge Market Harbour Theatre Coffee Fresh bread every day from seven
until late the quick signal follows a narrow path between bright walls
"""
_WORDS = _VOCABULARY.split()


def graphics_sheet(
    rng: np.random.Generator, side: int, photo: ByteArray | None = None
) -> ByteArray:
    """A random sheet (side, side, 3) uint8; ``photo`` (side, side, 3), where given, lies below."""
    if photo is None:
        image = _paper(rng, side)
    else:
        image = Image.fromarray(photo)
    draw = ImageDraw.Draw(image)
    painters = (_paragraph, _paragraph, _headline, _calendar, _stripes, _checkers, _grid, _shapes)
    for number in rng.choice(len(painters), size=7):
        x0, y0 = (int(v) for v in rng.uniform(-0.1, 0.75, size=2) * side)
        width, height = (int(v) for v in rng.uniform(0.2, 0.55, size=2) * side)
        box = (x0, y0, x0 + width, y0 + height)
        if rng.random() < 0.5:
            draw.rectangle(box, fill=_colour(rng))
        painters[number](draw, rng, box)
    sheet = np.asarray(image)
    return np.ascontiguousarray(np.rot90(sheet, int(rng.integers(4)) if rng.random() < 0.3 else 0))


Box = tuple[int, int, int, int]


def _colour(rng: np.random.Generator) -> Colour:
    """Grey levels, black and white included, as often as colours."""
    kind = rng.random()
    if kind < 0.3:
        level = int(rng.choice([0, 10, 30, 225, 245, 255]))
        return level, level, level
    if kind < 0.5:
        level = int(rng.integers(256))
        return level, level, level
    red, green, blue = (int(v) for v in rng.integers(256, size=3))
    return red, green, blue


def _paper(rng: np.random.Generator, side: int) -> Image.Image:
    """A plain or softly shaded ground."""
    first, second = np.array(_colour(rng)), np.array(_colour(rng))
    strength = rng.random() ** 2
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, side)
    ramp = 0.5 + 0.7 * (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])
    shade = np.clip(strength * ramp, 0, 1)[..., None]
    return Image.fromarray((first + (second - first) * shade).astype(np.uint8))


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _word(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.7:
        return str(rng.choice(_WORDS))
    if kind < 0.85:
        return str(int(rng.integers(10 ** int(rng.integers(1, 6)))))
    letters = rng.choice(list(string.ascii_letters + string.digits + "&%!?-+/"), size=6)
    return "".join(letters)


def _paragraph(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box) -> None:
    size = rng.uniform(14, 44)
    font, ink = _font(size), _colour(rng)
    words = max(1, int((box[2] - box[0]) / (3.2 * size)))
    for y in np.arange(box[1], box[3], size * rng.uniform(1.1, 1.6)):
        line = " ".join(_word(rng) for _ in range(words))
        draw.text((box[0], float(y)), line, fill=ink, font=font)


def _headline(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box) -> None:
    size = rng.uniform(50, 160)
    stroke = int(rng.integers(0, 5)) if rng.random() < 0.4 else 0
    draw.text(
        box[:2], _word(rng), fill=_colour(rng), font=_font(size),
        stroke_width=stroke, stroke_fill=_colour(rng),
    )  # fmt: skip


def _calendar(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box) -> None:
    """A month: a row of day names and five rows of numbers, ruled half of the time."""
    width, height = (box[2] - box[0]) / 7, (box[3] - box[1]) / 7
    font, ink, line = _font(0.55 * min(width, height)), _colour(rng), _colour(rng)
    ruled = rng.random() < 0.5
    draw.text(box[:2], str(rng.choice(_WORDS[:12])), fill=ink, font=_font(0.8 * height))
    for cell in range(42):
        row, column = divmod(cell, 7)
        x, y = box[0] + column * width, box[1] + (row + 1) * height
        text = "MTWTFSS"[column] if row == 0 else str(cell - 6)
        draw.text((x + 0.2 * width, y + 0.15 * height), text, fill=ink, font=font)
        if ruled:
            draw.rectangle((x, y, x + width, y + height), outline=line, width=2)


def _stripes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box) -> None:
    """Parallel lines at any angle whose period may grow, as in a test chart."""
    ink, width = _colour(rng), rng.uniform(2, 14)
    angle, growth = rng.uniform(0, np.pi), rng.uniform(1.0, 1.06)
    reach = box[2] - box[0]
    middle = complex((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    along, across = np.exp(1j * angle), 1j * np.exp(1j * angle)
    offset = -reach / 2
    while offset < reach / 2:
        start = middle + offset * across - 0.4 * reach * along
        end = middle + offset * across + 0.4 * reach * along
        draw.line((start.real, start.imag, end.real, end.imag), fill=ink, width=round(width))
        offset += 2 * width
        width *= growth


def _checkers(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box) -> None:
    ink, size = _colour(rng), rng.uniform(6, 40)
    for row, y in enumerate(np.arange(box[1], box[3], size)):
        for x in np.arange(box[0] + (row % 2) * size, box[2], 2 * size):
            draw.rectangle((float(x), float(y), float(x + size), float(y + size)), fill=ink)


def _grid(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box) -> None:
    ink, width = _colour(rng), int(rng.integers(1, 7))
    for x in np.arange(box[0], box[2], rng.uniform(10, 70)):
        draw.line((float(x), box[1], float(x), box[3]), fill=ink, width=width)
    for y in np.arange(box[1], box[3], rng.uniform(10, 70)):
        draw.line((box[0], float(y), box[2], float(y)), fill=ink, width=width)


def _shapes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box) -> None:
    """Ellipses, polygons and bare outlines."""
    origin, extent = np.array(box[:2]), np.array([box[2] - box[0], box[3] - box[1]])
    for _ in range(6):
        corners = origin + rng.random((int(rng.integers(3, 7)), 2)) * extent
        fill = _colour(rng) if rng.random() < 0.6 else None
        outline, width = _colour(rng), int(rng.integers(1, 10))
        if rng.random() < 0.5:
            (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
            draw.ellipse((x0, y0, x1, y1), fill=fill, outline=outline, width=width)
        else:
            draw.polygon([tuple(c) for c in corners], fill=fill, outline=outline, width=width)
