"""Who holds which tokens of a sequence: pure functions of (rank, size).

Zigzag: a sequence is cut into 2 * size chunks and rank r holds chunks r and 2 * size - 1 - r, so that under a causal
mask all ranks have the same work. A rank's tokens stay in ascending order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longctx.kernels.attention.mask import KeyIntervals


@lru_cache(maxsize=256)
def held_tokens(rank: int, size: int, length: int, device: torch.device) -> Tensor:
    """Indices in the sequence, ascending, of the tokens that `rank` of `size` holds: int64, (length / size,)."""
    if size == 1:
        return torch.arange(length, device=device)
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens is no multiple of 2 * {size} chunks")
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk))).to(device)


@lru_cache(maxsize=16)
def sequence_order(size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Between the order in which ranks 0..size-1 hold the tokens, side by side, and that of the sequence.

    `by_rank[to_sequence]` is in the sequence's order, `by_sequence[to_rank]` in the ranks'.
    """
    to_rank = torch.cat([held_tokens(rank, size, length, device) for rank in range(size)])
    return torch.argsort(to_rank), to_rank


def shard(tokens: Tensor, rank: int, size: int) -> Tensor:
    """The share of `tokens` (batch, sequence, ...) that `rank` holds: (batch, sequence / size, ...)."""
    return tokens if size == 1 else tokens[:, held_tokens(rank, size, tokens.shape[1], tokens.device)]


def sequence_mask(document_start: Tensor, device: torch.device) -> KeyIntervals:
    """The mask of whole sequences from `document_start` (batch, sequence), which is on the CPU."""
    if not document_start.any():  # one document a sequence: the compile-time case
        return KeyIntervals.causal(document_start.shape[1])
    return KeyIntervals.documents(document_start).to(device)
