"""The dynamic tile scheduler of the persistent Hopper kernels, rings of mbarriers, and TMA descriptors.

An item (work tile) is a block of rows (forward) or of keys (backward) of one head of one sequence. One program (CTA)
runs on each streaming multiprocessor; its producer warp takes the next item with an atomic counter, in an
order that `tiles.py` makes, and tells the consumer warpgroups which one it is through a mailbox of two slots in shared
memory.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false
# kernels: their constants are no Python values

from __future__ import annotations

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

BOX = gl.constexpr(8)  # numbers in a box, of which there are two


# rings of barriers ----------------------------------------------------------------------------------------------------


@gluon.jit
def barriers(STAGES: gl.constexpr, arrivals: gl.constexpr):
    """A ring of them, each over after so many arrivals. Who makes them fences before other partitions see them."""
    ring = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.index(i), count=arrivals)
    return ring


@gluon.jit
def slot(ring, count, STAGES: gl.constexpr):
    """The buffer or barrier that the count-th use of a ring has."""
    return ring.index(count % STAGES)


@gluon.jit
def phase_of(count, STAGES: gl.constexpr):
    """mbarrier parity of the count-th use of a ring; consumers wait for it, producers for its complement."""
    return (count // STAGES) & 1


# items ----------------------------------------------------------------------------------------------------------------


@gluon.jit
def _number(boxes, index):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(boxes.index(index).load(layout), 0)


@gluon.jit
def _write_number(boxes, index, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    boxes.index(index).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def make_box(readers: gl.constexpr):
    """Two boxes for items, with the barriers of their writer and of the partitions that read them."""
    boxes = gl.allocate_shared_memory(gl.int32, [2 * BOX, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    return boxes, barriers(2, 1), barriers(2, readers)


@gluon.jit
def item_of(place, items, tiles, tiles_batch, n_pairs, together, blocks):
    """The item at a place of `items`: its block (sequence * blocks + block), head, and bounds of the tiles it visits.

    `items` and `tiles`: see tiles.py.
    """
    item = gl.load(items + place)
    pair = item % (n_pairs * together) // together
    head = item // (n_pairs * together) * together + item % together
    bounds = tiles + (pair // blocks) * tiles_batch + (pair % blocks) * 4
    visit = gl.load(bounds), gl.load(bounds + 1), gl.load(bounds + 2), gl.load(bounds + 3)
    return pair, head, visit


@gluon.jit
def post_item(box, turn, pair, head, visit):
    """Says to the other warps what to work on next; pair -1: nothing any more."""
    boxes, box_full, box_empty = box
    first, full_first, full_last, last = visit
    mbarrier.wait(slot(box_empty, turn, 2), phase_of(turn, 2) ^ 1)
    at = (turn % 2) * BOX
    _write_number(boxes, at, pair)
    _write_number(boxes, at + 1, head)
    _write_number(boxes, at + 2, first)
    _write_number(boxes, at + 3, full_first)
    _write_number(boxes, at + 4, full_last)
    _write_number(boxes, at + 5, last)
    mbarrier.arrive(slot(box_full, turn, 2), count=1)


@gluon.jit
def await_item(box, turn):
    """The block of the next item, or -1."""
    boxes, box_full = box[0], box[1]
    mbarrier.wait(slot(box_full, turn, 2), phase_of(turn, 2))
    return _number(boxes, (turn % 2) * BOX)


@gluon.jit
def read_item(box, turn):
    """The rest of it: the head, and first, full_first, full_last, last."""
    boxes, box_empty = box[0], box[2]
    at = (turn % 2) * BOX
    head = _number(boxes, at + 1)
    visit = _number(boxes, at + 2), _number(boxes, at + 3), _number(boxes, at + 4), _number(boxes, at + 5)
    mbarrier.arrive(slot(box_empty, turn, 2), count=1)
    return head, visit


@gluon.jit
def visited_tile(i, visit):
    """The i-th tile of an item: those at the edges first, then the full ones."""
    first, full_first, full_last, last = visit
    before = full_first - first
    edges = before + last - full_last
    edge = gl.where(i < before, first + i, full_last - before + i)
    return gl.where(i < edges, edge, full_first + i - edges)


# in global memory -----------------------------------------------------------------------------------------------------


@gluon.jit
def pointers_to(
    base, strides, batch, head, first_row, n_rows, width,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) pointers to a tile of (batch, row, head, column), given the strides of three, and which exist."""
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    of_batch, of_row, of_head = strides
    base += batch.to(gl.int64) * of_batch + head.to(gl.int64) * of_head
    pointers = base + row.to(gl.int64)[:, None] * of_row + column[None, :]
    return pointers, (row < n_rows)[:, None] & (column < width)[None, :]


def descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Of x (batch, sequence, heads, head_dim) for the TMA unit, in tiles of `rows` of a head, `width` wide.

    Its coordinates are (batch, head, row, column). What lies outside x reads as 0 and is not written.
    """
    strides = [stride if size > 1 else 16 for size, stride in zip(x.shape, x.stride(), strict=True)]
    shape, strides = ([sizes[i] for i in (0, 2, 1, 3)] for sizes in (x.shape, strides))
    return TensorDescriptor(x, shape, [*strides[:3], 1], [1, 1, rows, width], _layout(128, 16, 4))


def part_descriptor(x: Tensor) -> TensorDescriptor:
    """Of contiguous float32 x, 4096 numbers at a time, which stand in the same order in shared memory."""
    return TensorDescriptor(x, [x.numel() // 256, 256], [256, 1], [16, 256], _layout(0, 32, 2))


def vector_descriptor(x: Tensor, n: int) -> TensorDescriptor:
    """Of all 32-bit numbers of contiguous x, `n` at a time."""
    return TensorDescriptor(x, [x.numel()], [1], [n], _layout(0, 32, 1))


@cache  # making one takes the CPU as long as the rest of a descriptor, and a launch has eleven
def _layout(swizzle_bytes: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle_bytes, element_bitwidth=bits, rank=rank)


def heads_together(heads: int, bytes_of_a_head: int) -> int:
    """How many of the key heads to work on at a time, so that what they read and write stays in the L2 cache."""
    fitting = max(1, (40 << 20) // max(1, bytes_of_a_head))
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fitting)
