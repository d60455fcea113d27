"""Compiles the Hopper attention kernels without a GPU; prints a JSON line for each kernel of a call.

Runs in a process of its own: where TRITON_INTERPRET is set nothing compiles, and each Triton needs its own.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
import triton

import sass
from compiled import compile_launches
from longctx.kernels.attention import hopper_backward, hopper_forward
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved

N = 4096
KERNELS = "attention_forward_hopper", "attention_backward_hopper", "attention_backward_wide_hopper"


def compile_case(
    head_dim: int, dtype: torch.dtype = torch.bfloat16, into=False, deterministic=False, blocks=False, kv_heads=2
) -> None:
    bound = torch.empty(1, N, dtype=torch.int32, device="meta")
    mask = KeyIntervals(N, N, False, bound, torch.empty_like(bound))
    q, k, v = (torch.empty(1, N, heads, head_dim, dtype=dtype, device="meta") for heads in (4, kv_heads, kv_heads))
    empty = partial(torch.empty, dtype=torch.float32, device="meta")
    lse, options = empty(1, 4, N), Options(0.1, deterministic=deterministic)
    flags = torch.empty(1, N // 128, dtype=torch.int32, device="meta")
    homes = hopper_backward.GradientTargets(
        torch.empty(1, dtype=torch.int64, device="meta"), empty((1, N, 2, kv_heads, head_dim))
    )
    gradients = (empty(q.shape), empty(k.shape), empty(v.shape)) if into else None

    def call():
        if blocks:
            part = hopper_forward.PartialOutput(flags, torch.empty_like(q), empty(q.shape), lse)
            hopper_forward.forward_on_hopper(q, k, v, mask, options, part)
            hopper_backward.PartialBackwardOnHopper(q, lse, q, q, lse, options).add(k, v, mask, homes)
            return
        if not deterministic and not into:
            hopper_forward.forward_on_hopper(q, k, v, mask, options)
        hopper_backward.backward_on_hopper(q, lse, Saved(q, k, v, q, lse), mask, options, gradients)

    for kernel in compile_launches(call, "sm_90", only=KERNELS):
        code = sass.disassembled(kernel.binary)
        print(
            json.dumps(
                {
                    "kernel": kernel.name, "triton": triton.__version__, "head_dim": head_dim, "dtype": str(dtype),
                    "into": into, "blocks": blocks, "deterministic": deterministic, "registers": kernel.registers,
                    "spills": kernel.spill_bytes, "shared": kernel.shared_bytes, "warnings": kernel.warnings,
                    "stores": sass.bytes_of_stores(code),
                    "loops": [
                        {
                            "instructions": len(loop), "spills": sass.spills(loop),
                            "exponentials": sass.exponentials_by_pending_products(loop),
                            "overwritten": sass.overwritten_operands(loop), "votes": sass.votes(loop),
                            "comparisons": sass.comparisons(loop),
                        }
                        for loop in sass.loops(code)
                    ],
                }
            ),
            flush=True,
        )  # fmt: skip


def main(is_short: bool) -> None:
    """All forms of the kernels, or one of each."""
    for head_dim in (64, 128, 256):
        compile_case(head_dim)
    for head_dim in (128,) if is_short else (64, 128, 256):
        compile_case(head_dim, blocks=True)
        compile_case(head_dim, deterministic=True)
    if not is_short:
        for head_dim in (64, 128, 256):
            compile_case(head_dim, into=True)
            # without heads that share keys, dQ's turns go the other way
            compile_case(head_dim, deterministic=True, kv_heads=4)
        torch.set_default_dtype(torch.bfloat16)  # which is not what sums are in
        compile_case(128, torch.float16)


if __name__ == "__main__":
    main("short" in sys.argv[1:])
