"""Every op in plain, differentiable PyTorch: the oracle of the tests and the fallback where no kernel is built.

Nothing here depends on a compiled extension. The functions take any strides, any H and W, run on any
device and in fp64, fp32, fp16 and bf16; coordinates are computed in fp32 (fp64 for double) whatever the
dtype of the features. In fp64 every function is twice differentiable.

Rules for odd coordinates, shared by all sampling ops: NaN in, NaN out; a coordinate that is infinite or
merely far outside samples the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_SCORES = 1 << 25
"""Bound on the attention scores held at once (elements): 128 MiB in fp32."""


# ------------------------------------------------------------------------------------------ sampling


def coordinate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates and accumulators for features of ``dtype``: fp64 for double, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_pixels(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """``image`` (B, C, H, W) at integer positions y, x (B, P), already in range -> (B, C, P)."""
    batch, channels, height, width = image.shape
    index = (y * width + x).long().unsqueeze(1).expand(batch, channels, y.shape[1])
    return image.reshape(batch, channels, height * width).gather(2, index)


def _corner(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """One corner of an interpolation stencil: the pixel where (y, x) is inside, zero elsewhere."""
    height, width = image.shape[-2:]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    safe_y = torch.where(inside, y, torch.zeros_like(y))
    safe_x = torch.where(inside, x, torch.zeros_like(x))
    # Selected, not multiplied by 0: the NaN of a NaN coordinate must not reach the gradient of a pixel.
    return torch.where(inside.unsqueeze(1), gather_pixels(image, safe_y, safe_x), 0.0)


def _bound(x: Tensor, low: float, high: float) -> Tensor:
    """As ``x.clamp(low, high)``, with slope 1 at the bounds themselves, where clamp has 1 before torch 2.15, then 0."""
    return x.masked_fill(x < low, low).masked_fill(x > high, high)  # keeps NaN


def sample_bilinear(image: Tensor, y: Tensor, x: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Bilinear samples with zeros outside; for other paddings y and x are in range, and only a neighbour may not be.

    Args:
        image: (B, C, H, W), already in the dtype to compute in.
        y, x: (B, P) pixel coordinates, pixel centres at integers.

    Returns:
        (B, C, P). At an integer coordinate the gradient is the right-hand one (the cell [n, n + 1)).
    """
    height, width = image.shape[-2:]
    y, x = _bound(y, -1, height), _bound(x, -1, width)  # -1 and the size itself sample zero
    y0, x0 = y.detach().floor(), x.detach().floor()
    fy, fx = (y - y0).unsqueeze(1), (x - x0).unsqueeze(1)
    y1, x1 = _pad_tap(y0 + 1, height, padding_mode), _pad_tap(x0 + 1, width, padding_mode)
    top = _corner(image, y0, x0) * (1 - fx) + _corner(image, y0, x1) * fx
    bottom = _corner(image, y1, x0) * (1 - fx) + _corner(image, y1, x1) * fx
    return top * (1 - fy) + bottom * fy


def _sample_bilinear_once(image: Tensor, y: Tensor, x: Tensor, width_hint: int) -> Tensor:
    """As :func:`sample_bilinear` by ``F.grid_sample``: 2.5x faster on a CPU, its second derivative left to
    the version of torch, and up to 1e-4 px off at 1080p, since it takes normalised coordinates.
    ``width_hint`` divides P."""
    height, width = image.shape[-2:]
    # grid_sample's index of an infinite coordinate is undefined. Rounding moves a coordinate of -1 or of the size a
    # little into the image, so that far ones are kept a whole pixel from it.
    y, x = _bound(y, -2, height + 1), _bound(x, -2, width + 1)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    grid = grid.view(image.shape[0], -1, width_hint, 2)
    return F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False).flatten(2)


# ----------------------------------------------------------------------------------------- flow_warp


def _reflect(coordinate: Tensor, size: int) -> Tensor:
    """Reflect about the first and last pixel centres (period 2 (size - 1))."""
    if size == 1:
        return coordinate * 0
    period = 2.0 * (size - 1)
    phase = torch.remainder(coordinate, period)
    return torch.where(phase > size - 1, period - phase, phase)


def _pad_coordinate(coordinate: Tensor, size: int, padding_mode: str) -> Tensor:
    if padding_mode == "border":
        return _bound(coordinate, 0, size - 1)
    if padding_mode == "reflection":
        return _reflect(coordinate, size)
    return coordinate


def _pad_tap(index: Tensor, size: int, padding_mode: str) -> Tensor:
    """A stencil tap beside an in-range coordinate, brought back into the image (not for zeros)."""
    if padding_mode == "zeros":
        return index
    return _pad_coordinate(index, size, padding_mode).clamp(0, size - 1)


def _cubic_weights(t: Tensor) -> list[Tensor]:
    """Keys' cubic, a = -0.75 (as ``F.grid_sample``), for the taps at -1, 0, 1, 2; t in [0, 1)."""
    a = -0.75

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _sample_bicubic(image: Tensor, y: Tensor, x: Tensor, padding_mode: str) -> Tensor:
    height, width = image.shape[-2:]
    y, x = _bound(y, -3, height + 2), _bound(x, -3, width + 2)  # beyond these every tap is padding
    y0, x0 = y.detach().floor(), x.detach().floor()
    weights_y, weights_x = _cubic_weights(y - y0), _cubic_weights(x - x0)
    out = image.new_zeros(())
    for i, wy in enumerate(weights_y):
        row = image.new_zeros(())
        tap_y = _pad_tap(y0 + (i - 1), height, padding_mode)
        for j, wx in enumerate(weights_x):
            tap_x = _pad_tap(x0 + (j - 1), width, padding_mode)
            row = row + _corner(image, tap_y, tap_x) * wx.unsqueeze(1)
        out = out + row * wy.unsqueeze(1)
    return out


def flow_warp(
    input: Tensor,
    flow: Tensor,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`mafnet_ops.flow_warp`, see there."""
    batch, channels, height, width = input.shape
    out_height, out_width = flow.shape[1:3]
    compute = coordinate_dtype(input.dtype)
    if input.numel() == 0 or flow.numel() == 0:
        empty = input.new_zeros(batch, channels, out_height, out_width) + flow.sum() * 0
        mask = input.new_zeros(batch, 1, out_height, out_width)
        return (empty, mask) if return_mask else empty
    image, offset = input.to(compute), flow.to(compute)
    rows = torch.arange(out_height, device=flow.device, dtype=compute).view(1, -1, 1)
    columns = torch.arange(out_width, device=flow.device, dtype=compute).view(1, 1, -1)
    x = (columns + offset[..., 0]).reshape(batch, -1)
    y = (rows + offset[..., 1]).reshape(batch, -1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if interpolation == "bicubic" and padding_mode == "border":
        px, py = x, y  # the taps are clamped, not the coordinate
    else:
        px = _pad_coordinate(x, width, padding_mode)
        py = _pad_coordinate(y, height, padding_mode)
    if interpolation == "nearest":
        nan = ((px + py) * 0).detach()
        nan = torch.where(torch.isnan(px) | torch.isnan(py), nan, torch.zeros_like(nan))
        out = _corner(image, py.detach().round(), px.detach().round()) + nan.unsqueeze(1)
        out = out + (offset.sum() * 0).nan_to_num(
            0, 0, 0
        )  # keeps flow in the graph: its gradient is zero
    elif interpolation == "bicubic":
        out = _sample_bicubic(image, py, px, padding_mode)
    else:
        out = sample_bilinear(image, py, px, padding_mode)
    out = out.view(batch, channels, out_height, out_width).to(input.dtype)
    if input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    if not return_mask:
        return out
    return out, inside.view(batch, 1, out_height, out_width).to(input.dtype)


# --------------------------------------------------------------------------- deformable convolution


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The definition of :func:`mafnet_ops.modulated_deform_conv2d`, see there."""
    batch, in_channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    taps = kernel_h * kernel_w
    out_h, out_w = offset.shape[-2:]
    offset_groups = offset.shape[1] // (2 * taps)
    groups = in_channels // group_channels
    if batch == 0 or out_h * out_w == 0:
        arguments = [t for t in (input, offset, mask, weight, bias) if t is not None]
        unused = torch.stack([t.to(input.dtype).sum() for t in arguments]).sum() * 0
        return input.new_zeros(batch, out_channels, out_h, out_w) + unused  # keeps all in the graph

    compute = coordinate_dtype(input.dtype)
    dy, dx = offset.to(compute).reshape(batch, offset_groups, taps, 2, out_h, out_w).unbind(3)
    arange = lambda n: torch.arange(n, device=input.device, dtype=compute)  # noqa: E731
    tap_y = (arange(kernel_h) * dilation[0]).repeat_interleave(kernel_w).view(1, 1, -1, 1, 1)
    tap_x = (arange(kernel_w) * dilation[1]).repeat(kernel_h).view(1, 1, -1, 1, 1)
    y = dy + tap_y + (arange(out_h) * stride[0] - padding[0]).view(1, 1, 1, -1, 1)
    x = dx + tap_x + (arange(out_w) * stride[1] - padding[1]).view(1, 1, 1, 1, -1)
    y = y.reshape(batch * offset_groups, -1)
    x = x.reshape(batch * offset_groups, -1)

    image = input.to(compute).reshape(batch * offset_groups, -1, height, width)
    if compute == torch.float64:
        columns = sample_bilinear(image, y, x)
    else:
        columns = _sample_bilinear_once(image, y, x, out_w)
    columns = columns.view(batch, offset_groups, -1, taps, out_h * out_w)
    if mask is not None:
        columns = columns * mask.to(compute).reshape(batch, offset_groups, 1, taps, out_h * out_w)
    columns = columns.reshape(batch, groups, group_channels * taps, out_h * out_w).to(input.dtype)
    kernel = weight.reshape(1, groups, out_channels // groups, group_channels * taps)
    out = torch.matmul(kernel, columns).view(batch, out_channels, out_h, out_w)
    if bias is not None:
        out = out + bias.view(1, -1, 1, 1)
    return out.to(input.dtype)


def deform_align_offsets(
    raw: Tensor,
    flow_1: Tensor | None,
    flow_2: Tensor | None,
    max_residue_magnitude: float,
) -> tuple[Tensor, Tensor]:
    """Split a raw head output (N, 3 * G * K, H, W) into offsets (dy, dx) and mask, both at least fp32.

    The first two thirds become ``max_residue_magnitude * tanh(.)`` plus the base flow (x, y) flipped to
    (dy, dx); the last third a sigmoid mask. With two flows the first half of the offset groups takes
    ``flow_1`` and the second half ``flow_2``. With an infinite ``max_residue_magnitude`` there is no tanh: the
    raw values are the residues.
    """
    compute = coordinate_dtype(raw.dtype)
    residue, mask = raw.to(compute).split([raw.shape[1] // 3 * 2, raw.shape[1] // 3], 1)
    bounded = max_residue_magnitude != math.inf
    offset = max_residue_magnitude * torch.tanh(residue) if bounded else residue
    flows = [f for f in (flow_1, flow_2) if f is not None]
    if flows:
        pairs = offset.shape[1] // 2 // len(flows)
        base = [f.to(compute).permute(0, 3, 1, 2).flip(1).repeat(1, pairs, 1, 1) for f in flows]
        offset = offset + torch.cat(base, 1)
    return offset, torch.sigmoid(mask)


# ---------------------------------------------------------------------------------- channel attention


def channel_statistics(input: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 2, C): the means over the pixels, then the maxima."""
    mean = input.mean((2, 3), dtype=coordinate_dtype(input.dtype)).to(input.dtype)
    return torch.stack([mean, input.amax((2, 3))], 1)


def channel_scale(input: Tensor, gate: Tensor) -> Tensor:
    """(N, C, H, W) times (N, C)."""
    return input * gate[:, :, None, None]


# --------------------------------------------------------------------------- pyramid spatial attention


def pool_concat(input: Tensor) -> Tensor:
    """The definition of :func:`mafnet_ops.pool_concat`, see there."""
    return torch.cat([F.max_pool2d(input, 3, 2, 1), F.avg_pool2d(input, 3, 2, 1)], 1)


def pointwise_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """LeakyReLU of a 1 x 1 convolution."""
    return F.leaky_relu(F.conv2d(input, weight, bias), negative_slope)


def pool_concat_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """The definition of :func:`mafnet_ops.pool_concat_conv`, see there."""
    out = F.conv2d(pool_concat(input), weight, bias, padding=weight.shape[-1] // 2)
    return F.leaky_relu(out, negative_slope)


def resize_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    negative_slope: float,
) -> Tensor:
    """LeakyReLU of a 3 x 3 convolution of ``input``, resized bilinearly to (height, width)."""
    if tuple(input.shape[2:]) != (height, width):
        input = F.interpolate(input, size=(height, width), mode="bilinear", align_corners=False)
    return F.leaky_relu(F.conv2d(input, weight, bias, padding=1), negative_slope)


def resize_add(input: Tensor, other: Tensor) -> Tensor:
    """The definition of :func:`mafnet_ops.resize_add`, see there."""
    size = (other.shape[-2], other.shape[-1])
    return F.interpolate(input, size=size, mode="bilinear", align_corners=False) + other


def spatial_gate(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    negative_slope: float,
    mask_from: str,
) -> Tensor:
    """The definition of :func:`mafnet_ops.spatial_gate`, see there."""
    feature = F.leaky_relu(F.conv2d(mask, weight, bias), negative_slope)
    gate = torch.sigmoid(mask if mask_from == "m" else feature)
    return input * (gate * scale) + feature


# -------------------------------------------------------------------------------------- self-attention


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    # Scores of half features overflow in fp16 and are off by whole units in bf16: all of it is fp32.
    compute = coordinate_dtype(query.dtype)
    scores = torch.matmul(query.to(compute) * scale, key.to(compute).transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, -1), value.to(compute)).to(value.dtype)


def self_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v over (N, heads, L, D), in blocks of queries.

    At most ``MAX_SCORES`` scores exist at a time (one query row at least); where more than one block is needed the
    backward recomputes each block's scores, so memory stays O(L) there too. torch.func cannot recompute: under it
    the weights of all blocks are kept.
    """
    batch, heads, length, _ = query.shape
    rows = max(1, MAX_SCORES // max(1, batch * heads * key.shape[2]))
    if rows >= length:
        return _attend(query, key, value, scale)
    blocks = []
    for start in range(0, length, rows):
        block = query[:, :, start : start + rows]
        if torch.is_grad_enabled() and torch._C._functorch.maybe_current_level() is None:
            blocks.append(checkpoint(_attend, block, key, value, scale, use_reentrant=False))
        else:
            blocks.append(_attend(block, key, value, scale))
    return torch.cat(blocks, 2)


def _bands(size: int, window: int) -> list[tuple[int, int, int]]:
    """Split [0, size) into (start, stop, window): the whole windows, then the shorter last one."""
    whole = size // window * window
    bands = [(0, whole, window)] if whole else []
    return bands + ([(whole, size, size - whole)] if whole < size else [])


def _to_windows(image: Tensor, height: int, width: int) -> Tensor:
    """(N, heads, H, W, D) of whole windows -> (N * windows, heads, height * width, D)."""
    batch, heads, rows, columns, depth = image.shape
    ny, nx = rows // height, columns // width
    windows = image.reshape(batch, heads, ny, height, nx, width, depth).permute(0, 2, 4, 1, 3, 5, 6)
    return windows.reshape(batch * ny * nx, heads, height * width, depth)


def windowed_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int,
    image_size: Sequence[int],
) -> Tensor:
    """Attention within window x window squares of an image whose rows are the tokens.

    Windows start at pixel (0, 0); those cut by the right or bottom edge are smaller. Each kind of
    rectangle (inside, right, bottom, corner) is one batch, so nothing is padded or masked.
    """
    batch, heads, _, out_depth = value.shape
    height, width = image_size
    images = [t.reshape(batch, heads, height, width, t.shape[-1]) for t in (query, key, value)]
    out_rows = []
    for y0, y1, wh in _bands(height, window):
        out_columns = []
        for x0, x1, ww in _bands(width, window):
            ny, nx = (y1 - y0) // wh, (x1 - x0) // ww
            parts = (t[:, :, y0:y1, x0:x1] for t in images)
            q, k, v = (_to_windows(t, wh, ww) for t in parts)
            out = self_attention(q, k, v, scale)
            out = out.view(batch, ny, nx, heads, wh, ww, out_depth).permute(0, 3, 1, 4, 2, 5, 6)
            out_columns.append(out.reshape(batch, heads, y1 - y0, x1 - x0, out_depth))
        out_rows.append(torch.cat(out_columns, 3))
    return torch.cat(out_rows, 2).reshape(batch, heads, height * width, out_depth)
