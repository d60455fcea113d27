"""Losses as modules, by the names of Liger-Kernel; nothing of longctx needs them."""

from __future__ import annotations

from torch import Tensor, nn

from longctx.kernels.loss.cross_entropy import cross_entropy
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` as a module, with its keyword arguments."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, **self.options)


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` as a module, with its keyword arguments."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, **self.options)
