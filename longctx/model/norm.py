"""The norm of the residual stream."""

from __future__ import annotations

from torch import nn

from longctx.config import ModelConfig, Norm
from longctx.kernels.norm.layer_norm import LayerNorm
from longctx.kernels.norm.rms_norm import RMSNorm


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that `config.norm` names: norm(x), or norm(x, residual=r) for the normalised sum and the sum."""
    kind = {Norm.rms_norm: RMSNorm, Norm.layer_norm: LayerNorm}[config.norm]
    return kind(config.width, config.norm_eps, implementation=str(config.fused_ops))
