"""Cross entropy over logits that exist: label smoothing, z-loss, softcap, and a gradient written over the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

from longctx.kernels import addressing, hardware, precision
from longctx.kernels.forward_mode import refuse_tangents
from longctx.kernels.loss import reference, triton_cross_entropy
from longctx.kernels.loss.options import LOSS_SCHEMA, LossOptions

REDUCTIONS = ("none", "sum", "mean")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Loss in nats, float32 (float64 for float64): of each token (`none`), their sum, or the mean over valid targets.

    logits (..., classes) in float16, bfloat16, float32 or float64; targets (...) int64. The loss is lse -
    (1 - label_smoothing) * x[target] - label_smoothing * mean(x) + z_loss * lse^2, of x = logits, or softcap *
    tanh(logits / softcap), and lse = log(sum(exp(x))); 0 where the target is `ignore_index`. A mean over no valid
    target is 0. `inplace`: the gradient is written over the logits, which saves as much memory as they take; nothing
    else may use them afterwards. For `sum` and `mean` the gradient is made together
    with the loss, but in float16, where it could vanish before a loss scale reaches it. Raises ValueError for what does
    not fit; a target outside the vocabulary raises on a CPU, and gives NaN on a GPU, where looking would wait for it.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    problems = options.check()
    if not logits.is_floating_point() or logits.ndim < 1 or logits.shape[-1] < 1:
        problems.append(f"logits {tuple(logits.shape)} {logits.dtype}: must be (..., classes) of a floating type")
    elif targets.shape != logits.shape[:-1]:
        problems.append(f"targets {tuple(targets.shape)}: must be {tuple(logits.shape[:-1])}, one a row of logits")
    if inplace and not logits.is_contiguous():
        problems.append("inplace: the logits must be contiguous, for the gradient to take their place")
    problems += reduction_problems(reduction)
    problems += target_problems(targets, ignore_index, logits.shape[-1])
    if problems:
        raise ValueError("; ".join(problems))
    refuse_tangents(logits)
    call = (*options, hardware.triton_or_reference(implementation, logits))
    weight = weight_of_a_token(targets, ignore_index, reduction, precision.accumulation_dtype(logits.dtype))
    if makes_gradient_early(reduction, logits):
        if inplace:
            return _InPlaceLoss.apply(logits, targets, weight, call)
        return _cross_entropy_with_gradient(logits, targets, weight, *call)[0]
    losses = _InPlaceLosses.apply(logits, targets, call) if inplace else _cross_entropy(logits, targets, *call)[0]
    return losses if reduction == "none" else losses.sum() * weight


def makes_gradient_early(reduction: str, *inputs: Tensor | None) -> bool:
    """Whether a loss of `inputs` makes their gradients with it; float16's a loss scale must reach before they round."""
    given = [x for x in inputs if x is not None]
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return reduction != "none" and needs_gradient and given[0].dtype != torch.float16


def reduction_problems(reduction: str) -> list[str]:
    """What is wrong with the name of a reduction."""
    return [] if reduction in REDUCTIONS else [f"reduction={reduction!r}: must be none, sum or mean"]


def target_problems(targets: Tensor, ignore_index: int, n_classes: int) -> list[str]:
    """What is wrong with targets; the values only where looking at them is free."""
    if targets.dtype != torch.int64:
        return [f"targets {targets.dtype}: must be torch.int64"]
    is_plain = type(targets) is Tensor and not torch.compiler.is_compiling()
    if not is_plain or targets.device.type != "cpu" or not targets.numel():
        return []
    outside = targets[(targets != ignore_index) & ((targets < 0) | (targets >= n_classes))]
    if not outside.numel():
        return []
    return [f"target {int(outside[0])} is out of bounds: must be 0 to {n_classes - 1}, or ignore_index={ignore_index}"]


def weight_of_a_token(targets: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """What losses are multiplied by: 1 / valid targets for a mean (1 where there are none), else 1."""
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=targets.device)
    return 1 / (targets != ignore_index).sum().clamp(min=1).to(dtype)


# blocks, of which the op here, the linear cross entropy and vocabulary-parallel losses are made -----------------------


def losses_of(
    logits: Tensor, targets: Tensor, options: LossOptions, implementation: str, weights: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses and log-sum-exps (tokens,) of logits (tokens, classes); with `out`, which may be `logits`, the gradient of
    sum(weights * losses) is written there; weights (tokens,) or one number."""
    if implementation == "triton":
        return triton_cross_entropy.loss(addressing.readable(logits), targets, options, weights, out)
    found = reference.cross_entropy_statistics(logits, targets, options, 0)
    losses, lse = reference.losses_of_statistics(found, targets, options, logits.shape[1])
    if out is not None:
        assert weights is not None
        gradient_of(logits, targets, lse, weights, options, 0, logits.shape[1], implementation, out)
    return losses, lse


def statistics_of(
    logits: Tensor, targets: Tensor, options: LossOptions, first_class: int, implementation: str
) -> Tensor:
    """See `reference.cross_entropy_statistics`."""
    if not logits.shape[1]:
        none = torch.tensor(
            [-torch.inf, 0, 0, 0], device=logits.device, dtype=precision.accumulation_dtype(logits.dtype)
        )
        return none.unsqueeze(1).repeat(1, len(logits))
    if implementation == "triton":
        return triton_cross_entropy.statistics(addressing.readable(logits), targets, options, first_class)
    return reference.cross_entropy_statistics(logits, targets, options, first_class)


def gradient_of(
    logits: Tensor, targets: Tensor, lse: Tensor, weights: Tensor, options: LossOptions, first_class: int,
    n_classes: int, implementation: str, out: Tensor,
) -> None:  # fmt: skip
    """Writes `reference.cross_entropy_gradient` into `out`, which may be `logits`."""
    if implementation == "triton":
        logits = addressing.readable(logits)
        triton_cross_entropy.gradient(logits, targets, lse, weights, options, first_class, n_classes, out)
    else:
        out.copy_(reference.cross_entropy_gradient(logits, targets, lse, weights, options, first_class, n_classes))


# custom ops -----------------------------------------------------------------------------------------------------------


def _rows(logits: Tensor) -> Tensor:
    return logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])  # of no classes too, as a rank may hold


def _forward(logits, targets, *call):
    losses, lse = losses_of(_rows(logits), targets.reshape(-1), LossOptions(*call[:-1]), call[-1])
    return losses.view(targets.shape), lse.view(targets.shape)


def _statistics(logits, targets, first_class, *call):
    found = statistics_of(_rows(logits), targets.reshape(-1), LossOptions(*call[:-1]), first_class, call[-1])
    return found.view(4, *targets.shape)


def _gradient(weights, logits, targets, lse, first_class, n_classes, *call):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(weights, logits, targets, lse, first_class, n_classes, out, call)
    return out


def _gradient_over_logits(weights, logits, targets, lse, first_class, n_classes, *call):
    _write_gradient(weights, logits, targets, lse, first_class, n_classes, logits, call)


def _write_gradient(weights, logits, targets, lse, first_class, n_classes, out, call) -> None:
    gradient_of(
        _rows(logits), targets.reshape(-1), lse.reshape(-1), weights.to(lse.dtype).reshape(-1), LossOptions(*call[:-1]),
        first_class, n_classes, call[-1], _rows(out),
    )  # fmt: skip


def _forward_with_gradient(logits, targets, weight, *call):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return _write_with_gradient(logits, targets, weight, out, call), out


def _forward_over_logits(logits, targets, weight, *call):
    return _write_with_gradient(logits, targets, weight, logits, call)


def _write_with_gradient(logits, targets, weight, out, call) -> Tensor:
    call = LossOptions(*call[:-1]), call[-1]
    losses, _ = losses_of(_rows(logits), targets.reshape(-1), *call, weight, _rows(out))
    return losses.sum() * weight


def _scale(x, factor):
    if hardware.unsupported(x) or hardware.INTERPRETED:
        x.mul_(factor)
    else:
        triton_cross_entropy.scale(x, factor)


_cross_entropy = custom_op(
    "longctx::cross_entropy",
    _forward,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {LOSS_SCHEMA}) -> (Tensor, Tensor)",
)
cross_entropy_statistics = custom_op(
    "longctx::cross_entropy_statistics",
    _statistics,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, int first_class, {LOSS_SCHEMA}) -> Tensor",
)
_GRADIENT = f"Tensor targets, Tensor lse, int first_class, int n_classes, {LOSS_SCHEMA}"
cross_entropy_gradient = custom_op(
    "longctx::cross_entropy_gradient",
    _gradient,
    mutates_args=(),
    schema=f"(Tensor weights, Tensor logits, {_GRADIENT}) -> Tensor",
)
cross_entropy_gradient_ = custom_op(
    "longctx::cross_entropy_gradient_",
    _gradient_over_logits,
    mutates_args=("logits",),
    schema=f"(Tensor weights, Tensor(a!) logits, {_GRADIENT}) -> ()",
)
_cross_entropy_with_gradient = custom_op(
    "longctx::cross_entropy_with_gradient",
    _forward_with_gradient,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, Tensor weight, {LOSS_SCHEMA}) -> (Tensor, Tensor)",
)
_cross_entropy_with_gradient_ = custom_op(
    "longctx::cross_entropy_with_gradient_",
    _forward_over_logits,
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor targets, Tensor weight, {LOSS_SCHEMA}) -> Tensor",
)
# multiplies contiguous x by one number on the device; on a GPU nothing is read or written where that is 1
scale_ = custom_op("longctx::scale_", _scale, mutates_args=("x",), schema="(Tensor(a!) x, Tensor factor) -> ()")


@_cross_entropy.register_fake
def _(logits, targets, *_call):
    losses = targets.new_empty(targets.shape, dtype=precision.accumulation_dtype(logits.dtype))
    return losses, torch.empty_like(losses)


@cross_entropy_statistics.register_fake
def _(logits, targets, *_call):
    return targets.new_empty((4, *targets.shape), dtype=precision.accumulation_dtype(logits.dtype))


@cross_entropy_gradient.register_fake
def _(weights, logits, *_others):
    return logits.new_empty(logits.shape)


@_cross_entropy_with_gradient.register_fake
def _(logits, targets, weight, *_call):
    return weight.new_empty(()), logits.new_empty(logits.shape)


@_cross_entropy_with_gradient_.register_fake
def _(logits, targets, weight, *_call):
    return weight.new_empty(())


def _setup_losses(ctx, inputs, output) -> None:
    logits, targets, *ctx.call = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _losses_autograd(ctx, dlosses: Tensor, _dlse: None):
    logits, targets, lse = ctx.saved_tensors
    return cross_entropy_gradient(dlosses, logits, targets, lse, 0, logits.shape[-1], *ctx.call), *[None] * 6


def _setup_loss(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a gradient of the gradient is made, of zeros
    # handed out once: what is saved for the backward pass would be kept, and copied, by it
    ctx.gradients = (output[1],)


def handed_out_once(ctx) -> tuple[Tensor, ...]:
    """The gradients that a forward pass has made, which the backward pass scales in place."""
    _refuse_second_derivative()
    if ctx.gradients is None:
        raise RuntimeError("a second backward pass through this loss: its gradient is gone; compute the loss again")
    gradients, ctx.gradients = ctx.gradients, None
    return gradients


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a loss whose gradient is made in place has no second derivative; use torch's loss for that")


def _loss_autograd(ctx, dloss: Tensor, _dgradient: None):
    (gradient,) = handed_out_once(ctx)
    scale_(gradient, dloss)
    return gradient, *[None] * 7


_cross_entropy.register_autograd(_losses_autograd, setup_context=_setup_losses)
_cross_entropy_with_gradient.register_autograd(_loss_autograd, setup_context=_setup_loss)


class _InPlaceLosses(torch.autograd.Function):
    """Losses of tokens, whose backward pass writes the gradient over the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, call: tuple) -> Tensor:
        losses, lse = _cross_entropy(logits, targets, *call)
        ctx.save_for_backward(logits, targets, lse)
        ctx.call = call
        return losses

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        _refuse_second_derivative()
        logits, targets, lse = ctx.saved_tensors
        cross_entropy_gradient_(gradients[0], logits, targets, lse, 0, logits.shape[-1], *ctx.call)
        return logits.detach(), None, None


class _InPlaceLoss(torch.autograd.Function):
    """A sum of losses, which writes the gradient over the logits at once."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weight: Tensor, call: tuple) -> Tensor:
        loss = _cross_entropy_with_gradient_(logits, targets, weight, *call)
        ctx.gradients = (logits.detach(),)
        return loss

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,) = handed_out_once(ctx)
        scale_(gradient, gradients[0])
        return gradient, None, None, None
