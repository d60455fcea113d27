"""The backward pass of attention on Hopper, in Gluon: a program holds a block of keys and walks the rows that see it.

docs/attention_on_hopper.md says how it works. Letters in shapes: Q rows and K keys of a tile, D head dim padded to 64
or 128. Score tiles are transposed, (K, Q), so that the products into dK and dV read them from registers. A consumer is
one warpgroup, with 64 keys of a tile; both take part of each tile of dQ, to which the keys of both belong.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false
# a kernel is launched with arguments that its signature does not show, and its constants are no Python values

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
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
from longctx.kernels.attention import hopper_tiles, triton_backward
from longctx.kernels.attention.hopper_backward_wide import attention_backward_wide_hopper
from longctx.kernels.attention.hopper_gluon import (
    named_barrier,
    reduce_add_to_global,
    threads_meet,
    tma_store,
    wait_for_writes,
)
from longctx.kernels.attention.hopper_gradients import (
    KEYS,
    SIZES,
    add_gradient,
    attention_backward_dq_hopper,
    by_register,
    load_items,
    loops_of,
    send_gradient,
    step_of,
    turn_of,
)
from longctx.kernels.attention.hopper_scheduler import (
    await_item,
    barriers,
    descriptor,
    heads_together,
    make_box,
    part_descriptor,
    phase_of,
    read_item,
    vector_descriptor,
)
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.tiles import backward_items, key_tiles, padded_bounds, row_tiles, shares_last_rows
from longctx.kernels.attention.triton_tile import wait_for
from longctx.kernels.triton_math import LOG2_E


@gluon.jit
def _of_consumer(block, NUMBER: gl.constexpr, index):
    return block.index(index).slice(NUMBER * KEYS, KEYS, dim=0)


@gluon.jit
def _probabilities(score, exponent, rows, stage, key, is_edge, factor, column: gl.constexpr):
    """exp2(score * factor - exponent), (K, Q), 0 where a row does not see a key."""
    starts, ends = rows[2], rows[3]
    p = gl.exp2(score * factor - exponent[None, :])
    if is_edge:
        row_start, row_end = starts.index(stage).load(column), ends.index(stage).load(column)
        seen = (key[:, None] >= row_start[None, :]) & (key[:, None] < row_end[None, :])
        p = gl.where(seen, p, 0.0)
    return p


@gluon.jit
def _consumer(
    box, key_ring, row_ring, rows, dscores, dq_ring, keys_at, by_tile, sizes,
    NUMBER: gl.constexpr, ACCUMULATE: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    DQ_STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 keys of each item, over all query heads of the group."""
    keys, values, key_full, key_empty = key_ring
    queries, douts, query_full, dout_full, row_empty = row_ring
    dq_tiles, dq_full, dq_empty = dq_ring
    n_keys, head_dim, group, key_blocks, factor, scale = sizes
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sum_layout, k_width=2)
    column: gl.constexpr = gl.SliceLayout(0, score_layout)
    score_zeros = gl.zeros([KEYS, BLOCK_Q], gl.float32, score_layout)
    dq_zeros = gl.zeros([64, 64], gl.float32, dq_layout)
    exponents, deltas = rows[0], rows[1]
    EARLY: gl.constexpr = BLOCK_Q == 64  # with longer tiles there are no registers for it
    done = gl.to_tensor(0)  # tiles of rows so far
    turn = gl.to_tensor(0)  # items so far
    pair = await_item(box, turn)
    while pair >= 0:
        head, visit = read_item(box, turn)
        first, full_first, full_last, last = visit
        batch, key_block = pair // key_blocks, pair % key_blocks
        first_key = key_block * (2 * KEYS) + NUMBER * KEYS
        key = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, score_layout))
        n_tiles = last - first  # of each query head, whose edges are before `near` and from `far` on
        near, far = full_first - first, full_last - first
        is_by_tile, _n_outer, n_inner = loops_of(by_tile, pair, n_tiles, group)
        outer, inner = gl.to_tensor(0), gl.to_tensor(0)
        dk = gl.zeros([KEYS, BLOCK_D], gl.float32, sum_layout)
        dv = gl.zeros([KEYS, BLOCK_D], gl.float32, sum_layout)

        mbarrier.wait(key_full, turn & 1)
        for _step in range(0, n_tiles * group):
            # addresses that seem to change are computed, not kept in registers, of which none are left
            zero = done >> 30
            k, v = _of_consumer(keys, NUMBER, zero), _of_consumer(values, NUMBER, zero)
            stage, parity = done % STAGES, phase_of(done, STAGES)
            mbarrier.wait(query_full.index(stage), parity)
            score = warpgroup_mma(k, queries.index(stage).permute((1, 0)), score_zeros, use_acc=False, is_async=True)
            if EARLY:
                exponent = exponents.index(stage).load(column)
            mbarrier.wait(dout_full.index(stage), parity)
            dp = warpgroup_mma(v, douts.index(stage).permute((1, 0)), score_zeros, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(1, deps=(score,))
            if not EARLY:
                exponent = exponents.index(stage).load(column)
            # its branch keeps the compiler from hoisting the wait above the exponentials
            _member, place = step_of(outer, inner, by_tile, is_by_tile, n_tiles)
            is_edge = (place < near) | (place >= far)
            p = _probabilities(score, exponent, rows, stage, key, is_edge, factor, column)
            if EARLY:
                delta = deltas.index(stage).load(column)
            dp, p = warpgroup_mma_wait(0, deps=(dp, p))
            if not EARLY:
                delta = deltas.index(stage).load(column)
            dscore = (p * (dp - delta[None, :])).to(k.dtype)  # not scaled: in float16 small ones would be lost
            dscore_tile = dscores.index(done & 1)
            if BLOCK_Q == 64:
                dscore_tile.slice(NUMBER * KEYS, KEYS, dim=0).store(dscore)
            else:  # as (Q, K), which spares registers here
                dscore_tile.slice(NUMBER * KEYS, KEYS, dim=1).permute((1, 0)).store(dscore)
            p_operand = gl.convert_layout(p.to(k.dtype), operand)
            dv = warpgroup_mma(p_operand, douts.index(stage), dv, is_async=True)
            fence_async_shared()
            named_barrier(9, 256)
            dscore_operand = gl.convert_layout(dscore, operand)
            if BLOCK_Q == 64:  # of dQ's tile each consumer has half of the columns
                dscore_part, k_part = dscore_tile.permute((1, 0)), keys.index(zero).slice(NUMBER * 64, 64, dim=1)
            else:  # or of the rows
                dscore_part, k_part = dscore_tile.slice(NUMBER * 64, 64, dim=0), keys.index(zero)
            dq = warpgroup_mma(dscore_part, k_part, dq_zeros, use_acc=False, is_async=True)
            dk = warpgroup_mma(dscore_operand, queries.index(stage), dk, is_async=True)
            dq, dv, p_operand = warpgroup_mma_wait(1, deps=(dq, dv, p_operand))
            buffer = NUMBER * DQ_STAGES + done % DQ_STAGES
            mbarrier.wait(dq_empty.index(buffer), phase_of(done, DQ_STAGES) ^ 1)
            dq_tiles.index(buffer).store(by_register(dq))
            fence_async_shared()
            mbarrier.arrive(dq_full.index(buffer), count=1)
            dk, dscore_operand = warpgroup_mma_wait(0, deps=(dk, dscore_operand))
            mbarrier.arrive(row_empty.index(stage), count=1)
            done += 1
            is_end = inner + 1 == n_inner
            inner, outer = gl.where(is_end, 0, inner + 1), gl.where(is_end, outer + 1, outer)

        dk *= scale
        dk_descriptor, dv_descriptor, dk_out, dv_out, homes, dk_strides, dv_strides = keys_at
        if homes is not None:
            dk_home = gl.multiple_of(gl.load(homes + key_block).to(gl.pointer_type(gl.float32)), 16)
            send_gradient(dk_home, dk_strides, batch, head, NUMBER, head_dim, dk, BLOCK_D)
            send_gradient(dk_home + dk_strides[1] // 2, dk_strides, batch, head, NUMBER, head_dim, dv, BLOCK_D)
        elif ACCUMULATE:
            add_gradient(dk_out, dk_strides, batch, head, first_key, n_keys, head_dim, dk, BLOCK_D, sum_layout)
            add_gradient(dv_out, dv_strides, batch, head, first_key, n_keys, head_dim, dv, BLOCK_D, sum_layout)
        else:
            named_barrier(9, 256)  # both have read all of the keys, whose place is taken
            dk_tile, dv_tile = _of_consumer(keys, NUMBER, 0), _of_consumer(values, NUMBER, 0)
            dv_tile.store(dv.to(dv_tile.dtype))
            dk_tile.store(dk.to(dk_tile.dtype))
            fence_async_shared()
            threads_meet()
            tma_store(dv_descriptor, [batch, head, first_key, 0], dv_tile)
            tma_store(dk_descriptor, [batch, head, first_key, 0], dk_tile)
            tma.store_wait(0)
        mbarrier.arrive(key_empty, count=1)
        turn += 1
        pair = await_item(box, turn)


@gluon.jit
def _adder(
    dq_descriptor, box, dq_ring, locks, turns, by_tile, turns_batch, key_blocks, group, n_heads, row_blocks,
    NUMBER: gl.constexpr, DQ_STAGES: gl.constexpr,
):  # fmt: skip
    """One of two warps that add the tiles of dQ to the others'; with `locks` as its turn comes (see `turn_of`).

    It serves one consumer; or, of two buffers, one, and so both parts of every second tile: until an addition is seen
    by all takes about as long as a tile of head_dim 128.
    """
    FIRST: gl.constexpr = 0 if DQ_STAGES == 2 else NUMBER
    LAST: gl.constexpr = 2 if DQ_STAGES == 2 else NUMBER + 1
    dq_tiles, dq_full, dq_empty = dq_ring
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
                if DQ_STAGES == 1 or (done & 1) == NUMBER:
                    member, place = step_of(outer, inner, by_tile, is_by_tile, n_tiles)
                    tile = visit[0] + place
                    part = ((batch * n_heads + head * group + member) * row_blocks + tile) * 2
                    buffer, parity = done % DQ_STAGES, phase_of(done, DQ_STAGES)
                    if locks is not None:
                        turn_of_keys = turn_of(turns + batch * turns_batch, by_tile, tile, key_block)
                        wait_for(locks + part + FIRST, turn_of_keys, True)
                    for c in gl.static_range(FIRST, LAST):
                        mbarrier.wait(dq_full.index(c * DQ_STAGES + buffer), parity)
                        reduce_add_to_global(
                            dq_descriptor, [(part + c) * 16, 0], dq_tiles.index(c * DQ_STAGES + buffer)
                        )
                    tma.store_wait(0)
                    for c in gl.static_range(FIRST, LAST):
                        mbarrier.arrive(dq_empty.index(c * DQ_STAGES + buffer), count=1)
                    if locks is not None:
                        wait_for_writes()
                        gl.atomic_add(locks + part + FIRST, 1, sem="release")
                done += 1
        turn += 1
        pair = await_item(box, turn)


@gluon.jit(do_not_specialize=SIZES)
def attention_backward_hopper(
    query_descriptor, key_descriptor, value_descriptor, dout_descriptor, dq_descriptor, dk_descriptor, dv_descriptor,
    exponent_descriptor, delta_descriptor, start_descriptor, end_descriptor, dk_out, dv_out, homes, items, tiles, turns,
    by_tile, locks, counter, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, tiles_batch, turns_batch,
    bounds_batch, n_keys, head_dim, n_heads, group, n_items, n_pairs, together, key_blocks, row_blocks, factor, scale,
    ACCUMULATE: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    DQ_STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query_descriptor.dtype
    matrix: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    sums: gl.constexpr = dq_descriptor.layout
    vector: gl.constexpr = exponent_descriptor.layout
    keys = gl.allocate_shared_memory(dtype, [1, 2 * KEYS, BLOCK_D], matrix)
    values = gl.allocate_shared_memory(dtype, [1, 2 * KEYS, BLOCK_D], matrix)
    queries = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, BLOCK_D], matrix)
    douts = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, BLOCK_D], matrix)
    dscores = gl.allocate_shared_memory(dtype, [2, 2 * KEYS, BLOCK_Q], matrix)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2 * DQ_STAGES, 16, 256], sums)
    exponents = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], vector)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], vector)
    starts = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_Q], vector)
    ends = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_Q], vector)
    box = make_box(4)
    key_ring = keys, values, barriers(1, 1).index(0), barriers(1, 2).index(0)
    row_ring = queries, douts, barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2)
    dq_ring = dq_tiles, barriers(2 * DQ_STAGES, 1), barriers(2 * DQ_STAGES, 1)
    fence_async_shared()
    descriptors = (
        query_descriptor, key_descriptor, value_descriptor, dout_descriptor, exponent_descriptor, delta_descriptor,
        start_descriptor, end_descriptor,
    )  # fmt: skip
    rows = exponents, deltas, starts, ends
    keys_at = (
        dk_descriptor,
        dv_descriptor,
        dk_out,
        dv_out,
        homes,
        (dk_batch, dk_row, dk_head),
        (dv_batch, dv_row, dv_head),
    )
    work = items, tiles, by_tile, counter, tiles_batch, n_items, n_pairs, together, key_blocks
    sizes = n_keys, head_dim, group, key_blocks, factor, scale
    gl.warp_specialize(
        [
            (_consumer, (box, key_ring, row_ring, rows, dscores, dq_ring, keys_at, by_tile, sizes, 0, ACCUMULATE,
                         BLOCK_Q, BLOCK_D, STAGES, DQ_STAGES)),
            (_consumer, (box, key_ring, row_ring, rows, dscores, dq_ring, keys_at, by_tile, sizes, 1, ACCUMULATE,
                         BLOCK_Q, BLOCK_D, STAGES, DQ_STAGES)),
            (load_items, (descriptors, box, key_ring, row_ring, rows, work, row_blocks, group, n_heads, bounds_batch,
                          ACCUMULATE, BLOCK_Q, 2 * KEYS, STAGES)),
            (_adder, (dq_descriptor, box, dq_ring, locks, turns, by_tile, turns_batch, key_blocks, group, n_heads,
                      row_blocks, 0, DQ_STAGES)),
            (_adder, (dq_descriptor, box, dq_ring, locks, turns, by_tile, turns_batch, key_blocks, group, n_heads,
                      row_blocks, 1, DQ_STAGES)),
        ],
        [4, 1, 1, 1],
        [REGISTERS, 24, 24, 24],
    )  # fmt: skip


class GradientTargets(NamedTuple):
    """Where the gradients of each tile of keys are written, in one tensor or several, here or on another GPU."""

    addresses: Tensor  # int64, one for each 2 * KEYS keys: of the first batch, key and head of dk
    like: Tensor  # (batch, tokens, 2, kv_heads, head_dim) float32, whose strides all homes have: dk and dv of a token


class PartialBackwardOnHopper:
    """The backward pass over keys that come block by block; see `passes.PartialBackward`."""

    def __init__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:  # fmt: skip
        self.q, self.dout, self.options = addressing.addressable(q), addressing.addressable(dout), options
        self.blocks, self.width = hopper_tiles.backward_tiles(q), hopper_tiles.hopper_head_dim(q)
        batch, n_queries, heads, _ = q.shape
        self.row_blocks = triton.cdiv(n_queries, self.blocks.rows)
        shape = batch, heads, self.row_blocks, self.blocks.rows * self.width // 4096, 16, 256
        self.dq_parts = torch.zeros(shape, dtype=torch.float32, device=q.device)
        with hardware.on_device(q):
            self.statistics = triton_backward.statistics(self.dout, out, dlse, lse, self.blocks.rows)

    def add(
        self, k: Tensor, v: Tensor, mask: KeyIntervals, into: tuple[Tensor, Tensor] | GradientTargets
    ) -> None:  # fmt: skip
        """One block: dk and dv are written to tensors of the inputs' dtype or to homes, added to float32 tensors."""
        q, options, blocks = self.q, self.options, self.blocks
        is_wide = self.width > 128
        block_keys = KEYS.value if is_wide else 2 * KEYS.value
        (batch, _, heads, head_dim), (n_keys, kv_heads) = q.shape, k.shape[1:3]
        k, v = addressing.addressable(k), addressing.addressable(v)
        if isinstance(into, GradientTargets):
            homes, (dk, dv) = into.addresses, into.like.unbind(2)
        else:
            homes, (dk, dv) = None, into
        is_sum = dk.dtype == torch.float32
        mask = mask.with_bounds(q.device)
        start, end = padded_bounds(mask, blocks.rows)
        tiles = row_tiles(mask, blocks.rows, block_keys)
        of_rows = key_tiles(mask, blocks.rows, block_keys) if options.deterministic else None
        is_down = options.deterministic and heads > kv_heads
        by_tile = shares_last_rows(mask, batch, blocks.rows, block_keys) if is_down else None
        programs = hardware.multiprocessors(q.device)
        together = heads_together(kv_heads, 4 * q.nbytes // kv_heads)
        # where dQ is added in turns, who is waited for has started before: the order of items is that of turns
        items = backward_items(
            mask, batch, blocks.rows, block_keys, kv_heads, together, programs, options.deterministic,
            options.deterministic and not is_down,
        )  # fmt: skip
        n_pairs = len(items) // kv_heads
        n_locks = (1 if is_wide else 2) * batch * heads * self.row_blocks if options.deterministic else 0
        zeros = torch.zeros(1 + n_locks, dtype=torch.int32, device=q.device)
        tile = {"rows": blocks.rows, "width": self.width}
        kernel, dq_parts, form = attention_backward_hopper, part_descriptor(self.dq_parts), {}
        if is_wide:
            kernel, dq_parts = attention_backward_wide_hopper, self.dq_parts
        else:
            dq_stages = blocks.ordered_dq_stages if options.deterministic else 1
            form = {"BLOCK_D": self.width, "DQ_STAGES": dq_stages}
        with hardware.on_device(q):
            kernel[(min(len(items), programs),)](
                descriptor(q, **tile), *(descriptor(x, block_keys, self.width) for x in (k, v)),
                descriptor(self.dout, **tile), dq_parts,
                *(descriptor(x, KEYS.value, self.width) for x in ((k, v) if is_sum else (dk, dv))),
                *(vector_descriptor(x, blocks.rows) for x in (*self.statistics, start, end)),
                dk, dv, homes, items, tiles, of_rows, by_tile, zeros[1:] if options.deterministic else None, zeros,
                *dk.stride()[:3], *dv.stride()[:3], addressing.shared_stride(tiles), addressing.shared_stride(of_rows),
                addressing.shared_stride(start), n_keys, head_dim, heads, heads // kv_heads, len(items), n_pairs,
                together, n_pairs // batch, self.row_blocks, options.scale * LOG2_E.value, options.scale,
                ACCUMULATE=is_sum and homes is None, BLOCK_Q=blocks.rows, STAGES=blocks.stages,
                REGISTERS=blocks.registers, **form, num_warps=4,
            )  # fmt: skip

    def dq(self, out: Tensor, is_added: bool = False) -> Tensor:
        """Writes, or adds, what the blocks have given to `out`, like q."""
        batch, n_queries, heads, head_dim = self.q.shape
        with hardware.on_device(self.q):
            attention_backward_dq_hopper[(self.row_blocks, heads, batch)](
                self.dq_parts, out, *out.stride()[:3], n_queries, head_dim, self.row_blocks, self.options.scale,
                ACCUMULATE=is_added, BLOCK_Q=self.blocks.rows, BLOCK_D=self.width, num_warps=4,
            )  # fmt: skip
        return out


def backward_on_hopper(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    mask: KeyIntervals,
    options: Options,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, in the inputs' dtype, or added to the float32 tensors `into`; see `passes`."""
    q, k, v, out, lse = saved
    if into is None:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    else:
        dq, dk, dv = into
    blocks = PartialBackwardOnHopper(dout, dlse, q, out, lse, options)
    blocks.add(k, v, mask, (dk, dv))
    return blocks.dq(dq, is_added=into is not None), dk, dv
