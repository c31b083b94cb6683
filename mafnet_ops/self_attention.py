"""Self-attention over the pixels of a feature map (non-local, SAGAN): any query and value widths, any length."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import _library, reference, self_attention_triton
from ._autograd import fold, jvp_by_vjp, unfold, without_missing
from ._checks import (
    autocast_dtype,
    number,
    pair,
    require,
    require_count,
    require_same_device,
    require_same_dtype,
    require_tensor,
)
from ._state_dict import RenameOnLoad

_OP = "self_attention"


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    window: int | None = None,
    image_size: Sequence[int] | None = None,
) -> Tensor:
    """``softmax(query @ key^T * scale) @ value`` without ever holding the L_q x L_k scores.

    The non-local form (Wang et al., "Non-local Neural Networks", CVPR 2018; Zhang et al., "SAGAN", ICML 2019): the
    default scale is 1, not 1 / sqrt(D), and the widths of query and value are free.

    Args:
        query: (N, heads, L_q, D_qk), floating point, any strides; D_qk at least 1.
        key: (N, heads, L_k, D_qk). L_k may differ from L_q (sub-sampled keys) where there is no window.
        value: (N, heads, L_k, D_v), all three of one dtype.
        scale: factor on the scores.
        window: None, or attend only within window x window squares of an image whose pixels, row by row, are
            the L tokens. Squares start at pixel (0, 0); those cut by the right or bottom edge are smaller.
        image_size: (H, W) with H * W = L; needed with ``window``.

    Returns:
        (N, heads, L_q, D_v) in the dtype of value. Where value is a transposed view of (N, heads, D_v, L_k), as an
        image (N, C, H, W) gives it, the result is one too; otherwise it is contiguous. The same holds for each
        gradient and its tensor. No keys give zeros.

    Scores, softmax and sums are fp32 (fp64 for double). Memory is O(L), in the backward too: it computes the scores
    again from the logarithm of their sum. Gradients flow to query, key and value, any number of times (compiled
    code: once); forward mode, ``torch.func`` and vmap work. Second derivatives and forward mode go through PyTorch
    code. On the CPU results have the same bits on every run and with any number of threads.

    Under autocast query, key and value run in autocast's dtype, scores and softmax stay fp32.

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
    scale = number(_OP, "scale", scale)
    options = _check(query, key, value, window, image_size)
    if not _has_kernels(query, key, value):
        return _reference(scale, options)(query, key, value)
    # Dynamo refuses a Function with a custom jvp and has no use for one.
    function = _SelfAttention if torch.compiler.is_compiling() else _SelfAttentionWithJvp
    output: Tensor = function.apply(query, key, value, scale, options)[0]
    return output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    image_size: Sequence[int] | None,
) -> tuple[int, ...]:
    """Raise unless the shapes fit; () or (window, H, W)."""
    batch, heads, length, depth = query.shape
    keys = length if window is not None else key.shape[2]
    expected = (batch, heads, keys, depth)
    where = "query, with window" if window is not None else "query, any L"
    require(tuple(key.shape) == expected, _OP, "key", f"{expected} as {where}", tuple(key.shape))
    require(
        value.shape[:3] == key.shape[:3],
        _OP,
        "value",
        f"N, heads, L = {tuple(key.shape[:3])} as key",
        tuple(value.shape[:3]),
    )
    require(depth > 0, _OP, "query", "D_qk of at least 1", depth)
    if window is None:
        return ()
    whole = isinstance(window, (int, torch.SymInt)) and window >= 1
    require(whole, _OP, "window", "None or an int >= 1", window)
    require(image_size is not None, _OP, "image_size", "(H, W) with window", None)
    assert image_size is not None
    size = pair(_OP, "image_size", image_size, 1)
    if size[0] * size[1] != length:  # Dynamo compiles for each length that goes into a text
        require(False, _OP, "image_size", f"H * W = L = {length}", size)
    return (window, *size)


# ------------------------------------------------------------------------------------- schema and fake

# window is empty, or (window, H, W). lse is the natural logarithm of each row's sum of exp(score * scale), fp32
# (fp64 for double).
_library.LIBRARY.define(
    "self_attention_forward(Tensor query, Tensor key, Tensor value, float scale, SymInt[] window) -> "
    "(Tensor out, Tensor lse)"
)
_library.LIBRARY.define(
    "self_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "float scale, SymInt[] window, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def _why_no_triton() -> str | None:
    if _library.disabled():
        return "MAFNET_DISABLE_EXT=1"
    if torch.version.cuda is None:
        return "this torch is a build without CUDA"
    return self_attention_triton.triton_missing()


_WHY_NO_TRITON = _why_no_triton()


def _backend(device_type: str) -> _library.Backend | None:
    if device_type != "cuda":
        return None
    if _WHY_NO_TRITON is None:
        return _library.Backend("triton", "compiled for the GPU at the first call")
    return _library.Backend("pytorch", _WHY_NO_TRITON)


_NATIVE_DEVICES = _library.register_op(
    _OP, ("self_attention_forward", "self_attention_backward"), _backend
)
_library.LIBRARY.impl("self_attention_forward", self_attention_triton.forward, "CUDA")
_library.LIBRARY.impl("self_attention_backward", self_attention_triton.backward, "CUDA")


def _has_kernels(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.device.type == "cuda":
        return _WHY_NO_TRITON is None and self_attention_triton.supported(query, key, value) is None
    return query.device.type in _NATIVE_DEVICES


@torch.library.register_fake("mafnet_ops::self_attention_forward", lib=_library.LIBRARY)
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    out = self_attention_triton.empty_like_tokens(value, (*query.shape[:3], value.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=reference.coordinate_dtype(query.dtype))


@torch.library.register_fake("mafnet_ops::self_attention_backward", lib=_library.LIBRARY)
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(
        self_attention_triton.empty_like_tokens(t, tuple(t.shape)) for t in (query, key, value)
    )


def _scores(query_shape: Any, key_shape: Any, window: Sequence[int]) -> int:
    """How many scores there are."""
    batch, heads, length, _ = query_shape
    if not window:
        return int(batch * heads * length * key_shape[2])
    side, *size = window
    rows, columns = (n // side * side**2 + (n % side) ** 2 for n in size)  # sums of squares
    return int(batch * heads * rows * columns)


@register_flop_formula(torch.ops.mafnet_ops.self_attention_forward)
def _flops(
    query_shape: Any,
    key_shape: Any,
    value_shape: Any,
    scale: float,
    window: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """The two matrix products."""
    depth = query_shape[3] + value_shape[3]
    return 2 * depth * _scores(query_shape, key_shape, window)


@register_flop_formula(torch.ops.mafnet_ops.self_attention_backward)
def _backward_flops(
    grad_shape: Any,
    query_shape: Any,
    key_shape: Any,
    value_shape: Any,
    out_shape: Any,
    lse_shape: Any,
    scale: float,
    window: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five matrix products: scores, and gradients of the weights, query, key and value."""
    depth = 3 * query_shape[3] + 2 * value_shape[3]
    return 2 * depth * _scores(query_shape, key_shape, window)


# ------------------------------------------------------------------------------------------ autograd

_Optional = Tensor | None


def _reference(scale: float, options: tuple[int, ...]) -> Any:
    """The definition as a differentiable function of query, key and value."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Autocast would take the scores back to its dtype. Not every device type knows it.
        low = autocast_dtype(query.device)
        precise = nullcontext() if low is None else torch.autocast(query.device.type, enabled=False)
        with precise:
            if not options:
                return reference.self_attention(query, key, value, scale)
            window, *size = options
            return reference.windowed_self_attention(query, key, value, scale, window, size)

    return function


class _SelfAttention(torch.autograd.Function):
    """(query, key, value, scale, options) -> (out, lse)."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scale: float, options: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.mafnet_ops.self_attention_forward(query, key, value, scale, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[_Optional, ...]:
        # Dynamo cannot nest Functions here; it differentiates once.
        compiling = torch.compiler.is_compiling()
        function: Any = _backward if compiling else _SelfAttentionBackward.apply
        results = function(grads[0], *ctx.saved_tensors, ctx.scale, ctx.options)
        return (*results, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = [fold(t, d, info.batch_size) for t, d in zip(args[:3], in_dims)]
        out, lse = _SelfAttentionWithJvp.apply(*tensors, *args[3:])
        return (unfold(out, info.batch_size), unfold(lse, info.batch_size)), (0, 0)


class _SelfAttentionWithJvp(_SelfAttention):
    @staticmethod
    def jvp(ctx: Any, *tangents: _Optional) -> tuple[Tensor, None]:
        primals = ctx.saved_for_forward
        return jvp_by_vjp(
            _reference(ctx.scale, ctx.options), primals, without_missing(primals, tangents)[2]
        ), None


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    options: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.mafnet_ops.self_attention_backward(
        grad_out, query, key, value, out, lse, scale, options, deterministic
    )


class _SelfAttentionBackward(torch.autograd.Function):
    """The raw backward op, whose own gradient goes through the reference.

    out and lse are functions of the other tensors, and the reference differentiates through them: they have no
    gradient of their own.
    """

    forward = staticmethod(_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.scale, ctx.options = inputs[6:]
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[_Optional, ...]:
        function = _reference_vjp(ctx.scale, ctx.options)
        vjp: Any = torch.func.vjp(function, *ctx.saved_tensors)[1]
        return (*vjp(grads), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: _Optional) -> tuple[Tensor, ...]:
        primals = ctx.saved_for_forward
        function = _reference_vjp(ctx.scale, ctx.options)
        return tuple(jvp_by_vjp(function, primals, without_missing(primals, tangents)[2]))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        tensors = [fold(t, d, info.batch_size) for t, d in zip(args[:6], in_dims)]
        grads = _SelfAttentionBackward.apply(*tensors, *args[6:])
        return tuple(unfold(g, info.batch_size) for g in grads), (0, 0, 0)


def _reference_vjp(scale: float, options: tuple[int, ...]) -> Any:
    """(grad_out, query, key, value) -> their gradients, by the reference."""

    def backward(grad_out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        vjp: Any = torch.func.vjp(_reference(scale, options), *tensors)[1]
        return tuple(vjp(grad_out))

    return backward


_NAMES = ((r"(query|key|value)_conv\.(.*)", r"\1.\2"),)  # as most public SAGAN code calls them


class SelfAttention(nn.Module):
    """SAGAN's block: ``x + gamma * attention(x)`` with 1 x 1 convolutions to query, key and value.

    Args:
        channels: C of the (N, C, H, W) input; the value keeps C channels.
        reduction: query and key have ``max(C // reduction, 1)`` channels.
        window: None for the whole frame, else the side of the square windows in pixels.

    ``gamma`` starts at 0, so an untrained block is the identity. State dicts with ``query_conv``, ``key_conv`` and
    ``value_conv`` load too.
    """

    def __init__(self, channels: int, reduction: int = 8, window: int | None = None) -> None:
        super().__init__()
        require_count(_OP, "channels", channels)
        require_count(_OP, "reduction", reduction)
        require_count(_OP, "window", window, or_none=True)
        self.window = window
        inner = max(channels // reduction, 1)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.register_load_state_dict_pre_hook(RenameOnLoad(_NAMES))

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        # Views: the kernels read pixels where the convolutions left them, and write an image.
        query, key, value = (
            conv(input).flatten(2).transpose(1, 2).unsqueeze(1)
            for conv in (self.query, self.key, self.value)
        )
        # A frame smaller than the window is one, smaller, window: no case of its own, which export would have to fix.
        size = None if self.window is None else (height, width)
        out = self_attention(query, key, value, 1.0, self.window, size)
        out = out.squeeze(1).transpose(1, 2).reshape(input.shape)
        return input + self.gamma.to(out.dtype) * out
