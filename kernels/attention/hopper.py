"""Attention on Hopper GPUs: what the Gluon kernels serve, and the two passes.

The kernels multiply with wgmma and copy with the tensor memory accelerator; docs/attention_on_hopper.md says how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.attention import torch_sdpa, triton_backward
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.hopper_backward import backward_on_hopper
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.reference import added, repeat_heads, sum_repeated_heads


def unsupported(q: Tensor, mask: KeyIntervals | BlockMask, options: Options) -> str | None:
    """Why a call like this cannot be served here, or None if it can."""
    if not _is_on_gpu(q) or hardware.architecture(q.device) != "sm_90":
        return "the Hopper kernels need a GPU of compute capability 9.0"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper kernels take float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] % 8:
        return f"the Hopper kernels take head dims that are multiples of 8, not {q.shape[-1]}"
    for name, is_asked in (
        ("kept blocks", isinstance(mask, BlockMask)),
        ("softcap", options.softcap),
        ("alibi_slopes", options.alibi_slopes is not None),
        ("dropout", options.dropout),
    ):
        if is_asked:
            return f"the Hopper kernels know no {name}"
    return None


def _is_on_gpu(q: Tensor) -> bool:
    return q.device.type == "cuda"


def has_own_backward(q: Tensor) -> bool:
    """Whether the backward pass is one of the kernels here."""
    return q.shape[-1] <= 128


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    mask: KeyIntervals,
    options: Options,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `passes`. Head dims above 128 have torch's kernels where these serve, else the portable one."""
    q, k, v, out, lse = saved
    if has_own_backward(q):
        return backward_on_hopper(dout, dlse, saved, mask, options, into)
    if torch_sdpa.unsupported(q, options) is None:
        gradients = torch_sdpa.backward_by_torch(dout, dlse, saved, mask, options.scale)
    elif _cudnn_serves(k, dlse, mask, options):
        repeated = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        dq, dk, dv = torch_sdpa.cudnn_backward(dout, Saved(q, *repeated, out, lse), mask, options.scale)
        gradients = dq, sum_repeated_heads(dk, k.shape[2]), sum_repeated_heads(dv, k.shape[2])
    else:
        return triton_backward.backward_in_triton(dout, dlse, saved, mask, options, into)
    return added(gradients, into)


def _cudnn_serves(k: Tensor, dlse: Tensor | None, mask: KeyIntervals, options: Options) -> bool:
    """At a head dim of 256, which torch's other kernels do not take with a gradient of lse."""
    return dlse is None and not options.deterministic and torch_sdpa.knows_mask(mask) and k.shape[1] > 1
