"""The kernels of the forward: blocks of queries, and the merge of parts of the keys."""

import triton
import triton.language as tl

from .tiles import add_dot, dot, load_rows, mask_of, offsets_of, own_block, rectangle, tokens_at

LN2 = tl.constexpr(0.6931471805599453)
# Start of the running maximum. Were it -inf, a first block of nothing but -inf would give -inf - -inf = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
MINUS_INFINITY = tl.constexpr(float("-inf"))


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
    scores = dot(q, tl.trans(k), PRECISION, UPCAST)
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
        total = add_dot(total * shrink[:, None], p, ones, PRECISION, UPCAST)
    else:
        total = total * shrink + tl.sum(p, 1)
    acc = add_dot(acc * shrink[:, None], p, v, PRECISION, UPCAST)
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
    image, head, cell, start = own_block(BLOCK_Q, heads, length_q, cells, blocks)
    first, across, count_q = rectangle(cell, length_q, window, height, width, WINDOWED)
    if start >= count_q:  # a window at the edge has fewer blocks
        return
    count_k = count_q if WINDOWED else length_k
    rows = start + tl.arange(0, BLOCK_Q)
    valid_q = rows < count_q
    tokens_q = tokens_at(rows, first, across, width, WINDOWED, WIDE)
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

    q = load_rows(query, tokens_q, valid_q, query_strides, WIDTH_QK, PAD_QK, WIDE, True)
    if NEGATE:
        q = (-q.to(tl.float32)).to(q.dtype)  # exact; the interpreter cannot negate bfloat16
    acc = tl.zeros((BLOCK_Q, PAD_V), tl.float32)
    total = tl.zeros((BLOCK_Q, 8) if ONES else (BLOCK_Q,), tl.float32)
    highest = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    columns = tl.arange(0, BLOCK_K)
    # The rest comes first: after the loop its addresses would take registers within.
    if whole < last_key:
        valid = whole + columns < last_key
        tokens = tokens_at(whole + columns, first, across, width, WINDOWED, WIDE)
        k = load_rows(key, tokens, valid, key_strides, WIDTH_QK, PAD_QK, WIDE, True)
        v = load_rows(value, tokens, valid, value_strides, WIDTH_V, PAD_V, WIDE, True)
        acc, total, highest = _forward_step(
            q, k, v, acc, total, highest, valid, score_scale, True, ONES, PRECISION, UPCAST
        )
    for at in tl.range(first_key, whole, BLOCK_K):
        tokens = tokens_at(at + columns, first, across, width, WINDOWED, WIDE)
        k = load_rows(key, tokens, columns, key_strides, WIDTH_QK, PAD_QK, WIDE, False)
        v = load_rows(value, tokens, columns, value_strides, WIDTH_V, PAD_V, WIDE, False)
        acc, total, highest = _forward_step(
            q, k, v, acc, total, highest, columns, score_scale, False, ONES, PRECISION, UPCAST
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
    pointers = out + offsets_of(tokens_q, out_strides, PAD_V, WIDE)
    mask = mask_of(valid_q, WIDTH_V, PAD_V)
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
    image, head, _, start = own_block(BLOCK, heads, length, 1, blocks)
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
    inside = mask_of(valid, WIDTH, PAD)
    offsets = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
    for split in range(splits):
        part = tl.load(part_lse + split * rows_of_a_part + rows, mask=valid, other=0.0)
        weight = tl.exp2(part - highest)
        pointers = parts + split * rows_of_a_part * WIDTH + offsets
        acc += weight[:, None] * tl.load(pointers, mask=inside, other=0.0)
        total += weight
    out += image * out_strides[0] + head * out_strides[1]
    tokens = tokens_at(rows, 0, 1, 1, False, WIDE)
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + offsets_of(tokens, out_strides, PAD, WIDE), acc, mask=inside)
    tl.store(lse + plane * length + rows, (highest + tl.log2(total)) * LN2, mask=valid)
