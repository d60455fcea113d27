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


# in which order the items of a Hopper kernel are taken ----------------------------------------------------------------
# An item is a block of rows or of keys of one head. `together` heads, a section, are worked on at a time: as many as
# the cache holds. Blocks are numbered sequence by sequence, items section by section, in these block by block.


@cached_per_mask
def forward_items(
    mask: KeyIntervals, batch: int, block_q: int, block_k: int, heads: int, together: int
) -> Tensor:  # fmt: skip
    """Numbers of all blocks of rows of all heads, int32: most tiles first, so that programs end together."""
    order = _longest_first(_visited(key_tiles(mask, block_q, block_k), batch))
    return _numbers(_sections(heads, together, order.device) * len(order) + order, together)


@cached_per_mask
def backward_items(
    mask: KeyIntervals, batch: int, block_q: int, block_k: int, heads: int, together: int, programs: int,
    in_turns: bool, last_first: bool,
) -> Tensor:  # fmt: skip
    """Numbers of all blocks of keys of all heads, int32: by position, so that they find shared rows in the cache.

    A long one that is taken late would keep one program at work when all others have ended. So the last sections are
    taken together, the longest blocks first: as many sections as have the longest block's work for each program. Where
    blocks by position become shorter and shorter, as in causal masks, two sections do as well one after the other.
    `in_turns`: together, but by position; `last_first`: by position from the last block on, section after section.
    """
    tiles = row_tiles(mask, block_q, block_k)
    visited = _visited(tiles, batch)
    n, section = len(visited), _sections(heads, together, tiles.device)
    order = _by_position(n, batch, last_first, tiles.device)
    if last_first:
        return _numbers(section * n + order, together)
    longest = F.pad(visited, (0, 1)).max()  # 0 if there are no keys
    at_the_end = (programs * longest / visited.sum().clamp(min=1) / together).round()
    is_longest_first = (visited[order].diff() <= 0).all()
    at_the_end = torch.where(is_longest_first & (at_the_end <= 2), 0, at_the_end)
    is_end = section >= len(section) - at_the_end
    if not in_turns:
        order = torch.where(is_end, _longest_first(visited), order)
    place = torch.where(is_end, len(section), section) * n + torch.arange(n, device=tiles.device)
    by_place = torch.argsort(place.flatten(), stable=True)
    return _numbers((section * n + order).flatten()[by_place], together)


def _sections(heads: int, together: int, device: torch.device) -> Tensor:
    assert heads % together == 0, f"{heads} heads in sections of {together}"
    return torch.arange(heads // together, device=device)[:, None]


def _visited(tiles: Tensor, batch: int) -> Tensor:
    """How many tiles each block of all sequences visits: (batch * blocks,)."""
    return (tiles[..., 3] - tiles[..., 0]).expand(batch, -1).flatten()


def _longest_first(visited: Tensor) -> Tensor:
    return torch.argsort(visited, descending=True, stable=True)


def _by_position(n: int, batch: int, last_first: bool, device: torch.device) -> Tensor:
    """The first blocks of all sequences, then the second ones, ..., of `n` blocks; or the last ones first."""
    number = torch.arange(n, device=device).view(batch, n // max(1, batch))
    return (number.flip(1) if last_first else number).T.flatten()


def _numbers(first: Tensor, together: int) -> Tensor:
    """Of items: `together` a block of a section, which is numbered section * blocks + block."""
    return (first.flatten()[:, None] * together + torch.arange(together, device=first.device)).flatten().to(torch.int32)


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
