"""Which implementation of its ops a model runs on a device: known at the start, or refused there."""

from __future__ import annotations

import torch

from longctx.config import Config, ModelConfig
from longctx.errors import UserError
from longctx.kernels import hardware
from longctx.kernels.attention.choice import choose_implementation
from longctx.kernels.attention.interface import check_inputs
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options


def implementations(config: Config, device: torch.device) -> dict[str, str]:
    """What `model.attention` and `model.fused_ops` come to, in words, by `attention` and `fused_ops`.

    Raises UserError if one that is asked for cannot serve the model there.
    """
    compute = getattr(torch, config.precision.compute)
    return {
        "attention": attention_implementation(config.model, device, compute),
        "fused_ops": fused_implementation(config.model, device, compute),
    }


def attention_implementation(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What `model.attention` comes to, in words; raises UserError if the one asked for cannot serve the model."""
    q, k = (torch.empty(1, 1, n, config.head_dim, device=device, dtype=dtype) for n in (config.heads, config.kv_heads))
    try:
        check_inputs(q, k, k)
        packed = KeyIntervals.documents(torch.zeros(1, 1, dtype=torch.int64)).to(device)
        of_one, of_many = (
            choose_implementation(config.attention, q, mask, Options(config.head_dim**-0.5))
            for mask in (KeyIntervals.causal(1), packed)
        )
        return of_one if of_one == of_many else f"{of_many}, in sequences of one document {of_one}"
    except ValueError as error:
        raise UserError(f"model.attention={config.attention}: {error}") from None


def fused_implementation(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What `model.fused_ops` comes to; raises UserError if the one asked for cannot run on the device."""
    try:
        return hardware.triton_or_reference(config.fused_ops, torch.empty(0, device=device, dtype=dtype))
    except ValueError as error:
        raise UserError(f"model.fused_ops={config.fused_ops}: {error}") from None
