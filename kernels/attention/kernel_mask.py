"""A mask as the Triton kernels read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels import addressing
from longctx.kernels.attention.block_mask import BlockMask, addition_turns, tile_lists
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.kernels.attention.tiles import contiguous_bounds, key_tiles, row_tiles


class KernelMask(NamedTuple):
    """Contiguous tensors, int32 but for `layout`; None where a kind of mask, or a call's options, need none."""

    start: Tensor  # (batch or 1, n_queries), with `end`
    end: Tensor
    query_position: Tensor | None  # (batch or 1, n_queries)
    key_position: Tensor | None  # (n_keys,)
    tiles: Tensor  # bounds of tiles.py (batch or 1, blocks, 4), or counts of block_mask.py (1 or heads, blocks, 2)
    turns: Tensor | None = None  # deterministic backward: bounds as above of each block of rows, or of block_mask.py
    order: Tensor | None = None  # of block_mask.py, (1 or heads, blocks, tiles)
    layout: Tensor | None = None  # uint8, (1 or heads, rows, columns) of blocks of layout_q x layout_k
    layout_q: int = 0
    layout_k: int = 0

    @property
    def tiles_batch(self) -> int:
        """Stride of `tiles` (and `turns`) over the batch; block-sparse layouts are shared by it."""
        return addressing.shared_stride(self.tiles) if self.layout is None else 0

    @property
    def tiles_head(self) -> int:
        """Stride of `tiles` over the heads."""
        return 0 if self.layout is None else addressing.shared_stride(self.tiles)

    @property
    def order_strides(self) -> tuple[int, int]:
        """Of `order`, over the heads and over the blocks."""
        return addressing.shared_stride(self.order), 0 if self.order is None else self.order.stride(1)

    @property
    def turns_strides(self) -> tuple[int, int]:
        """Of `turns`, over the batch and over the heads."""
        stride = addressing.shared_stride(self.turns)
        return (stride, 0) if self.layout is None else (0, stride)


def kernel_mask(
    mask: KeyIntervals | BlockMask,
    options: Options,
    device: torch.device,
    tile_q: int,
    tile_k: int,
    of_keys: bool = False,
) -> KernelMask:
    """What the forward pass reads of `mask`, with tiles of these sizes; `of_keys`: what the backward pass does."""
    intervals = mask.intervals if isinstance(mask, BlockMask) else mask
    needs_positions = options.alibi_slopes is not None or options.seed is not None
    positions = (intervals.query_position, intervals.key_position) if needs_positions else (None, None)
    if isinstance(mask, BlockMask):
        lists = tile_lists(mask, tile_q, tile_k, of_keys)
        turns = addition_turns(mask, tile_q, tile_k) if of_keys and options.deterministic else None
        return KernelMask(
            *contiguous_bounds(intervals), *positions, lists.counts, turns, lists.order, mask.kept.view(torch.uint8),
            mask.block_q, mask.block_k,
        )  # fmt: skip
    mask = mask.with_bounds(device)
    of_rows = key_tiles(mask, tile_q, tile_k) if options.deterministic or not of_keys else None
    visited = row_tiles(mask, tile_q, tile_k) if of_keys else of_rows
    assert visited is not None
    return KernelMask(*contiguous_bounds(mask), *positions, visited, of_rows)
