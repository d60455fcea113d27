"""Which tiles of the score matrix a mask touches: computed once a mask, walked by the kernels of all layers.

A tile is empty (skipped), full (no mask) or at an edge (masked element by element). Because both bounds of the key
intervals never decrease, what one block of rows or of keys touches is one range of tiles, and the full ones are one
range inside it: [first, full_first) and [full_last, last) are edges, [full_first, full_last) full.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.mask_cache import cached_per_mask

TILE = 128  # rows or keys: in these, work is cut for ranks
MERGED_ROWS = 64  # rows whose results over blocks of keys are merged, or left alone, together
TAKES_PART, HAS_BEFORE, HAS_AFTER = 1, 2, 4  # bits of a merge flag


@cached_per_mask
def key_tiles(mask: KeyIntervals, block_q: int, block_k: int) -> Tensor:
    """Of each block of rows, the tiles of keys: int32, (batch or 1, row blocks, 4), the four bounds of above."""
    start, end = contiguous_bounds(mask)
    first_row = torch.arange(0, mask.n_queries, block_q, device=start.device)
    last_row = (first_row + block_q - 1).clamp(max=mask.n_queries - 1)
    first = start[:, first_row] // block_k
    last = _blocks(end[:, last_row], block_k)
    return _ordered(first, _blocks(start[:, last_row], block_k), end[:, first_row] // block_k, last)


@cached_per_mask
def row_tiles(mask: KeyIntervals, block_q: int, block_k: int) -> Tensor:
    """Of each block of keys, the tiles of rows: int32, (batch or 1, key blocks, 4). The transpose of `key_tiles`."""
    start, end = contiguous_bounds(mask)
    first_key = torch.arange(0, mask.n_keys, block_k, dtype=torch.int32, device=start.device).repeat(start.shape[0], 1)
    next_key = first_key + block_k
    first_row = torch.searchsorted(end, first_key, right=True)  # ends after the block's first key
    first = torch.where(first_row == mask.n_queries, _blocks(first_row, block_q), first_row // block_q)
    last = _blocks(torch.searchsorted(start, next_key), block_q)  # starts before the block's end
    full_first = _blocks(torch.searchsorted(end, next_key), block_q)  # ends no earlier than the block
    full_last = torch.searchsorted(start, first_key, right=True) // block_q  # starts no later than the block
    return _ordered(first, full_first, full_last, last)


def contiguous_bounds(mask: KeyIntervals) -> tuple[Tensor, Tensor]:
    """Start and end of a mask that has them; masks are made with rows beside each other, so nothing is copied."""
    assert mask.start is not None
    assert mask.end is not None
    return mask.start.contiguous(), mask.end.contiguous()


def _blocks(count: Tensor, size: int) -> Tensor:
    """How many blocks of `size` hold `count`."""
    return (count + (size - 1)) // size


def _ordered(first: Tensor, full_first: Tensor, full_last: Tensor, last: Tensor) -> Tensor:
    """The four bounds, with empty ranges where first >= last or full_first >= full_last."""
    last = torch.maximum(first, last)
    full_first = torch.minimum(torch.maximum(full_first, first), last)
    full_last = torch.minimum(torch.maximum(full_last, full_first), last)
    return torch.stack((first, full_first, full_last, last), dim=-1).to(torch.int32).contiguous()


@cached_per_mask
def by_position(mask: KeyIntervals, batch: int, block_k: int, last_first: bool) -> Tensor:
    """The blocks of keys of all sequences, numbered as in `longest_first`, the first or last of each sequence first.

    Blocks that see the same rows come soon after each other (beside each other, but for the other sequences), and find
    them in the cache. In causal documents the first block of keys is also seen by most rows.
    """
    blocks = -(-mask.n_keys // block_k)
    number = torch.arange(batch * blocks, dtype=torch.int32, device=contiguous_bounds(mask)[0].device)
    number = number.view(batch, blocks)
    return (number.flip(1) if last_first else number).T.flatten()


@cached_per_mask
def shares_last_rows(mask: KeyIntervals, batch: int, block_q: int, block_k: int) -> Tensor:
    """Whether a block of keys and one beside it are seen up to the same tile of rows: int32 0 or 1, (batch * blocks,).

    So it is with a causal mask, inside a document and in full attention; in a window each block is seen further than
    the one before.
    """
    last = row_tiles(mask, block_q, block_k)[..., 3]
    is_same = last[:, 1:] == last[:, :-1]
    shares = F.pad(is_same, (1, 0)) | F.pad(is_same, (0, 1))
    return shares.to(torch.int32).expand(batch, -1).flatten()


@cached_per_mask
def padded_bounds(mask: KeyIntervals, rows: int) -> tuple[Tensor, Tensor]:
    """Start and end for a whole number of blocks of rows; those that do not exist see nothing."""
    start, end = contiguous_bounds(mask)
    missing = -mask.n_queries % rows
    return F.pad(start, (0, missing)), F.pad(end, (0, missing))


@cached_per_mask
def longest_first(mask: KeyIntervals, batch: int, block_q: int, block_k: int) -> Tensor:
    """The blocks of rows of all sequences, those that visit most tiles first.

    int32 (batch * blocks,): sequence * blocks + block. Those who take work in this order end at about the same time.
    """
    tiles = key_tiles(mask, block_q, block_k)
    visited = (tiles[..., 3] - tiles[..., 0]).expand(batch, -1).flatten()
    return torch.argsort(visited, descending=True, stable=True).to(torch.int32)


def merge_flags(masks: list[KeyIntervals], block_q: int) -> list[Tensor]:
    """What blocks of rows do with each of several blocks of keys whose results are merged, given the masks of these.

    Of each mask int32 (batch or 1, row blocks): 0 where no row sees any of its keys, else `TAKES_PART` and whether
    there are keys in masks before and after. Rows that see no key at all take part in the first.
    """
    seen = []
    for mask in masks:
        start, end = contiguous_bounds(mask)
        sees = F.pad(start < end, (0, -mask.n_queries % block_q))
        seen.append(sees.view(len(sees), -1, block_q).any(2))
    seen[0] = seen[0] | ~torch.stack(seen).any(0)
    found = torch.stack(seen).to(torch.int32)
    so_far = found.cumsum(0) - found
    to_come = found.sum(0) - found - so_far
    return list((found * (TAKES_PART + HAS_BEFORE * (so_far > 0) + HAS_AFTER * (to_come > 0))).to(torch.int32))
