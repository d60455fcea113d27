"""The forward pass of attention in portable Triton: one program a block of query rows, programs independent.

FlashAttention-2's schedule (Dao 2023): a program keeps its rows, walks the tiles of keys they see, and rescales a
running sum of exponentials. Letters in shapes: Q rows and K keys of a tile, D head dim padded to a power of two.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels import addressing, hardware
from longctx.kernels.attention import triton_blocks
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.kernel_mask import kernel_mask
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.kernels.attention.triton_tile import (
    add_alibi,
    load_tile,
    softmax_step,
    tile_bounds,
    tile_inside,
    tile_offsets,
    visible,
)
from longctx.kernels.triton_math import LN_2, LOG2_E, finite, tanh, wide


@triton.jit
def _forward_tile(
    acc, row_max, row_sum, q_tile, k, v, tile, row, start, end, layout, q_position, k_positions, slope, seed, threshold,
    stream, k_row, v_row, n_keys, scale, softcap,
    EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    LAYOUT_Q: tl.constexpr, LAYOUT_K: tl.constexpr,
):  # fmt: skip
    first = tile * BLOCK_K
    key = first + tl.arange(0, BLOCK_K)
    if k_positions is None:
        k_position = key
    else:
        k_position = tl.load(k_positions + key, mask=key < n_keys, other=0)
    k_tile = load_tile(k, first, n_keys, k_row, EDGE, BLOCK_K, BLOCK_D, HEAD_DIM)
    score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    factor = scale * LOG2_E  # of the raw products; of scores in natural units it is log2(e)
    if softcap is not None:
        score = softcap * tanh(score * (scale / softcap))
        factor = LOG2_E
    if slope is not None:
        if softcap is None:
            score = score * scale
            factor = LOG2_E
        score = add_alibi(score, slope[:, None], q_position[:, None], k_position[None, :])
    if EDGE:
        seen = visible(row[:, None], key[None, :], start[:, None], end[:, None], layout, n_keys, LAYOUT_Q, LAYOUT_K)
        score = tl.where(seen, score, float("-inf"))
    v_tile = load_tile(v, first, n_keys, v_row, EDGE, BLOCK_K, BLOCK_D, HEAD_DIM)
    return softmax_step(
        acc, row_max, row_sum, score, factor, v_tile, seed, threshold, stream,
        q_position[:, None], k_position[None, :], EDGE,
    )  # fmt: skip


@triton.jit
def attention_forward_triton(
    q, k, v, out, lse, sink, slopes, seed, start, end, tiles, order, layout, q_positions, k_positions,
    q_batch, q_row: tl.constexpr, q_head, k_batch, k_row: tl.constexpr, k_head,
    v_batch, v_row: tl.constexpr, v_head, out_batch, out_row: tl.constexpr, out_head,
    slopes_batch, slopes_row, slopes_head, bounds_batch, positions_batch,
    tiles_batch, tiles_head, order_head, order_block, layout_head,
    n_queries, n_keys, group, scale, softcap, threshold, keep_scale,
    MERGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LAYOUT_Q: tl.constexpr, LAYOUT_K: tl.constexpr,
):  # fmt: skip
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest first
    head, batch = tl.program_id(1), tl.program_id(2)
    stream = batch * tl.num_programs(1) + head
    first, full_first, full_last, last = tile_bounds(
        tiles + wide(batch) * tiles_batch + wide(head) * tiles_head, row_block, order
    )
    if MERGE and sink is None:
        if first >= last:
            return  # nothing to add

    first_row = row_block * BLOCK_Q
    row = first_row + tl.arange(0, BLOCK_Q)
    is_row = row < n_queries
    q += wide(batch) * q_batch + wide(head) * q_head
    k += wide(batch) * k_batch + wide(head // group) * k_head
    v += wide(batch) * v_batch + wide(head // group) * v_head
    q_tile = load_tile(q, first_row, n_queries, q_row, True, BLOCK_Q, BLOCK_D, HEAD_DIM)
    row_start = tl.load(start + wide(batch) * bounds_batch + row, mask=is_row, other=0)
    row_end = tl.load(end + wide(batch) * bounds_batch + row, mask=is_row, other=0)
    if layout is not None:
        order += wide(head) * order_head + wide(row_block) * order_block
        layout += wide(head) * layout_head
    q_position = row + (n_keys - n_queries)
    if q_positions is not None:
        q_position = tl.load(q_positions + wide(batch) * positions_batch + row, mask=is_row, other=0)
    slope = None
    if slopes is not None:
        slopes += wide(batch) * slopes_batch + head * slopes_head
        slope = tl.load(slopes + row.to(tl.int64) * slopes_row, mask=is_row, other=0.0)
    seed_value = None
    if seed is not None:
        seed_value = tl.load(seed)

    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    if sink is not None:  # one more key, whose value is 0
        row_max = tl.full((BLOCK_Q,), 0.0, tl.float32) + tl.load(sink + head).to(tl.float32) * LOG2_E
        row_sum += 1.0

    edges_before = full_first - first
    edges = edges_before + last - full_last
    for part in tl.static_range(2):  # the tiles of both edges, then the full ones
        low, high = 0 if part == 0 else full_first, edges if part == 0 else full_last
        for i in range(low, high):
            tile = i if part == 1 else tl.where(i < edges_before, first + i, full_last - edges_before + i)
            if order is not None:
                tile = tl.load(order + tile)
            acc, row_max, row_sum = _forward_tile(
                acc, row_max, row_sum, q_tile, k, v, tile, row, row_start, row_end, layout, q_position, k_positions,
                slope, seed_value, threshold, stream, k_row, v_row, n_keys, scale, softcap,
                part == 0, HEAD_DIM, BLOCK_D, BLOCK_K, LAYOUT_Q, LAYOUT_K,
            )  # fmt: skip

    _store_rows(
        acc, row_max, row_sum, out + wide(batch) * out_batch + wide(head) * out_head, lse + wide(stream) * n_queries,
        first_row, row, is_row, n_queries, out_row, keep_scale, MERGE, HEAD_DIM, BLOCK_D, BLOCK_Q,
    )  # fmt: skip


@triton.jit
def _store_rows(
    acc, row_max, row_sum, out, lse, first_row, row, is_row, n_queries, out_row, keep_scale,
    MERGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Writes out and lse of a block of rows, or merges them into what is there."""
    share = tl.where(row_sum == 0.0, 0.0, keep_scale / row_sum)  # a row without keys; NaN stays NaN
    row_lse = tl.where(row_sum == 0.0, float("-inf"), row_max * LN_2 + tl.log(row_sum))
    out_pointers = out + wide(first_row) * out_row + tile_offsets(out_row, BLOCK_Q, BLOCK_D)
    inside = tile_inside(n_queries - first_row, BLOCK_Q, BLOCK_D, HEAD_DIM)
    if MERGE:
        before = tl.load(lse + row, mask=is_row, other=float("-inf"))
        top = finite(tl.maximum(before, row_lse))
        merged = top + tl.log(tl.exp(before - top) + tl.exp(row_lse - top))
        base = finite(merged)
        share *= tl.exp(row_lse - base)
        acc = acc * share[:, None] + tl.load(out_pointers, mask=inside) * tl.exp(before - base)[:, None]
        row_lse = merged
    else:
        acc = acc * share[:, None]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, row_lse, mask=is_row)


def forward_in_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyIntervals | BlockMask,
    options: Options,
    sink: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (batch, n_queries, heads, head_dim) and lse (batch, heads, n_queries) float32; see `passes`."""
    batch, n_queries, heads, head_dim = q.shape
    if into is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, heads, n_queries), dtype=torch.float32, device=q.device)
    else:
        out, lse = into
    q, k, v = (addressing.readable(x) for x in (q, k, v))
    blocks = triton_blocks.attention_forward(q, isinstance(mask, BlockMask))
    m = kernel_mask(mask, options, q.device, blocks.rows, blocks.keys)
    slopes = options.slopes(batch, n_queries, heads)
    with hardware.on_device(q):
        attention_forward_triton[(triton.cdiv(n_queries, blocks.rows), heads, batch)](
            q, k, v, out, lse, None if sink is None else sink.contiguous(), slopes, options.seed, m.start, m.end,
            m.tiles, m.order, m.layout, m.query_position, m.key_position,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *addressing.strides(slopes, 3), addressing.shared_stride(m.start),
            addressing.shared_stride(m.query_position), m.tiles_batch, m.tiles_head, *m.order_strides,
            addressing.shared_stride(m.layout),
            n_queries, k.shape[1], heads // k.shape[2],
            options.scale, options.softcap or None, options.threshold, 1 / (1 - options.dropout),
            MERGE=into is not None, HEAD_DIM=head_dim, BLOCK_D=addressing.padded(head_dim),
            BLOCK_Q=blocks.rows, BLOCK_K=blocks.keys, LAYOUT_Q=m.layout_q, LAYOUT_K=m.layout_k,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )  # fmt: skip
    return out, lse
