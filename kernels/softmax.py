"""Softmax over the last dim of scaled and masked scores: scaled_masked_softmax and its causal form.

For attention whose scores exist; `longctx.kernels.attention` never holds them. (Shoeybi et al. 2019, Megatron-LM)
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from longctx.kernels import addressing, hardware
from longctx.kernels.addressing import RowBlocks, padded
from longctx.kernels.forward_mode import refuse_tangents
from longctx.kernels.precision import accumulation_dtype
from longctx.kernels.triton_math import LOG2_E, finite, wide


def _blocks(columns: int) -> RowBlocks:
    """For rows of scores: 16 elements a thread."""
    columns = min(padded(columns), 16384)
    rows = max(1, 4096 // columns)
    return RowBlocks(rows, columns, max(4, rows * columns // 512))


def softmax_reference(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """softmax_reference(scale * x + mask) over the last dim of x (..., rows, columns); 0 where nothing takes part.

    mask: boolean, True where a column takes part, or floating. (see `longctx.kernels.softmax`)
    """
    score = x.to(accumulation_dtype(x.dtype)) * scale
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
    if causal:
        visible = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril(x.shape[-1] - x.shape[-2])
        score = score.masked_fill(~visible, -torch.inf)
    empty = (score == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(score.masked_fill(empty, 0), -1).masked_fill(empty, 0).to(x.dtype)


@triton.jit
def _load_scores(
    x, mask, row, column, n_rows, n_columns, x_row, mask_row, mask_column, scale,
    IS_BOOLEAN: tl.constexpr, KEPT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """(R, C) of scaled scores, -inf where a column does not take part."""
    visible = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    loaded = visible
    if CAUSAL:
        last = row[:, None] + n_columns - n_rows
        loaded &= column[None, :] // 8 * 8 <= last  # eight at a time, so that loads stay wide
        visible &= column[None, :] <= last
    score = tl.load(x + row[:, None] * x_row + column[None, :], mask=loaded, other=0.0).to(tl.float32) * scale
    if mask is not None:
        entry = tl.load(mask + row[:, None] * mask_row + column[None, :] * mask_column, mask=loaded, other=0)
        if IS_BOOLEAN:
            visible &= (entry != 0) == (KEPT != 0)
        else:
            score += entry.to(tl.float32)
    return tl.where(visible, score, float("-inf"))


@triton.jit
def softmax_forward_triton(
    x, mask, out, heads, n_rows, n_columns, x_batch, x_head, x_row, mask_batch, mask_head, mask_row, mask_column, scale,
    IS_BOOLEAN: tl.constexpr, KEPT: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(n_rows, ROWS)
    matrix = tl.program_id(0) // row_blocks  # all in one axis of the grid: the others end at 65535
    head, batch = wide(matrix % heads), wide(matrix // heads)
    row = wide(tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    x += batch * x_batch + head * x_head
    if mask is not None:
        mask += batch * mask_batch + head * mask_head
    out += wide(matrix) * n_rows * n_columns
    column = tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    if not IS_WIDE:
        score = _load_scores(
            x, mask, row, column, n_rows, n_columns, x_row, mask_row, mask_column, scale, IS_BOOLEAN, KEPT, CAUSAL
        )
        weight = tl.exp2((score - finite(tl.max(score, 1))[:, None]) * LOG2_E)
        total = tl.sum(weight, 1)
        weight = weight / tl.where(total == 0.0, 1.0, total)[:, None]
        offsets = row[:, None] * n_columns + column[None, :]
        tl.store(out + offsets, weight.to(out.dtype.element_ty), mask=inside)
    else:
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, n_columns, COLUMNS):
            score = _load_scores(
                x, mask, row, first + column, n_rows, n_columns, x_row, mask_row, mask_column, scale, IS_BOOLEAN, KEPT,
                CAUSAL,
            )  # fmt: skip
            new_peak = tl.maximum(peak, tl.max(score, 1))
            total *= tl.exp2((peak - finite(new_peak)) * LOG2_E)
            total += tl.sum(tl.exp2((score - finite(new_peak)[:, None]) * LOG2_E), 1)
            peak = new_peak
        total = tl.where(total == 0.0, 1.0, total)
        for first in range(0, n_columns, COLUMNS):
            score = _load_scores(
                x, mask, row, first + column, n_rows, n_columns, x_row, mask_row, mask_column, scale, IS_BOOLEAN, KEPT,
                CAUSAL,
            )  # fmt: skip
            weight = tl.exp2((score - finite(peak)[:, None]) * LOG2_E) / total[:, None]
            inside = (row < n_rows)[:, None] & (first + column < n_columns)[None, :]
            offsets = row[:, None] * n_columns + first + column[None, :]
            tl.store(out + offsets, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_gradient(dout, out, row, column, n_rows, n_columns, dout_row):
    """Weights and their gradients (R, C) in float32, and which exist."""
    inside = (row < n_rows) & (column < n_columns)
    weight = tl.load(out + row * n_columns + column, mask=inside, other=0.0).to(tl.float32)
    return weight, tl.load(dout + row * dout_row + column, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def softmax_backward_triton(
    dout, out, dx, n_rows, n_columns, dout_row, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_WIDE: tl.constexpr
):  # fmt: skip
    row = (wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if not IS_WIDE:
        weight, gradient, inside = _load_gradient(dout, out, row, column, n_rows, n_columns, dout_row)
        result = weight * (gradient - tl.sum(weight * gradient, 1)[:, None]) * scale
        tl.store(dx + row * n_columns + column, result.to(dx.dtype.element_ty), mask=inside)
    else:
        mean = tl.zeros((ROWS, 1), tl.float32)
        for first in range(0, n_columns, COLUMNS):
            weight, gradient, _ = _load_gradient(dout, out, row, first + column, n_rows, n_columns, dout_row)
            mean += tl.sum(weight * gradient, 1)[:, None]
        for first in range(0, n_columns, COLUMNS):
            weight, gradient, inside = _load_gradient(dout, out, row, first + column, n_rows, n_columns, dout_row)
            result = weight * (gradient - mean) * scale
            tl.store(dx + row * n_columns + first + column, result.to(dx.dtype.element_ty), mask=inside)


# custom ops -----------------------------------------------------------------------------------------------------------


def _forward(x, mask, causal, mask_keeps, scale):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    x4 = addressing.readable(x[(None,) * (4 - x.ndim)])
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)].expand(x4.shape)
    blocks = _blocks(x.shape[-1])
    with hardware.on_device(x):
        softmax_forward_triton[(triton.cdiv(x4.shape[2], blocks.rows) * x4.shape[1] * x4.shape[0],)](
            x4, mask, out, *x4.shape[1:], *x4.stride()[:3], *addressing.strides(mask, 4), scale,
            IS_BOOLEAN=mask is not None and mask.dtype == torch.bool, KEPT=int(mask_keeps), CAUSAL=bool(causal),
            ROWS=blocks.rows, COLUMNS=blocks.columns, IS_WIDE=x.shape[-1] > blocks.columns, num_warps=blocks.warps,
        )  # fmt: skip
    return out


def _backward(dout, out, scale):
    dx = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if not out.numel():
        return dx
    dout = addressing.rows(dout)
    blocks = _blocks(out.shape[-1])
    with hardware.on_device(out):
        softmax_backward_triton[(triton.cdiv(len(dout), blocks.rows),)](
            dout, out.contiguous(), dx, *dout.shape, dout.stride(0), scale, ROWS=blocks.rows, COLUMNS=blocks.columns,
            IS_WIDE=out.shape[-1] > blocks.columns, num_warps=blocks.warps,
        )  # fmt: skip
    return dx


# arguments from the first int on are part of the key under which DTensor remembers a call's placements
_softmax = custom_op(
    "longctx::softmax",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, int causal, bool mask_keeps, float scale) -> Tensor",
)
_softmax_backward = custom_op(
    "longctx::softmax_backward", _backward, mutates_args=(), schema="(Tensor dout, Tensor out, float scale) -> Tensor"
)


@_softmax.register_fake
def _(x, *_others):
    return x.new_empty(x.shape)


@_softmax_backward.register_fake
def _(dout, out, scale):
    return out.new_empty(out.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.scale = inputs[4]
    ctx.save_for_backward(output)


def _autograd(ctx, dout: Tensor):
    (out,) = ctx.saved_tensors
    return _softmax_backward(dout, out, ctx.scale), None, None, None, None


_softmax.register_autograd(_autograd, setup_context=_setup_context)


# public ---------------------------------------------------------------------------------------------------------------


def softmax(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """softmax(scale * x + mask) over the last dim, like x; exponentials and sums in float32.

    x (..., rows, columns), up to four dims, in float16, bfloat16, float32 or float64. `mask` broadcasts to x and has no
    gradient: boolean, True where a column takes part (as in torch's attention), or floating, which is added. `causal`:
    row i sees columns up to i + columns - rows. A row of which nothing takes part is 0. Raises ValueError for what does
    not fit.
    """
    return masked_softmax(x, mask, scale, causal, True, implementation)


def masked_softmax(x, mask, scale, causal, mask_keeps, implementation) -> Tensor:
    problems = []
    if not x.is_floating_point() or not 2 <= x.ndim <= 4:
        problems.append(f"x {tuple(x.shape)} {x.dtype}: must be (..., rows, columns) of 2 to 4 dims, floating")
    if isinstance(scale, Tensor):
        problems.append("scale: must be a number; multiply a learned one into x")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            problems.append(f"mask {mask.dtype}: must be boolean, or floating to be added")
        if mask.requires_grad:
            problems.append("mask: gets no gradient; give mask.detach()")
        sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
        if mask.ndim > x.ndim or any(m not in (1, n) for m, n in sizes):
            problems.append(f"mask {tuple(mask.shape)}: must broadcast to x, {tuple(x.shape)}")
    if problems:
        raise ValueError("; ".join(problems))
    if hardware.triton_or_reference(implementation, x) == "triton":
        refuse_tangents(x)
        return _softmax(x, mask, int(causal), mask_keeps, scale)
    if mask is not None and mask.dtype == torch.bool and not mask_keeps:
        mask = ~mask
    return softmax_reference(x, mask, scale, causal)
