"""The op behind `rms_norm` and `layer_norm`: dropout, residual and normalisation in one pass, as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.dropout import new_seed
from longctx.kernels.forward_mode import refuse_tangents
from longctx.kernels.norm import reference, triton_norm
from longctx.kernels.triton_op import triton_op

WIDEST = 65536


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    subtract_mean: bool,
    implementation: str,
    weight_offset: float = 0.0,
    total_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    row_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(total) like x, and total = dropout(x) + residual.

    x (..., width) in float16, bfloat16 or float32 (float64: the reference), width to 65536; weight and bias (width,),
    or (groups, width) where x is (..., groups, width), in any floating dtype; residual like x. `total_dtype`: by
    default that of the residual, or of x. `dropout`: probability with which an element of x becomes 0; `seed`, one
    int64 on the device, drawn if None, and `row_ids` (x's shape without width), by default 0, 1, 2 ..., decide which.
    Sums are in float32. Raises ValueError with all that is wrong.
    """
    _check(x, weight, bias, residual, dropout, seed, row_ids)
    if dropout and seed is None:
        seed = new_seed(x.device)
    if not dropout:
        seed, row_ids = None, None
    if residual is None and not dropout and total_dtype in (None, x.dtype):
        total_dtype = None
    elif total_dtype is None:
        total_dtype = x.dtype if residual is None else residual.dtype

    if hardware.triton_or_reference(implementation, x) == "reference":
        total = reference.dropout_add(x, residual, dropout, seed, row_ids, total_dtype or x.dtype)
        if subtract_mean:
            return reference.layer_norm(total, weight, bias, eps, weight_offset).to(x.dtype), total
        return reference.rms_norm(total, weight, eps, weight_offset).to(x.dtype), total
    call = (total_dtype, eps, weight_offset, subtract_mean, dropout, seed, row_ids)
    refuse_tangents(x, weight, bias, residual)
    y, total, _ = _norm(x, weight, bias, residual, *call)
    return y, x if total_dtype is None else total


def _check(x, weight, bias, residual, dropout, seed, row_ids) -> None:
    problems = []
    if not x.is_floating_point() or not x.ndim:
        problems.append(f"x {tuple(x.shape)} {x.dtype}: must be (..., width) of a floating type")
    elif not 1 <= x.shape[-1] <= WIDEST:
        problems.append(f"x {tuple(x.shape)}: its last dim must be 1 to {WIDEST}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.ndim not in (1, 2) or parameter.shape != x.shape[-parameter.ndim :]):
            allowed = " or ".join(str(tuple(x.shape[-n:])) for n in (1, 2))
            problems.append(f"{name} {tuple(parameter.shape)}: must be {allowed}, the last dims of x")
    if bias is not None and (weight is None or weight.shape != bias.shape):
        problems.append("bias: needs a weight of its shape")
    if residual is not None and residual.shape != x.shape:
        problems.append(f"residual {tuple(residual.shape)}: must have the shape of x, {tuple(x.shape)}")
    if not 0 <= dropout < 1:
        problems.append(f"dropout={dropout}: must be at least 0 and below 1")
    if row_ids is not None and (row_ids.shape != x.shape[:-1] or row_ids.is_floating_point()):
        problems.append(
            f"row_ids {tuple(row_ids.shape)} {row_ids.dtype}: must be {tuple(x.shape[:-1])}, one integer a row"
        )
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        problems.append(f"seed {tuple(seed.shape)} {seed.dtype}: must be one torch.int64")
    if problems:
        raise ValueError("; ".join(problems))


# custom ops -----------------------------------------------------------------------------------------------------------
# What a call has no use for is a tensor without elements: ops return as many tensors as their schema says.


def _op_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, total_dtype: torch.dtype | None,
    eps: float, weight_offset: float, subtract_mean: bool, dropout: float, seed: Tensor | None, row_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, total, statistics = triton_norm.forward_in_triton(
        x, residual, weight, bias, triton_norm.Dropout(dropout, seed, row_ids), eps, weight_offset, subtract_mean,
        total_dtype,
    )  # fmt: skip
    return y, x.new_empty(0) if total is None else total, statistics


_norm = triton_op("norm", _op_forward)


@_norm.register_fake
def _(x, weight, bias, residual, total_dtype, eps, weight_offset, subtract_mean, *_dropout):
    total = x.new_empty(0) if total_dtype is None else x.new_empty(x.shape, dtype=total_dtype)
    statistics = x.new_empty((*x.shape[:-1], 2 if subtract_mean else 1), dtype=torch.float32)
    return x.new_empty(x.shape), total, statistics


# arguments from the first dtype on are part of the key under which DTensor remembers placements
def _op_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, has_bias: bool, weight_offset: float, dropout: float, seed: Tensor | None,
    row_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dropped = triton_norm.Dropout(dropout, seed, row_ids)
    gradients = triton_norm.backward_in_triton(
        dy, dtotal, total, weight, has_bias, statistics, dropped, weight_offset, x_dtype, residual_dtype
    )
    dx, dresidual, dweight, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dresidual, dweight, dbias


_norm_backward = triton_op("norm_backward", _op_backward)


@_norm_backward.register_fake
def _(dy, dtotal, total, weight, statistics, x_dtype, residual_dtype, has_bias, *_others):
    def like_weight(wanted: bool) -> Tensor:
        return weight.new_empty(weight.shape, dtype=torch.float32) if wanted else dy.new_empty(0)

    dresidual = dy.new_empty(0) if residual_dtype is None else total.new_empty(total.shape, dtype=residual_dtype)
    dx = total.new_empty(total.shape, dtype=x_dtype)
    return dx, dresidual, like_weight(weight is not None), like_weight(has_bias)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, residual, total_dtype, _eps, ctx.weight_offset, _subtract_mean, ctx.dropout, seed, row_ids = inputs
    _, total, statistics = output
    ctx.has_total, ctx.x_dtype = total_dtype is not None, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*([statistics] if ctx.has_total else [total, statistics]))
    ctx.set_materialize_grads(False)
    # one gradient serves both x and residual where nothing sets them apart
    ctx.has_residual = residual is not None
    ctx.residual_dtype = None
    if residual is not None and (ctx.dropout or residual.dtype != x.dtype):
        ctx.residual_dtype = residual.dtype
    ctx.save_for_backward(total if ctx.has_total else x, weight, statistics, seed, row_ids)


def _autograd(ctx, dy: Tensor | None, dtotal: Tensor | None, _dstatistics: None):
    total, weight, statistics, seed, row_ids = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(total, dtype=ctx.x_dtype)
    dx, dresidual, dweight, dbias = _norm_backward(
        dy, dtotal if ctx.has_total else None, total, weight, statistics, ctx.x_dtype, ctx.residual_dtype,
        ctx.bias_dtype is not None, ctx.weight_offset, ctx.dropout, seed, row_ids,
    )  # fmt: skip
    if ctx.residual_dtype is None:
        dresidual = dx if ctx.has_residual else None
    dweight = None if weight is None else dweight.to(weight.dtype)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dx, dweight, dbias, dresidual, *(None for _ in range(7))


_norm.register_autograd(_autograd, setup_context=_setup_context)
