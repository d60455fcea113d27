"""Softmax by the names of apex and Megatron-LM; nothing of longctx needs them."""

from __future__ import annotations

from torch import Tensor

from longctx.kernels.softmax import masked_softmax


def scaled_masked_softmax(x: Tensor, mask: Tensor | None, scale: float, implementation: str = "auto") -> Tensor:
    """`softmax` with Megatron's mask: True where a column is left out."""
    return masked_softmax(x, mask, scale, False, False, implementation)


def scaled_upper_triang_masked_softmax(x: Tensor, mask: object, scale: float, implementation: str = "auto") -> Tensor:
    """`softmax` of x (batch * heads, rows, rows) without what lies above the diagonal; `mask` is not looked at."""
    del mask
    return masked_softmax(x, None, scale, True, True, implementation)
