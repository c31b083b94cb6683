"""The kernels of the backward: delta, then gradients of key and value, then those of query."""

import triton
import triton.language as tl

from .tiles import add_dot, dot, load_rows, mask_of, offsets_of, own_block, rectangle, tokens_at

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def self_attention_delta_kernel(
    grad_out,
    grad_out_strides,
    out,
    out_strides,
    delta,
    heads,
    length,
    blocks,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = sum over channels of grad_out * out, which is what every grad_score of a row has in common."""
    image, head, _, start = own_block(BLOCK, heads, length, 1, blocks)
    rows = start + tl.arange(0, BLOCK)
    valid = rows < length
    tokens = tokens_at(rows, 0, 1, 1, False, WIDE)
    grad_out += image * grad_out_strides[0] + head * grad_out_strides[1]
    out += image * out_strides[0] + head * out_strides[1]
    g = load_rows(grad_out, tokens, valid, grad_out_strides, WIDTH, PAD, WIDE, True)
    o = load_rows(out, tokens, valid, out_strides, WIDTH, PAD, WIDE, True)
    product = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + (image * heads + head) * length + rows, product, mask=valid)


@triton.jit
def _key_value_step(
    k,
    v,
    q,
    g,
    row_lse,
    row_delta,
    grad_k,
    grad_v,
    valid_q,
    valid_k,
    score_scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of queries for the resident keys; scores are transposed, (keys, queries)."""
    scores = dot(k, tl.trans(q), PRECISION, UPCAST)
    p = tl.exp2(scores * score_scale - row_lse[None, :] * LOG2E)
    if MASKED:
        # Not left to zeros in k and q: exp2(0 - lse) may be inf, and inf * 0 is NaN.
        p = tl.where(valid_k[:, None] & valid_q[None, :], p, 0.0)
    grad_v = add_dot(grad_v, p.to(g.dtype), g, PRECISION, UPCAST)
    grad_p = dot(v, tl.trans(g), PRECISION, UPCAST)
    grad_scores = (p * (grad_p - row_delta[None, :])).to(q.dtype)
    grad_k = add_dot(grad_k, grad_scores, q, PRECISION, UPCAST)
    return grad_k, grad_v, grad_scores


@triton.jit
def self_attention_backward_key_value_kernel(
    grad_out,
    grad_out_strides,
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    lse,
    delta,
    grad_query,
    grad_key,
    grad_key_strides,
    grad_value,
    grad_value_strides,
    heads,
    length_q,
    length_k,
    cells,
    blocks,
    window,
    height,
    width,
    scale,
    score_scale,
    ATOMIC: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH_QK: tl.constexpr,
    WIDTH_V: tl.constexpr,
    PAD_QK: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grad_key and grad_value of BLOCK_K keys, which stay on the chip while the queries pass.

    With ATOMIC also grad_query / scale: added up in fp32 (N, heads, L, D_qk), in no fixed order. That saves two of the
    seven products, for BLOCK_Q * D_qk atomics a step: it pays for narrow queries only.
    """
    image, head, cell, start = own_block(BLOCK_K, heads, length_k, cells, blocks)
    first, across, count_k = rectangle(cell, length_k, window, height, width, WINDOWED)
    if start >= count_k:
        return
    count_q = count_k if WINDOWED else length_q
    rows = start + tl.arange(0, BLOCK_K)
    valid_k = rows < count_k
    tokens_k = tokens_at(rows, first, across, width, WINDOWED, WIDE)
    grad_out += image * grad_out_strides[0] + head * grad_out_strides[1]
    query += image * query_strides[0] + head * query_strides[1]
    key += image * key_strides[0] + head * key_strides[1]
    value += image * value_strides[0] + head * value_strides[1]
    grad_key += image * grad_key_strides[0] + head * grad_key_strides[1]
    grad_value += image * grad_value_strides[0] + head * grad_value_strides[1]
    lse += (image * heads + head) * length_q
    delta += (image * heads + head) * length_q
    grad_query += (image * heads + head) * length_q * WIDTH_QK
    dense = (0, 0, WIDTH_QK, 1)

    k = load_rows(key, tokens_k, valid_k, key_strides, WIDTH_QK, PAD_QK, WIDE, True)
    v = load_rows(value, tokens_k, valid_k, value_strides, WIDTH_V, PAD_V, WIDE, True)
    grad_k = tl.zeros((BLOCK_K, PAD_QK), tl.float32)
    grad_v = tl.zeros((BLOCK_K, PAD_V), tl.float32)
    columns = tl.arange(0, BLOCK_Q)
    # A block of keys with a tail takes every block of queries with masks.
    whole = tl.where(start + BLOCK_K <= count_k, count_q // BLOCK_Q * BLOCK_Q, 0)
    for at in tl.range(0, whole, BLOCK_Q):
        tokens = tokens_at(at + columns, first, across, width, WINDOWED, WIDE)
        q = load_rows(query, tokens, columns, query_strides, WIDTH_QK, PAD_QK, WIDE, False)
        g = load_rows(grad_out, tokens, columns, grad_out_strides, WIDTH_V, PAD_V, WIDE, False)
        row_lse, row_delta = tl.load(lse + tokens), tl.load(delta + tokens)
        grad_k, grad_v, grad_scores = _key_value_step(
            k,
            v,
            q,
            g,
            row_lse,
            row_delta,
            grad_k,
            grad_v,
            columns,
            valid_k,
            score_scale,
            False,
            PRECISION,
            UPCAST,
        )
        if ATOMIC:
            pointers = grad_query + offsets_of(tokens, dense, PAD_QK, WIDE)
            grad_q = dot(tl.trans(grad_scores), k, PRECISION, UPCAST)
            inside = mask_of(columns >= 0, WIDTH_QK, PAD_QK)
            tl.atomic_add(pointers, grad_q, mask=inside, sem="relaxed")
    for at in tl.range(whole, count_q, BLOCK_Q, num_stages=1):
        valid = at + columns < count_q
        tokens = tokens_at(at + columns, first, across, width, WINDOWED, WIDE)
        q = load_rows(query, tokens, valid, query_strides, WIDTH_QK, PAD_QK, WIDE, True)
        g = load_rows(grad_out, tokens, valid, grad_out_strides, WIDTH_V, PAD_V, WIDE, True)
        row_lse = tl.load(lse + tokens, mask=valid, other=0.0)
        row_delta = tl.load(delta + tokens, mask=valid, other=0.0)
        grad_k, grad_v, grad_scores = _key_value_step(
            k,
            v,
            q,
            g,
            row_lse,
            row_delta,
            grad_k,
            grad_v,
            valid,
            valid_k,
            score_scale,
            True,
            PRECISION,
            UPCAST,
        )
        if ATOMIC:
            pointers = grad_query + offsets_of(tokens, dense, PAD_QK, WIDE)
            grad_q = dot(tl.trans(grad_scores), k, PRECISION, UPCAST)
            inside = mask_of(valid, WIDTH_QK, PAD_QK)
            tl.atomic_add(pointers, grad_q, mask=inside, sem="relaxed")

    grad_key += offsets_of(tokens_k, grad_key_strides, PAD_QK, WIDE)
    inside = mask_of(valid_k, WIDTH_QK, PAD_QK)
    tl.store(grad_key, (grad_k * scale).to(grad_key.dtype.element_ty), mask=inside)
    grad_value += offsets_of(tokens_k, grad_value_strides, PAD_V, WIDE)
    inside = mask_of(valid_k, WIDTH_V, PAD_V)
    tl.store(grad_value, grad_v.to(grad_value.dtype.element_ty), mask=inside)


@triton.jit
def _query_step(
    q,
    g,
    k,
    v,
    row_lse,
    row_delta,
    grad_q,
    valid,
    score_scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    scores = dot(q, tl.trans(k), PRECISION, UPCAST)
    p = tl.exp2(scores * score_scale - row_lse[:, None])
    if MASKED:
        p = tl.where(valid[None, :], p, 0.0)
    grad_p = dot(g, tl.trans(v), PRECISION, UPCAST)
    grad_scores = (p * (grad_p - row_delta[:, None])).to(k.dtype)
    return add_dot(grad_q, grad_scores, k, PRECISION, UPCAST)


@triton.jit
def self_attention_backward_query_kernel(
    grad_out,
    grad_out_strides,
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    lse,
    delta,
    grad_query,
    grad_query_strides,
    heads,
    length_q,
    length_k,
    cells,
    blocks,
    window,
    height,
    width,
    scale,
    score_scale,
    WINDOWED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH_QK: tl.constexpr,
    WIDTH_V: tl.constexpr,
    PAD_QK: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grad_query of BLOCK_Q queries while the keys pass: the way without atomics."""
    image, head, cell, start = own_block(BLOCK_Q, heads, length_q, cells, blocks)
    first, across, count_q = rectangle(cell, length_q, window, height, width, WINDOWED)
    if start >= count_q:
        return
    count_k = count_q if WINDOWED else length_k
    rows = start + tl.arange(0, BLOCK_Q)
    valid_q = rows < count_q
    tokens_q = tokens_at(rows, first, across, width, WINDOWED, WIDE)
    grad_out += image * grad_out_strides[0] + head * grad_out_strides[1]
    query += image * query_strides[0] + head * query_strides[1]
    key += image * key_strides[0] + head * key_strides[1]
    value += image * value_strides[0] + head * value_strides[1]
    grad_query += image * grad_query_strides[0] + head * grad_query_strides[1]
    lse += (image * heads + head) * length_q
    delta += (image * heads + head) * length_q

    q = load_rows(query, tokens_q, valid_q, query_strides, WIDTH_QK, PAD_QK, WIDE, True)
    g = load_rows(grad_out, tokens_q, valid_q, grad_out_strides, WIDTH_V, PAD_V, WIDE, True)
    row_lse = tl.load(lse + tokens_q, mask=valid_q, other=0.0) * LOG2E
    row_delta = tl.load(delta + tokens_q, mask=valid_q, other=0.0)
    grad_q = tl.zeros((BLOCK_Q, PAD_QK), tl.float32)
    columns = tl.arange(0, BLOCK_K)
    whole = count_k // BLOCK_K * BLOCK_K
    for at in tl.range(0, whole, BLOCK_K):
        tokens = tokens_at(at + columns, first, across, width, WINDOWED, WIDE)
        k = load_rows(key, tokens, columns, key_strides, WIDTH_QK, PAD_QK, WIDE, False)
        v = load_rows(value, tokens, columns, value_strides, WIDTH_V, PAD_V, WIDE, False)
        grad_q = _query_step(
            q,
            g,
            k,
            v,
            row_lse,
            row_delta,
            grad_q,
            columns,
            score_scale,
            False,
            PRECISION,
            UPCAST,
        )
    if whole < count_k:
        valid = whole + columns < count_k
        tokens = tokens_at(whole + columns, first, across, width, WINDOWED, WIDE)
        k = load_rows(key, tokens, valid, key_strides, WIDTH_QK, PAD_QK, WIDE, True)
        v = load_rows(value, tokens, valid, value_strides, WIDTH_V, PAD_V, WIDE, True)
        grad_q = _query_step(
            q,
            g,
            k,
            v,
            row_lse,
            row_delta,
            grad_q,
            valid,
            score_scale,
            True,
            PRECISION,
            UPCAST,
        )
    grad_query += offsets_of(tokens_q, grad_query_strides, PAD_QK, WIDE)
    inside = mask_of(valid_q, WIDTH_QK, PAD_QK)
    tl.store(grad_query, (grad_q * scale).to(grad_query.dtype.element_ty), mask=inside)
