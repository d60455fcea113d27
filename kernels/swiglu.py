"""SwiGLU: silu(gate) * up, with silu(x) = x / (1 + exp(-x)). (Shazeer 2020, GLU Variants Improve Transformer)

The backward pass makes silu again from the gate instead of keeping it. With the matrix product that follows as one op,
`swiglu_linear`, what goes into that product is made again too, in the memory of its gradient, by the kernel that makes
the gradients of gate and up: those two alone are kept.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels import addressing, hardware, precision
from longctx.kernels.addressing import RowBlocks, matrix, padded
from longctx.kernels.dense import check_weight, sum_of_rows
from longctx.kernels.forward_mode import refuse_tangents
from longctx.kernels.triton_math import LOG2_E, wide
from longctx.kernels.triton_op import launchable, triton_op


def _blocks(columns: int) -> RowBlocks:
    """For matrices whose elements are independent: 16 elements a thread."""
    columns = min(padded(columns), 4096)
    return RowBlocks(4096 // columns, columns, 8)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. (Shazeer 2020, GLU Variants Improve Transformer)"""
    compute = precision.accumulation_dtype(gate.dtype)
    return (F.silu(gate.to(compute)) * up.to(compute)).to(gate.dtype)


@triton.jit
def _tile(n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (R, 1) and columns (1, C) of a program's tile, and which exist."""
    row = (wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < n_rows) & (column < n_columns)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2_E))


@triton.jit
def swiglu_forward_triton(
    gate, up, out, n_rows, n_columns, gate_row, up_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column, inside = _tile(n_rows, n_columns, ROWS, COLUMNS)
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n_columns + column, (g * _sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_triton(
    dout, gate, up, dgate, dup, out, n_rows, n_columns, dout_row, gate_row, up_row, gradient_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out`, None or contiguous, becomes the forward pass's result; it may be the memory of dout."""
    row, column, inside = _tile(n_rows, n_columns, ROWS, COLUMNS)
    d = tl.load(dout + row * dout_row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(g)
    silu = g * sigmoid
    of_gate = d * u * (sigmoid + silu * (1 - sigmoid))
    offsets = row * gradient_row + column
    tl.store(dgate + offsets, of_gate.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + offsets, (d * silu).to(dup.dtype.element_ty), mask=inside)
    if out is not None:
        tl.store(out + row * n_columns + column, (silu * u).to(out.dtype.element_ty), mask=inside)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = addressing.rows(gate), addressing.rows(up)
    if out.numel():
        blocks = _blocks(gate.shape[1])
        grid = triton.cdiv(gate.shape[0], blocks.rows), triton.cdiv(gate.shape[1], blocks.columns)
        with hardware.on_device(gate):
            launchable(swiglu_forward_triton)[grid](
                gate, up, out, *gate.shape, gate.stride(0), up.stride(0),
                ROWS=blocks.rows, COLUMNS=blocks.columns, num_warps=blocks.warps,
            )  # fmt: skip
    return out


def _backward_into(
    dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, out: Tensor | None = None
) -> None:
    """dgate and dup (rows, columns) have one stride; `out`: see the kernel."""
    dout, gate, up = addressing.rows(dout), addressing.rows(gate), addressing.rows(up)
    if dout.numel():
        blocks = _blocks(gate.shape[1])
        grid = triton.cdiv(gate.shape[0], blocks.rows), triton.cdiv(gate.shape[1], blocks.columns)
        with hardware.on_device(gate):
            launchable(swiglu_backward_triton)[grid](
                dout, gate, up, dgate, dup, out, *gate.shape, dout.stride(0), gate.stride(0), up.stride(0),
                dgate.stride(0), ROWS=blocks.rows, COLUMNS=blocks.columns, num_warps=blocks.warps,
            )  # fmt: skip


# custom ops -----------------------------------------------------------------------------------------------------------


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def _backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients(dout, gate, up)


def _gradients(dout: Tensor, gate: Tensor, up: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _backward_into(dout, gate, up, *(x.view(-1, gate.shape[-1]) for x in (dgate, dup)), out)
    return dgate, dup


def _packed_forward(x: Tensor) -> Tensor:
    return _forward(*_halves(x))


def _packed_backward(dout: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _backward_into(dout, *_halves(x), *_halves(dx.view(-1, x.shape[-1])))
    return dx


def _linear_forward(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(_forward(gate, up), weight, bias)


def _linear_backward(dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = matrix(dy)
    hidden = torch.mm(rows, weight)  # its gradient, and then itself
    dgate, dup = _gradients(hidden, gate, up, hidden)
    return dgate, dup, torch.mm(rows.T, hidden)


_swiglu = triton_op("swiglu", _forward)
_swiglu_backward = triton_op("swiglu_backward", _backward)
_swiglu_packed = triton_op("swiglu_packed", _packed_forward)
_swiglu_packed_backward = triton_op("swiglu_packed_backward", _packed_backward)
_swiglu_linear = triton_op("swiglu_linear", _linear_forward)
_swiglu_linear_backward = triton_op("swiglu_linear_backward", _linear_backward)


@_swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@_swiglu_backward.register_fake
def _(dout, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@_swiglu_packed.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_swiglu_packed_backward.register_fake
def _(dout, x):
    return x.new_empty(x.shape)


@_swiglu_linear.register_fake
def _(gate, up, weight, bias):
    return gate.new_empty((*gate.shape[:-1], weight.shape[0]))


@_swiglu_linear_backward.register_fake
def _(dy, gate, up, weight):
    return gate.new_empty(gate.shape), up.new_empty(up.shape), weight.new_empty(weight.shape)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_swiglu.register_autograd(lambda ctx, dout: _swiglu_backward(dout, *ctx.saved_tensors), setup_context=_save_inputs)
_swiglu_packed.register_autograd(
    lambda ctx, dout: _swiglu_packed_backward(dout, *ctx.saved_tensors), setup_context=_save_inputs
)


def _linear_autograd(ctx, dy: Tensor):
    gate, up, weight, bias = ctx.saved_tensors
    return *_swiglu_linear_backward(dy, gate, up, weight), sum_of_rows(matrix(dy), bias)


_swiglu_linear.register_autograd(_linear_autograd, setup_context=_save_inputs)


# public ---------------------------------------------------------------------------------------------------------------


def _check_alike(gate: Tensor, up: Tensor) -> None:
    if up.shape != gate.shape or up.dtype != gate.dtype or not gate.ndim:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}: must be alike")


def swiglu(gate: Tensor, up: Tensor | None = None, *, implementation: str = "auto") -> Tensor:
    """silu(gate) * up, like gate; computed in float32.

    gate and up (..., width), of any strides, in float16, bfloat16, float32 or float64; without `up`, `gate` is both,
    packed: (..., 2 * width), the gate first. Raises ValueError for shapes that do not fit.
    """
    if up is None and (not gate.ndim or gate.shape[-1] % 2):
        raise ValueError(f"gate {tuple(gate.shape)}: packed with up, its last dim must be even")
    if up is not None:
        _check_alike(gate, up)
    if hardware.triton_or_reference(implementation, gate) == "reference":
        return swiglu_reference(*(_halves(gate) if up is None else (gate, up)))
    refuse_tangents(gate, up)
    return _swiglu_packed(gate) if up is None else _swiglu(gate, up)


def swiglu_linear(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str = "auto"
) -> Tensor:
    """swiglu(gate, up) W^T + bias, (..., out_features), with the gradients of the two one after the other, also where
    the weight needs none.

    gate and up (..., width) as `swiglu` takes them, weight (out_features, width) and bias (out_features,) of their
    dtype, not DTensors. Kept for the backward pass: gate, up, weight and bias. Raises ValueError for what does not fit.
    """
    gate, up, weight, bias = precision.autocast(gate, up, weight, bias)  # pyright: ignore[reportAssignmentType]
    _check_alike(gate, up)
    if problems := check_weight("weight", weight, bias, gate.shape[-1], gate):
        raise ValueError("; ".join(problems))
    if hardware.triton_or_reference(implementation, gate) == "reference":
        return F.linear(swiglu_reference(gate, up), weight, bias)
    refuse_tangents(gate, up, weight, bias)
    return _swiglu_linear(gate, up, weight, bias)
