"""Compiles the attention kernels for GPUs that need not be there; prints a JSON line for each kernel of a call.

Runs in a process of its own: where TRITON_INTERPRET is set nothing compiles.
"""

from __future__ import annotations

import json
import sys

import torch

from compiled import compile_launches
from longctx.kernels.attention import triton_backward, triton_forward
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved

N = 4096


def key_intervals(with_positions: bool = False) -> KeyIntervals:
    bound = torch.empty(1, N, dtype=torch.int32, device="meta")
    positions = (torch.empty_like(bound), bound[0]) if with_positions else (None, None)
    return KeyIntervals(N, N, False, bound, torch.empty_like(bound), *positions)


def kept_blocks() -> BlockMask:
    return BlockMask(torch.empty(4, N // 16, N // 256, dtype=torch.bool, device="meta"), 16, 256, key_intervals())


def compile_case(
    architecture: str, dtype: torch.dtype, head_dim: int, mask: KeyIntervals | BlockMask, distributed=False, **changes
) -> None:
    q, k, v = (torch.empty(1, N, heads, head_dim, dtype=dtype, device="meta") for heads in (4, 2, 2))
    lse, options = torch.empty(1, 4, N, device="meta"), Options(0.1, **changes)

    into, gradients, sink = None, None, None
    if distributed:  # as a ring calls them
        into, sink = (torch.empty(q.shape, device="meta"), lse), torch.empty(4, dtype=dtype, device="meta")
        gradients = tuple(torch.empty(x.shape, device="meta") for x in (q, k, v))

    def call():
        triton_forward.forward_in_triton(q, k, v, mask, options, sink, into)
        triton_backward.backward_in_triton(q, lse, Saved(q, k, v, q, lse), mask, options, gradients)

    for kernel in compile_launches(call, architecture):
        print(
            json.dumps(
                {
                    "kernel": kernel.name, "architecture": architecture, "dtype": str(dtype), "head_dim": head_dim,
                    "mask": type(mask).__name__, "options": sorted(changes), "registers": kernel.registers,
                    "spills": kernel.spill_bytes, "shared": kernel.shared_bytes,
                    "wgmma": kernel.assembly.count("wgmma.mma_async"),
                    "vector_atomics": kernel.assembly.count(".v4.f32"),
                }
            ),
            flush=True,
        )  # fmt: skip


def cases(architecture: str, is_short: bool = False) -> list[dict]:
    """What is compiled for an architecture: arguments of `compile_case`, all for tensors of one dtype.

    `is_short`: at one head_dim alone, and only as a ring calls them, of all options.
    """
    head_dims = (64, 128, 256)
    few = (128,) if is_short else head_dims
    if architecture != "sm_90":
        return [{"dtype": torch.float16, "head_dim": d, "mask": key_intervals()} for d in head_dims]
    seed, slopes = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(4, device="meta")
    options = {"softcap": 30.0, "alibi_slopes": slopes, "dropout": 0.1, "seed": seed}
    at_128 = {"dtype": torch.bfloat16, "head_dim": 128}
    rare = [
        {**at_128, "mask": key_intervals(), "deterministic": True},
        {**at_128, "mask": key_intervals(with_positions=True), **options},
    ]
    return [
        *({"dtype": torch.bfloat16, "head_dim": d, "mask": key_intervals()} for d in few),
        *({"dtype": torch.float32, "head_dim": d, "mask": key_intervals()} for d in few),
        *({"dtype": torch.bfloat16, "head_dim": d, "mask": kept_blocks()} for d in few),
        {**at_128, "mask": key_intervals(), "distributed": True},
        *([] if is_short else rare),
    ]


def main(architecture: str, *short: str) -> None:
    for case in cases(architecture, is_short=bool(short)):
        compile_case(architecture, **case)


if __name__ == "__main__":
    main(*sys.argv[1:])
