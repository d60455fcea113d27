"""Compiles the kernels of the fused ops for GPUs that need not be there; prints a JSON line for each kernel of a call.

Runs in a process of its own: where TRITON_INTERPRET is set nothing compiles.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import torch
from torch._library.triton import set_wrap_triton_enabled

from compiled import compile_launches
from longctx.kernels import dense, rotary, softmax, swiglu
from longctx.kernels.attention import key_gradients
from longctx.kernels.loss import triton_cross_entropy
from longctx.kernels.loss.options import PLAIN, LossOptions
from longctx.kernels.norm import triton_norm

NO_DROPOUT = triton_norm.Dropout(0.0, None, None)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(rows: int, width: int, subtract_mean: bool = False, with_residual: bool = False, dropout=NO_DROPOUT) -> None:
    x, weight = empty(rows, width), empty(width)
    bias, residual = weight if subtract_mean else None, x if with_residual else None
    dtype = torch.bfloat16 if with_residual else None
    _, _, statistics = triton_norm.forward_in_triton(
        x, residual, weight, bias, dropout, 1e-5, 0.0, subtract_mean, dtype
    )
    dtotal = x if with_residual else None
    triton_norm.backward_in_triton(x, dtotal, x, weight, subtract_mean, statistics, dropout, 0.0, torch.bfloat16, None)


def cross_entropy(classes: int, options: LossOptions) -> None:
    logits, targets = empty(4096, classes), empty(4096, dtype=torch.int64)
    losses, one = empty(4096, dtype=torch.float32), empty(1, dtype=torch.float32)
    triton_cross_entropy.loss(logits, targets, options)
    triton_cross_entropy.loss(logits, targets, options, one, logits)
    triton_cross_entropy.statistics(logits, targets, options, 0)
    triton_cross_entropy.gradient(logits, targets, losses, losses, options, 0, classes, logits)
    triton_cross_entropy.scale(logits, one)


def rotary_of_both(interleaved: bool) -> None:
    q, k, angle = empty(1, 32768, 32, 128), empty(1, 32768, 8, 128), empty(1, 32768, 64, dtype=torch.float32)
    rotary._launch(rotary.rotary_triton, q, k, empty(*q.shape), empty(*k.shape), angle, angle, None, interleaved, False)


def swiglu_both_ways() -> None:
    gate, up = empty(32768, 14336), empty(32768, 14336)
    swiglu._forward(gate, up)
    swiglu._backward(gate, gate, up)
    swiglu._gradients(gate, gate, up, gate)


def softmax_both_ways(columns: int) -> None:
    x = empty(1, 32, 1024, columns)
    softmax._forward(x, None, 1, True, 0.1)
    softmax._forward(x, empty(1, 1, 1024, columns, dtype=torch.bool), 0, True, 0.1)
    softmax._backward(x, x, 0.1)


def sums_of_key_gradients() -> None:
    inbox, dk = empty(4, 1, 8192, 2, 8, 128, dtype=torch.float32), empty(1, 8192, 8, 128)
    key_gradients._launch(inbox, empty(8192, dtype=torch.int64), dk, dk, False)


def gelu_backward() -> None:
    dense._gelu_backward(empty(32768, 16384), empty(32768, 16384))


SEED = triton_norm.Dropout(0.1, empty(1, dtype=torch.int64), empty(32768, dtype=torch.int64))
CASES: dict[str, Callable[[], None]] = {
    "rms_norm 32768 x 4096": lambda: norm(32768, 4096),
    "rms_norm 32768 x 8192": lambda: norm(32768, 8192),
    "rms_norm 131072 x 128": lambda: norm(131072, 128),
    "rms_norm 16384 x 16384": lambda: norm(16384, 16384),
    "layer_norm 16384 x 16384": lambda: norm(16384, 16384, True, True),
    "rms_norm 4096 x 65536": lambda: norm(4096, 65536),
    "add_rms_norm 32768 x 4096": lambda: norm(32768, 4096, with_residual=True),
    "layer_norm 32768 x 4096": lambda: norm(32768, 4096, subtract_mean=True),
    "dropout_add_layer_norm 32768 x 4096": lambda: norm(32768, 4096, True, True, SEED),
    "cross_entropy 128256": lambda: cross_entropy(128256, PLAIN),
    "cross_entropy 50257, smoothed and capped": lambda: cross_entropy(50257, LossOptions(-100, 0.1, 1e-4, 30.0)),
    "rotary 32/8 heads of 128": lambda: rotary_of_both(False),
    "rotary interleaved": lambda: rotary_of_both(True),
    "swiglu 32768 x 14336": swiglu_both_ways,
    "softmax 4096": lambda: softmax_both_ways(4096),
    "softmax 32768": lambda: softmax_both_ways(32768),
    "gelu_backward 32768 x 16384": gelu_backward,
    "key gradients of 4 ranks": sums_of_key_gradients,
}


def main(architecture: str) -> None:
    for case, call in CASES.items():
        is_seen_by_compile = any(word in case for word in ("norm", "rotary", "swiglu"))
        with set_wrap_triton_enabled(False):  # as in an op outside torch.compile
            kernels = compile_launches(call, architecture, floats="fp64" if is_seen_by_compile else "fp32")
        for kernel in kernels:
            record = {
                "case": case, "kernel": kernel.name, "is_seen_by_compile": is_seen_by_compile,
                "architecture": architecture, "registers": kernel.registers,
                "spills": kernel.spill_bytes, "shared": kernel.shared_bytes,
                "wide_loads": kernel.assembly.count("ld.global.v4.b32"),
                "wide_stores": kernel.assembly.count("st.global.v4.b32"),
                "async_copies": kernel.assembly.count("cp.async.cg"),
                "doubles": len(re.findall(r"^\s*(?!cvt|ld|mov)\w+[.\w]*\.f64", kernel.assembly, re.MULTILINE)),
            }  # fmt: skip
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
