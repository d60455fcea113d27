"""The backward pass of attention in portable Triton: one program a block of keys, which walks the rows that see it.

dK and dV stay in registers, also over the query heads that share the keys; dQ is summed across programs in float32
(FlashAttention-2's column split, Dao 2023). Letters in shapes: Q rows and K keys of a tile, D head dim padded to a
power of two. Score tiles are held transposed, (K, Q), so that the two products into dK and dV read them from registers.
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
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.triton_tile import (
    add_alibi,
    load_tile,
    meet,
    tile_bounds,
    tile_inside,
    tile_offsets,
    visible,
    wait_for,
)
from longctx.kernels.triton_math import LOG2_E, kept, tanh, wide


@triton.jit
def attention_delta_triton(
    dout, out, dlse, lse, delta, exponent, dout_batch, dout_row: tl.constexpr, dout_head,
    out_batch, out_row: tl.constexpr, out_head, n_queries, n_padded,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, (batch, heads, n_padded); if `exponent` is there, lse in base 2."""
    first_row = tl.program_id(0) * BLOCK_Q
    head, batch = tl.program_id(1), tl.program_id(2)
    stream = batch * tl.num_programs(1) + head
    dout += wide(batch) * dout_batch + wide(head) * dout_head
    out += wide(batch) * out_batch + wide(head) * out_head
    dout_tile = load_tile(dout, first_row, n_queries, dout_row, True, BLOCK_Q, BLOCK_D, HEAD_DIM).to(tl.float32)
    out_tile = load_tile(out, first_row, n_queries, out_row, True, BLOCK_Q, BLOCK_D, HEAD_DIM).to(tl.float32)
    row = first_row + tl.arange(0, BLOCK_Q)
    row_delta = tl.sum(dout_tile * out_tile, 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + wide(stream) * n_queries + row, mask=row < n_queries, other=0.0)
    row_lse = tl.zeros((BLOCK_Q,), tl.float32)
    if lse is not None:
        row_lse = tl.load(lse + wide(stream) * n_queries + row, mask=row < n_queries, other=float("-inf"))
        row_delta = tl.where(row_lse == float("-inf"), 0.0, row_delta)  # of a row without keys dlse may be NaN
    tl.store(delta + wide(stream) * n_padded + row, row_delta, mask=row < n_padded)
    if exponent is not None:
        weightless = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)  # exp2(x - inf) is 0
        tl.store(exponent + wide(stream) * n_padded + row, weightless, mask=row < n_padded)


@triton.jit
def _turn(turns, tile, key_block, order, n_keys, BLOCK_K: tl.constexpr):
    """Which place in the order of additions to a tile of dQ a block of keys has: the last block comes first."""
    if order is None:
        turn = tl.load(turns + wide(tile) * 4 + 3) - 1 - key_block
    else:
        turn = tl.load(turns + wide(tile) * tl.cdiv(n_keys, BLOCK_K) + key_block)
    return turn


@triton.jit
def _backward_tile(
    dk, dv, k_tile, v_tile, q, dout, dq, lse, delta, locks, start, end, order, layout, q_positions, turns, tile,
    key_block, key, k_position, slopes, seed, threshold, keep_scale, stream,
    q_row, dout_row, dq_row, slopes_row, n_queries, n_keys, scale, softcap,
    EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LAYOUT_Q: tl.constexpr, LAYOUT_K: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    first_row = tile * BLOCK_Q
    row = first_row + tl.arange(0, BLOCK_Q)
    is_row = row < n_queries
    q_tile = load_tile(q, first_row, n_queries, q_row, EDGE, BLOCK_Q, BLOCK_D, HEAD_DIM)
    dout_tile = load_tile(dout, first_row, n_queries, dout_row, EDGE, BLOCK_Q, BLOCK_D, HEAD_DIM)
    if EDGE:
        row_lse = tl.load(lse + row, mask=is_row, other=float("inf"))
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # a row without keys: weights of 0
        row_delta = tl.load(delta + row, mask=is_row, other=0.0)
    else:
        row_lse = tl.load(lse + row)
        row_delta = tl.load(delta + row)
    if q_positions is None:
        q_position = row + (n_keys - n_queries)
    else:
        q_position = tl.load(q_positions + row, mask=is_row, other=0)

    score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # (K, Q)
    unit = scale  # of the raw products; scores in natural units have 1
    if softcap is not None:
        squashed = tanh(score * (scale / softcap))
        score = softcap * squashed
        unit = 1.0
    if slopes is not None:
        slope = tl.load(slopes + row.to(tl.int64) * slopes_row, mask=is_row, other=0.0)
        if softcap is None:
            score = score * scale
            unit = 1.0
        score = add_alibi(score, slope[None, :], q_position[None, :], k_position[:, None])
    if q_tile.dtype == tl.float32:  # one rounding less than the product and sum that make one instruction
        p = tl.exp2((score * unit - row_lse[None, :]) * LOG2_E)
    else:
        p = tl.exp2(score * (unit * LOG2_E) - (row_lse * LOG2_E)[None, :])
    if EDGE:
        row_start = tl.load(start + row, mask=is_row, other=0)
        row_end = tl.load(end + row, mask=is_row, other=0)
        seen = visible(
            row[None, :], key[:, None], row_start[None, :], row_end[None, :], layout, n_keys, LAYOUT_Q, LAYOUT_K
        )
        p = tl.where(seen, p, 0.0)

    dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
    kept_p = p
    if seed is not None:
        keep = kept(seed, threshold, stream, q_position[None, :], k_position[:, None])
        kept_p = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dv = tl.dot(kept_p.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
    dscore = p * (dp - row_delta[None, :])
    if softcap is not None:
        dscore *= 1 - squashed * squashed
    dscore = dscore.to(q_tile.dtype)
    dq_tile = tl.dot(tl.trans(dscore), k_tile, input_precision="ieee") * scale  # before dk: spills less
    dk = tl.dot(dscore, q_tile, dk, input_precision="ieee")

    if locks is not None:
        turn = _turn(turns, tile, key_block, order, n_keys, BLOCK_K)
        wait_for(locks + tile, turn, NVIDIA)
    dq_pointers = dq + wide(first_row) * dq_row + tile_offsets(dq_row, BLOCK_Q, BLOCK_D)
    if EDGE or HEAD_DIM < BLOCK_D:
        inside = tile_inside(n_queries - first_row, BLOCK_Q, BLOCK_D, HEAD_DIM)
        tl.atomic_add(dq_pointers, dq_tile, mask=inside, sem="relaxed")
    else:
        tl.atomic_add(dq_pointers, dq_tile, sem="relaxed")
    if locks is not None:
        meet(NVIDIA)  # every thread's additions are done before the next block's turn
        tl.atomic_add(locks + tile, 1, sem="release")
    return dk, dv


@triton.jit
def attention_backward_triton(
    dout, q, k, v, lse, delta, dq, dk, dv, locks, slopes, seed, start, end, tiles, order, turns, layout,
    q_positions, k_positions,
    dout_batch, dout_row: tl.constexpr, dout_head, q_batch, q_row: tl.constexpr, q_head,
    k_batch, k_row: tl.constexpr, k_head, v_batch, v_row: tl.constexpr, v_head,
    dq_batch, dq_row: tl.constexpr, dq_head,
    dk_batch, dk_row: tl.constexpr, dk_head, dv_batch, dv_row: tl.constexpr, dv_head,
    slopes_batch, slopes_row, slopes_head, bounds_batch, positions_batch,
    tiles_batch, tiles_head, turns_batch, turns_head, order_head, order_block, layout_head,
    n_queries, n_keys, group, scale, softcap, threshold, keep_scale,
    ACCUMULATE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT_Q: tl.constexpr, LAYOUT_K: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    key_block = tl.program_id(0)  # under a causal mask the longest first
    if locks is not None:
        key_block = tl.num_programs(0) - 1 - key_block  # in the order of turns: who is waited for has started before
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    start += wide(batch) * bounds_batch
    end += wide(batch) * bounds_batch
    tiles += wide(batch) * tiles_batch
    if ACCUMULATE and order is None:
        first, _, _, last = tile_bounds(tiles, key_block, order)
        if first >= last:
            return  # nothing to add

    first_key = key_block * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    k_position = key
    if k_positions is not None:
        k_position = tl.load(k_positions + key, mask=key < n_keys, other=0)
    if q_positions is not None:
        q_positions += wide(batch) * positions_batch
    seed_value = None
    if seed is not None:
        seed_value = tl.load(seed)
    k += wide(batch) * k_batch + wide(kv_head) * k_head
    v += wide(batch) * v_batch + wide(kv_head) * v_head
    k_tile = load_tile(k, first_key, n_keys, k_row, True, BLOCK_K, BLOCK_D, HEAD_DIM)
    v_tile = load_tile(v, first_key, n_keys, v_row, True, BLOCK_K, BLOCK_D, HEAD_DIM)
    dk_tile = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)

    for member in range(0, group):  # the query heads that share these keys
        head = kv_head * group + member
        stream = batch * (tl.num_programs(1) * group) + head
        q_head_base = q + wide(batch) * q_batch + wide(head) * q_head
        dout_head_base = dout + wide(batch) * dout_batch + wide(head) * dout_head
        dq_head_base = dq + wide(batch) * dq_batch + wide(head) * dq_head
        lse_base, delta_base = lse + wide(stream) * n_queries, delta + wide(stream) * n_queries
        locks_base = None
        if locks is not None:
            locks_base = locks + stream * tl.cdiv(n_queries, BLOCK_Q)
        first, full_first, full_last, last = tile_bounds(tiles + wide(head) * tiles_head, key_block, order)
        head_turns, head_order, head_layout = turns, order, layout
        if turns is not None:
            head_turns += wide(batch) * turns_batch + wide(head) * turns_head
        if order is not None:
            head_order += wide(head) * order_head + wide(key_block) * order_block
            head_layout += wide(head) * layout_head
        slopes_base = None
        if slopes is not None:
            slopes_base = slopes + wide(batch) * slopes_batch + head * slopes_head
        for part in tl.static_range(3):  # the tiles of the near edge, the full ones, those of the far edge
            low = first if part == 0 else (full_first if part == 1 else full_last)
            high = full_first if part == 0 else (full_last if part == 1 else last)
            for i in range(low, high):
                tile = i
                if order is not None:
                    tile = tl.load(head_order + i)
                dk_tile, dv_tile = _backward_tile(
                    dk_tile, dv_tile, k_tile, v_tile, q_head_base, dout_head_base, dq_head_base, lse_base, delta_base,
                    locks_base, start, end, order, head_layout, q_positions, head_turns, tile, key_block, key,
                    k_position, slopes_base, seed_value, threshold, keep_scale, stream, q_row, dout_row, dq_row,
                    slopes_row, n_queries, n_keys, scale, softcap,
                    part != 1, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, LAYOUT_Q, LAYOUT_K, NVIDIA,
                )  # fmt: skip

    inside = tile_inside(n_keys - first_key, BLOCK_K, BLOCK_D, HEAD_DIM)
    dk += wide(batch) * dk_batch + wide(kv_head) * dk_head + wide(first_key) * dk_row
    dv += wide(batch) * dv_batch + wide(kv_head) * dv_head + wide(first_key) * dv_row
    dk_pointers, dv_pointers = dk + tile_offsets(dk_row, BLOCK_K, BLOCK_D), dv + tile_offsets(dv_row, BLOCK_K, BLOCK_D)
    dk_tile *= scale
    if ACCUMULATE:
        dk_tile += tl.load(dk_pointers, mask=inside)
        dv_tile += tl.load(dv_pointers, mask=inside)
    tl.store(dk_pointers, dk_tile.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv_pointers, dv_tile.to(dv.dtype.element_ty), mask=inside)


def backward_in_triton(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    mask: KeyIntervals | BlockMask,
    options: Options,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, in the inputs' dtype, or added to the float32 tensors `into`; see `passes`."""
    q, k, v, out, lse = saved
    batch, n_queries, heads, head_dim = q.shape
    n_keys, kv_heads = k.shape[1:3]
    if into is None:
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    else:
        dq, dk, dv = into
    dout, q, k, v, out = (addressing.readable(x) for x in (dout, q, k, v, out))
    lse = lse.contiguous()
    blocks = triton_blocks.attention_backward(q, isinstance(mask, BlockMask))
    m = kernel_mask(mask, options, q.device, blocks.rows, blocks.keys, of_keys=True)
    locks = None
    if options.deterministic:
        locks = torch.zeros(batch * heads * triton.cdiv(n_queries, blocks.rows), dtype=torch.int32, device=q.device)
    slopes = options.slopes(batch, n_queries, heads)
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": addressing.padded(head_dim)}
    with hardware.on_device(q):
        delta = _delta(dout, out, dlse, lse)
        attention_backward_triton[(triton.cdiv(n_keys, blocks.keys), kv_heads, batch)](
            dout, q, k, v, lse, delta, dq, dk, dv, locks, slopes, options.seed, m.start, m.end, m.tiles, m.order,
            m.turns, m.layout, m.query_position, m.key_position,
            *(stride for x in (dout, q, k, v, dq, dk, dv) for stride in x.stride()[:3]),
            *addressing.strides(slopes, 3), addressing.shared_stride(m.start),
            addressing.shared_stride(m.query_position), m.tiles_batch, m.tiles_head, *m.turns_strides, *m.order_strides,
            addressing.shared_stride(m.layout), n_queries, n_keys, heads // kv_heads,
            options.scale, options.softcap or None, options.threshold, 1 / (1 - options.dropout),
            ACCUMULATE=into is not None, **shape, BLOCK_Q=blocks.rows, BLOCK_K=blocks.keys,
            LAYOUT_Q=m.layout_q, LAYOUT_K=m.layout_k, NVIDIA=hardware.architecture(q.device).startswith("sm_"),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return dq if into is not None else dq.to(q.dtype), dk, dv


def _delta(dout: Tensor, out: Tensor, dlse: Tensor | None, lse: Tensor) -> Tensor:
    delta = torch.empty_like(lse)
    _launch_delta(dout, out, dlse, lse, delta, None)
    return delta


def statistics(dout: Tensor, out: Tensor, dlse: Tensor | None, lse: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """What a backward pass needs of rows: lse in base 2 and delta = rowsum(dout * out) - dlse.

    Both (batch, heads, n_queries up to the next multiple) float32. Rows that see no key or do not exist have lse inf
    and delta 0: their weights are 0.
    """
    batch, heads, n_queries = lse.shape
    shape = 2, batch, heads, n_queries + -n_queries % multiple
    exponent, delta = torch.empty(shape, dtype=torch.float32, device=lse.device)
    _launch_delta(dout, out, dlse, lse, delta, exponent)
    return exponent, delta


def delta(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out), (batch, heads, n_queries) float32."""
    batch, n_queries, heads, _ = dout.shape
    sums = torch.empty((batch, heads, n_queries), dtype=torch.float32, device=dout.device)
    with hardware.on_device(dout):
        _launch_delta(dout, out, None, None, sums, None)
    return sums


def _launch_delta(dout, out, dlse, lse, delta: Tensor, exponent: Tensor | None) -> None:
    dout, out = addressing.readable(dout), addressing.readable(out)
    dlse, lse = (None if x is None else x.contiguous() for x in (dlse, lse))
    batch, n_queries, heads, head_dim = dout.shape
    rows = 16 if hardware.INTERPRETED else 64
    attention_delta_triton[(triton.cdiv(delta.shape[-1], rows), heads, batch)](
        dout, out, dlse, lse, delta, exponent, *dout.stride()[:3], *out.stride()[:3], n_queries, delta.shape[-1],
        HEAD_DIM=head_dim, BLOCK_D=addressing.padded(head_dim), BLOCK_Q=rows, num_warps=4,
    )  # fmt: skip
