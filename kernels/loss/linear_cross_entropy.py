"""Cross entropy of hidden states projected to a vocabulary, which never holds the logits of all tokens.

Chunks of tokens: their logits, over which the gradient is written at once, then the chunk's share of both gradients.
The weight's gradient is summed in float32. (Hsu et al. 2024, Liger; Wijmans et al. 2024, CCE; sums in bfloat16 diverge)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from longctx.kernels import hardware, precision
from longctx.kernels.addressing import matrix
from longctx.kernels.forward_mode import refuse_tangents
from longctx.kernels.loss import chunks, reference
from longctx.kernels.loss.cross_entropy import (
    gradient_of,
    handed_out_once,
    losses_of,
    makes_gradient_early,
    reduction_problems,
    scale_,
    statistics_of,
    target_problems,
    weight_of_a_token,
)
from longctx.kernels.loss.options import LOSS_SCHEMA, LossOptions


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`cross_entropy(hidden @ weight^T + bias, targets)` in nats, float32 (float64 for float64).

    hidden (..., width), weight (classes, width) and bias (classes,) of one dtype, which autocast may choose; targets
    (...) int64. Options as in `cross_entropy`. Memory beyond the gradients, with the Triton kernels: the logits of a
    chunk of tokens, and the weight's gradient in float32, in whose memory the finished one stays. Raises ValueError for
    what does not fit.

    `sum` and `mean` make both gradients in the forward pass: three matrix products. `sum` multiplies the losses by
    `token_weight`, one number on the device (say 1 over the tokens of a batch of which this is a part): known early, it
    costs nothing. `none` makes the logits again in the backward pass: four products.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    hidden, weight, bias = precision.autocast(hidden, weight, bias)  # pyright: ignore[reportAssignmentType]
    _check(hidden, weight, bias, targets, options, reduction, token_weight)
    refuse_tangents(hidden, weight, bias, token_weight)
    call = (*options, hardware.triton_or_reference(implementation, hidden))
    dtype = precision.accumulation_dtype(hidden.dtype)
    if token_weight is None:
        token_weight = weight_of_a_token(targets, ignore_index, reduction, dtype)
    token_weight = token_weight.reshape(()).to(dtype)
    if makes_gradient_early(reduction, hidden, weight, bias):
        return _linear_cross_entropy_with_gradient(hidden, weight, bias, targets, token_weight, *call)[0]
    losses = _linear_cross_entropy(hidden, weight, bias, targets, *call)
    return losses if reduction == "none" else losses.sum() * token_weight


def _check(hidden, weight, bias, targets, options, reduction, token_weight) -> None:
    problems = options.check()
    if weight.ndim != 2 or not weight.numel():
        problems.append(f"weight {tuple(weight.shape)}: must be (classes, width)")
    elif not hidden.ndim or hidden.shape[-1] != weight.shape[1]:
        problems.append(f"hidden {tuple(hidden.shape)}: its last dim must be the width of weight, {weight.shape[1]}")
    elif targets.shape != hidden.shape[:-1]:
        problems.append(f"targets {tuple(targets.shape)}: must be {tuple(hidden.shape[:-1])}, one a hidden state")
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        problems.append(f"hidden {hidden.dtype}, weight {weight.dtype}: must have one dtype, bias too")
    if not hidden.is_floating_point():
        problems.append(f"hidden {hidden.dtype}: must be floating")
    others = {"weight": weight, "bias": bias, "targets": targets, "token_weight": token_weight}
    elsewhere = [f"{name} on {x.device}" for name, x in others.items() if x is not None and x.device != hidden.device]
    if elsewhere:
        problems.append(f"hidden on {hidden.device}, {', '.join(elsewhere)}: must be on one device")
    if bias is not None and bias.shape != weight.shape[:1]:
        problems.append(f"bias {tuple(bias.shape)}: must be {tuple(weight.shape[:1])}, one a class")
    problems += reduction_problems(reduction)
    if token_weight is not None and (
        reduction != "sum" or token_weight.numel() != 1 or (token_weight.requires_grad and torch.is_grad_enabled())
    ):
        problems.append("token_weight: must be one number without gradient, and goes with reduction='sum'")
    problems += target_problems(targets, options.ignore_index, weight.shape[0])
    if problems:
        raise ValueError("; ".join(problems))


CPU_ROOM = 1 << 24  # bytes of a chunk's logits


# the loop over chunks -------------------------------------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """The classes whose weights this process holds, of all of them."""

    first: int
    size: int  # of the whole
    largest: int  # of the shares of all processes: they cut tokens into the same chunks
    merge: Callable[[Tensor], Tensor]  # statistics (4, tokens) of these classes to those of all


class Gradients(NamedTuple):
    """Of hidden, weight (float32) and bias (float32); a hidden state's is a share where the vocabulary is split."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: LossOptions, implementation: str,
    token_weights: Tensor | None = None, vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Gradients | None]:  # fmt: skip
    """Losses (tokens,) of hidden (tokens, width) and targets (tokens,).

    With `token_weights`, (tokens,) or one number, the gradients of sum(token_weights * losses) too.
    """
    sums = precision.accumulation_dtype(hidden.dtype)
    losses = torch.empty(len(hidden), dtype=sums, device=hidden.device)
    gradients = None
    if token_weights is not None:
        gradients = Gradients(
            torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
            torch.zeros(weight.shape, dtype=sums, device=hidden.device),
            None if bias is None else torch.zeros(bias.shape, dtype=sums, device=hidden.device),
        )
    chunk = tokens_of_a_chunk(hidden, len(weight) if vocabulary is None else vocabulary.largest)
    buffer = torch.empty((min(chunk, len(hidden)), len(weight)), dtype=hidden.dtype, device=hidden.device)
    for first in range(0, len(hidden), chunk):
        part = slice(first, first + chunk)
        logits = buffer[: len(hidden[part])]
        _project(hidden[part], weight, bias, logits)
        weights = token_weights
        if token_weights is not None and token_weights.numel() > 1:
            weights = token_weights[part]
        out = None if token_weights is None else logits
        losses[part] = _losses(logits, targets[part], options, implementation, weights, out, vocabulary)
        if gradients is not None:
            torch.mm(logits, weight, out=gradients.hidden[part])
            _add_product(gradients.weight, logits, hidden[part])
            if gradients.bias is not None:
                gradients.bias.add_(logits.sum(0, dtype=sums))
    return losses, gradients


def _losses(logits, targets, options, implementation, weights, out, vocabulary: Vocabulary | None) -> Tensor:
    """Of a chunk; with `out` the gradient to its logits is written there."""
    if vocabulary is None:
        return losses_of(logits, targets, options, implementation, weights, out)[0]
    held = statistics_of(logits, targets, options, vocabulary.first, implementation)
    losses, lse = reference.losses_of_statistics(vocabulary.merge(held), targets, options, vocabulary.size)
    if out is not None:
        gradient_of(logits, targets, lse, weights, options, vocabulary.first, vocabulary.size, implementation, out)
    return losses


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def _add_product(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """total += dlogits^T @ hidden, without rounding the product to the dtype of its factors."""
    if total.dtype == hidden.dtype:
        total.addmm_(dlogits.T, hidden)
    elif hidden.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, dlogits.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(dlogits.T.to(total.dtype), hidden.to(total.dtype))


def tokens_of_a_chunk(hidden: Tensor, classes: int) -> int:
    """How many of the tokens of hidden (tokens, width) have logits at a time; on a CPU these stay in its cache."""
    tokens, width = hidden.shape
    size = hidden.element_size()
    room = CPU_ROOM if hidden.device.type == "cpu" else None
    return chunks.tokens_of_a_chunk(tokens, size * width, size * classes, room)


def cast_in_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous x in a dtype of half its size, in the first half of the memory of x, which is lost."""
    if x.dtype == dtype or not x.numel():
        return x.to(dtype)
    flat = x.view(-1)
    result = flat.view(dtype)[: flat.numel()]
    done = -(-flat.numel() // 256)
    result[:done] = flat[:done].clone()
    while done < flat.numel():  # what is read begins where what is written ends
        until = min(2 * done, flat.numel())
        result[done:until] = flat[done:until]
        done = until
    return result.view(x.shape)


# custom ops -----------------------------------------------------------------------------------------------------------


def _forward(hidden, weight, bias, targets, *call):
    losses, _ = in_chunks(matrix(hidden), weight, bias, targets.reshape(-1), LossOptions(*call[:-1]), call[-1])
    return losses.view(targets.shape)


def _backward(dlosses, hidden, weight, bias, targets, *call):
    weights = dlosses.to(precision.accumulation_dtype(hidden.dtype)).reshape(-1)
    _, gradients = in_chunks(
        matrix(hidden), weight, bias, targets.reshape(-1), LossOptions(*call[:-1]), call[-1], weights
    )
    return finished(gradients, hidden)


def _forward_with_gradient(hidden, weight, bias, targets, token_weight, *call):
    losses, gradients = in_chunks(
        matrix(hidden), weight, bias, targets.reshape(-1), LossOptions(*call[:-1]), call[-1], token_weight
    )
    return losses.sum() * token_weight, *finished(gradients, hidden)


def finished(gradients: Gradients | None, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in their dtype; without a bias its is empty."""
    assert gradients is not None
    dbias = hidden.new_empty(0) if gradients.bias is None else gradients.bias.to(hidden.dtype)
    return gradients.hidden.view(hidden.shape), cast_in_place(gradients.weight, hidden.dtype), dbias


def fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Fake (meta) result of `finished`, for torch.compile and FakeTensor."""
    dbias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), dbias


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_linear_cross_entropy = custom_op(
    "longctx::linear_cross_entropy", _forward, mutates_args=(), schema=f"({_INPUTS}, {LOSS_SCHEMA}) -> Tensor"
)
_linear_cross_entropy_backward = custom_op(
    "longctx::linear_cross_entropy_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dlosses, {_INPUTS}, {LOSS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
_linear_cross_entropy_with_gradient = custom_op(
    "longctx::linear_cross_entropy_with_gradient",
    _forward_with_gradient,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor token_weight, {LOSS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, targets, *_call):
    return hidden.new_empty(targets.shape, dtype=precision.accumulation_dtype(hidden.dtype))


@_linear_cross_entropy_backward.register_fake
def _(dlosses, hidden, weight, bias, *_others):
    return fake_gradients(hidden, weight, bias)


@_linear_cross_entropy_with_gradient.register_fake
def _(hidden, weight, bias, targets, token_weight, *_call):
    return token_weight.new_empty(()), *fake_gradients(hidden, weight, bias)


def _setup_losses(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, *ctx.call = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)


def _losses_autograd(ctx, dlosses: Tensor):
    hidden, weight, bias, targets = ctx.saved_tensors
    dhidden, dweight, dbias = _linear_cross_entropy_backward(dlosses, hidden, weight, bias, targets, *ctx.call)
    return dhidden, dweight, None if bias is None else dbias, None, *(None for _ in ctx.call)


def _setup_loss(ctx, inputs, output) -> None:
    ctx.has_bias, ctx.others = inputs[2] is not None, len(inputs) - 3
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or gradients of the gradients are made, of zeros
    ctx.gradients = output[1:]  # handed out once: what is saved for the backward pass would be kept, and copied, by it


def _loss_autograd(ctx, dloss: Tensor, *_none):
    dhidden, dweight, dbias = handed_out_once(ctx)
    for gradient in (dhidden, dweight, dbias):
        scale_(gradient, dloss)
    return dhidden, dweight, dbias if ctx.has_bias else None, *(None for _ in range(ctx.others))


_linear_cross_entropy.register_autograd(_losses_autograd, setup_context=_setup_losses)
_linear_cross_entropy_with_gradient.register_autograd(_loss_autograd, setup_context=_setup_loss)
