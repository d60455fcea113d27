"""LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias over the last dim. (Ba et al. 2016)"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longctx.kernels.norm.op import norm


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5, *, implementation: str = "auto"
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, like x.

    x (..., width) in float16, bfloat16, float32 or float64, of any strides; weight and bias (width,) shared by all
    rows, or (heads, width) where x is (..., heads, width), or None for 1 and 0. Sums are in float32, gradients of
    weight and bias too until they get their dtype. `implementation`: `auto`, `triton` or `reference`. Raises ValueError
    for shapes that do not fit and widths beyond 65536.
    """
    return norm(x, weight, bias, None, eps=eps, subtract_mean=True, implementation=implementation)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`layer_norm(x + residual)` like x, and x + residual in the residual's dtype; residual has the shape of x."""
    return norm(x, weight, bias, residual, eps=eps, subtract_mean=True, implementation=implementation)


# modules --------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """`layer_norm` with its parameters; `width` may be (heads, head_dim) for a weight a head.

    With a residual it returns `add_layer_norm`.
    """

    def __init__(
        self, width: int | tuple[int, int], eps: float = 1e-5, bias: bool = True, implementation: str = "auto"
    ) -> None:
        super().__init__()
        self.eps, self.implementation = eps, implementation
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps, implementation=self.implementation)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, implementation=self.implementation)
