"""The backward pass of attention on Hopper for head dims of 129 to 256, in Gluon: see `hopper_backward` first.

The sums of 64 keys fill the registers of both consumers, so a program holds 64 keys and each consumer half of the head
dim, H = 128 columns, of dK, dV and dQ. Scores are divided by keys, 32 each, and reach the other consumer through shared
memory. There is no room to stage dQ, so it is added to global memory from registers. Letters in shapes: Q rows and K
keys of a tile.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# a kernel is launched with arguments that its signature does not show, and its constants are no Python values

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx.kernels.attention.hopper_gluon import named_barrier, tma_store
from longctx.kernels.attention.hopper_gradients import (
    KEYS,
    SIZES,
    add_gradient,
    by_register,
    load_items,
    loops_of,
    quad_layout,
    send_gradient,
    step_of,
    turn_of,
)
from longctx.kernels.attention.hopper_scheduler import await_item, barriers, make_box, phase_of, read_item, slot
from longctx.kernels.attention.triton_tile import wait_for

WIDTH = gl.constexpr(256)  # head dim, padded
HALF = gl.constexpr(128)  # of the head dim: a consumer's
SHARE = gl.constexpr(32)  # of the keys: a consumer's scores


@gluon.jit
def _of_consumer(keys, values, index, NUMBER: gl.constexpr):
    """Keys and values of an item, those of a consumer's scores, and the columns of K for its half of dQ."""
    k, v = keys.index(index), values.index(index)
    k_share, v_share = k.slice(NUMBER * SHARE, SHARE, dim=0), v.slice(NUMBER * SHARE, SHARE, dim=0)
    return k, v, k_share, v_share, k.slice(NUMBER * HALF, HALF, dim=1)


@gluon.jit
def _probabilities(score, rows, stage, key, is_edge, factor, of_row: gl.constexpr):
    """exp2(score * factor - exponent), (Q, K), 0 where a row does not see a key."""
    exponents, starts, ends = rows[0], rows[2], rows[3]
    exponent = exponents.index(stage).load(of_row)
    p = gl.exp2(score * factor - exponent[:, None])
    if is_edge:
        row_start, row_end = starts.index(stage).load(of_row), ends.index(stage).load(of_row)
        seen = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_end[:, None])
        p = gl.where(seen, p, 0.0)
    return p


@gluon.jit
def _add_to_global(part, dq):
    """Adds (64, 64) of dQ to a part of 4096 numbers, 16 bytes a thread at a time."""
    quads: gl.constexpr = quad_layout()
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, quads))
    column = gl.arange(0, 256, layout=gl.SliceLayout(0, quads))
    gl.atomic_add(part + row[:, None] * 256 + column[None, :], by_register(dq), sem="relaxed")


@gluon.jit
def _consumer(
    box, key_ring, row_ring, rows, shares, dq_parts, keys_at, by_tile, turn_ring, sizes,
    NUMBER: gl.constexpr, ACCUMULATE: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: scores of half of an item's keys, and half of the columns of all gradients."""
    keys, values, key_full, key_empty = key_ring
    queries, douts, query_full, dout_full, row_empty = row_ring
    deltas = rows[1]
    weights, dscores = shares  # p and dS, (K, Q), of both consumers
    n_keys, head_dim, n_heads, group, key_blocks, row_blocks, factor, scale = sizes
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHARE, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_row: gl.constexpr = gl.SliceLayout(1, score_layout)
    score_zeros = gl.zeros([BLOCK_Q, SHARE], gl.float32, score_layout)
    dq_zeros = gl.zeros([BLOCK_Q, 64], gl.float32, dq_layout)
    k, v, k_share, v_share, k_half = _of_consumer(keys, values, 0, NUMBER)
    done = gl.to_tensor(0)  # tiles of rows so far
    turn = gl.to_tensor(0)  # items so far
    pair = await_item(box, turn)
    while pair >= 0:
        head, visit = read_item(box, turn)
        first, full_first, full_last, last = visit
        batch, key_block = pair // key_blocks, pair % key_blocks
        first_key = key_block * KEYS
        key = first_key + NUMBER * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(0, score_layout))
        n_tiles = last - first  # of each query head, whose edges are before `near` and from `far` on
        near, far = full_first - first, full_last - first
        n_all = n_tiles * group
        base = (batch * n_heads + head * group) * row_blocks + first
        is_by_tile, _n_outer, n_inner = loops_of(by_tile, pair, n_tiles, group)
        outer, inner = gl.to_tensor(0), gl.to_tensor(0)
        dk = gl.zeros([KEYS, HALF], gl.float32, sum_layout)
        dv = gl.zeros([KEYS, HALF], gl.float32, sum_layout)
        member, place = step_of(outer, inner, by_tile, is_by_tile, n_tiles)
        mbarrier.wait(key_full, turn & 1)

        # the first tile's weights and their gradients, which nothing overlaps
        stage, parity = done % STAGES, phase_of(done, STAGES)
        mbarrier.wait(query_full.index(stage), parity, pred=n_all > 0)
        score = warpgroup_mma(queries.index(stage), k_share.permute((1, 0)), score_zeros, use_acc=False, is_async=True)
        mbarrier.wait(dout_full.index(stage), parity, pred=n_all > 0)
        dp = warpgroup_mma(douts.index(stage), v_share.permute((1, 0)), score_zeros, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(1, deps=(score,))
        p = _probabilities(score, rows, stage, key, (place < near) | (place >= far), factor, of_row)
        dp, p = warpgroup_mma_wait(0, deps=(dp, p))
        for i in range(0, n_all):
            # addresses that seem to change are computed, not kept in registers, of which none are left
            k, v, k_share, v_share, k_half = _of_consumer(keys, values, done >> 30, NUMBER)
            stage = done % STAGES
            delta = deltas.index(stage).load(of_row)
            dscore = p * (dp - delta[:, None])  # not scaled: in float16 small ones would be lost
            p_tile, dscore_tile = weights.index(done & 1), dscores.index(done & 1)
            p_tile.slice(NUMBER * SHARE, SHARE, dim=0).permute((1, 0)).store(p.to(k.dtype))
            dscore_tile.slice(NUMBER * SHARE, SHARE, dim=0).permute((1, 0)).store(dscore.to(k.dtype))
            fence_async_shared()
            named_barrier(9, 256)
            dscore_rows = dscore_tile.permute((1, 0))
            dout_half = douts.index(stage).slice(NUMBER * HALF, HALF, dim=1)
            query_half = queries.index(stage).slice(NUMBER * HALF, HALF, dim=1)
            dq = warpgroup_mma(dscore_rows, k_half.slice(0, 64, dim=1), dq_zeros, use_acc=False, is_async=True)
            dv = warpgroup_mma(p_tile, dout_half, dv, is_async=True)
            tile = base + member * row_blocks + place  # among the tiles of all heads
            part = dq_parts + (tile * 4 + NUMBER * 2).to(gl.int64) * 4096
            if turn_ring is not None:
                mbarrier.wait(slot(turn_ring[0], done, 2), phase_of(done, 2))
            dq = warpgroup_mma_wait(1, deps=(dq,))
            _add_to_global(part, dq)
            dq = warpgroup_mma(dscore_rows, k_half.slice(64, 64, dim=1), dq_zeros, use_acc=False, is_async=True)
            dk = warpgroup_mma(dscore_tile, query_half, dk, is_async=True)

            # the next tile's scores are in the queue before dK is waited for (of the last tile: for nothing)
            next_stage, parity = (done + 1) % STAGES, phase_of(done + 1, STAGES)
            mbarrier.wait(query_full.index(next_stage), parity, pred=i + 1 < n_all)
            score = warpgroup_mma(
                queries.index(next_stage), k_share.permute((1, 0)), score_zeros, use_acc=False, is_async=True
            )
            mbarrier.wait(dout_full.index(next_stage), parity, pred=i + 1 < n_all)
            dp = warpgroup_mma(
                douts.index(next_stage), v_share.permute((1, 0)), score_zeros, use_acc=False, is_async=True
            )
            dq, dv = warpgroup_mma_wait(3, deps=(dq, dv))
            _add_to_global(part + 4096, dq)
            dk = warpgroup_mma_wait(2, deps=(dk,))
            mbarrier.arrive(row_empty.index(stage), count=1)
            if turn_ring is not None:
                mbarrier.arrive(slot(turn_ring[1], done, 2), count=1)
            done += 1
            is_end = inner + 1 == n_inner
            inner, outer = gl.where(is_end, 0, inner + 1), gl.where(is_end, outer + 1, outer)
            member, place = step_of(outer, inner, by_tile, is_by_tile, n_tiles)
            score = warpgroup_mma_wait(1, deps=(score,))
            is_edge = (place < near) | (place >= far)
            p = _probabilities(score, rows, next_stage, key, is_edge, factor, of_row)
            dp, p = warpgroup_mma_wait(0, deps=(dp, p))

        dk *= scale
        dk_descriptor, dv_descriptor, dk_out, dv_out, homes, dk_strides, dv_strides = keys_at
        column, width = NUMBER * HALF, head_dim - NUMBER * HALF
        if homes is not None:
            home = gl.multiple_of(gl.load(homes + key_block // 2).to(gl.pointer_type(gl.float32)), 16) + column
            send_gradient(home, dk_strides, batch, head, key_block % 2, width, dk, HALF)
            send_gradient(home + dk_strides[1] // 2, dk_strides, batch, head, key_block % 2, width, dv, HALF)
        elif ACCUMULATE:
            add_gradient(dk_out + column, dk_strides, batch, head, first_key, n_keys, width, dk, HALF, sum_layout)
            add_gradient(dv_out + column, dv_strides, batch, head, first_key, n_keys, width, dv, HALF, sum_layout)
        else:
            named_barrier(9, 256)  # both have read all of the keys, whose place is taken
            k_half.store(dk.to(k.dtype))
            v.slice(NUMBER * HALF, HALF, dim=1).store(dv.to(v.dtype))
            fence_async_shared()
            named_barrier(9, 256)
            if NUMBER == 0:
                tma_store(dk_descriptor, [batch, head, first_key, 0], k)
            else:
                tma_store(dv_descriptor, [batch, head, first_key, 0], v)
            tma.store_wait(0)
        mbarrier.arrive(key_empty, count=1)
        turn += 1
        pair = await_item(box, turn)


@gluon.jit
def _turn_keeper(
    box, turn_ring, turns, by_tile, locks, turns_batch, key_blocks, group, n_heads, row_blocks, WAITS: gl.constexpr
):  # fmt: skip
    """One of two warps: the first waits for the program's turn at each tile, the second gives it on once both consumers
    have added their parts of dQ. The first is at most two tiles ahead."""
    is_turn, is_added, is_given_on = turn_ring
    done = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    pair = await_item(box, turn)
    while pair >= 0:
        head, visit = read_item(box, turn)
        n_tiles = visit[3] - visit[0]
        batch, key_block = pair // key_blocks, pair % key_blocks
        is_by_tile, n_outer, n_inner = loops_of(by_tile, pair, n_tiles, group)
        for outer in range(0, n_outer):
            for inner in range(0, n_inner):
                member, place = step_of(outer, inner, by_tile, is_by_tile, n_tiles)
                tile = visit[0] + place
                lock = locks + (batch * n_heads + head * group + member) * row_blocks + tile
                if WAITS:
                    mbarrier.wait(slot(is_given_on, done, 2), phase_of(done, 2) ^ 1)
                    wait_for(lock, turn_of(turns + batch * turns_batch, by_tile, tile, key_block), True)
                    mbarrier.arrive(slot(is_turn, done, 2), count=1)
                else:
                    mbarrier.wait(slot(is_added, done, 2), phase_of(done, 2))
                    gl.atomic_add(lock, 1, sem="release")
                    mbarrier.arrive(slot(is_given_on, done, 2), count=1)
                done += 1
        turn += 1
        pair = await_item(box, turn)


@gluon.jit(do_not_specialize=SIZES)
def attention_backward_wide_hopper(
    query_descriptor, key_descriptor, value_descriptor, dout_descriptor, dq_parts, dk_descriptor, dv_descriptor,
    exponent_descriptor, delta_descriptor, start_descriptor, end_descriptor, dk_out, dv_out, homes, items, tiles, turns,
    by_tile, locks, counter, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, tiles_batch, turns_batch,
    bounds_batch, n_keys, head_dim, n_heads, group, n_items, n_pairs, together, key_blocks, row_blocks, factor, scale,
    ACCUMULATE: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query_descriptor.dtype
    matrix: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    vector: gl.constexpr = exponent_descriptor.layout
    keys = gl.allocate_shared_memory(dtype, [1, KEYS, WIDTH], matrix)
    values = gl.allocate_shared_memory(dtype, [1, KEYS, WIDTH], matrix)
    queries = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, WIDTH], matrix)
    douts = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, WIDTH], matrix)
    weights = gl.allocate_shared_memory(dtype, [2, KEYS, BLOCK_Q], matrix)
    dscores = gl.allocate_shared_memory(dtype, [2, KEYS, BLOCK_Q], matrix)
    exponents = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], vector)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], vector)
    starts = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_Q], vector)
    ends = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_Q], vector)
    box = make_box(2 if locks is None else 4)
    turn_ring = barriers(2, 1), barriers(2, 2), barriers(2, 1)
    key_ring = keys, values, barriers(1, 1).index(0), barriers(1, 2).index(0)
    row_ring = queries, douts, barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    descriptors = (
        query_descriptor, key_descriptor, value_descriptor, dout_descriptor, exponent_descriptor, delta_descriptor,
        start_descriptor, end_descriptor,
    )  # fmt: skip
    rows = exponents, deltas, starts, ends
    shares = weights, dscores
    dk_strides, dv_strides = (dk_batch, dk_row, dk_head), (dv_batch, dv_row, dv_head)
    keys_at = dk_descriptor, dv_descriptor, dk_out, dv_out, homes, dk_strides, dv_strides
    work = items, tiles, by_tile, counter, tiles_batch, n_items, n_pairs, together, key_blocks
    sizes = n_keys, head_dim, n_heads, group, key_blocks, row_blocks, factor, scale
    if locks is None:  # which stands for the ring of turns too
        gl.warp_specialize(
            [
                (_consumer, (box, key_ring, row_ring, rows, shares, dq_parts, keys_at, by_tile, locks, sizes, 0,
                             ACCUMULATE, BLOCK_Q, STAGES)),
                (_consumer, (box, key_ring, row_ring, rows, shares, dq_parts, keys_at, by_tile, locks, sizes, 1,
                             ACCUMULATE, BLOCK_Q, STAGES)),
                (load_items, (descriptors, box, key_ring, row_ring, rows, work, row_blocks, group, n_heads,
                              bounds_batch, ACCUMULATE, BLOCK_Q, KEYS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (box, key_ring, row_ring, rows, shares, dq_parts, keys_at, by_tile, turn_ring, sizes, 0,
                             ACCUMULATE, BLOCK_Q, STAGES)),
                (_consumer, (box, key_ring, row_ring, rows, shares, dq_parts, keys_at, by_tile, turn_ring, sizes, 1,
                             ACCUMULATE, BLOCK_Q, STAGES)),
                (load_items, (descriptors, box, key_ring, row_ring, rows, work, row_blocks, group, n_heads,
                              bounds_batch, ACCUMULATE, BLOCK_Q, KEYS, STAGES)),
                (_turn_keeper, (box, turn_ring, turns, by_tile, locks, turns_batch, key_blocks, group, n_heads,
                                row_blocks, True)),
                (_turn_keeper, (box, turn_ring, turns, by_tile, locks, turns_batch, key_blocks, group, n_heads,
                                row_blocks, False)),
            ],
            [4, 1, 1, 1],
            [REGISTERS, 24, 24, 24],
        )  # fmt: skip
