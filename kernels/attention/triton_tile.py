"""What the Triton attention kernels do with one tile, shared by forward, backward and block-sparse.

Shapes: Q rows and K keys of a tile, D head dim padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx.kernels.triton_math import kept, wide


@triton.jit
def tile_offsets(stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, D) offsets from a tile's first element."""
    return tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_inside(n_rows, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(ROWS, D): which of a tile's elements exist, where `n_rows` of its rows do."""
    inside = tl.arange(0, ROWS)[:, None] < n_rows
    if HEAD_DIM < BLOCK_D:
        inside &= tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    return inside


@triton.jit
def load_tile(
    base, first, n_rows, stride, EDGE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """(ROWS, D) from row `first` on; zeros outside the `n_rows` rows and HEAD_DIM columns there are."""
    pointers = base + wide(first) * stride + tile_offsets(stride, ROWS, BLOCK_D)
    if EDGE:
        tile = tl.load(pointers, mask=tile_inside(n_rows - first, ROWS, BLOCK_D, HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def add_alibi(score, slope, q_position, k_position):
    """ALiBi: scores in natural units lose slope * |distance|."""
    return score - slope * tl.abs(q_position - k_position).to(tl.float32)


@triton.jit
def visible(row, key, start, end, layout, n_keys, LAYOUT_Q: tl.constexpr, LAYOUT_K: tl.constexpr):
    """Whether rows see keys, all shaped to broadcast against each other; `layout` as in BlockMask, of one head."""
    seen = (key >= start) & (key < end)
    if layout is not None:
        block = (row // LAYOUT_Q).to(tl.int64) * tl.cdiv(n_keys, LAYOUT_K) + key // LAYOUT_K
        seen &= tl.load(layout + block, mask=seen, other=0) != 0
    return seen


@triton.jit
def tile_bounds(tiles, block, order):
    """The tiles that a block of rows or of keys visits: first, first full, last full, last (see tiles.py).

    Of a block-sparse mask they are places in `order`, those with an edge first (see block_mask.py).
    """
    if order is None:
        bounds = tiles + wide(block) * 4
        first, full_first = tl.load(bounds), tl.load(bounds + 1)
        full_last, last = tl.load(bounds + 2), tl.load(bounds + 3)
    else:
        first, full_first = 0, tl.load(tiles + wide(block) * 2)
        full_last = tl.load(tiles + wide(block) * 2 + 1)
        last = full_last
    return first, full_first, full_last, last


@triton.jit
def wait_for(lock, value, NVIDIA: tl.constexpr):
    """Spins until the int32 at `lock` is `value`; what was released with it is visible then.

    In PTX, because a loop that holds a loop of Triton's is not pipelined.
    """
    if NVIDIA:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred differs;
                .reg .b32 seen;
                AGAIN:
                ld.acquire.gpu.global.b32 seen, [$1];
                setp.ne.s32 differs, seen, $2;
                @differs nanosleep.u32 20;
                @differs bra AGAIN;
                mov.b32 $0, seen;
            }
            """,
            "=r,l,r", [lock, value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        while tl.atomic_add(lock, 0, sem="acquire") != value:
            pass


@triton.jit
def meet(NVIDIA: tl.constexpr):
    """Waits for all threads of the program. In PTX, because a loop with Triton's barrier is not pipelined."""
    if NVIDIA:
        tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.debug_barrier()


@triton.jit
def softmax_step(
    acc, row_max, row_sum, score, factor, v, seed, threshold, stream, q_position, k_position, EDGE: tl.constexpr
):
    """One more tile of keys: acc (Q, D), row_max and row_sum (Q,) of exp2(score * factor - row_max), score (Q, K)."""
    new_peak = tl.maximum(row_max, tl.max(score, 1) * factor)
    # of a full tile every row sees all; `finite` written out, which as a call costs registers here
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if EDGE else new_peak
    weight = tl.exp2(score * factor - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weight, 1)
    if seed is not None:
        weight = tl.where(kept(seed, threshold, stream, q_position, k_position), weight, 0.0)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, row_sum
