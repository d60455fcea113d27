"""Norms in plain torch: the specification, the path of the CPU, the truth of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.dropout import dropout_threshold, kept_of_rows
from longctx.kernels.precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dim of x. (Zhang and Sennrich 2019)

    x (..., width), weight (width,), or (groups, width) where x is (..., groups, width).
    """
    if weight is None or (weight.ndim == 1 and weight.dtype == x.dtype and not weight_offset):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    compute = accumulation_dtype(x.dtype)
    return (F.rms_norm(x.to(compute), (x.shape[-1],), None, eps) * (weight.to(compute) + weight_offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float = 0.0) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (weight_offset + weight) + bias over the last dim of x. (Ba et al. 2016)

    Shapes as in `rms_norm`.
    """
    is_wide = accumulation_dtype(x.dtype) == x.dtype  # torch's sums gradients of weight and bias in their dtype
    if weight is None or (is_wide and weight.ndim == 1 and weight.dtype == x.dtype and not weight_offset):
        return F.layer_norm(x, (x.shape[-1],), weight, None if bias is None else bias.to(x.dtype), eps)
    compute = accumulation_dtype(x.dtype)
    y = F.layer_norm(x.to(compute), (x.shape[-1],), None, None, eps) * (weight.to(compute) + weight_offset)
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def dropout_add(
    x: Tensor, residual: Tensor | None, dropout: float, seed: Tensor | None, row_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dropout(x) + residual in `dtype`; the elements of x (..., width) are named by row and column, see `kept`."""
    compute = accumulation_dtype(x.dtype)
    if seed is None and residual is not None and residual.dtype == x.dtype == dtype:
        return x + residual
    if seed is not None:
        rows = row_ids if row_ids is not None else torch.arange(x[..., 0].numel(), device=x.device).view(x.shape[:-1])
        column = torch.arange(x.shape[-1], device=x.device)
        keeps = kept_of_rows(seed, dropout_threshold(dropout), rows.unsqueeze(-1), column)
        x = torch.where(keeps, x.to(compute) / (1 - dropout), 0)
    if residual is not None:
        x = x.to(compute) + residual.to(compute)
    return x.to(dtype)
