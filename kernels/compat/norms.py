"""Norms by the names and arguments of other projects; nothing of longctx needs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longctx.kernels.norm.layer_norm import layer_norm
from longctx.kernels.norm.op import norm
from longctx.kernels.norm.rms_norm import RMSNorm


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: None = None,
    layerscale: None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    *,
    seed: Tensor | None = None,
    row_ids: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm(dropout(x0) + residual) like x0, in one pass; with `prenorm` the sum too. (Dao, flash-attention)

    `rowscale`, `layerscale` and `return_dropout_mask` are refused. The sum is in float32 with `residual_in_fp32`, else
    in the residual's dtype, or x0's. `seed`, one int64 on the device (drawn if None), and `row_ids` (x0's shape without
    width; by default 0, 1, 2 ...) decide what is dropped: rows that keep their numbers are dropped alike however they
    are spread over processes.
    """
    _refuse(rowscale=rowscale, layerscale=layerscale, return_dropout_mask=return_dropout_mask)
    y, total = _dropout_add_norm(
        True, x0, residual, weight, bias, dropout_p, epsilon, residual_in_fp32, seed, row_ids, implementation
    )
    return (y, total) if prenorm else y


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: None,
    dropout_p: float,
    epsilon: float,
    rowscale: None = None,
    layerscale: None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    *,
    seed: Tensor | None = None,
    row_ids: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`dropout_add_layer_norm` with RMSNorm, which has no bias."""
    _refuse(bias=bias, rowscale=rowscale, layerscale=layerscale, return_dropout_mask=return_dropout_mask)
    y, total = _dropout_add_norm(
        False, x0, residual, weight, None, dropout_p, epsilon, residual_in_fp32, seed, row_ids, implementation
    )
    return (y, total) if prenorm else y


def _refuse(**given: object) -> None:
    """Raises ValueError for arguments of flash-attention's that these norms do not compute."""
    if names := [name for name, value in given.items() if value is not None and value is not False]:
        raise ValueError(f"{', '.join(names)}: not supported here, pass None (return_dropout_mask: False)")


def _dropout_add_norm(
    subtract_mean, x0, residual, weight, bias, dropout_p, epsilon, residual_in_fp32, seed, row_ids, implementation
) -> tuple[Tensor, Tensor]:
    return norm(
        x0, weight, bias, residual, eps=epsilon, subtract_mean=subtract_mean, implementation=implementation,
        total_dtype=torch.float32 if residual_in_fp32 else None, dropout=dropout_p, seed=seed, row_ids=row_ids,
    )  # fmt: skip


class Fp32LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, arguments and all, computed in float32 whatever the dtype of x."""

    def forward(self, input: Tensor) -> Tensor:
        width = 1
        for size in self.normalized_shape:
            width *= size
        if tuple(input.shape[input.ndim - len(self.normalized_shape) :]) != tuple(self.normalized_shape):
            raise ValueError(f"input {tuple(input.shape)}: its last dims must be {tuple(self.normalized_shape)}")
        weight, bias = (None if p is None else p.reshape(width) for p in (self.weight, self.bias))
        rows = input.reshape(*input.shape[: input.ndim - len(self.normalized_shape)], width)
        return layer_norm(rows, weight, bias, self.eps).view(input.shape)


class CohereLayerNorm(nn.Module):
    """Mean and variance over the last dim, a weight and no bias; `hidden_size` (heads, head_dim) is a QK-norm's.

    The name and arguments of Cohere's models in transformers.
    """

    def __init__(self, hidden_size: int | tuple[int, int], eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.variance_epsilon)


class DropoutAddLayerNorm(nn.Module):
    """`dropout_add_layer_norm` with its parameters; no dropout in evaluation. (Dao, flash-attention)"""

    def __init__(
        self, hidden_size: int, prenorm: bool = False, p: float = 0.0, eps: float = 1e-5,
        residual_in_fp32: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prenorm, self.p, self.eps, self.residual_in_fp32 = prenorm, p, eps, residual_in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return dropout_add_layer_norm(
            x0, residual, self.weight, self.bias, self.p if self.training else 0.0, self.eps, prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )  # fmt: skip


FusedRMSNorm = RMSNorm  # its name where DTensor-sharded norms came from: torchtitan
