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

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of the running maximum. Were it -inf, a first block of nothing but -inf would give -inf - -inf = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
MINUS_INFINITY = tl.constexpr(float("-inf"))
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _program(BLOCK: tl.constexpr, heads, length, cells, blocks):
    """Of the flat program id (a grid's other axes end at 65,535): image, head, window, first row of the block."""
    index = tl.program_id(0)
    block = index % blocks
    cell = index // blocks % cells
    plane = index // blocks // cells
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), cell, block * BLOCK


@triton.jit
def _rectangle(cell, length, window, height, width, WINDOWED: tl.constexpr):
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
def _tokens(index, first, across, width, WINDOWED: tl.constexpr, WIDE: tl.constexpr):
    """The tokens at places ``index`` of a window."""
    tokens = index
    if WINDOWED:
        tokens = first + index // across * width + index % across
    if WIDE:
        tokens = tokens.to(tl.int64)
    return tokens


@triton.jit
def _offsets(tokens, strides, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets (tokens, BLOCK) within one image and head; ``strides`` are of image, head, token, channel."""
    channels = tl.arange(0, BLOCK)
    if WIDE:
        channels = channels.to(tl.int64)
    return tokens[:, None] * strides[2] + channels[None, :] * strides[3]


@triton.jit
def _mask(valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return valid[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]


@triton.jit
def _load(
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
    pointers = pointer + _offsets(tokens, strides, BLOCK, WIDE)
    if MASKED:
        return tl.load(pointers, mask=_mask(valid, WIDTH, BLOCK), other=0.0)
    if WIDTH < BLOCK:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK) < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _add_dot(total, a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


# ------------------------------------------------------------------------------------------- forward


@triton.jit
def _forward_step(
    q,
    k,
    v,
    acc,
    total,
    highest,
    valid,
    score_scale,
    MASKED: tl.constexpr,
    ONES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of keys: sums so far shrink to the new maximum, then take the block's share.

    A maximum that ignores NaN is meant: the NaN comes through p. A row of +inf is inf - inf = NaN, as it should be.
    """
    scores = _dot(q, tl.trans(k), PRECISION, UPCAST)
    if MASKED:
        # Scaled first: 0 * -inf would be NaN.
        scores = tl.where(valid[None, :], scores * score_scale, MINUS_INFINITY)
        now = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - now[:, None])
    else:
        # Scale and difference are one fused instruction a score.
        now = tl.maximum(highest, tl.max(scores, 1) * score_scale)
        p = tl.exp2(scores * score_scale - now[:, None])
    shrink = tl.exp2(highest - now)
    p = p.to(v.dtype)
    if ONES:
        # The tensor cores add the row up: fewer slots than an addition a score and shuffles.
        ones = tl.full((k.shape[0], 8), 1.0, v.dtype)
        total = _add_dot(total * shrink[:, None], p, ones, PRECISION, UPCAST)
    else:
        total = total * shrink + tl.sum(p, 1)
    acc = _add_dot(acc * shrink[:, None], p, v, PRECISION, UPCAST)
    return acc, total, now


@triton.jit
def self_attention_forward_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    out,
    out_strides,
    lse,
    heads,
    length_q,
    length_k,
    cells,
    blocks,
    keys_per_split,
    window,
    height,
    width,
    score_scale,
    NEGATE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH_QK: tl.constexpr,
    WIDTH_V: tl.constexpr,
    PAD_QK: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out and lse of BLOCK_Q queries. ``score_scale`` is |scale| log2 e, NEGATE its sign.

    With SPLIT, axis 1 of the grid deals out the keys: ``out`` (splits, N, heads, L, D_v) and ``lse`` (splits, N, heads,
    L), in log2, are fp32 results of a part, for the merge.
    """
    image, head, cell, start = _program(BLOCK_Q, heads, length_q, cells, blocks)
    first, across, count_q = _rectangle(cell, length_q, window, height, width, WINDOWED)
    if start >= count_q:  # a window at the edge has fewer blocks
        return
    count_k = count_q if WINDOWED else length_k
    rows = start + tl.arange(0, BLOCK_Q)
    valid_q = rows < count_q
    tokens_q = _tokens(rows, first, across, width, WINDOWED, WIDE)
    query += image * query_strides[0] + head * query_strides[1]
    key += image * key_strides[0] + head * key_strides[1]
    value += image * value_strides[0] + head * value_strides[1]
    out += image * out_strides[0] + head * out_strides[1]
    lse += (image * heads + head) * length_q

    first_key = 0
    last_key = count_k
    if SPLIT:
        split = tl.program_id(1)
        first_key = split * keys_per_split
        last_key = tl.minimum(first_key + keys_per_split, count_k)
        planes = tl.num_programs(0) // (cells * blocks)
        out += split.to(tl.int64) * planes * length_q * WIDTH_V
        lse += split.to(tl.int64) * planes * length_q
    whole = first_key + tl.maximum(last_key - first_key, 0) // BLOCK_K * BLOCK_K

    q = _load(query, tokens_q, valid_q, query_strides, WIDTH_QK, PAD_QK, WIDE, True)
    if NEGATE:
        q = (-q.to(tl.float32)).to(q.dtype)  # exact; the interpreter cannot negate bfloat16
    acc = tl.zeros((BLOCK_Q, PAD_V), tl.float32)
    total = tl.zeros((BLOCK_Q, 8) if ONES else (BLOCK_Q,), tl.float32)
    highest = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    columns = tl.arange(0, BLOCK_K)
    for at in tl.range(first_key, whole, BLOCK_K):
        tokens = _tokens(at + columns, first, across, width, WINDOWED, WIDE)
        k = _load(key, tokens, columns, key_strides, WIDTH_QK, PAD_QK, WIDE, False)
        v = _load(value, tokens, columns, value_strides, WIDTH_V, PAD_V, WIDE, False)
        acc, total, highest = _forward_step(
            q, k, v, acc, total, highest, columns, score_scale, False, ONES, PRECISION, UPCAST
        )
    if whole < last_key:
        valid = whole + columns < last_key
        tokens = _tokens(whole + columns, first, across, width, WINDOWED, WIDE)
        k = _load(key, tokens, valid, key_strides, WIDTH_QK, PAD_QK, WIDE, True)
        v = _load(value, tokens, valid, value_strides, WIDTH_V, PAD_V, WIDE, True)
        acc, total, highest = _forward_step(
            q, k, v, acc, total, highest, valid, score_scale, True, ONES, PRECISION, UPCAST
        )

    if ONES:
        total = tl.max(total, 1)  # equal columns
    acc = acc / total[:, None]
    if SPLIT:
        # A part without a score above -inf has no say in the merge; NaN would have.
        acc = tl.where(total[:, None] == 0, 0.0, acc)
        tl.store(lse + tokens_q, highest + tl.log2(total), mask=valid_q)
    else:
        tl.store(lse + tokens_q, (highest + tl.log2(total)) * LN2, mask=valid_q)
    pointers = out + _offsets(tokens_q, out_strides, PAD_V, WIDE)
    mask = _mask(valid_q, WIDTH_V, PAD_V)
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def self_attention_merge_kernel(
    parts,
    part_lse,
    out,
    out_strides,
    lse,
    heads,
    length,
    blocks,
    splits,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Results over parts of the keys, each weighted with its share of the sum; in one order, so with the same bits."""
    image, head, _, start = _program(BLOCK, heads, length, 1, blocks)
    rows = start + tl.arange(0, BLOCK)
    valid = rows < length
    channels = tl.arange(0, PAD)
    plane = image * heads + head
    rows_of_a_part = (tl.num_programs(0) // blocks).to(tl.int64) * length
    part_lse += plane * length
    parts += plane * length * WIDTH
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    for split in range(splits):
        part = tl.load(part_lse + split * rows_of_a_part + rows, mask=valid, other=0.0)
        highest = tl.maximum(highest, part)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, PAD), tl.float32)
    inside = _mask(valid, WIDTH, PAD)
    offsets = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
    for split in range(splits):
        part = tl.load(part_lse + split * rows_of_a_part + rows, mask=valid, other=0.0)
        weight = tl.exp2(part - highest)
        pointers = parts + split * rows_of_a_part * WIDTH + offsets
        acc += weight[:, None] * tl.load(pointers, mask=inside, other=0.0)
        total += weight
    out += image * out_strides[0] + head * out_strides[1]
    tokens = _tokens(rows, 0, 1, 1, False, WIDE)
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + _offsets(tokens, out_strides, PAD, WIDE), acc, mask=inside)
    tl.store(lse + plane * length + rows, (highest + tl.log2(total)) * LN2, mask=valid)


# ------------------------------------------------------------------------------------------ backward


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
    image, head, _, start = _program(BLOCK, heads, length, 1, blocks)
    rows = start + tl.arange(0, BLOCK)
    valid = rows < length
    tokens = _tokens(rows, 0, 1, 1, False, WIDE)
    grad_out += image * grad_out_strides[0] + head * grad_out_strides[1]
    out += image * out_strides[0] + head * out_strides[1]
    g = _load(grad_out, tokens, valid, grad_out_strides, WIDTH, PAD, WIDE, True)
    o = _load(out, tokens, valid, out_strides, WIDTH, PAD, WIDE, True)
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
    scores = _dot(k, tl.trans(q), PRECISION, UPCAST)
    p = tl.exp2(scores * score_scale - row_lse[None, :] * LOG2E)
    if MASKED:
        # Not left to zeros in k and q: exp2(0 - lse) may be inf, and inf * 0 is NaN.
        p = tl.where(valid_k[:, None] & valid_q[None, :], p, 0.0)
    grad_v = _add_dot(grad_v, p.to(g.dtype), g, PRECISION, UPCAST)
    grad_p = _dot(v, tl.trans(g), PRECISION, UPCAST)
    grad_scores = (p * (grad_p - row_delta[None, :])).to(q.dtype)
    grad_k = _add_dot(grad_k, grad_scores, q, PRECISION, UPCAST)
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
    image, head, cell, start = _program(BLOCK_K, heads, length_k, cells, blocks)
    first, across, count_k = _rectangle(cell, length_k, window, height, width, WINDOWED)
    if start >= count_k:
        return
    count_q = count_k if WINDOWED else length_q
    rows = start + tl.arange(0, BLOCK_K)
    valid_k = rows < count_k
    tokens_k = _tokens(rows, first, across, width, WINDOWED, WIDE)
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

    k = _load(key, tokens_k, valid_k, key_strides, WIDTH_QK, PAD_QK, WIDE, True)
    v = _load(value, tokens_k, valid_k, value_strides, WIDTH_V, PAD_V, WIDE, True)
    grad_k = tl.zeros((BLOCK_K, PAD_QK), tl.float32)
    grad_v = tl.zeros((BLOCK_K, PAD_V), tl.float32)
    columns = tl.arange(0, BLOCK_Q)
    # A block of keys with a tail takes every block of queries with masks.
    whole = tl.where(start + BLOCK_K <= count_k, count_q // BLOCK_Q * BLOCK_Q, 0)
    for at in tl.range(0, whole, BLOCK_Q):
        tokens = _tokens(at + columns, first, across, width, WINDOWED, WIDE)
        q = _load(query, tokens, columns, query_strides, WIDTH_QK, PAD_QK, WIDE, False)
        g = _load(grad_out, tokens, columns, grad_out_strides, WIDTH_V, PAD_V, WIDE, False)
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
            pointers = grad_query + _offsets(tokens, dense, PAD_QK, WIDE)
            grad_q = _dot(tl.trans(grad_scores), k, PRECISION, UPCAST)
            inside = _mask(columns >= 0, WIDTH_QK, PAD_QK)
            tl.atomic_add(pointers, grad_q, mask=inside, sem="relaxed")
    for at in tl.range(whole, count_q, BLOCK_Q, num_stages=1):
        valid = at + columns < count_q
        tokens = _tokens(at + columns, first, across, width, WINDOWED, WIDE)
        q = _load(query, tokens, valid, query_strides, WIDTH_QK, PAD_QK, WIDE, True)
        g = _load(grad_out, tokens, valid, grad_out_strides, WIDTH_V, PAD_V, WIDE, True)
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
            pointers = grad_query + _offsets(tokens, dense, PAD_QK, WIDE)
            grad_q = _dot(tl.trans(grad_scores), k, PRECISION, UPCAST)
            inside = _mask(valid, WIDTH_QK, PAD_QK)
            tl.atomic_add(pointers, grad_q, mask=inside, sem="relaxed")

    grad_key += _offsets(tokens_k, grad_key_strides, PAD_QK, WIDE)
    inside = _mask(valid_k, WIDTH_QK, PAD_QK)
    tl.store(grad_key, (grad_k * scale).to(grad_key.dtype.element_ty), mask=inside)
    grad_value += _offsets(tokens_k, grad_value_strides, PAD_V, WIDE)
    inside = _mask(valid_k, WIDTH_V, PAD_V)
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
    scores = _dot(q, tl.trans(k), PRECISION, UPCAST)
    p = tl.exp2(scores * score_scale - row_lse[:, None])
    if MASKED:
        p = tl.where(valid[None, :], p, 0.0)
    grad_p = _dot(g, tl.trans(v), PRECISION, UPCAST)
    grad_scores = (p * (grad_p - row_delta[:, None])).to(k.dtype)
    return _add_dot(grad_q, grad_scores, k, PRECISION, UPCAST)


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
    image, head, cell, start = _program(BLOCK_Q, heads, length_q, cells, blocks)
    first, across, count_q = _rectangle(cell, length_q, window, height, width, WINDOWED)
    if start >= count_q:
        return
    count_k = count_q if WINDOWED else length_k
    rows = start + tl.arange(0, BLOCK_Q)
    valid_q = rows < count_q
    tokens_q = _tokens(rows, first, across, width, WINDOWED, WIDE)
    grad_out += image * grad_out_strides[0] + head * grad_out_strides[1]
    query += image * query_strides[0] + head * query_strides[1]
    key += image * key_strides[0] + head * key_strides[1]
    value += image * value_strides[0] + head * value_strides[1]
    grad_query += image * grad_query_strides[0] + head * grad_query_strides[1]
    lse += (image * heads + head) * length_q
    delta += (image * heads + head) * length_q

    q = _load(query, tokens_q, valid_q, query_strides, WIDTH_QK, PAD_QK, WIDE, True)
    g = _load(grad_out, tokens_q, valid_q, grad_out_strides, WIDTH_V, PAD_V, WIDE, True)
    row_lse = tl.load(lse + tokens_q, mask=valid_q, other=0.0) * LOG2E
    row_delta = tl.load(delta + tokens_q, mask=valid_q, other=0.0)
    grad_q = tl.zeros((BLOCK_Q, PAD_QK), tl.float32)
    columns = tl.arange(0, BLOCK_K)
    whole = count_k // BLOCK_K * BLOCK_K
    for at in tl.range(0, whole, BLOCK_K):
        tokens = _tokens(at + columns, first, across, width, WINDOWED, WIDE)
        k = _load(key, tokens, columns, key_strides, WIDTH_QK, PAD_QK, WIDE, False)
        v = _load(value, tokens, columns, value_strides, WIDTH_V, PAD_V, WIDE, False)
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
        tokens = _tokens(whole + columns, first, across, width, WINDOWED, WIDE)
        k = _load(key, tokens, valid, key_strides, WIDTH_QK, PAD_QK, WIDE, True)
        v = _load(value, tokens, valid, value_strides, WIDTH_V, PAD_V, WIDE, True)
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
    grad_query += _offsets(tokens_q, grad_query_strides, PAD_QK, WIDE)
    inside = _mask(valid_q, WIDTH_QK, PAD_QK)
    tl.store(grad_query, (grad_q * scale).to(grad_query.dtype.element_ty), mask=inside)
