"""The dtypes that ops compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype of torch.autocast, where that is on, as it does for matrix products: not float64, nor
    integers."""
    device = next(x.device.type for x in tensors if x is not None)
    # "meta" has no autocast; torch.amp.is_autocast_available says so, but torch 2.11 cannot trace it
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        x if x is None or x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors
    ]  # fmt: skip


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
