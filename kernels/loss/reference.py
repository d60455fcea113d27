"""Losses in plain torch: the specification, the path of the CPU, the truth of the tests.

Sums and exponentials are in float32, or in float64 where the inputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.loss.options import PLAIN, LossOptions
from longctx.kernels.precision import accumulation_dtype


def cross_entropy(logits: Tensor, targets: Tensor, options: LossOptions = PLAIN) -> Tensor:
    """Loss of each token in nats: logits (..., classes), targets (...) -> (...), fp32 or fp64; see `LossOptions`."""
    flat, flat_targets = logits.flatten(0, -2), targets.flatten()
    found = cross_entropy_statistics(flat, flat_targets, options, 0)
    return losses_of_statistics(found, flat_targets, options, logits.shape[-1])[0].view_as(targets)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32 or float64; the logits themselves where softcap is 0."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cross_entropy_statistics(logits: Tensor, targets: Tensor, options: LossOptions, first_class: int) -> Tensor:
    """What a loss needs of logits (tokens, classes) of the classes from `first_class` on, as (4, tokens).

    The maximum of x, the sum of exp(x - maximum), x at the target (0 where its class is not here), and the sum of x.
    """
    x = capped(logits, options.softcap)
    peak = x.amax(-1).detach()
    total = (x - peak.unsqueeze(-1)).exp().sum(-1)
    column = targets - first_class
    is_here = (column >= 0) & (column < x.shape[1])
    at_target = torch.where(is_here, x.gather(1, torch.where(is_here, column, 0).unsqueeze(1)).squeeze(1), 0)
    return torch.stack((peak, total, at_target, x.sum(-1) if options.label_smoothing else torch.zeros_like(peak)))


def losses_of_statistics(
    statistics: Tensor, targets: Tensor, options: LossOptions, n_classes: int
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each token, from the statistics of all `n_classes` classes."""
    peak, total, at_target, plain = statistics
    lse = peak + total.log()
    smoothing = options.label_smoothing
    # differences to the maximum first: large logits cancel exactly
    losses = total.log() + (1 - smoothing) * (peak - at_target)
    if options.z_loss:
        losses = losses + options.z_loss * lse**2
    if smoothing:
        losses = losses + smoothing * (peak - plain / n_classes)
    losses = torch.where((targets >= 0) & (targets < n_classes), losses, torch.nan)
    return torch.where(targets != options.ignore_index, losses, 0), lse


def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, lse: Tensor, weights: Tensor, options: LossOptions, first_class: int,
    n_classes: int,
) -> Tensor:  # fmt: skip
    """Gradient of sum(weights * losses) to the logits (tokens, classes); weights (tokens,) or a single number.

    The classes are those from `first_class` on of `n_classes`, `lse` is that of all of them.
    """
    if not logits.shape[1]:  # a rank may hold no class
        return torch.empty_like(logits)
    x = capped(logits, options.softcap)
    gradient = (x - lse.unsqueeze(1)).exp_()
    if options.z_loss:
        gradient *= (1 + 2 * options.z_loss * lse).unsqueeze(1)
    if options.label_smoothing:
        gradient -= options.label_smoothing / n_classes
    column = targets - first_class
    is_here = (column >= 0) & (column < x.shape[1])
    at_target = ((1 - options.label_smoothing) * is_here.to(gradient.dtype)).unsqueeze(1)
    gradient.scatter_add_(1, torch.where(is_here, column, 0).unsqueeze(1), -at_target)
    if options.softcap:
        gradient *= 1 - (x / options.softcap) ** 2
    weights = torch.where((targets >= 0) & (targets < n_classes), weights.to(gradient.dtype), torch.nan)
    gradient *= weights.unsqueeze(1)
    return gradient.masked_fill_((targets == options.ignore_index).unsqueeze(1), 0).to(logits.dtype)


def project_to_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """hidden (..., width) @ weight (vocabulary, width)^T + bias, squashed to +-softcap by tanh where one is given."""
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return logits if softcap is None else capped(logits, softcap)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: LossOptions = PLAIN
) -> Tensor:
    """`cross_entropy(project_to_vocabulary(hidden, weight, bias), targets)`, all logits at once."""
    return cross_entropy(project_to_vocabulary(hidden, weight, bias), targets, options)
