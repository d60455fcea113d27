"""Normalisation over the last dim in Triton: dropout, residual and norm in one pass, forward and backward.

A program has a tile of R rows and C columns. Rows wider than a tile are read again, by the same program, for what needs
the whole row's sums. In the backward pass a program walks tiles of rows and keeps its share of the weight's gradient in
float32; the shares are summed once. (Ba et al. 2016; Zhang and Sennrich 2019; the walk as in Dao's layer_norm)
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels import addressing, hardware
from longctx.kernels.addressing import RowBlocks, padded
from longctx.kernels.dropout import dropout_threshold
from longctx.kernels.triton_math import kept_of_rows, single, wide
from longctx.kernels.triton_op import launchable


def _forward_blocks(x: Tensor) -> RowBlocks:
    """For rows x (..., width): 32 elements a thread."""
    columns = min(padded(x.shape[-1]), 16384)
    rows = max(1, min(16, 16384 // columns))
    return RowBlocks(rows, columns, max(4, rows * columns // 2048))


def _backward_blocks(x: Tensor, groups: int) -> tuple[RowBlocks, int]:
    """For rows x (..., width) whose weights are in `groups`: blocks, and how many programs share the rows.

    Gradient, input, output and the weight's sum are in registers together; rows are copied ahead while one is computed.
    """
    columns = min(padded(x.shape[-1]), 8192)
    rows = max(1, 4096 // columns)
    stage = 3 * rows * columns * x.element_size()  # gradients of output and residual, and the input
    stages = 3 if 3 * stage <= hardware.shared_memory(hardware.architecture(x.device)) else 1
    blocks = RowBlocks(rows, columns, max(8, rows * columns // 1024), stages)
    resident = hardware.multiprocessors(x.device) * (2 if rows * columns <= 4096 else 1)
    return blocks, groups * max(1, resident // groups)


@triton.jit
def _load(pointer, row, stride, column, inside):
    """(R, C) of a matrix of rows, in float32; 0 outside."""
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row_ids(row_ids, row, is_row):
    """The numbers by which dropout knows the rows, int32."""
    if row_ids is not None:
        row = tl.load(row_ids + row, mask=is_row, other=0)
    return row.to(tl.int32)


@triton.jit
def _scale_of(weight, weight_offset, group, column, WIDTH: tl.constexpr):
    """(R or 1, C): what normalised values are multiplied by."""
    pointers = weight + group[:, None] * WIDTH + column[None, :]
    return tl.load(pointers, mask=column[None, :] < WIDTH, other=0.0).to(tl.float32) + weight_offset


@triton.jit
def _summed(
    x, residual, total, seed, threshold, keep_scale, row, row_id, first, inside, x_row, residual_row,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(R, C) of dropout(x) + residual from column `first` on, rounded as it is stored in `total`."""
    column = first + tl.arange(0, COLUMNS)
    value = _load(x, row, x_row, column, inside)
    if seed is not None:
        value = tl.where(kept_of_rows(seed, threshold, row_id, first, ROWS, COLUMNS), value * keep_scale, 0.0)
    if residual is not None:
        value += _load(residual, row, residual_row, column, inside)
    if total is not None:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row[:, None] * WIDTH + column[None, :], rounded, mask=inside)
        value = tl.where(inside, rounded.to(tl.float32), 0.0)
    return value


@triton.jit
def _moments(value, inside, count, SUBTRACT_MEAN: tl.constexpr):
    """Mean (0 without one) and the sum of squared differences to it, each (R,)."""
    mean = tl.sum(value, 1) / count
    if SUBTRACT_MEAN:
        centred = tl.where(inside, value - mean[:, None], 0.0)
    else:
        mean = tl.zeros_like(mean)
        centred = value
    return mean, tl.sum(centred * centred, 1)


@triton.jit
def _store_normalised(
    value, mean, inverse, y, weight, bias, weight_offset, row, group, column, inside,
    WIDTH: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
):  # fmt: skip
    if SUBTRACT_MEAN:
        value = value - mean[:, None]
    value = value * inverse[:, None]
    if weight is not None:
        value = value * _scale_of(weight, weight_offset, group, column, WIDTH)
    if bias is not None:
        value += _scale_of(bias, 0.0, group, column, WIDTH)
    tl.store(y + row[:, None] * WIDTH + column[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward_triton(
    x, residual, weight, bias, seed, row_ids, y, total, statistics,
    n_rows, x_row, residual_row, eps, weight_offset, threshold, keep_scale,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    eps, weight_offset, keep_scale = single(eps), single(weight_offset), single(keep_scale)
    row = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_rows
    if GROUPS == 1:
        group = tl.zeros((1,), tl.int64)
    else:
        group = row % GROUPS
    seed_value = seed
    row_id = row
    if seed is not None:
        seed_value = tl.load(seed)
        row_id = _row_ids(row_ids, row, is_row)
    column = tl.arange(0, COLUMNS)

    if WIDTH <= COLUMNS:
        inside = is_row[:, None] & (column < WIDTH)[None, :]
        value = _summed(
            x, residual, total, seed_value, threshold, keep_scale, row, row_id, 0, inside, x_row, residual_row,
            WIDTH, ROWS, COLUMNS,
        )  # fmt: skip
        mean, squares = _moments(value, inside, WIDTH, SUBTRACT_MEAN)
        inverse = 1 / tl.sqrt(squares / WIDTH + eps)
        _store_normalised(
            value, mean, inverse, y, weight, bias, weight_offset, row, group, column, inside, WIDTH, SUBTRACT_MEAN
        )
    else:
        mean = tl.zeros((ROWS,), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        seen = tl.zeros((), tl.float32)
        for first in range(0, WIDTH, COLUMNS):
            inside = is_row[:, None] & (first + column < WIDTH)[None, :]
            value = _summed(
                x, residual, total, seed_value, threshold, keep_scale, row, row_id, first, inside, x_row, residual_row,
                WIDTH, ROWS, COLUMNS,
            )  # fmt: skip
            count = tl.minimum(WIDTH - seen, COLUMNS)
            tile_mean, tile_squares = _moments(value, inside, count, SUBTRACT_MEAN)
            # two sets' moments to those of both (Chan et al. 1979)
            apart = tile_mean - mean
            squares += tile_squares + apart * apart * (seen * count / (seen + count))
            mean += apart * (count / (seen + count))
            seen += count
        inverse = 1 / tl.sqrt(squares / WIDTH + eps)
        for first in range(0, WIDTH, COLUMNS):
            inside = is_row[:, None] & (first + column < WIDTH)[None, :]
            value = _summed(
                x, residual, total, seed_value, threshold, keep_scale, row, row_id, first, inside, x_row, residual_row,
                WIDTH, ROWS, COLUMNS,
            )  # fmt: skip
            _store_normalised(
                value, mean, inverse, y, weight, bias, weight_offset, row, group, first + column, inside, WIDTH,
                SUBTRACT_MEAN,
            )  # fmt: skip

    if SUBTRACT_MEAN:
        tl.store(statistics + row * 2 + 1, mean, mask=is_row)
        tl.store(statistics + row * 2, inverse, mask=is_row)
    else:
        tl.store(statistics + row, inverse, mask=is_row)


@triton.jit
def _normalised(
    dy, total, weight, weight_offset, mean, inverse, row, group, column, inside, dy_row, total_row,
    WIDTH: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
):  # fmt: skip
    """(R, C) each: gradient of y, normalised values, gradient of these."""
    gradient = _load(dy, row, dy_row, column, inside)
    value = _load(total, row, total_row, column, inside)
    if SUBTRACT_MEAN:
        value = tl.where(inside, value - mean[:, None], 0.0)
    value = value * inverse[:, None]
    dvalue = gradient
    if weight is not None:
        dvalue = gradient * _scale_of(weight, weight_offset, group, column, WIDTH)
    return gradient, value, dvalue


@triton.jit
def _store_gradients(
    value, dvalue, slope, shift, inverse, dtotal, dx, dresidual, seed, threshold, keep_scale, row, row_id, first,
    inside, dtotal_row, WIDTH: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = first + tl.arange(0, COLUMNS)
    gradient = dvalue - value * slope[:, None]
    if SUBTRACT_MEAN:
        gradient -= shift[:, None]
    gradient = gradient * inverse[:, None]
    if dtotal is not None:
        gradient += _load(dtotal, row, dtotal_row, column, inside)
    offsets = row[:, None] * WIDTH + column[None, :]
    if dresidual is not None:
        tl.store(dresidual + offsets, gradient.to(dresidual.dtype.element_ty), mask=inside)
    if seed is not None:
        gradient = tl.where(kept_of_rows(seed, threshold, row_id, first, ROWS, COLUMNS), gradient * keep_scale, 0.0)
    tl.store(dx + offsets, gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_triton(
    dy, dtotal, total, weight, statistics, seed, row_ids, dx, dresidual, dweight, dbias,
    n_rows, dy_row, dtotal_row, total_row, weight_offset, threshold, keep_scale,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    weight_offset, keep_scale = single(weight_offset), single(keep_scale)
    share = wide(tl.program_id(0))
    group = share % GROUPS + tl.zeros((1,), tl.int64)
    column = tl.arange(0, COLUMNS)
    seed_value = seed
    if seed is not None:
        seed_value = tl.load(seed)
    # of one tile's elements; rows are added up at the end
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows_of_group = n_rows // GROUPS
    tiles, step = tl.cdiv(rows_of_group, ROWS), tl.num_programs(0) // GROUPS
    for tile in tl.range((share // GROUPS).to(tl.int32), tiles, step, num_stages=STAGES):
        row_of_group = wide(tile) * ROWS + tl.arange(0, ROWS)
        is_row = row_of_group < rows_of_group
        row = row_of_group * GROUPS + share % GROUPS
        row_id = row
        if seed is not None:
            row_id = _row_ids(row_ids, row, is_row)
        mean = None
        if SUBTRACT_MEAN:
            inverse = tl.load(statistics + row * 2, mask=is_row, other=0.0)
            mean = tl.load(statistics + row * 2 + 1, mask=is_row, other=0.0)
        else:
            inverse = tl.load(statistics + row, mask=is_row, other=0.0)

        if WIDTH <= COLUMNS:
            inside = is_row[:, None] & (column < WIDTH)[None, :]
            gradient, value, dvalue = _normalised(
                dy, total, weight, weight_offset, mean, inverse, row, group, column, inside, dy_row, total_row, WIDTH,
                SUBTRACT_MEAN,
            )  # fmt: skip
            slope = tl.sum(value * dvalue, 1) / WIDTH
            shift = tl.sum(dvalue, 1) / WIDTH
            _store_gradients(
                value, dvalue, slope, shift, inverse, dtotal, dx, dresidual, seed_value, threshold, keep_scale, row,
                row_id, 0, inside, dtotal_row, WIDTH, SUBTRACT_MEAN, ROWS, COLUMNS,
            )  # fmt: skip
            weight_sum += gradient * value
            bias_sum += gradient
        else:
            slope = tl.zeros((ROWS,), tl.float32)
            shift = tl.zeros((ROWS,), tl.float32)
            for first in range(0, WIDTH, COLUMNS):
                inside = is_row[:, None] & (first + column < WIDTH)[None, :]
                gradient, value, dvalue = _normalised(
                    dy, total, weight, weight_offset, mean, inverse, row, group, first + column, inside, dy_row,
                    total_row, WIDTH, SUBTRACT_MEAN,
                )  # fmt: skip
                slope += tl.sum(value * dvalue, 1) / WIDTH
                shift += tl.sum(dvalue, 1) / WIDTH
            for first in range(0, WIDTH, COLUMNS):
                inside = is_row[:, None] & (first + column < WIDTH)[None, :]
                gradient, value, dvalue = _normalised(
                    dy, total, weight, weight_offset, mean, inverse, row, group, first + column, inside, dy_row,
                    total_row, WIDTH, SUBTRACT_MEAN,
                )  # fmt: skip
                _store_gradients(
                    value, dvalue, slope, shift, inverse, dtotal, dx, dresidual, seed_value, threshold, keep_scale, row,
                    row_id, first, inside, dtotal_row, WIDTH, SUBTRACT_MEAN, ROWS, COLUMNS,
                )  # fmt: skip
                _add(dweight, gradient * value, share, first + column, WIDTH)
                _add(dbias, gradient, share, first + column, WIDTH)

    if WIDTH <= COLUMNS:
        _store(dweight, weight_sum, share, column, WIDTH)
        _store(dbias, bias_sum, share, column, WIDTH)


@triton.jit
def _store(shares, values, share, column, WIDTH: tl.constexpr):
    """The sum over rows of `values` (R, C) becomes one share of a gradient."""
    if shares is not None:
        tl.store(shares + share * WIDTH + column, tl.sum(values, 0), mask=column < WIDTH)


@triton.jit
def _add(shares, values, share, column, WIDTH: tl.constexpr):
    """The sum over rows of `values` (R, C) is added to this program's share of a gradient."""
    if shares is not None:
        pointers = shares + share * WIDTH + column
        inside = column < WIDTH
        tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + tl.sum(values, 0), mask=inside)


# launch ---------------------------------------------------------------------------------------------------------------


class Dropout(NamedTuple):
    """Probability, seed (one int64 on the device), and the number of each row, (rows,) int64, or None for 0, 1, 2
    ..."""

    probability: float
    seed: Tensor | None
    row_ids: Tensor | None

    @property
    def threshold(self) -> int:
        """An entry is dropped where its 32 random bits are below this."""
        return dropout_threshold(self.probability)


def forward_in_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout: Dropout,
    eps: float,
    weight_offset: float,
    subtract_mean: bool,
    total_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y like x; dropout(x) + residual in `total_dtype`, None for none; 1 / deviation (and mean) of each row, float32.

    x, residual (..., width); weight, bias (width,) or (groups, width), where row i has those of i modulo groups.
    """
    width = x.shape[-1]
    rows, residual_rows = (None if t is None else addressing.rows(t) for t in (x, residual))
    assert rows is not None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if total_dtype is None else torch.empty(x.shape, dtype=total_dtype, device=x.device)
    statistics = torch.empty((*x.shape[:-1], 2 if subtract_mean else 1), dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, total, statistics
    blocks = _forward_blocks(x)
    with hardware.on_device(x):
        launchable(norm_forward_triton)[(triton.cdiv(rows.shape[0], blocks.rows),)](
            rows, residual_rows, _contiguous(weight), _contiguous(bias), dropout.seed, _contiguous(dropout.row_ids), y,
            total, statistics, rows.shape[0], rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0), eps, weight_offset, dropout.threshold,
            1 / (1 - dropout.probability),
            WIDTH=width, GROUPS=_groups(weight), SUBTRACT_MEAN=subtract_mean, ROWS=blocks.rows, COLUMNS=blocks.columns,
            num_warps=blocks.warps,
        )  # fmt: skip
    return y, total, statistics


def backward_in_triton(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    statistics: Tensor,
    dropout: Dropout,
    weight_offset: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, residual (None without `residual_dtype`), weight and bias (float32, like weight)."""
    width = total.shape[-1]
    dy_rows, dtotal_rows, total_rows = (None if t is None else addressing.rows(t) for t in (dy, dtotal, total))
    assert dy_rows is not None
    assert total_rows is not None
    dx = torch.empty(total.shape, dtype=x_dtype, device=total.device)
    dresidual = None if residual_dtype is None else torch.empty(total.shape, dtype=residual_dtype, device=total.device)
    groups = _groups(weight)
    blocks, programs = _backward_blocks(total, groups)
    new = torch.empty if width <= blocks.columns and total.numel() else torch.zeros
    dweight, dbias = (
        new((programs, width), dtype=torch.float32, device=total.device) if wanted else None
        for wanted in (weight is not None, has_bias)
    )
    if total.numel():
        with hardware.on_device(total):
            launchable(norm_backward_triton)[(programs,)](
                dy_rows, dtotal_rows, total_rows, _contiguous(weight), statistics, dropout.seed,
                _contiguous(dropout.row_ids), dx, dresidual, dweight, dbias, total_rows.shape[0], dy_rows.stride(0),
                0 if dtotal_rows is None else dtotal_rows.stride(0), total_rows.stride(0), weight_offset,
                dropout.threshold, 1 / (1 - dropout.probability),
                WIDTH=width, GROUPS=groups, SUBTRACT_MEAN=statistics.shape[-1] == 2, ROWS=blocks.rows,
                COLUMNS=blocks.columns, num_warps=blocks.warps, STAGES=blocks.stages,
            )  # fmt: skip
    return dx, dresidual, _sum_of_shares(dweight, weight), _sum_of_shares(dbias, weight)


def _sum_of_shares(shares: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if shares is None or weight is None:
        return None
    return shares.view(-1, _groups(weight), shares.shape[1]).sum(0).view(weight.shape)


def _groups(weight: Tensor | None) -> int:
    return 1 if weight is None else max(1, weight[..., 0].numel())


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
