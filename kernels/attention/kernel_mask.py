"""A mask as the Triton kernels read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.attention.block_mask import BlockMask, tile_lists
from longctx.kernels.attention.mask import KeyIntervals, once_a_mask
from longctx.kernels.attention.options import Options
from longctx.kernels.attention.tiles import key_tiles, row_tiles


class KernelMask(NamedTuple):
    """Contiguous tensors, int32 but for `layout`; None where a kind of mask, or a call's options, need none."""

    kind: str  # full, causal, intervals or blocks
    start: Tensor | None = None  # (batch or 1, n_queries), with `end`
    end: Tensor | None = None
    query_position: Tensor | None = None  # (batch or 1, n_queries)
    key_position: Tensor | None = None  # (n_keys,)
    tiles: Tensor | None = None  # bounds of tiles.py (batch or 1, blocks, 4), or counts of block_mask.py
    order: Tensor | None = None  # of block_mask.py
    turns: Tensor | None = None  # deterministic backward: bounds of the tiles of each block of rows, or block_mask.py's
    layout: Tensor | None = None  # uint8 (layouts, ...), of BlockMask
    layouts: int = 1
    layout_q: int = 0
    layout_k: int = 0

    @property
    def edge_stages(self) -> int | None:
        """Pipeline stages of the loops over tiles with an edge: full and causal masks have too few for more than 1."""
        return 1 if self.kind in ("full", "causal") else None


def kernel_mask(
    mask: KeyIntervals | BlockMask, options: Options, tile_q: int, tile_k: int, of_keys: bool = False
) -> KernelMask:
    """What the forward pass reads of `mask`, with tiles of these sizes; `of_keys`: what the backward pass does."""
    if isinstance(mask, BlockMask):
        start, end = contiguous_bounds(mask.intervals)
        lists = tile_lists(mask, tile_q, tile_k, of_keys)
        return KernelMask(
            "blocks", start, end, None, None, lists.counts, lists.order, lists.turns, mask.kept.view(torch.uint8),
            mask.kept.shape[0], mask.block_q, mask.block_k,
        )  # fmt: skip
    if mask.start is None:
        return KernelMask("causal" if mask.is_causal else "full")
    start, end = contiguous_bounds(mask)
    places = None, None
    if options.alibi_slopes is not None or options.seed is not None:
        places = mask.query_position, mask.key_position
    if not of_keys:
        return KernelMask("intervals", start, end, *places, key_tiles(mask, tile_q, tile_k))
    turns = key_tiles(mask, tile_q, tile_k) if options.deterministic else None
    return KernelMask("intervals", start, end, *places, row_tiles(mask, tile_q, tile_k), turns=turns)


@once_a_mask
def contiguous_bounds(mask: KeyIntervals) -> tuple[Tensor, Tensor]:
    """Start and end of the key intervals, each (batch or 1, n_queries) with rows beside each other."""
    assert mask.start is not None
    start, end = torch.broadcast_tensors(*mask.bounds(mask.start.device))
    return start.contiguous(), end.contiguous()
