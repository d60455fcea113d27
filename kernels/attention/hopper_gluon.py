"""What the Hopper kernels need of Gluon that differs between Triton 3.6 and 3.9, or that its Python side lacks."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# Gluon's functions take a hidden argument, and exist in one version of Triton or the other

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

threads_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # those of one partition
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@_core.builtin
def _reduce_add_to_global(descriptor, coordinates, source, _semantic=None):
    """Adds a tile in shared memory to a tensor with the TMA unit: asynchronous, unordered."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, descriptor.handle, coordinates, source.handle)


reduce_add_to_global = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _reduce_add_to_global


@gluon.jit
def named_barrier(number: gl.constexpr, threads: gl.constexpr):
    """Where `threads` threads of several partitions meet; Triton itself leaves the numbers from 8 on free."""
    gl.inline_asm_elementwise(
        f"bar.sync {number}, {threads}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def arrive_at_named_barrier(number: gl.constexpr, threads: gl.constexpr):
    """Counts this partition's threads as met, without waiting."""
    gl.inline_asm_elementwise(
        f"bar.arrive {number}, {threads}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_writes():
    """Waits until what the TMA unit was given to add is visible to others; `tma.store_wait`: until it was read."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _scaling(n):
    """PTX for `n` numbers of a thread: products, unless all factors of a warp are 1.

    As WGMMA has them, the numbers 0 and 1 are of one row, 2 and 3 of the row 8 below it, 4 and 5 of the first again.
    """
    factor_of = [f"${2 * n + i % 4}" for i in range(n)]  # operands are the results, the same as inputs, and the factors
    products = " ".join(f"mul.f32 ${i}, ${i}, {factor_of[i]};" for i in range(n))
    return f"""
        {{
            .reg .pred changes;
            setp.neu.f32 changes, {factor_of[0]}, 1.0;
            setp.neu.or.f32 changes, {factor_of[2]}, 1.0, changes;
            vote.sync.any.pred changes, changes, 0xffffffff;
            @!changes bra.uni DONE;
            {products}
            DONE:
        }}
    """


@gluon.constexpr_function
def _scaling_operands(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def scale_rows(x, factor):
    """x * factor[:, None] of a warpgroup's product x (64, columns), which is no more than a branch where all are 1.

    All threads of a warp come here together, as to the products around it, so that they may vote.
    """
    gl.static_assert(x.shape[0] == 64 and gl.num_warps() == 4)
    n: gl.constexpr = x.shape[0] * x.shape[1] // 128  # of a thread
    return gl.inline_asm_elementwise(
        _scaling(n), _scaling_operands(n), [x, factor[:, None]], dtype=gl.float32, is_pure=True, pack=n
    )


@gluon.constexpr_function
def _hiding(n):
    """PTX that hides those of a thread's `n` scores whose key is outside the interval of their row.

    Of each of its two rows a thread has numbers 0 and 1 of every 8 columns, as WGMMA lays them out: its column j is
    8 * (j // 2) + j % 2, counted from its first. So 2 * (x // 8) + min(x % 8, 2) of its columns are before column x.
    Bit j of a register says whether the row sees column j, and ptxas moves 7 bits at a time into predicates (R2P).
    """
    operand = lambda kind, row: f"${kind * n + 2 * row}"  # noqa: E731  kinds: results, scores, keys, starts, ends
    lines = []
    for row in range(2):
        for bound, bits in ((operand(3, row), "before"), (operand(4, row), f"seen{row}")):
            lines.append(f"""
                sub.s32 columns, {bound}, {operand(2, row)};
                max.s32 columns, columns, 0;
                shr.u32 eighths, columns, 3;
                and.b32 columns, columns, 7;
                min.u32 columns, columns, 2;
                mad.lo.u32 columns, eighths, 2, columns;
                shl.b32 {bits}, 1, columns;
                sub.u32 {bits}, {bits}, 1;
            """)
        lines.append(f"not.b32 before, before; and.b32 seen{row}, seen{row}, before;")
    for i in range(n):
        row, column = i // 2 % 2, i // 4 * 2 + i % 2
        lines.append(f"and.b32 bit, seen{row}, {1 << column}; setp.ne.u32 is_seen, bit, 0;")
        lines.append(f"selp.f32 ${i}, ${n + i}, 0fFF800000, is_seen;")  # -inf
    registers = ".reg .b32 columns, eighths, bit, before, seen<2>; .reg .pred is_seen;"
    return f"{{ {registers} {' '.join(lines)} }}"


@gluon.constexpr_function
def _hiding_operands(n):
    return ",".join(["=&f"] * n + ["f"] * n + ["r"] * (3 * n))


@gluon.jit
def hide_unseen(score, key, row_start, row_end):
    """Scores (64, K) of a warpgroup's product, -inf where key (K,) is not in [row_start, row_end) (64,).

    Keys follow one another, bounds are 0 or more. It is `where(seen, score, -inf)` in half of its instructions.
    """
    gl.static_assert(score.shape[0] == 64 and score.shape[1] <= 128 and gl.num_warps() == 4)
    n: gl.constexpr = score.shape[0] * score.shape[1] // 128  # of a thread
    operands = [score, key[None, :], row_start[:, None], row_end[:, None]]
    return gl.inline_asm_elementwise(_hiding(n), _hiding_operands(n), operands, dtype=gl.float32, is_pure=True, pack=n)
