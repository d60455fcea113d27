"""The forward pass of attention on Hopper, in Gluon: a warp copies, two or three warpgroups multiply and take softmax.

docs/attention_on_hopper.md says how it works. Letters in shapes: Q rows and K keys of a tile, D head dim padded to 64,
128 or 256. A consumer is one warpgroup, with 64 rows of a tile.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# a kernel is launched with arguments that its signature does not show, and its constants are no Python values

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx.kernels import addressing, hardware
from longctx.kernels.attention import hopper_tiles
from longctx.kernels.attention import tiles as tile_lists
from longctx.kernels.attention.hopper_gluon import (
    arrive_at_named_barrier,
    hide_unseen,
    named_barrier,
    scale_rows,
    threads_meet,
    tma_load,
    tma_store,
)
from longctx.kernels.attention.hopper_scheduler import (
    await_item,
    barriers,
    descriptor,
    heads_together,
    item_of,
    make_box,
    phase_of,
    pointers_to,
    post_item,
    read_item,
    slot,
    visited_tile,
)
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.kernels.triton_math import LN_2, LOG2_E, finite

ROWS = gl.constexpr(tile_lists.MERGED_ROWS)  # of a consumer
TAKES_PART, HAS_BEFORE, HAS_AFTER = (
    gl.constexpr(bit) for bit in (tile_lists.TAKES_PART, tile_lists.HAS_BEFORE, tile_lists.HAS_AFTER)
)
RESCALE_THRESHOLD = gl.constexpr(8.0)  # of log2: how much sums may outgrow the maximum they are relative to
SIZES = [  # one compilation for all of them
    "bounds_batch", "tiles_batch", "flags_batch", "n_queries", "heads", "group", "n_items", "n_pairs", "together",
    "row_blocks",
]  # fmt: skip


@gluon.jit
def _merge_flags_of(of_batch, row, n_queries):
    """The merge flags of the rows of a consumer, from `row` on; 0 where there are none."""
    return gl.load(of_batch + row // ROWS, mask=row < n_queries, other=0)


@gluon.jit
def _lane_sums(p):
    """(Q, 4): sums of a row's weights, one a lane; added up after the loop, they need no shuffle in it."""
    return gl.sum(gl.sum(p.reshape([ROWS, p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _new_max(score, row_max, factor, key, row_start, row_end, MASKED: gl.constexpr):
    """Scores with -inf where a row sees no key, the new row_max, it again but 0 for -inf, and what sums shrink by.

    row_max follows the true maximum once this is far larger; before that nothing shrinks, and sums need no product.
    (FlashAttention-4, where it runs on Blackwell)
    """
    if MASKED:
        score = hide_unseen(score, key, row_start, row_end)
    highest = gl.maximum(row_max, gl.max(score, 1) * factor)
    new_row_max = gl.where(highest - row_max > RESCALE_THRESHOLD, highest, row_max)
    base = new_row_max
    if MASKED:
        base = finite(new_row_max)
    return score, new_row_max, base, gl.exp2(row_max - base)


@gluon.jit
def _consume_tiles(
    i_first, i_last, n_tiles, visit, done, q, key_ring, value_ring, state, factor, row_start, row_end,
    MASKED: gl.constexpr, NUMBER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    PING_PONG: gl.constexpr, IS_PART: gl.constexpr, score_layout: gl.constexpr, acc_layout: gl.constexpr,
):  # fmt: skip
    """Tiles i_first to i_last of an item: their scores, and the products of the weights before with their values."""
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    acc_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    keys, key_full, key_empty = key_ring
    values, value_full, value_empty = value_ring
    acc, p, row_max, row_sum = state
    lane_row: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    key = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, score_layout))
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, score_layout)
    for i in range(i_first, i_last):
        count = done + i
        if PING_PONG:  # one consumer multiplies while the others take their softmax
            named_barrier(10 + NUMBER, 256)
        score = warpgroup_mma(q, slot(keys, count, STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(slot(value_full, count - 1, STAGES), phase_of(count - 1, STAGES))
        acc = warpgroup_mma(p, slot(values, count - 1, STAGES), acc, is_async=True)
        if PING_PONG:
            arrive_at_named_barrier(10 + (NUMBER + 1) % CONSUMERS, 256)
        score = warpgroup_mma_wait(1, deps=(score,))
        mbarrier.arrive(slot(key_empty, count, STAGES), count=1)
        tile_key = key
        if MASKED:
            tile_key = key + visited_tile(i, visit) * BLOCK_K
        score, row_max, base, shrink = _new_max(score, row_max, factor, tile_key, row_start, row_end, MASKED)
        if CONSUMERS == 3:  # whose registers do not hold two tiles of p: the other consumers hide this wait
            acc, p, score = warpgroup_mma_wait(0, deps=(acc, p, score))
            mbarrier.arrive(slot(value_empty, count - 1, STAGES), count=1)
            acc = scale_rows(acc, gl.convert_layout(shrink, acc_row))
        next_p = gl.exp2(score * factor - base[:, None])
        row_sum = row_sum * gl.convert_layout(shrink, lane_row)[:, None] + _lane_sums(next_p)
        next_p = gl.convert_layout(next_p.to(q.dtype), p_layout)
        # the spin of this wait keeps the compiler from hoisting the next one above the softmax
        mbarrier.wait(slot(key_full, count + 1, STAGES), phase_of(count + 1, STAGES), pred=i + 1 < n_tiles)
        if CONSUMERS == 3:  # for nothing, but it keeps pairs of p in their registers around the loop
            p = warpgroup_mma_wait(0, deps=(next_p,))
        else:
            acc, p, next_p = warpgroup_mma_wait(0, deps=(acc, p, next_p))
            mbarrier.arrive(slot(value_empty, count - 1, STAGES), count=1)
            if IS_PART and acc.shape[1] == 256:  # or ptxas moves the exponentials behind the wait
                acc = acc * gl.convert_layout(shrink, acc_row)[:, None]
            else:
                acc = scale_rows(acc, gl.convert_layout(shrink, acc_row))
            p = next_p
    return acc, p, row_max, row_sum


@gluon.jit
def _write_out(descriptor, tile, coordinates, acc):
    """Stores the output tile of a consumer with the TMA unit."""
    tma.store_wait(0)  # of the item before
    threads_meet()
    tile.store(acc.to(tile.dtype))
    fence_async_shared()
    threads_meet()
    tma_store(descriptor, coordinates, tile)


@gluon.jit
def _consumer(
    rings, outs, rows,
    NUMBER: gl.constexpr, IS_PART: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    OWN_OUT: gl.constexpr, PING_PONG: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of each item."""
    box, query_ring, key_ring, value_ring = rings
    queries, query_full, query_empty = query_ring
    keys, key_full, key_empty = key_ring
    values, value_full, value_empty = value_ring
    (
        out_descriptor, sums, lse, start, end, merge_flags, strides, bounds_batch, flags_batch, n_queries, head_dim,
        heads, row_blocks, factor,
    ) = rows  # fmt: skip
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    score_row: gl.constexpr = gl.SliceLayout(1, score_layout)
    acc_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    q = queries.index(NUMBER)
    out_tile = outs.index(NUMBER)
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, score_layout)
    if PING_PONG and NUMBER == CONSUMERS - 1:
        arrive_at_named_barrier(10, 256)
    done = gl.to_tensor(0)  # tiles of keys so far
    turn = gl.to_tensor(0)  # items so far
    pair = await_item(box, turn)
    while pair >= 0:
        head, visit = read_item(box, turn)
        first, full_first, full_last, last = visit
        batch = pair // row_blocks
        first_row = (pair % row_blocks) * (CONSUMERS * ROWS) + NUMBER * ROWS
        row = first_row + gl.arange(0, ROWS, layout=score_row)
        is_row = row < n_queries
        row_start = gl.load(start + batch.to(gl.int64) * bounds_batch + row, mask=is_row, other=0)
        row_end = gl.load(end + batch.to(gl.int64) * bounds_batch + row, mask=is_row, other=0)
        edges = full_first - first + last - full_last
        n_tiles = last - first
        is_written, has_before, has_after = is_row, False, False
        if IS_PART:
            flags = _merge_flags_of(merge_flags + batch * flags_batch, first_row, n_queries)
            has_before, has_after = (flags & HAS_BEFORE) != 0, (flags & HAS_AFTER) != 0
            is_written = is_row & ((flags & TAKES_PART) != 0)  # others of the item's rows may alone

        # the first tile, whose scores nothing overlaps
        mbarrier.wait(query_full.index(NUMBER), turn & 1)
        mbarrier.wait(slot(key_full, done, STAGES), phase_of(done, STAGES))
        score = warpgroup_mma(q, slot(keys, done, STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=(score,))
        mbarrier.arrive(slot(key_empty, done, STAGES), count=1)
        key = visited_tile(0, visit) * BLOCK_K
        key += gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, score_layout))
        row_max = gl.full([ROWS], float("-inf"), gl.float32, score_row)  # that sums are relative to, see `_new_max`
        score, row_max, base, _ = _new_max(score, row_max, factor, key, row_start, row_end, True)
        p = gl.exp2(score * factor - base[:, None])
        row_sum = _lane_sums(p)
        p = gl.convert_layout(p.to(q.dtype), p_layout)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, acc_layout)
        mbarrier.wait(slot(key_full, done + 1, STAGES), phase_of(done + 1, STAGES), pred=n_tiles > 1)
        state = _consume_tiles(
            1, edges, n_tiles, visit, done, q, key_ring, value_ring, (acc, p, row_max, row_sum), factor, row_start,
            row_end, True, NUMBER, CONSUMERS, BLOCK_K, STAGES, PING_PONG, IS_PART, score_layout, acc_layout,
        )  # fmt: skip
        acc, p, row_max, row_sum = _consume_tiles(
            gl.maximum(edges, 1), n_tiles, n_tiles, visit, done, q, key_ring, value_ring, state, factor, row_start,
            row_end, False, NUMBER, CONSUMERS, BLOCK_K, STAGES, PING_PONG, IS_PART, score_layout, acc_layout,
        )  # fmt: skip
        if OWN_OUT:
            mbarrier.arrive(query_empty.index(NUMBER), count=1)
        final = done + n_tiles - 1
        mbarrier.wait(slot(value_full, final, STAGES), phase_of(final, STAGES))
        acc = warpgroup_mma(p, slot(values, final, STAGES), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(slot(value_empty, final, STAGES), count=1)
        done += n_tiles

        row_sum = gl.convert_layout(gl.sum(row_sum, 1), score_row)
        is_empty = row_sum == 0.0  # a row without keys; NaN stays NaN
        share = gl.where(is_empty, 0.0, 1.0 / row_sum)
        row_lse = gl.where(is_empty, float("-inf"), (row_max + gl.log2(row_sum)) * LN_2)
        lse_row = lse + (batch.to(gl.int64) * heads + head) * n_queries + row
        if IS_PART:
            before = gl.load(lse_row, mask=is_row & has_before, other=float("-inf"))
            top = finite(gl.maximum(before, row_lse))
            merged = top + gl.log2(gl.exp2((before - top) * LOG2_E) + gl.exp2((row_lse - top) * LOG2_E)) * LN_2
            base = finite(merged)
            share = share * gl.exp2((row_lse - base) * LOG2_E)
            of_before = gl.convert_layout(gl.exp2((before - base) * LOG2_E), acc_row)
            row_lse = merged
        gl.store(lse_row, row_lse, mask=is_written)
        acc = acc * gl.convert_layout(share, acc_row)[:, None]
        if IS_PART:
            pointers, inside = pointers_to(
                sums, strides, batch, head, first_row, n_queries, head_dim, ROWS, BLOCK_D, acc_layout
            )
            acc += gl.load(pointers, mask=inside & has_before, other=0.0) * of_before[:, None]
            gl.store(pointers, acc, mask=inside & has_after)
        if IS_PART:
            if (flags & (TAKES_PART | HAS_AFTER)) == TAKES_PART:
                _write_out(out_descriptor, out_tile, [batch, head, first_row, 0], acc)
        else:
            _write_out(out_descriptor, out_tile, [batch, head, first_row, 0], acc)
        if not OWN_OUT:
            tma.store_wait(0)
            mbarrier.arrive(query_empty.index(NUMBER), count=1)
        turn += 1
        pair = await_item(box, turn)
    tma.store_wait(0)


@gluon.jit
def _producer(
    descriptors, rings, work,
    IS_PART: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """One warp: takes items, says which, and copies their queries, keys and values."""
    box, query_ring, key_ring, value_ring = rings
    query_descriptor, key_descriptor, value_descriptor = descriptors
    queries, query_full, query_empty = query_ring
    keys, key_full, key_empty = key_ring
    values, value_full, value_empty = value_ring
    (
        items, tiles, counter, merge_flags, tiles_batch, flags_batch, n_queries, n_items, n_pairs, together, row_blocks,
        group,
    ) = work  # fmt: skip
    done = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    place = gl.program_id(0)
    while place < n_items:
        pair, head, visit = item_of(place, items, tiles, tiles_batch, n_pairs, together, row_blocks)
        first, full_first, full_last, last = visit
        is_empty = first >= last
        is_wanted = True
        if IS_PART:
            flags = gl.to_tensor(0)
            for c in gl.static_range(CONSUMERS):
                row = (pair % row_blocks * CONSUMERS + c) * ROWS
                flags |= _merge_flags_of(merge_flags + (pair // row_blocks) * flags_batch, row, n_queries)
            is_wanted = flags != 0
        if is_wanted:
            if is_empty:  # one tile, of which no row sees anything
                first = gl.maximum(first - 1, 0)
                full_first, full_last, last = first + 1, first + 1, first + 1
            visit = first, full_first, full_last, last
            post_item(box, turn, pair, head, visit)
            batch, row_block = pair // row_blocks, pair % row_blocks
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(query_empty.index(c), (turn & 1) ^ 1)
                mbarrier.expect(query_full.index(c), query_descriptor.block_type.nbytes)
                row = (row_block * CONSUMERS + c) * ROWS
                tma_load(query_descriptor, [batch, head, row, 0], query_full.index(c), queries.index(c))
            for i in range(0, last - first):
                stage, parity = done % STAGES, phase_of(done, STAGES) ^ 1
                key = visited_tile(i, visit) * BLOCK_K
                mbarrier.wait(key_empty.index(stage), parity)
                mbarrier.expect(key_full.index(stage), key_descriptor.block_type.nbytes)
                tma_load(key_descriptor, [batch, head // group, key, 0], key_full.index(stage), keys.index(stage))
                mbarrier.wait(value_empty.index(stage), parity)
                mbarrier.expect(value_full.index(stage), value_descriptor.block_type.nbytes)
                tma_load(value_descriptor, [batch, head // group, key, 0], value_full.index(stage), values.index(stage))
                done += 1
            turn += 1
        place = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    post_item(box, turn, -1, 0, (0, 0, 0, 0))


@gluon.jit(do_not_specialize=SIZES)
def attention_forward_hopper(
    query_descriptor, key_descriptor, value_descriptor, out_descriptor, sums, lse, start, end, items, tiles,
    merge_flags, counter, sums_batch, sums_row, sums_head, bounds_batch, tiles_batch, flags_batch, n_queries,
    head_dim, heads, group, n_items, n_pairs, together, row_blocks, factor,
    IS_PART: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    OWN_OUT: gl.constexpr, PING_PONG: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query_descriptor.dtype
    matrix: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], matrix)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_D], matrix)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_D], matrix)
    outs = queries
    if OWN_OUT:
        outs = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], matrix)
    box = make_box(CONSUMERS)
    query_ring = queries, barriers(CONSUMERS, 1), barriers(CONSUMERS, 1)
    key_ring = keys, barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    value_ring = values, barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    fence_async_shared()
    rows = (
        out_descriptor, sums, lse, start, end, merge_flags, (sums_batch, sums_row, sums_head), bounds_batch,
        flags_batch, n_queries, head_dim, heads, row_blocks, factor,
    )  # fmt: skip
    descriptors = query_descriptor, key_descriptor, value_descriptor
    work = (
        items, tiles, counter, merge_flags, tiles_batch, flags_batch, n_queries, n_items, n_pairs, together, row_blocks,
        group,
    )  # fmt: skip
    rings = box, query_ring, key_ring, value_ring
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consumer, (rings, outs, rows, 0, IS_PART, BLOCK_K, BLOCK_D, STAGES, OWN_OUT, PING_PONG, CONSUMERS)),
                (_consumer, (rings, outs, rows, 1, IS_PART, BLOCK_K, BLOCK_D, STAGES, OWN_OUT, PING_PONG, CONSUMERS)),
                (_consumer, (rings, outs, rows, 2, IS_PART, BLOCK_K, BLOCK_D, STAGES, OWN_OUT, PING_PONG, CONSUMERS)),
                (_producer, (descriptors, rings, work, IS_PART, BLOCK_K, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (rings, outs, rows, 0, IS_PART, BLOCK_K, BLOCK_D, STAGES, OWN_OUT, PING_PONG, CONSUMERS)),
                (_consumer, (rings, outs, rows, 1, IS_PART, BLOCK_K, BLOCK_D, STAGES, OWN_OUT, PING_PONG, CONSUMERS)),
                (_producer, (descriptors, rings, work, IS_PART, BLOCK_K, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )


class PartialOutput(NamedTuple):
    """The running results of attention over several blocks of keys, and what each tile of rows does with the next."""

    merge_flags: Tensor  # of each `MERGED_ROWS` rows, see `tiles.merge_flags`
    out: Tensor  # like q: written with the last block that a row has part in
    sums: Tensor  # float32, of those before it
    lse: Tensor  # (batch, heads, n_queries) float32


def forward_on_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyIntervals,
    options: Options,
    part: PartialOutput | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (batch, n_queries, heads, head_dim) and lse (batch, heads, n_queries) float32; see `passes`.

    `part`: this is one of several blocks of keys, after the last of which its out and lse are whole.
    """
    batch, n_queries, heads, head_dim = q.shape
    kv_heads, merge_flags = k.shape[2], None
    if part is not None:
        merge_flags, out, sums, lse = part
    else:
        lse = torch.empty((batch, heads, n_queries), dtype=torch.float32, device=q.device)
        out = sums = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (addressing.addressable(x) for x in (q, k, v))
    blocks, width = hopper_tiles.forward_tiles(q), hopper_tiles.hopper_head_dim(q)
    mask = mask.with_bounds(q.device)
    start, end = tile_lists.contiguous_bounds(mask)
    item_rows = blocks.consumers * ROWS.value
    tiles = tile_lists.key_tiles(mask, item_rows, blocks.keys)
    together = heads_together(kv_heads, 2 * k.nbytes // kv_heads) * (heads // kv_heads)
    items = tile_lists.forward_items(mask, batch, item_rows, blocks.keys, heads, together)
    n_pairs = len(items) // heads
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    queries, outs = (descriptor(x, ROWS.value, width) for x in (q, out))
    keys, values = (descriptor(x, blocks.keys, width) for x in (k, v))
    with hardware.on_device(q):
        attention_forward_hopper[(min(len(items), hardware.multiprocessors(q.device)),)](
            queries, keys, values, outs, sums, lse, start, end, items, tiles, merge_flags, counter, *sums.stride()[:3],
            addressing.shared_stride(start), addressing.shared_stride(tiles), addressing.shared_stride(merge_flags),
            n_queries, head_dim, heads, heads // kv_heads, len(items), n_pairs, together, n_pairs // batch,
            options.scale * LOG2_E.value, IS_PART=part is not None, BLOCK_K=blocks.keys, BLOCK_D=width,
            STAGES=blocks.stages, OWN_OUT=blocks.own_out, PING_PONG=blocks.ping_pong, REGISTERS=blocks.registers,
            PRODUCER_REGISTERS=blocks.producer_registers, CONSUMERS=blocks.consumers, num_warps=4,
        )  # fmt: skip
    return out, lse
