"""Which implementation of attention serves a call: the fastest that can, or the one asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.attention import hopper, torch_sdpa
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options

MAX_BATCH = 65535  # blocks of a CUDA grid along its last axis
IMPLEMENTATIONS = ("auto", "hopper", "triton", "sdpa", "reference")


def choose_implementation(implementation: str, q: Tensor, mask: KeyIntervals | BlockMask, options: Options) -> str:
    """The implementation that serves a call: the one asked for, or for `auto` the fastest that can.

    Raises ValueError if the one asked for cannot serve inputs like `q`, and says why.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    reasons = unsupported(q, mask, options)
    if implementation != "auto":
        if reason := reasons[implementation]:
            raise ValueError(
                f"attention implementation {str(implementation)!r} cannot serve this call: {reason}; "
                "use 'auto' or 'reference'"
            )
        return implementation
    if q.dtype == torch.float64 and q.device.type != "cpu":
        raise ValueError(
            "q is torch.float64 on a GPU: no kernel there takes it; convert to float32, or ask for "
            "implementation='reference', which holds the whole score matrix"
        )
    return next(name for name in by_speed(q, mask) if not reasons[name])


def by_speed(q: Tensor, mask: KeyIntervals | BlockMask) -> tuple[str, ...]:
    """The implementations, fastest first, for such a call; whether each can serve it is another question."""
    if q.device.type == "cpu":
        return "sdpa", "reference", "triton", "hopper"  # where Triton runs on a CPU, it is the interpreter
    # as timed on H200s: then cuDNN leads, then Triton, then FlashAttention-2, but for head dims whose backward spills
    is_cudnn = isinstance(mask, KeyIntervals) and torch_sdpa.uses_cudnn(q, mask)
    others = ("sdpa", "triton") if is_cudnn or q.shape[-1] > 128 else ("triton", "sdpa")
    return "hopper", *others, "reference"


def unsupported(q: Tensor, mask: KeyIntervals | BlockMask, options: Options) -> dict[str, str | None]:
    """For each implementation why it cannot serve a call like this, or None if it can."""
    is_large = q.device.type != "cpu" and q.shape[0] > MAX_BATCH
    too_large = f"a batch of {q.shape[0]}, where a grid has at most {MAX_BATCH}: split it" if is_large else None
    of_torch = "torch's kernels skip no blocks" if isinstance(mask, BlockMask) else torch_sdpa.unsupported(q, options)
    return {
        "hopper": too_large or hopper.unsupported(q, mask, options),
        "triton": too_large or hardware.unsupported(q),
        "sdpa": too_large or of_torch,
        "reference": None,
    }


def explain_choice(q: Tensor, mask: KeyIntervals | BlockMask, options: Options) -> str:
    """What `auto` takes for a call, and why none of the others: a line each, fastest first."""
    chosen, reasons = choose_implementation("auto", q, mask, options), unsupported(q, mask, options)
    kind = _kind(mask)

    def verdict(name: str) -> str:
        if reasons[name]:
            return f"cannot: {reasons[name]}"
        if name == chosen:
            return f"chosen: the first that can, for {kind} in {q.dtype} with head_dim {q.shape[-1]}"
        return "can, and comes later"

    return "\n".join(f"{name}: {verdict(name)}" for name in by_speed(q, mask))


def _kind(mask: KeyIntervals | BlockMask) -> str:
    if isinstance(mask, BlockMask):
        return "kept blocks"
    return "key intervals" if mask.start is not None else "a causal mask" if mask.is_causal else "a full mask"
