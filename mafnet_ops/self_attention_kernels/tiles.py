"""What the kernels share: which rows a program has, how they are read, and products."""

import triton
import triton.language as tl


@triton.jit
def own_block(BLOCK: tl.constexpr, heads, length, cells, blocks):
    """Of the flat program id (a grid's other axes end at 65,535): image, head, window, first row of the block."""
    index = tl.program_id(0)
    block = index % blocks
    cell = index // blocks % cells
    plane = index // blocks // cells
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), cell, block * BLOCK


@triton.jit
def rectangle(cell, length, window, height, width, WINDOWED: tl.constexpr):
    """First token, pixels in a row and tokens of a window; the right and bottom edge may cut it."""
    first = 0
    across = 1
    count = length
    if WINDOWED:
        columns = tl.cdiv(width, window)
        y = cell // columns * window
        x = cell % columns * window
        first = y * width + x
        across = tl.minimum(window, width - x)
        count = tl.minimum(window, height - y) * across
    return first, across, count


@triton.jit
def tokens_at(index, first, across, width, WINDOWED: tl.constexpr, WIDE: tl.constexpr):
    """The tokens at places ``index`` of a window."""
    tokens = index
    if WINDOWED:
        tokens = first + index // across * width + index % across
    if WIDE:
        tokens = tokens.to(tl.int64)
    return tokens


@triton.jit
def offsets_of(tokens, strides, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets (tokens, BLOCK) within one image and head; ``strides`` are of image, head, token, channel."""
    channels = tl.arange(0, BLOCK)
    if WIDE:
        channels = channels.to(tl.int64)
    return tokens[:, None] * strides[2] + channels[None, :] * strides[3]


@triton.jit
def mask_of(valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return valid[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]


@triton.jit
def load_rows(
    pointer,
    tokens,
    valid,
    strides,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The channels of ``tokens``, (tokens, BLOCK); zero beyond WIDTH and, if MASKED, where not ``valid``."""
    pointers = pointer + offsets_of(tokens, strides, BLOCK, WIDE)
    if MASKED:
        return tl.load(pointers, mask=mask_of(valid, WIDTH, BLOCK), other=0.0)
    if WIDTH < BLOCK:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK) < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_dot(total, a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)
