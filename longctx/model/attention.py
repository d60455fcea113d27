"""The attention layer. `attend` is the seam where context parallelism takes the kernel's place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.norm.rms_norm import RMSNorm
from longctx.kernels.rotary import apply_rotary_to_both


class Attend(nn.Module):
    """The attention op as a module, so that `longctx.parallel` can replace it.

    `options`: keyword arguments of `longctx.kernels.attention.interface.attention`, such as `softcap`.
    """

    def __init__(self, implementation: str = "auto", **options: Any) -> None:
        super().__init__()
        self.implementation, self.options = implementation, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> Tensor:
        """q (batch, sequence, heads, head_dim), k and v with kv_heads -> out like q."""
        return attention(q, k, v, mask, implementation=self.implementation, **self.options)[0]


class Attention(nn.Module):
    """Projections, rotary positions, optional QK-norm, and `attend`."""

    def __init__(self, config: ModelConfig, rotates: bool) -> None:
        """rotates: whether queries and keys are turned by their positions."""
        super().__init__()
        self.head_dim, self.fused_ops, self.rotates = config.head_dim, str(config.fused_ops), rotates
        self.query = nn.Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.output = nn.Linear(config.heads * config.head_dim, config.width, bias=config.projection_bias)
        self.query_norm, self.key_norm = (
            RMSNorm(config.head_dim, config.norm_eps, self.fused_ops) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.attend = Attend(config.attention)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: KeyIntervals) -> Tensor:
        """x (batch, sequence, width); rotation: cos and sin, (batch, sequence, head_dim / 2)."""
        out = self.attend(*self.project(x, rotation), mask)
        return self.output(torch.flatten(out, 2))

    def project(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], group: int = 0, groups: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `attend` is given: q (batch, sequence, heads, head_dim), k and v with kv_heads; of one of so many equal
        groups of heads."""
        layers = self.query, self.key, self.value
        q, k, v = (_of_group(layer, x, group, groups).unflatten(-1, (-1, self.head_dim)) for layer in layers)
        q, k = self.query_norm(q), self.key_norm(k)
        if self.rotates:
            q, k = apply_rotary_to_both(q, k, *rotation, implementation=self.fused_ops)
        return q, k, v


def _of_group(layer: nn.Linear, x: Tensor, group: int, groups: int) -> Tensor:
    """The layer's result, of one of so many equal groups of its columns."""
    if groups == 1:
        return layer(x)
    bias = None if layer.bias is None else layer.bias.chunk(groups)[group]
    return F.linear(x, layer.weight.chunk(groups)[group], bias)
