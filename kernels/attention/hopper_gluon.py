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
