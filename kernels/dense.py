"""Linear layers whose additions ride in the matrix products: FusedDense, and FusedMLP with GELU between two of them.

y = x W^T + b + residual. With `return_residual` x itself comes back too: whatever gradient it gets is the starting
value of the product that makes x's. The MLP is W2 gelu(W1 x + b1) + b2; it keeps the GELU's input, and one kernel makes
from it again the GELU, its derivative's product, and b1's gradient; or, with `recompute`, it keeps x alone and
multiplies again. GELU is the tanh form. (Dao, flash-attention's fused_dense; Hendrycks and Gimpel 2016)
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import custom_op

from longctx.kernels import addressing, hardware, precision
from longctx.kernels.addressing import RowBlocks, matrix
from longctx.kernels.hardware import multiprocessors
from longctx.kernels.precision import accumulation_dtype
from longctx.kernels.triton_math import tanh, wide


def _gelu_blocks(x: Tensor) -> tuple[RowBlocks, int]:
    """For x (rows, columns), and how many programs share the rows of a tile's columns."""
    blocks = RowBlocks(2, 1024, 4)
    across = -(-x.shape[1] // blocks.columns)
    tiles_of_rows = max(1, -(-x.shape[0] // blocks.rows))
    return blocks, min(tiles_of_rows, max(1, 32 * multiprocessors(x.device) // across))


def gelu_backward_reference(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of tanh's GELU of x (..., width): the gradient of x, the GELU, the gradient's sum over rows in fp32 or fp64."""
    dx = torch.ops.aten.gelu_backward(dout, x, approximate="tanh")
    return dx, F.gelu(x, approximate="tanh"), dx.flatten(0, -2).sum(0, dtype=accumulation_dtype(x.dtype))


@triton.jit
def gelu_backward_triton(
    dout, x, dx, out, shares, n_rows, n_columns, dout_row, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program walks tiles of R rows of its C columns; its sum of dx over rows is one of the bias's shares."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(1) * ROWS, n_rows, tl.num_programs(1) * ROWS):
        row = wide(first) + tl.arange(0, ROWS)[:, None]
        inside = (row < n_rows) & (column < n_columns)[None, :]
        gradient = tl.load(dout + row * dout_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        squashed = tanh(0.7978845608028654 * (value + 0.044715 * value * value * value))
        slope = 0.7978845608028654 * (1 + 0.134145 * value * value)
        derivative = 0.5 * (1 + squashed) + 0.5 * value * (1 - squashed * squashed) * slope
        gradient = (gradient * derivative).to(dx.dtype.element_ty)
        offsets = row * n_columns + column[None, :]
        tl.store(dx + offsets, gradient, mask=inside)
        tl.store(out + offsets, (0.5 * value * (1 + squashed)).to(out.dtype.element_ty), mask=inside)
        total += gradient.to(tl.float32)
    tl.store(shares + wide(tl.program_id(1)) * n_columns + column, tl.sum(total, 0), mask=column < n_columns)


def _gelu_backward(dout: Tensor, x: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x in `dx`, which may be dout; the GELU again; the gradient's sum over rows."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dout_rows = (addressing.rows(t) for t in (x, dout))
    blocks, programs = _gelu_blocks(rows)
    shares = torch.zeros((programs, x.shape[-1]), dtype=torch.float32, device=x.device)
    if x.numel():
        with hardware.on_device(x):
            gelu_backward_triton[(triton.cdiv(x.shape[-1], blocks.columns), programs)](
                dout_rows, rows, dx, out, shares, *rows.shape, dout_rows.stride(0), rows.stride(0),
                ROWS=blocks.rows, COLUMNS=blocks.columns, num_warps=blocks.warps,
            )  # fmt: skip
    return dx, out, shares.sum(0)


def _gelu_backward_elsewhere(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gelu_backward(dout, x)


# dout and the GELU's input -> the gradient of that, the GELU again, and the gradient's sum over rows in float32
gelu_backward = custom_op(
    "longctx::gelu_backward",
    _gelu_backward_elsewhere,
    mutates_args=(),
    schema="(Tensor dout, Tensor x) -> (Tensor, Tensor, Tensor)",
)


def _gelu_backward_in_place(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _gelu_backward(dout, x, dout)[1:]


# the same, the gradient written over dout, which is contiguous
gelu_backward_ = custom_op(
    "longctx::gelu_backward_",
    _gelu_backward_in_place,
    mutates_args=("dout",),
    schema="(Tensor(a!) dout, Tensor x) -> (Tensor, Tensor)",
)


@gelu_backward_.register_fake
def _(dout, x):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:], dtype=torch.float32)


@gelu_backward.register_fake
def _(dout, x):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[-1:], dtype=torch.float32)


# the layers -----------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x (rows, in_features) W^T + bias + residual (rows, out_features)."""
    if residual is None:
        return F.linear(x, weight, bias)
    start = residual if bias is None else residual + bias
    return torch.addmm(start, x, weight.T)


def _input_gradient(dy: Tensor, weight: Tensor, dresidual: Tensor | None, shape: torch.Size) -> Tensor:
    """dy W, added to the gradient that x has got elsewhere."""
    product = torch.mm(dy, weight) if dresidual is None else torch.addmm(matrix(dresidual), dy, weight)
    return product.view(shape)


def sum_of_rows(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    """The gradient of a layer's bias, if it has one, of dy (rows, out_features); summed in float32."""
    return None if bias is None else dy.sum(0, dtype=precision.accumulation_dtype(dy.dtype)).to(bias.dtype)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, return_residual):
        y = _linear(matrix(x), weight, bias, None if residual is None else matrix(residual))
        ctx.save_for_backward(x, weight, bias)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        y = y.view(*x.shape[:-1], len(weight))
        return (y, x.view_as(x)) if return_residual else y

    @staticmethod
    def backward(ctx, *gradients):
        dy, dresidual = (*gradients, None)[:2]
        x, weight, bias = ctx.saved_tensors
        if dy is None:
            return dresidual, None, None, None, None
        rows = matrix(dy)
        dx = _input_gradient(rows, weight, dresidual, x.shape) if ctx.needs_input_grad[0] else None
        dweight = torch.mm(rows.T, matrix(x)) if ctx.needs_input_grad[1] else None
        return dx, dweight, sum_of_rows(rows, bias), dy if ctx.has_residual else None, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, return_residual, recompute, implementation):
        rows = matrix(x)
        before = _linear(rows, weight1, bias1, None)
        y = _linear(F.gelu(before, approximate="tanh"), weight2, bias2, None)
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, None if recompute else before)
        ctx.implementation = implementation
        ctx.set_materialize_grads(False)
        y = y.view(*x.shape[:-1], len(weight2))
        return (y, x.view_as(x)) if return_residual else y

    @staticmethod
    def backward(ctx, *gradients):
        dy, dresidual = (*gradients, None)[:2]
        x, weight1, bias1, weight2, bias2, before = ctx.saved_tensors
        if dy is None:
            return dresidual, *(None for _ in range(7))
        rows, dy = matrix(x), matrix(dy)
        if before is None or torch.is_grad_enabled():  # it has a graph of its own, for second derivatives
            before = _linear(rows, weight1, bias1, None)
        inner = torch.mm(dy, weight2)
        has_graph = torch.is_grad_enabled() and type(inner) is Tensor  # which the op in place would not be part of
        if ctx.implementation == "reference" or has_graph:
            inner, after, dbias1 = gelu_backward_reference(inner, before)
        elif type(inner) is Tensor:
            after, dbias1 = gelu_backward_(inner, before)
        else:  # sharded, and with it what a rank holds of it
            inner, after, dbias1 = gelu_backward(inner, before)
        dweight2 = torch.mm(dy.T, after)
        del after
        dx = _input_gradient(inner, weight1, dresidual, x.shape)
        dbias1 = None if bias1 is None else dbias1.to(bias1.dtype)
        return dx, torch.mm(inner.T, rows), dbias1, dweight2, sum_of_rows(dy, bias2), None, None, None


def check_weight(name: str, weight: Tensor, bias: Tensor | None, in_features: int, like: Tensor) -> list[str]:
    """What is wrong with the weight and bias of a linear layer over `like` (..., in_features)."""
    problems = []
    if weight.ndim != 2 or weight.shape[1] != in_features or weight.dtype != like.dtype:
        problems.append(
            f"{name} {tuple(weight.shape)} {weight.dtype}: must be (out_features, {in_features}) {like.dtype}"
        )
    elif bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != like.dtype):
        problems.append(f"bias of {name} {tuple(bias.shape)} {bias.dtype}: must be ({len(weight)},) {like.dtype}")
    return problems


def _apart(tensor: Tensor | None, other: Tensor | None) -> Tensor | None:
    """`tensor`, or a view of it where it is `other`: torch.compile takes no tensor twice."""
    return tensor.view_as(tensor) if tensor is not None and tensor is other else tensor


# public ---------------------------------------------------------------------------------------------------------------


def fused_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, return_residual: bool = False
) -> Any:
    """x W^T + bias + residual, (..., out_features); with `return_residual` also x, for a skip connection around it.

    x (..., in_features), weight (out_features, in_features), bias (out_features,), residual (..., out_features), all of
    one dtype; the bias's gradient is summed in float32. Raises ValueError for what does not fit.
    """
    given = x
    x, weight, bias, residual = precision.autocast(x, weight, bias, residual)  # pyright: ignore[reportAssignmentType]
    problems = check_weight("weight", weight, bias, x.shape[-1], x)
    shape = (*x.shape[:-1], len(weight))
    if not problems and residual is not None and (residual.shape, residual.dtype) != (shape, x.dtype):
        problems.append(f"residual {tuple(residual.shape)} {residual.dtype}: must be {shape} {x.dtype}, as x")
    if problems:
        raise ValueError("; ".join(problems))
    is_cast = x is not given
    found = _Dense.apply(x, weight, bias, _apart(residual, x), return_residual and not is_cast)
    return (found, given) if return_residual and is_cast else found  # not as autocast has rounded it


def fused_mlp(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    return_residual: bool = False,
    recompute: bool = False,
    implementation: str = "auto",
) -> Any:
    """gelu(x W1^T + bias1) W2^T + bias2, (..., out_features); with `return_residual` also x.

    x (..., in_features), weight1 (hidden_features, in_features), weight2 (out_features, hidden_features), all of one
    dtype. Kept for the backward pass: x and the GELU's input, or with `recompute` x alone, for one more matrix product.
    Raises ValueError for what does not fit.
    """
    given = x
    x, weight1, weight2, bias1, bias2 = precision.autocast(  # pyright: ignore[reportAssignmentType]
        x, weight1, weight2, bias1, bias2
    )
    problems = check_weight("weight1", weight1, bias1, x.shape[-1], x)
    problems += check_weight("weight2", weight2, bias2, len(weight1), x)
    if problems:
        raise ValueError("; ".join(problems))
    is_cast = x is not given
    found = _MLP.apply(
        x, weight1, bias1, _apart(weight2, weight1), _apart(bias2, bias1), return_residual and not is_cast, recompute,
        hardware.triton_or_reference(implementation, x),
    )  # fmt: skip
    return (found, given) if return_residual and is_cast else found  # not as autocast has rounded it


class FusedDense(nn.Linear):
    """`fused_dense` as a layer: torch's Linear with a residual that comes in, or one that goes out."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, return_residual: bool = False, device=None,
        dtype=None
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  x comes back too on request
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return fused_dense(input, self.weight, self.bias, residual, self.return_residual)


class FusedMLP(nn.Module):
    """`fused_mlp` as a layer; hidden_features is by default 4 * in_features."""

    def __init__(
        self, in_features: int, hidden_features: int | None = None, out_features: int | None = None, bias1: bool = True,
        bias2: bool = True, return_residual: bool = False, recompute: bool = False, implementation: str = "auto",
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden_features = hidden_features or 4 * in_features
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, **factory)
        self.options = {
            "return_residual": return_residual, "recompute": recompute, "implementation": implementation,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        fc1, fc2 = self.fc1, self.fc2
        return fused_mlp(x, fc1.weight, fc2.weight, fc1.bias, fc2.bias, **self.options)
