"""Independent definitions of the ops: plain loops in fp64, and PyTorch that runs in any dtype as the baseline.

Nothing here imports the project. Loops go over pixels and taps in Python, channels by NumPy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray
Pair = tuple[int, int]


def to_array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


# --------------------------------------------------------------------------- deformable convolution


def bilinear_at(image: Array, y: float, x: float) -> Array:
    """``image`` (C, H, W) at the point (y, x), zeros outside -> (C,); NaN where y or x is."""
    channels, height, width = image.shape
    if math.isnan(y) or math.isnan(x):
        return np.full(channels, math.nan)
    total = np.zeros(channels)
    if math.isinf(y) or math.isinf(x):
        return total
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return total


def deform_conv2d_loop(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """Modulated deformable convolution from its formula, channel by channel for the groups."""
    x, o, w = to_array(input), to_array(offset), to_array(weight)
    batch, channels = x.shape[:2]
    out_channels, group_channels, kernel_h, kernel_w = w.shape
    taps = kernel_h * kernel_w
    offset_groups = o.shape[1] // (2 * taps)
    of_offset_group = np.arange(channels) // (channels // offset_groups)
    out = np.zeros((batch, out_channels, *o.shape[2:]))
    for n, i, j in np.ndindex(batch, *o.shape[2:]):
        samples = np.zeros((channels, taps))
        for g, k in np.ndindex(offset_groups, taps):
            plane = g * taps + k
            y = i * stride[0] - padding[0] + k // kernel_w * dilation[0] + o[n, 2 * plane, i, j]
            x_ = j * stride[1] - padding[1] + k % kernel_w * dilation[1] + o[n, 2 * plane + 1, i, j]
            mine = of_offset_group == g
            m = 1.0 if mask is None else float(mask[n, plane, i, j])
            samples[mine, k] = m * bilinear_at(x[n][mine], y, x_)
        per_group = out_channels // (channels // group_channels)
        for c in range(out_channels):
            first = c // per_group * group_channels
            part = samples[first : first + group_channels]
            out[n, c, i, j] = (w[c].reshape(group_channels, taps) * part).sum()
    if bias is not None:
        out += to_array(bias)[:, None, None]
    return torch.from_numpy(out)


def deform_conv2d_torch(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """The same in differentiable PyTorch: a padded image, advanced indexing, one grouped 1 x 1 convolution.

    Features stay in their dtype, coordinates are fp32 at least. For offsets that are finite.
    """
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    compute = torch.promote_types(offset.dtype, torch.float32)
    offset_groups = offset.shape[1] // (2 * kernel_h * kernel_w)
    shape = (batch, offset_groups, kernel_h, kernel_w, out_h, out_w)
    # Two rows and columns of zeros on each side: every point is clamped into them.
    image = F.pad(input, (2, 2, 2, 2))
    image = image.view(batch, offset_groups, channels // offset_groups, height + 4, width + 4)
    shift = offset.to(compute).reshape(batch, offset_groups, kernel_h, kernel_w, 2, out_h, out_w)
    rows = (torch.arange(out_h) * stride[0] - padding[0]).view(-1, 1)
    rows = rows + (torch.arange(kernel_h) * dilation[0]).view(-1, 1, 1, 1)
    columns = torch.arange(out_w) * stride[1] - padding[1]
    columns = columns + (torch.arange(kernel_w) * dilation[1]).view(-1, 1, 1)
    y = (shift[:, :, :, :, 0] + rows).clamp(-2, height + 1) + 2
    x = (shift[:, :, :, :, 1] + columns).clamp(-2, width + 1) + 2
    top, left = y.detach().floor().clamp(0, height + 2), x.detach().floor().clamp(0, width + 2)
    n = torch.arange(batch).view(-1, 1, 1, 1, 1, 1).expand(shape)
    g = torch.arange(offset_groups).view(-1, 1, 1, 1, 1).expand(shape)
    samples = torch.zeros((), dtype=compute)
    for i in (0, 1):
        for j in (0, 1):
            share = (1 - (y - top - i).abs()) * (1 - (x - left - j).abs())
            pixels = image[n, g, :, (top + i).long(), (left + j).long()]  # (*shape, C / G)
            samples = samples + share.unsqueeze(-1) * pixels
    if mask is not None:
        samples = samples * mask.to(compute).reshape(shape).unsqueeze(-1)
    samples = samples.permute(0, 1, 6, 2, 3, 4, 5).to(input.dtype)
    flat = samples.reshape(batch, channels * kernel_h * kernel_w, out_h, out_w)
    kernel = weight.reshape(out_channels, group_channels * kernel_h * kernel_w, 1, 1)
    return F.conv2d(flat, kernel, bias, groups=channels // group_channels)


def align_offsets_loop(
    raw: Tensor,
    flow_1: Tensor | None,
    flow_2: Tensor | None,
    taps: int,
    max_residue_magnitude: float,
) -> tuple[Tensor, Tensor]:
    """Offsets and mask of a deformable alignment, channel by channel; no tanh where the residue is infinite."""
    values = to_array(raw)
    pairs = values.shape[1] // 3  # G * K
    offset, mask = np.zeros_like(values[:, : 2 * pairs]), np.zeros_like(values[:, :pairs])
    for pair in range(pairs):
        group, groups = pair // taps, pairs // taps
        flow = flow_1 if flow_2 is None or group < groups / 2 else flow_2
        for axis in (0, 1):  # dy, dx
            channel = 2 * pair + axis
            offset[:, channel] = values[:, channel]
            if math.isfinite(max_residue_magnitude):
                offset[:, channel] = max_residue_magnitude * np.tanh(values[:, channel])
            if flow is not None:
                offset[:, channel] += to_array(flow)[..., 1 - axis]
        mask[:, pair] = 1 / (1 + np.exp(-values[:, 2 * pairs + pair]))
    return torch.from_numpy(offset), torch.from_numpy(mask)


# --------------------------------------------------------------------------- pyramid spatial attention


def pool_concat_loop(x: Array) -> Array:
    """(C, H, W) -> (2 C, ceil(H / 2), ceil(W / 2)): maximum over what is inside, mean over all nine."""
    channels, height, width = x.shape
    out = np.zeros((2 * channels, (height + 1) // 2, (width + 1) // 2))
    for i, j in np.ndindex(*out.shape[1:]):
        rows = slice(max(2 * i - 1, 0), 2 * i + 2)
        columns = slice(max(2 * j - 1, 0), 2 * j + 2)
        window = x[:, rows, columns].reshape(channels, -1)
        out[:channels, i, j] = window.max(1)
        out[channels:, i, j] = window.sum(1) / 9
    return out


def conv_loop(x: Array, weight: Array, bias: Array) -> Array:
    """(C, H, W) by (C_out, C, k, k), same size."""
    radius = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (radius, radius), (radius, radius)))
    out = np.zeros((weight.shape[0], *x.shape[1:]))
    for i, j in np.ndindex(*out.shape[1:]):
        window = padded[:, i : i + 2 * radius + 1, j : j + 2 * radius + 1]
        out[:, i, j] = (weight * window).sum((1, 2, 3)) + bias
    return out


def resize_loop(x: Array, height: int, width: int) -> Array:
    """Bilinear with half-pixel centres, the edge repeated."""

    def along(out: int, size: int, index: int) -> tuple[int, int, float]:
        at = max((index + 0.5) * size / out - 0.5, 0.0)
        low = min(int(at), size - 1)
        return low, min(low + 1, size - 1), at - low

    result = np.zeros((x.shape[0], height, width))
    for i, j in np.ndindex(height, width):
        y0, y1, fy = along(height, x.shape[1], i)
        x0, x1, fx = along(width, x.shape[2], j)
        top = x[:, y0, x0] * (1 - fx) + x[:, y0, x1] * fx
        bottom = x[:, y1, x0] * (1 - fx) + x[:, y1, x1] * fx
        result[:, i, j] = top * (1 - fy) + bottom * fy
    return result


def leaky_relu_loop(x: Array, slope: float) -> Array:
    return np.where(x > 0, x, slope * x)


def gate_loop(
    x: Array, mask: Array, weight: Array, bias: Array, scale: float, slope: float, mask_from: str
) -> Array:
    feature = leaky_relu_loop(conv_loop(mask, weight, bias), slope)
    gate = 1 / (1 + np.exp(-(mask if mask_from == "m" else feature)))
    return x * gate * scale + feature


def pyramid_loop(
    x: Array,
    weights: dict[str, Array],
    biases: dict[str, Array],
    scale: float = 2.0,
    slope: float = 0.1,
    mask_from: str = "m",
) -> Array:
    """Pyramid spatial attention of one image (C, H, W)."""

    def conv(name: str, value: Array) -> Array:
        return conv_loop(value, weights[name], biases[name])

    def lrelu(name: str, value: Array) -> Array:
        return leaky_relu_loop(conv(name, value), slope)

    level_1 = lrelu("pool_1", pool_concat_loop(lrelu("reduce", x)))
    level_2 = lrelu("pool_2", pool_concat_loop(lrelu("level_2", level_1)))
    level_2 = resize_loop(lrelu("conv_2", level_2), *level_1.shape[1:])
    merged = resize_loop(lrelu("add", level_2 + level_1), *x.shape[1:])
    mask = conv("mask", merged)
    return gate_loop(x, mask, weights["feature"], biases["feature"], scale, slope, mask_from)


class PyramidArrays:
    """:func:`pyramid_loop` without loops over pixels, for thousands of sizes; a test holds it to the loop."""

    def __init__(self, weights: dict[str, Array], biases: dict[str, Array]) -> None:
        self.weights, self.biases = weights, biases
        self.resizes: dict[Pair, Array] = {}

    def __call__(self, x: Array) -> Array:
        level_1 = self.lrelu("pool_1", self.pools(self.lrelu("reduce", x)))
        level_2 = self.lrelu("pool_2", self.pools(self.lrelu("level_2", level_1)))
        level_2 = self.resize(self.lrelu("conv_2", level_2), *level_1.shape[1:])
        merged = self.resize(self.lrelu("add", level_2 + level_1), *x.shape[1:])
        mask = self.conv("mask", merged)
        return x / (1 + np.exp(-mask)) * 2 + self.lrelu("feature", mask)

    def conv(self, name: str, x: Array) -> Array:
        weight = self.weights[name]
        windows = self.windows(x, weight.shape[-1], 0.0)
        return (
            np.tensordot(weight, windows, ((1, 2, 3), (0, 3, 4))) + self.biases[name][:, None, None]
        )

    @staticmethod
    def windows(x: Array, kernel: int, outside: float) -> Array:
        """(C, H, W) -> (C, H, W, kernel, kernel), what lies around every pixel."""
        edge = kernel // 2
        padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge)), constant_values=outside)
        return np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))

    def lrelu(self, name: str, x: Array) -> Array:
        return leaky_relu_loop(self.conv(name, x), 0.1)

    def pools(self, x: Array) -> Array:
        """Outside there is nothing to be the largest, and zeros in the mean."""
        largest = self.windows(x, 3, -np.inf)[:, ::2, ::2].max((3, 4))
        return np.concatenate([largest, self.windows(x, 3, 0.0)[:, ::2, ::2].sum((3, 4)) / 9])

    def resize(self, x: Array, height: int, width: int) -> Array:
        rows, columns = self.matrix(x.shape[1], height), self.matrix(x.shape[2], width)
        return rows @ x @ columns.T

    def matrix(self, size: int, out: int) -> Array:
        """(out, size), what :func:`resize_loop` does along one axis."""
        if (size, out) not in self.resizes:
            unit = np.eye(size)[:, :, None]  # images of one column
            self.resizes[size, out] = resize_loop(unit, out, 1)[:, :, 0].T
        return self.resizes[size, out]


# ----------------------------------------------------------------------------------- channel attention


def channel_attention_loop(x: Array, weights: list[Array], biases: list[Array]) -> Array:
    """One image (C, H, W); the layers are 1 x 1 and in the order mean in, mean out, max in, max out."""
    logits = np.zeros(x.shape[0])
    pixels = [x[:, i, j] for i, j in np.ndindex(*x.shape[1:])]
    for i, statistic in ((0, sum(pixels) / len(pixels)), (2, np.max(pixels, 0))):
        hidden = np.maximum(weights[i][:, :, 0, 0] @ statistic + biases[i], 0)
        logits += weights[i + 1][:, :, 0, 0] @ hidden + biases[i + 1]
    return x * (1 / (1 + np.exp(-logits)))[:, None, None]


# -------------------------------------------------------------------------------------- self-attention


def attention_loop(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v, one query at a time, (N, heads, L, D)."""
    q, k, v = to_array(query), to_array(key), to_array(value)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for n, head, i in np.ndindex(*q.shape[:3]):
        scores = scale * (k[n, head] * q[n, head, i]).sum(1)
        share = np.exp(scores - scores.max())
        out[n, head, i] = (share[:, None] * v[n, head]).sum(0) / share.sum()
    return torch.from_numpy(out)


def windowed_attention_loop(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, image_size: Pair
) -> Tensor:
    """Full attention on the tokens of each window, picked by their pixel."""
    out = torch.full((*query.shape[:3], value.shape[3]), math.nan, dtype=torch.float64)
    owner: dict[Pair, list[int]] = {}
    for y, x in np.ndindex(*image_size):
        owner.setdefault((y // window, x // window), []).append(y * image_size[1] + x)
    for tokens in owner.values():
        q, k, v = (t[:, :, tokens] for t in (query, key, value))
        out[:, :, tokens] = attention_loop(q, k, v, scale)
    return out
