"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dim. (Zhang and Sennrich 2019)"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longctx.kernels.norm.op import norm


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, weight_offset: float = 0.0, implementation: str = "auto"
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight), like x.

    x (..., width) in float16, bfloat16, float32 or float64, of any strides; weight (width,) shared by all rows, or
    (heads, width) where x is (..., heads, width), or None for 1. Gemma's weights have a `weight_offset` of 1. Sums are
    in float32, the weight's gradient too until it gets its dtype. `implementation`: `auto`, `triton` or `reference`.
    Raises ValueError for shapes that do not fit and widths beyond 65536.
    """
    call = {"weight_offset": weight_offset, "implementation": implementation}
    return norm(x, weight, None, None, eps=eps, subtract_mean=False, **call)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` like x, and x + residual in the residual's dtype; residual has the shape of x."""
    call = {"weight_offset": weight_offset, "implementation": implementation}
    return norm(x, weight, None, residual, eps=eps, subtract_mean=False, **call)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight; `width` may be (heads, head_dim) for a weight a head.

    With a residual it returns `add_rms_norm`.
    """

    def __init__(self, width: int | tuple[int, int], eps: float = 1e-6, implementation: str = "auto") -> None:
        super().__init__()
        self.eps, self.implementation = eps, implementation
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return rms_norm(x, self.weight, self.eps, implementation=self.implementation)
        return add_rms_norm(x, residual, self.weight, self.eps, implementation=self.implementation)
