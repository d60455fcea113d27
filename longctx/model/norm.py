"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longctx.config import ModelConfig, Norm
from longctx.kernels import reference


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return reference.layer_norm(x, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream that `config.norm` names."""
    return {Norm.rms_norm: RMSNorm, Norm.layer_norm: LayerNorm}[config.norm](config.width, config.norm_eps)
