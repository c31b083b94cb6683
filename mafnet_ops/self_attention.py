"""Self-attention over the pixels of a feature map (non-local, SAGAN): any query and value widths, any length."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from . import _library, reference
from ._checks import (
    autocast_dtype,
    pair,
    require,
    require_same_device,
    require_same_dtype,
    require_tensor,
)

_OP = "self_attention"


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    window: int | None = None,
    image_size: Sequence[int] | None = None,
) -> Tensor:
    """``softmax(query @ key^T * scale) @ value`` without ever holding the L x L scores.

    The non-local form (Wang et al., "Non-local Neural Networks", CVPR 2018; Zhang et al., "SAGAN", ICML 2019): the
    default scale is 1, not 1 / sqrt(D), and the widths of query and value are free.

    Args:
        query, key: (N, heads, L, D_qk), floating point; D_qk at least 1.
        value: (N, heads, L, D_v), the dtype of query.
        scale: factor on the scores.
        window: None, or attend only within window x window squares of an image whose pixels, row by row, are
            the L tokens. Squares start at pixel (0, 0); those cut by the right or bottom edge are smaller.
        image_size: (H, W) with H * W = L; needed with ``window``.

    Returns:
        (N, heads, L, D_v) in the dtype of value. Scores and softmax are computed in fp32 (fp64 for double).

    Under autocast query, key and value run in autocast's dtype, scores and softmax stay fp32.

    Memory is O(L): at most ``reference.MAX_SCORES`` scores exist at a time, in the backward too.

    Raises:
        ValueError: a shape, device, window or image size that does not fit.
        TypeError: a dtype that is not floating point, or dtypes that differ.
    """
    tensors: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        require_tensor(_OP, name, tensor, 4)
    require_same_device(_OP, "query", tensors)
    low = autocast_dtype(query.device) if query.dtype != torch.float64 else None
    if low is None:
        require_same_dtype(_OP, "query", tensors)
    else:
        query, key, value = query.to(low), key.to(low), value.to(low)
    require(
        key.shape == query.shape, _OP, "key", f"{tuple(query.shape)} as query", tuple(key.shape)
    )
    require(
        value.shape[:3] == query.shape[:3],
        _OP,
        "value",
        f"N, heads, L = {tuple(query.shape[:3])} as query",
        tuple(value.shape[:3]),
    )
    require(query.shape[3] > 0, _OP, "query", "D_qk of at least 1", query.shape[3])
    # Autocast would take the scores back to its dtype.
    precise = nullcontext() if low is None else torch.autocast(query.device.type, enabled=False)
    if window is None:
        with precise:
            return reference.self_attention(query, key, value, scale)
    require(window >= 1, _OP, "window", "None or an int >= 1", window)
    require(image_size is not None, _OP, "image_size", "(H, W) with window", None)
    assert image_size is not None
    size = pair(_OP, "image_size", image_size, 1)
    length = query.shape[2]
    require(size[0] * size[1] == length, _OP, "image_size", f"H * W = L = {length}", size)
    with precise:
        return reference.windowed_self_attention(query, key, value, scale, window, size)


_library.register_op(_OP)


class SelfAttention(nn.Module):
    """SAGAN's block: ``x + gamma * attention(x)`` with 1 x 1 convolutions to query, key and value.

    Args:
        channels: C of the (N, C, H, W) input; the value keeps C channels.
        reduction: query and key have ``max(C // reduction, 1)`` channels.
        window: None for the whole frame, else the side of the square windows in pixels.

    ``gamma`` starts at 0, so an untrained block is the identity.
    """

    def __init__(self, channels: int, reduction: int = 8, window: int | None = None) -> None:
        super().__init__()
        require(reduction >= 1, _OP, "reduction", "an int >= 1", reduction)
        self.window = window
        inner = max(channels // reduction, 1)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        query, key, value = (
            conv(input).flatten(2).transpose(1, 2).unsqueeze(1)
            for conv in (self.query, self.key, self.value)
        )
        # A frame smaller than the window is one, smaller, window: no case of its own, which export would have to fix.
        size = None if self.window is None else (height, width)
        out = self_attention(query, key, value, 1.0, self.window, size)
        out = out.squeeze(1).transpose(1, 2).reshape(input.shape)
        return input + self.gamma.to(out.dtype) * out
