"""Attention on Hopper GPUs: what the Gluon kernels serve.

The kernels multiply with wgmma and copy with the tensor memory accelerator; docs/attention_on_hopper.md says how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options


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
