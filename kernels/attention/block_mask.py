"""A mask of kept blocks: which blocks of (queries, keys) an attention computes, shared by its heads or one for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.mask_cache import cached_per_mask, remember
from longctx.kernels.attention.tiles import key_tiles


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Query row i of head h sees key j if kept[h, i // block_q, j // block_k], and if `intervals` let it.

    `kept`: bool, (1 or heads, ceil(n_queries / block_q), ceil(n_keys / block_k)); `intervals` has bounds written out.
    """

    kept: Tensor
    block_q: int
    block_k: int
    intervals: KeyIntervals

    def __post_init__(self) -> None:
        if self.is_owned:
            remember(self.kept)

    @property
    def is_owned(self) -> bool:
        """As of `KeyIntervals`."""
        return self.intervals.is_owned

    @property
    def n_queries(self) -> int:
        return self.intervals.n_queries

    @property
    def n_keys(self) -> int:
        return self.intervals.n_keys

    def dense(self, device: torch.device | str) -> Tensor:
        """(batch or 1, 1 or heads, n_queries, n_keys) bool: True where a row sees a key."""
        kept = self.kept.repeat_interleave(self.block_q, 1).repeat_interleave(self.block_k, 2)
        return self.intervals.dense(device) & kept[:, : self.n_queries, : self.n_keys]

    def positions(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """As of `KeyIntervals`."""
        return self.intervals.positions(device)

    def identity(self) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """The tensors and sizes that the mask consists of, see `mask_cache`."""
        tensors, sizes = self.intervals.identity()
        return (self.kept, *tensors), (self.block_q, self.block_k, *sizes)


class TileLists(NamedTuple):
    """The tiles that a kernel visits for each block of rows (or of keys): those with an edge first, then the full ones.

    `counts` (1 or heads, blocks, 2): how many have an edge, and how many there are; `order` (1 or heads, blocks, most
    that there can be): which. Both int32.
    """

    counts: Tensor
    order: Tensor


@cached_per_mask
def tile_lists(mask: BlockMask, tile_q: int, tile_k: int, of_keys: bool) -> TileLists:
    """The lists of each block of `tile_q` rows, or, `of_keys`, of each block of `tile_k` keys."""
    touched, full = _classify(mask, tile_q, tile_k)
    if of_keys:
        touched, full = touched.transpose(1, 2), full.transpose(1, 2)
    rank = torch.where(full, 1, torch.where(touched, 0, 2))
    order = torch.sort(rank, dim=-1, stable=True).indices
    counts = torch.stack(((touched & ~full).sum(-1), touched.sum(-1)), dim=-1)
    return TileLists(*(x.to(torch.int32).contiguous() for x in (counts, order)))


@cached_per_mask
def addition_turns(mask: BlockMask, tile_q: int, tile_k: int) -> Tensor:
    """(1 or heads, row blocks, key blocks) int32: how many key blocks after this one add to the same rows of dQ."""
    touched = _classify(mask, tile_q, tile_k)[0].to(torch.int32)
    return (touched.flip(-1).cumsum(-1).flip(-1) - touched).to(torch.int32).contiguous()


def _classify(mask: BlockMask, tile_q: int, tile_k: int) -> tuple[Tensor, Tensor]:
    """Of each tile, (1 or heads, row tiles, key tiles): whether anything in it is seen, and whether all of it is."""
    heads, rows, columns = mask.kept.shape
    count = mask.kept.new_zeros((heads, rows + 1, columns + 1), dtype=torch.int32)
    count[:, 1:, 1:] = mask.kept.to(torch.int32).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    top, bottom = _blocks_of_tiles(mask.n_queries, tile_q, mask.block_q, mask.kept.device)
    left, right = _blocks_of_tiles(mask.n_keys, tile_k, mask.block_k, mask.kept.device)
    below, above = count[:, bottom], count[:, top]
    kept = below[:, :, right] - below[:, :, left] - above[:, :, right] + above[:, :, left]
    area = (bottom - top)[:, None] * (right - left)

    # of all sequences: what one of them sees is visited, and what one does not see all of has an edge
    firsts, full_firsts, full_lasts, lasts = key_tiles(mask.intervals, tile_q, tile_k).unsqueeze(-1).unbind(2)
    first, full_first, full_last, last = firsts.amin(0), full_firsts.amax(0), full_lasts.amin(0), lasts.amax(0)
    tile = torch.arange(len(left), device=kept.device)
    touched = (kept > 0) & (tile >= first) & (tile < last)
    is_whole = torch.arange(1, len(top) + 1, device=kept.device).unsqueeze(-1) * tile_q <= mask.n_queries
    return touched, touched & (kept == area) & (tile >= full_first) & (tile < full_last) & is_whole


def _blocks_of_tiles(length: int, tile: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first block that each tile overlaps, and the one after the last."""
    start = torch.arange(0, length, tile, device=device)
    end = (start + tile).clamp(max=length)
    return start // block, (end + block - 1) // block
