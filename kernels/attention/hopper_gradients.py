"""What both backward kernels on Hopper are made of: the walk over tiles of rows, how these arrive, how gradients leave.

Letters in shapes: Q rows and K keys of a tile, D head dim padded.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# a kernel is launched with arguments that its signature does not show, and its constants are no Python values

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longctx.kernels.attention.hopper_gluon import tma_load
from longctx.kernels.attention.hopper_scheduler import item_of, phase_of, pointers_to, post_item
from longctx.kernels.triton_math import wide

KEYS = gl.constexpr(64)  # of a tile of scores; homes of gradients are of 2 * KEYS
SIZES = [  # one compilation for all of them
    "tiles_batch", "turns_batch", "bounds_batch", "n_keys", "n_heads", "group", "n_items", "n_pairs",
    "together", "key_blocks", "row_blocks",
]  # fmt: skip


@gluon.constexpr_function
def quad_layout():
    """(16, 256), of a warpgroup: the c-th four registers of thread t are those from 512 c + 4 t on."""
    registers = [[0, 1], [0, 2], [2, 0], [4, 0], [8, 0]]
    lanes = [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 128], [1, 0]], [], [16, 256])


@gluon.jit
def by_register(dq):
    """(64, 64) of a warpgroup's product as (16, 256): each thread writes its registers in order, 16 bytes at a time."""
    quads: gl.constexpr = quad_layout()
    parts = dq.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5])
    return gl.convert_layout(parts.reshape([16, 256]), quads)


@gluon.constexpr_function
def _sector_layout(BLOCK_D):
    """A consumer's sums (64, D), a pair of columns of each thread traded for another's: four threads hold 64 bytes."""
    columns = [[0, 16], [0, 32], [0, 64]][: 1 + BLOCK_D // 64]
    lanes, warps = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], *columns], lanes, warps, [], [64, BLOCK_D])


@gluon.jit
def send_gradient(home, strides, batch, head, block, head_dim, x, BLOCK_D: gl.constexpr):
    """Writes (KEYS, D) to block 0 or 1 of a home: 16 bytes a thread, as links between GPUs want it."""
    layout: gl.constexpr = _sector_layout(BLOCK_D)
    pointers, inside = pointers_to(
        home, strides, batch, head, block * KEYS, 2 * KEYS, head_dim, KEYS, BLOCK_D, layout
    )  # fmt: skip
    gl.store(pointers, gl.convert_layout(x, layout), mask=inside)


@gluon.jit
def add_gradient(
    out, strides, batch, head, first_key, n_keys, head_dim, x, BLOCK_D: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Adds (KEYS, D) to float32 numbers in memory, which no other program has."""
    pointers, inside = pointers_to(out, strides, batch, head, first_key, n_keys, head_dim, KEYS, BLOCK_D, layout)
    gl.store(pointers, x + gl.load(pointers, mask=inside, other=0.0), mask=inside)


# the walk over an item's tiles of rows --------------------------------------------------------------------------------
# Head after head, each tile of a head in ascending order; given `by_tile`, an int32 for each block of keys
# (`tiles.shares_last_rows`), in descending order, and where that is not 0 all query heads of the group at each tile.


@gluon.jit
def loops_of(by_tile, pair, n_tiles, group):
    """Whether an item's outer loop is the one over tiles, or that over query heads; and the lengths of both loops."""
    is_by_tile, n_outer, n_inner = False, group, n_tiles
    if by_tile is not None:
        is_by_tile = gl.load(by_tile + pair) != 0
        n_outer, n_inner = gl.where(is_by_tile, n_tiles, group), gl.where(is_by_tile, group, n_tiles)
    return is_by_tile, n_outer, n_inner


@gluon.jit
def step_of(outer, inner, by_tile, is_by_tile, n_tiles):
    """The query head of the group, and the tile among those that the item visits, of a step of both loops."""
    member, place = gl.where(is_by_tile, inner, outer), gl.where(is_by_tile, outer, inner)
    if by_tile is not None:
        place = n_tiles - 1 - place
    return member, place


@gluon.jit
def turn_of(turns, by_tile, tile, key_block):
    """How many blocks of keys add to a tile of rows before this one, whose items all begin before this one's.

    `turns` holds the blocks of keys that the rows see (`tiles.key_tiles`): on the way down the first adds first, else
    the last.
    """
    if by_tile is not None:
        turn = key_block - gl.load(turns + tile * 4)
    else:
        turn = gl.load(turns + tile * 4 + 3) - 1 - key_block
    return turn


# what moves -----------------------------------------------------------------------------------------------------------


@gluon.jit
def load_items(
    descriptors, box, key_ring, row_ring, rows, work, row_blocks, group, n_heads, bounds_batch,
    ACCUMULATE: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: takes items, says which, and copies all that they are made of."""
    (
        query_descriptor, key_descriptor, value_descriptor, dout_descriptor, exponent_descriptor, delta_descriptor,
        start_descriptor, end_descriptor,
    ) = descriptors  # fmt: skip
    keys, values, key_full, key_empty = key_ring
    queries, douts, query_full, dout_full, row_empty = row_ring
    exponents, deltas, starts, ends = rows
    items, tiles, by_tile, counter, tiles_batch, n_items, n_pairs, together, key_blocks = work
    done = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    # the first one too: who waits for another's turn waits for a program that runs
    place = gl.atomic_add(counter, 1, sem="relaxed")
    while place < n_items:
        pair, head, visit = item_of(place, items, tiles, tiles_batch, n_pairs, together, key_blocks)
        n_tiles = visit[3] - visit[0]
        if not (ACCUMULATE and n_tiles == 0):  # nothing to add
            post_item(box, turn, pair, head, visit)
            batch, key_block = pair // key_blocks, pair % key_blocks
            mbarrier.wait(key_empty, (turn & 1) ^ 1)
            mbarrier.expect(key_full, key_descriptor.block_type.nbytes + value_descriptor.block_type.nbytes)
            first_key = key_block * BLOCK_K
            tma_load(key_descriptor, [batch, head, first_key, 0], key_full, keys.index(0))
            tma_load(value_descriptor, [batch, head, first_key, 0], key_full, values.index(0))
            is_by_tile, n_outer, n_inner = loops_of(by_tile, pair, n_tiles, group)
            for outer in range(0, n_outer):
                for inner in range(0, n_inner):
                    member, at = step_of(outer, inner, by_tile, is_by_tile, n_tiles)
                    query_head, row = head * group + member, (visit[0] + at) * BLOCK_Q
                    stage, parity = done % STAGES, phase_of(done, STAGES) ^ 1
                    of_head = (batch * n_heads + query_head) * (row_blocks * BLOCK_Q) + row
                    of_batch = batch * bounds_batch + row
                    full = query_full.index(stage)
                    mbarrier.wait(row_empty.index(stage), parity)
                    mbarrier.expect(full, query_descriptor.block_type.nbytes + 3 * 4 * BLOCK_Q)
                    tma_load(query_descriptor, [batch, query_head, row, 0], full, queries.index(stage))
                    tma_load(exponent_descriptor, [of_head], full, exponents.index(stage))
                    tma_load(start_descriptor, [of_batch], full, starts.index(stage))
                    tma_load(end_descriptor, [of_batch], full, ends.index(stage))
                    full = dout_full.index(stage)
                    mbarrier.expect(full, dout_descriptor.block_type.nbytes + 4 * BLOCK_Q)
                    tma_load(dout_descriptor, [batch, query_head, row, 0], full, douts.index(stage))
                    tma_load(delta_descriptor, [of_head], full, deltas.index(stage))
                    done += 1
            turn += 1
        place = gl.atomic_add(counter, 1, sem="relaxed")
    post_item(box, turn, -1, 0, (0, 0, 0, 0))


@triton.jit
def attention_backward_dq_hopper(
    parts, dq, dq_batch, dq_row, dq_head, n_queries, head_dim, row_blocks, scale,
    ACCUMULATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ out of its parts of 64 x 64, each in the order of registers (see `quad_layout`), times `scale`."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts += ((wide(batch) * tl.num_programs(1) + head) * row_blocks + tile) * (BLOCK_Q * BLOCK_D)
    row, column = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_D)[None, :]
    part = row // 64 + column // 64
    thread = row % 64 // 16 * 32 + row % 8 * 4 + column % 8 // 2
    quad, register = column % 64 // 8, row // 8 % 2 * 2 + column % 2
    result = tl.load(parts + part * 4096 + quad * 512 + thread * 4 + register) * scale
    row += tile * BLOCK_Q
    pointers = dq + wide(batch) * dq_batch + wide(head) * dq_head + row.to(tl.int64) * dq_row + column
    inside = (row < n_queries) & (column < head_dim)
    if ACCUMULATE:
        result += tl.load(pointers, mask=inside)
    tl.store(pointers, result.to(dq.dtype.element_ty), mask=inside)
