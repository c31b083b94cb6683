"""self_attention on CUDA: what the Triton kernels take, in which blocks, and how they are launched.

Triton comes with torch for CUDA; it and the kernels are imported at the first call, so that this file can always be.
Signatures are those of the raw ops ``self_attention_forward`` and ``self_attention_backward``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import require

MAX_WIDTH = 256
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 6)
_LEAST_SHARED = 99 * 1024  # bytes: sm_86, sm_89 and sm_120
_INT32_MAX = 2**31 - 1
_LOG2E = math.log2(math.e)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Device:
    """What the launches depend on."""

    capability: tuple[int, int]
    multiprocessors: int
    shared: int  # bytes that one block may have


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a step, warps of a program, and loads in flight."""

    query: int
    key: int
    warps: int
    stages: int


# -------------------------------------------------------------------------------------- what is taken


def triton_missing() -> str | None:
    """Why Triton cannot be used at all; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, MIN_TRITON))}"
    return None


@torch.compiler.assume_constant_result  # Dynamo cannot trace the questions
def _device_missing(index: int) -> str | None:
    return _ask_device(index)


@functools.cache
def _ask_device(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        # Triton makes no tensor-core code for sm_75, and spills 8 KiB a thread.
        return f"sm_{capability[0]}{capability[1]} is older than sm_80"
    return triton_missing()


def supported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why these cannot be given to :func:`forward`; None where they can. The sizes must fit already."""
    if query.device.type != "cuda" and not _interpreted():
        return f"the Triton kernels run on CUDA, not on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"the Triton kernels have no {str(query.dtype).removeprefix('torch.')}"
    width = max(query.shape[-1], value.shape[-1])
    if width > MAX_WIDTH:
        return f"the Triton kernels take up to {MAX_WIDTH} channels a head, not {width}"
    return None if _interpreted() else _device_missing(query.device.index or 0)


# ------------------------------------------------------------------------------------------- choices


def _padded(width: int) -> int:
    """The least power of two that holds a width and that a product on the tensor cores takes."""
    return max(16, 1 << (width - 1).bit_length())


def forward_blocks(
    dtype: torch.dtype, width_qk: int, width_v: int, rows: int, device: Device
) -> Blocks:
    """Chosen so that no register is spilled (``benchmarks/triton_bars.toml``) and shared memory fits.

    ``rows`` are all queries of the call. 128 x 128 costs 6.2 issue slots a score, 64 x 64 8.0, but gives
    four times the programs: for what would not fill the GPU.
    """
    width = max(_padded(width_qk), _padded(width_v))
    if dtype == torch.float32:
        return _wide_fp32_blocks(width) if width > 64 else Blocks(64, 32, 4, 2)
    if width > 128:
        return Blocks(64, 64, 8, 1)
    if width > 64:
        return Blocks(128, 64, 8, 2)
    if rows < 128 * device.multiprocessors:
        return Blocks(64, 64, 4, 3)
    return Blocks(128, 128, 8, 3 if device.shared >= 128 * 1024 else 2)


def key_value_blocks(dtype: torch.dtype, width_qk: int, width_v: int) -> Blocks:
    """As :func:`forward_blocks`: here two accumulators and two kinds of resident rows share the registers."""
    width = max(_padded(width_qk), _padded(width_v))
    if dtype == torch.float32:
        return _wide_fp32_blocks(width) if width > 64 else Blocks(32, 32, 4, 1)
    if width > 128:
        return Blocks(32, 32, 8, 1)
    return Blocks(64, 64, 8, 1) if width > 64 else Blocks(64, 128, 8, 2)


def query_blocks(dtype: torch.dtype, width_qk: int, width_v: int) -> Blocks:
    """As :func:`forward_blocks`. 64 queries are one warp group's rows: more warps would repeat its exponentials."""
    width = max(_padded(width_qk), _padded(width_v))
    if dtype == torch.float32:
        return _wide_fp32_blocks(width) if width > 64 else Blocks(16, 32, 4, 1)
    if width > 128:
        return Blocks(64, 16, 8, 1)
    return Blocks(64, 64, 4, 1) if width > 64 else Blocks(64, 64, 4, 2)


def _wide_fp32_blocks(width: int) -> Blocks:
    """Three TF32 products of wide rows spill in any block; these fit the shared memory."""
    return Blocks(32, 32, 8, 1) if width <= 128 else Blocks(16, 16, 4, 1)


def key_splits(programs: int, key_blocks: int, multiprocessors: int) -> int:
    """Into how many parts the keys are dealt out: two programs a multiprocessor, four blocks of keys each at least."""
    wanted = 2 * multiprocessors // max(programs, 1)
    return max(1, min(wanted, key_blocks // 4, 16))


def use_atomics(width_qk: int, deterministic: bool) -> bool:
    """One kernel of five products whose grad_query is added up by atomics, or two of seven without.

    At 57,600 tokens the atomics write 1.7 GB for 16 channels and 6.6 GB for 64.
    """
    return not deterministic and _padded(width_qk) <= 16


# ---------------------------------------------------------------------------------------- the launches


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("mafnet_ops.self_attention_kernels")


@functools.cache
def _interpreted() -> bool:
    """Whether Triton is to run on the CPU, as in our tests (TRITON_INTERPRET=1)."""
    if triton_missing() is not None:
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED),
    )


def device_of(tensor: Tensor) -> Device:
    if tensor.device.type == "cuda":
        return _cuda_device(tensor.device.index or 0)
    return Device(MIN_CAPABILITY, 1, _LEAST_SHARED)  # the interpreter


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """All launches pass here, so that the static report can compile instead."""
    # The default of this option changes with Triton 3.10; a scale and a difference are one instruction with it.
    kernel[grid](*arguments, enable_fp_fusion=True, **options)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset within one image and head can pass 32 bits."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape[2:], t.stride()[2:]))
        > _INT32_MAX
        for t in tensors
    )


def _precision(dtype: torch.dtype) -> str:
    """Of fp32 products: TF32 where torch's own may use it, else three products of TF32 halves, which keep 22 bits.

    Products in IEEE fp32 would be unrolled into thousands of FFMA: 5,647 slots a step, 651 of them spills, against
    781 for half of that step.
    """
    # Not torch.get_float32_matmul_precision(), which is an error where torch.backends chose.
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def empty_like_tokens(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The layout of every result of the op: dense, and where the tokens of ``tensor`` are neighbours in memory, as in
    (N, C, H * W), so they are here."""
    _, heads, length, depth = shape
    if tensor.stride(2) == 1 and tensor.stride(3) != 1:
        strides = (heads * depth * length, depth * length, 1, length)
        return tensor.new_empty_strided(shape, strides)
    return tensor.new_empty(shape)


@dataclass(frozen=True)
class _Geometry:
    """Sizes of a call, and the windows as the kernels count them."""

    images: int
    heads: int
    length_q: int
    length_k: int
    window: tuple[int, int, int]  # side, height, width; the side is 0 for none

    @classmethod
    def of(cls, query: Tensor, key: Tensor, window: list[int]) -> _Geometry:
        images, heads, length_q = query.shape[:3]
        side, height, width = window or (0, 1, 1)
        return cls(images, heads, length_q, key.shape[2], (side, height, width))

    @property
    def cells(self) -> int:
        side, height, width = self.window
        return -(-height // side) * -(-width // side) if side else 1

    def blocks(self, length: int, block: int) -> int:
        """Blocks of a window, or of all tokens."""
        side, height, width = self.window
        return -(-(min(side, height) * min(side, width) if side else length) // block)

    def programs(self, length: int, block: int) -> int:
        return self.images * self.heads * self.cells * self.blocks(length, block)


def _constants(
    geometry: _Geometry, query: Tensor, value: Tensor, wide: bool, blocks: Blocks
) -> dict[str, Any]:
    return {
        "WINDOWED": geometry.window[0] > 0,
        "WIDE": wide,
        "WIDTH_QK": query.shape[3],
        "WIDTH_V": value.shape[3],
        "PAD_QK": _padded(query.shape[3]),
        "PAD_V": _padded(value.shape[3]),
        "BLOCK_Q": blocks.query,
        "BLOCK_K": blocks.key,
        "PRECISION": _precision(query.dtype),
        "UPCAST": _interpreted() and query.dtype == torch.bfloat16,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _check(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    reason = supported(query, key, value)
    require(reason is None, op, "query", "what the Triton kernels take", reason)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: list[int]
) -> tuple[Tensor, Tensor]:
    """Raw op: out (N, heads, L_q, D_v) and lse (N, heads, L_q), the natural logarithm of a row's sum, in fp32."""
    _check("self_attention_forward", query, key, value)
    geometry = _Geometry.of(query, key, window)
    shape = (*query.shape[:3], value.shape[3])
    out = empty_like_tokens(value, shape)
    lse = query.new_empty(shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    if geometry.length_k == 0:
        return out.zero_(), lse.fill_(-math.inf)
    device = device_of(query)
    blocks = forward_blocks(query.dtype, query.shape[3], value.shape[3], lse.numel(), device)
    programs = geometry.programs(geometry.length_q, blocks.query)
    key_blocks = -(-geometry.length_k // blocks.key)
    splits = 1 if window else key_splits(programs, key_blocks, device.multiprocessors)
    blocks_a_split = -(-key_blocks // splits)
    splits = -(-key_blocks // blocks_a_split)  # none is empty

    parts, part_lse = out, lse
    if splits > 1:
        parts = query.new_empty((splits, *shape), dtype=torch.float32)
        part_lse = query.new_empty((splits, *shape[:3]), dtype=torch.float32)
    wide = _wide(query, key, value, out)
    with _on(query):
        launch(
            _kernels().self_attention_forward_kernel,
            (programs, splits),
            *(query, query.stride(), key, key.stride(), value, value.stride()),
            *(parts, parts[0].stride() if splits > 1 else out.stride(), part_lse),
            *(geometry.heads, geometry.length_q, geometry.length_k, geometry.cells),
            *(geometry.blocks(geometry.length_q, blocks.query), blocks_a_split * blocks.key),
            *(*geometry.window, abs(scale) * _LOG2E),
            NEGATE=scale < 0,
            SPLIT=splits > 1,
            # Three products by one are no cheaper than the additions.
            ONES=query.dtype != torch.float32 or _precision(query.dtype) == "tf32",
            **_constants(geometry, query, value, wide, blocks),
        )
        if splits > 1:
            rows = 32
            merge_blocks = -(-geometry.length_q // rows)
            launch(
                _kernels().self_attention_merge_kernel,
                (geometry.images * geometry.heads * merge_blocks,),
                *(parts, part_lse, out, out.stride(), lse),
                *(geometry.heads, geometry.length_q, merge_blocks, splits),
                WIDE=wide,
                WIDTH=shape[3],
                PAD=_padded(shape[3]),
                BLOCK=rows,
                num_warps=4,
            )
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: list[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw op: gradients of query, key and value, laid out as those are; ``deterministic`` takes no atomics."""
    _check("self_attention_backward", query, key, value)
    geometry = _Geometry.of(query, key, window)
    grads = [empty_like_tokens(t, tuple(t.shape)) for t in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    if 0 in (geometry.images, geometry.heads, geometry.length_q, geometry.length_k):
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    atomic = use_atomics(query.shape[3], deterministic)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    sums = query.new_zeros(query.shape, dtype=torch.float32) if atomic else grad_query
    widths = (query.dtype, query.shape[3], value.shape[3])
    wide = _wide(grad_out, query, key, value, out, sums, *grads)
    inputs = (
        *(grad_out, grad_out.stride(), query, query.stride()),
        *(key, key.stride(), value, value.stride(), lse, delta),
    )
    sizes = (geometry.heads, geometry.length_q, geometry.length_k, geometry.cells)
    scales = (*geometry.window, scale, scale * _LOG2E)
    with _on(query):
        rows = 32
        delta_blocks = -(-geometry.length_q // rows)
        launch(
            _kernels().self_attention_delta_kernel,
            (geometry.images * geometry.heads * delta_blocks,),
            *(grad_out, grad_out.stride(), out, out.stride(), delta),
            *(geometry.heads, geometry.length_q, delta_blocks),
            WIDE=wide,
            WIDTH=value.shape[3],
            PAD=_padded(value.shape[3]),
            BLOCK=rows,
            num_warps=4,
        )
        blocks = key_value_blocks(*widths)
        launch(
            _kernels().self_attention_backward_key_value_kernel,
            (geometry.programs(geometry.length_k, blocks.key),),
            *inputs,
            *(sums, grad_key, grad_key.stride(), grad_value, grad_value.stride()),
            *(*sizes, geometry.blocks(geometry.length_k, blocks.key), *scales),
            ATOMIC=atomic,
            **_constants(geometry, query, value, wide, blocks),
        )
        if atomic:
            grad_query.copy_(sums.mul_(scale))
        else:
            blocks = query_blocks(*widths)
            launch(
                _kernels().self_attention_backward_query_kernel,
                (geometry.programs(geometry.length_q, blocks.query),),
                *inputs,
                *(grad_query, grad_query.stride()),
                *(*sizes, geometry.blocks(geometry.length_q, blocks.query), *scales),
                **_constants(geometry, query, value, wide, blocks),
            )
    return grad_query, grad_key, grad_value
