"""Triton kernels of self_attention; ``self_attention_triton.py`` launches them.

    score = query . key * scale,  p = softmax(score),  out = p value            (one row of scores per query)
    delta = grad_out . out,  grad_score = p (grad_out . value - delta)
    grad_value = p^T grad_out,  grad_key = scale grad_score^T query,  grad_query = scale grad_score key

A program owns a block of queries (or of keys) of one image, head and window, and walks over the other kind in blocks:
the scores never leave the chip. They are kept in units of log2 e, so that the exponential is one instruction.

What all kernels share:

* The whole blocks run in a loop without masks; the tail, at most one block, follows with them.
* Widths are padded with zeros to a power of two of at least 16, the least that ``tl.dot`` takes. That is exact.
* Windows are rectangles of tokens: the i-th token of one is found by a division, nothing is copied.
* Strides are free; ``WIDE`` makes offsets within one image and head 64 bits, those of images and heads always are.
* ``UPCAST`` is for the interpreter alone, whose dot products cannot read bfloat16. Products of two are exact in fp32.

Every loop has its count of issue slots in ``benchmarks/triton_bars.toml``.
"""

from .backward import (
    self_attention_backward_key_value_kernel,
    self_attention_backward_query_kernel,
    self_attention_delta_kernel,
)
from .forward import self_attention_forward_kernel, self_attention_merge_kernel

__all__ = [
    "self_attention_backward_key_value_kernel",
    "self_attention_backward_query_kernel",
    "self_attention_delta_kernel",
    "self_attention_forward_kernel",
    "self_attention_merge_kernel",
]
