"""Cross entropy over rows of logits in Triton: statistics, loss, gradient, or loss and gradient together.

A program walks the columns of a row and keeps a running maximum and sum of exponentials in each of its lanes, which
meet once at the end. Loss and gradient together read a row twice, the second time out of the L2 cache: about as
many programs run as have rows that fit there. (Milakov and Gimelshein 2018, online softmax)
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# a kernel is launched with arguments that its signature does not show

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.addressing import padded
from longctx.kernels.hardware import multiprocessors
from longctx.kernels.loss.options import LossOptions
from longctx.kernels.triton_math import LOG2_E, finite, tanh, wide


class LossBlocks(NamedTuple):
    """Columns that a program reads at a time, its warps and pipeline stages; programs that run at once."""

    columns: int
    warps: int
    stages: int
    programs: int


def _blocks(logits: Tensor) -> LossBlocks:
    """For logits (tokens, classes) whose rows are read twice: few programs at once, so that the L2 cache helps."""
    columns = min(padded(logits.shape[1]), 8192)
    processors = multiprocessors(logits.device)
    row_bytes = logits.shape[1] * logits.element_size()
    a_processor = max(2, min(4, (32 << 20) // (row_bytes * processors)))
    return LossBlocks(columns, max(4, columns // 512), 3, processors * a_processor)


@triton.jit
def _columns(COLUMNS: tl.constexpr):
    """(C / 8, 8): the columns of a tile, eight neighbours to a lane, which needs no other lane to reduce them."""
    return tl.arange(0, COLUMNS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _load_capped(logits, column, n_columns, softcap, POLICY: tl.constexpr):
    """Logits in float32, squashed where there is a softcap; -inf outside."""
    inside = column < n_columns
    x = tl.load(logits + column, mask=inside, other=float("-inf"), eviction_policy=POLICY).to(tl.float32)
    if softcap is not None:
        x = tl.where(inside, softcap * tanh(x / softcap), float("-inf"))
    return x


@triton.jit
def _row_statistics(
    logits, n_columns, softcap, SMOOTHED: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Maximum, sum of exp(x - maximum), and sum of x (0 unless SMOOTHED) of a row."""
    column = _columns(COLUMNS)
    peak = tl.full((COLUMNS // 8,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS // 8,), tl.float32)
    plain = tl.zeros((COLUMNS // 8,), tl.float32)
    for first in tl.range(0, n_columns, COLUMNS, num_stages=STAGES):
        x = _load_capped(logits, first + column, n_columns, softcap, "")
        peak_before, peak = peak, tl.maximum(peak, tl.max(x, 1))
        base = finite(peak)
        total = total * tl.exp2((peak_before - base) * LOG2_E) + tl.sum(tl.exp2((x - base[:, None]) * LOG2_E), 1)
        if SMOOTHED:
            plain += tl.sum(tl.where(first + column < n_columns, x, 0.0), 1)
    row_peak = tl.max(peak, 0)
    return row_peak, tl.sum(total * tl.exp2((peak - row_peak) * LOG2_E), 0), tl.sum(plain, 0)


@triton.jit
def _at_target(logits, target, first_class, n_columns, softcap):
    """x at the target, 0 where this process does not hold that class."""
    column = target - first_class
    is_here = (column >= 0) & (column < n_columns)
    x = tl.load(logits + tl.where(is_here, column, 0), mask=is_here, other=0.0).to(tl.float32)
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def _write_gradient(
    logits, out, lse, target, weight, first_class, n_columns, n_classes, ignore_index, smoothing, z_loss, softcap,
    SMOOTHED: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """weight * d loss / d logits of a row; `out` may be `logits`."""
    column = _columns(COLUMNS)
    n_tiles = tl.cdiv(n_columns, COLUMNS)
    if target == ignore_index:
        for tile in range(0, n_tiles):
            inside = tile * COLUMNS + column < n_columns
            tl.store(out + tile * COLUMNS + column, tl.zeros_like(column).to(out.dtype.element_ty), mask=inside)
    else:
        weight = tl.where((target >= 0) & (target < n_classes), weight, float("nan"))
        scale = weight * (1 + 2 * z_loss * lse)
        for tile in tl.range(0, n_tiles, num_stages=STAGES):
            first = (n_tiles - 1 - tile) * COLUMNS  # backwards: what was read last is still in the cache
            x = _load_capped(logits, first + column, n_columns, softcap, "evict_first")
            gradient = tl.exp2((x - lse) * LOG2_E) * scale
            if SMOOTHED:
                gradient -= weight * (smoothing / n_classes)
            # subtracted before the sum is rounded
            gradient = tl.where(first + column == target - first_class, gradient - weight * (1 - smoothing), gradient)
            if softcap is not None:
                gradient *= 1 - (x / softcap) * (x / softcap)
            inside = first + column < n_columns
            tl.store(out + first + column, gradient.to(out.dtype.element_ty), mask=inside,
                     eviction_policy="evict_first")  # fmt: skip


@triton.jit
def cross_entropy_forward_triton(
    logits, targets, weights, losses, lses, out,
    n_rows, n_columns, logits_row, out_row, weights_row, ignore_index, smoothing, z_loss, softcap,
    SMOOTHED: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row_logits = logits + wide(row) * logits_row
        target = tl.load(targets + row)
        at_target = _at_target(row_logits, target, 0, n_columns, softcap)
        peak, total, plain = _row_statistics(row_logits, n_columns, softcap, SMOOTHED, COLUMNS, STAGES)
        lse = peak + tl.log(total)
        # differences to the maximum first: large logits cancel exactly
        loss = tl.log(total) + (1 - smoothing) * (peak - at_target) + z_loss * lse * lse
        if SMOOTHED:
            loss += smoothing * (peak - plain / n_columns)
        is_known = (target >= 0) & (target < n_columns)
        loss = tl.where(is_known, loss, float("nan"))
        tl.store(losses + row, tl.where(target != ignore_index, loss, 0.0))
        tl.store(lses + row, lse)
        if out is not None:
            weight = tl.load(weights + row * weights_row)
            _write_gradient(
                row_logits, out + wide(row) * out_row, lse, target, weight, 0, n_columns, n_columns, ignore_index,
                smoothing, z_loss, softcap, SMOOTHED, COLUMNS, STAGES,
            )  # fmt: skip


@triton.jit
def cross_entropy_statistics_triton(
    logits, targets, statistics, n_rows, n_columns, logits_row, first_class, softcap,
    SMOOTHED: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_logits = logits + wide(row) * logits_row
    at_target = _at_target(row_logits, tl.load(targets + row), first_class, n_columns, softcap)
    peak, total, plain = _row_statistics(row_logits, n_columns, softcap, SMOOTHED, COLUMNS, STAGES)
    tl.store(statistics + row, peak)
    tl.store(statistics + n_rows + row, total)
    tl.store(statistics + 2 * n_rows + row, at_target)
    tl.store(statistics + 3 * n_rows + row, plain)


@triton.jit
def cross_entropy_backward_triton(
    logits, targets, lses, weights, out,
    n_columns, logits_row, out_row, weights_row, first_class, n_classes, ignore_index, smoothing, z_loss, softcap,
    SMOOTHED: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    _write_gradient(
        logits + wide(row) * logits_row, out + wide(row) * out_row, tl.load(lses + row), tl.load(targets + row),
        tl.load(weights + row * weights_row), first_class, n_columns, n_classes, ignore_index, smoothing, z_loss,
        softcap, SMOOTHED, COLUMNS, STAGES,
    )  # fmt: skip


@triton.jit
def cross_entropy_scale_triton(x, factor, n_elements, BLOCK: tl.constexpr):
    value = tl.load(factor)
    if value != 1.0:
        for first in range(wide(tl.program_id(0)) * BLOCK, n_elements, tl.num_programs(0) * BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            inside = offsets < n_elements
            scaled = tl.load(x + offsets, mask=inside).to(tl.float32) * value
            tl.store(x + offsets, scaled.to(x.dtype.element_ty), mask=inside)


# launch ---------------------------------------------------------------------------------------------------------------


def loss(
    logits: Tensor, targets: Tensor, options: LossOptions, weights: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps (tokens,) float32 of logits (tokens, classes) and targets (tokens,) int64.

    With `out` (which may be `logits`) the gradient of sum(weights * losses) too; weights float32, (tokens,) or one.
    """
    targets = targets.contiguous()
    losses, lses = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    blocks = _blocks(logits)
    if len(logits):
        with hardware.on_device(logits):
            cross_entropy_forward_triton[(min(len(logits), blocks.programs) if out is not None else len(logits),)](
                logits, targets, weights, losses, lses, out, len(logits), logits.shape[1], logits.stride(0),
                0 if out is None else out.stride(0), _row_stride(weights), options.ignore_index,
                options.label_smoothing, options.z_loss, options.softcap or None,
                SMOOTHED=options.label_smoothing > 0, COLUMNS=blocks.columns, STAGES=blocks.stages,
                num_warps=blocks.warps,
            )  # fmt: skip
    return losses, lses


def statistics(logits: Tensor, targets: Tensor, options: LossOptions, first_class: int) -> Tensor:
    """See `reference.cross_entropy_statistics`: (4, tokens) float32; the sum of x is 0 without label smoothing."""
    targets = targets.contiguous()
    result = torch.empty((4, len(logits)), dtype=torch.float32, device=logits.device)
    blocks = _blocks(logits)
    if len(logits):
        with hardware.on_device(logits):
            cross_entropy_statistics_triton[(len(logits),)](
                logits, targets, result, len(logits), logits.shape[1], logits.stride(0), first_class,
                options.softcap or None, SMOOTHED=options.label_smoothing > 0, COLUMNS=blocks.columns,
                STAGES=blocks.stages, num_warps=blocks.warps,
            )  # fmt: skip
    return result


def gradient(
    logits: Tensor, targets: Tensor, lses: Tensor, weights: Tensor, options: LossOptions, first_class: int,
    n_classes: int, out: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of sum(weights * losses) to logits into `out`, which may be `logits`.

    The logits are those of classes `first_class` on of `n_classes`, `lses` of all of them.
    """
    targets, lses = targets.contiguous(), lses.contiguous()
    if logits.numel():
        blocks = _blocks(logits)
        with hardware.on_device(logits):
            cross_entropy_backward_triton[(len(logits),)](
                logits, targets, lses, weights, out, logits.shape[1], logits.stride(0), out.stride(0),
                _row_stride(weights), first_class, n_classes, options.ignore_index, options.label_smoothing,
                options.z_loss, options.softcap or None, SMOOTHED=options.label_smoothing > 0,
                COLUMNS=blocks.columns, STAGES=blocks.stages, num_warps=blocks.warps,
            )  # fmt: skip


def scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a single number on the device; of a contiguous x nothing is read or written where it is 1."""
    block = 4096
    if not x.is_contiguous():  # such as an uneven shard, cut out of a padded one
        x.mul_(factor)
    elif x.numel():
        with hardware.on_device(x):
            cross_entropy_scale_triton[(min(triton.cdiv(x.numel(), block), 8 * hardware.multiprocessors(x.device)),)](
                x, factor, x.numel(), BLOCK=block, num_warps=8
            )


def _row_stride(weights: Tensor | None) -> int:
    return 0 if weights is None or weights.numel() == 1 else weights.stride(0)
