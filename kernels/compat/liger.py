"""Losses as modules, by the names and arguments of Liger-Kernel; nothing of longctx needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from longctx.kernels.loss.cross_entropy import cross_entropy, reduction_problems
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy
from longctx.kernels.loss.options import LossOptions


class _Loss(nn.Module):
    """Liger's arguments, as far as our losses know them; `weight` of classes and `return_z_loss` are refused."""

    def __init__(
        self,
        weight: None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if weight is not None or return_z_loss:
            raise ValueError("weights of classes and return_z_loss: not supported here, pass None and False")
        problems = LossOptions(ignore_index, label_smoothing, lse_square_scale, softcap or 0.0).check()
        problems += reduction_problems(reduction)
        if problems:
            raise ValueError("; ".join(problems))
        self.ignore_index, self.lse_square_scale, self.label_smoothing = ignore_index, lse_square_scale, label_smoothing
        self.reduction, self.softcap = reduction, softcap

    @property
    def options(self) -> dict[str, Any]:
        """By the names of our losses."""
        return {
            "ignore_index": self.ignore_index, "z_loss": self.lse_square_scale, "reduction": self.reduction,
            "label_smoothing": self.label_smoothing, "softcap": self.softcap,
        }  # fmt: skip


class LigerCrossEntropyLoss(_Loss):
    """`cross_entropy` as a module; `lse_square_scale` is its `z_loss`."""

    def forward(self, _input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(_input, target, **self.options)


class LigerFusedLinearCrossEntropyLoss(_Loss):
    """`linear_cross_entropy` as a module; `lse_square_scale` is its `z_loss`, `ce_weight` what `weight` is above."""

    def __init__(self, ce_weight: None = None, *arguments: Any, **named: Any) -> None:
        super().__init__(ce_weight, *arguments, **named)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(_input, lin_weight, target, bias=bias, **self.options)
