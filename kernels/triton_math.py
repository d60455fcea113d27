"""What the Triton kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def wide(x):
    """An integer as int64, so that products with strides pass 2^31."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def single(x):
    """A float as float32: torch.compile passes Python's floats as float64, in which a tile would be computed then."""
    return tl.cast(x, tl.float32)


@triton.jit
def finite(peak):
    """A maximum of nothing, -inf, as 0: exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def tanh(x):
    """To float32's precision near 0 too, where the quotient of exponentials loses it."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def kept(seed, threshold, stream, row, column):
    """Which entries dropout keeps: Philox of (column, row, stream), integers that name an entry, against a uint32."""
    zero = (row + column) * 0
    words = tl.philox(seed, column + zero, row + zero, stream + zero, zero)
    return words[0] >= threshold.to(tl.uint32)


@triton.jit
def kept_of_rows(seed, threshold, row, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS): as `kept`, for columns from `first` on, a multiple of 4: four share the words of one Philox."""
    four = first // 4 + tl.arange(0, COLUMNS // 4)
    zero = (row[:, None] + four[None, :]) * 0
    word = tl.philox(seed, four[None, :] + zero, row[:, None] + zero, zero, zero)
    words = tl.join(tl.join(word[0], word[2]), tl.join(word[1], word[3]))  # the last index counts fastest
    return tl.reshape(words, (ROWS, COLUMNS)) >= threshold.to(tl.uint32)
