"""Dropout by counters: the random numbers of the Triton kernels, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_threshold(probability: float) -> int:
    """An entry is dropped where its 32 random bits are below this."""
    return max(2, min(round(probability * 2**32), 2**32 - 1))  # a 1 would become a constant of the compilation


def new_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator, for kernels that draw their own numbers."""
    return torch.randint(2**62, (1,), device=device)


def kept(seed: Tensor, threshold: int, stream: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Which entries dropout keeps, of a shape to which the integers that name them broadcast; see `philox`."""
    return philox(seed, stream, row, column)[0] >= threshold


def kept_of_rows(seed: Tensor, threshold: int, row: Tensor, column: Tensor) -> Tensor:
    """As `kept`, in norms: four columns share the words of one counter, (column // 4, row, 0, 0)."""
    words = torch.stack(torch.broadcast_tensors(*philox(seed, torch.zeros_like(column), row, column // 4)))
    place = (column % 4).expand(words.shape[1:])
    return words.gather(0, place.unsqueeze(0)).squeeze(0) >= threshold


def philox(seed: Tensor, stream: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits, as int64, for each counter.

    Philox-4x32 with ten rounds (Salmon et al. 2011): the counter is (column, row, stream, 0), in attention (key
    position, row position, batch * heads + head, 0), the key the seed.
    """
    word = torch.tensor(2**32 - 1, device=seed.device)
    c0, c1 = column.to(torch.int64) & word, row.to(torch.int64) & word
    c2, c3 = stream, torch.zeros_like(stream)
    key0, key1 = seed & word, (seed >> 32) & word

    def high_word(x: Tensor, factor: int) -> Tensor:  # of a product of two 32-bit words, without passing 2^63
        return ((x >> 16) * factor + ((x & 0xFFFF) * factor >> 16)) >> 16

    for _ in range(10):
        c0, c1, c2, c3 = (
            high_word(c2, 0xCD9E8D57) ^ c1 ^ key0,
            c2 * 0xCD9E8D57 & word,
            high_word(c0, 0xD2511F53) ^ c3 ^ key1,
            c0 * 0xD2511F53 & word,
        )
        key0, key1 = key0 + 0x9E3779B9 & word, key1 + 0xBB67AE85 & word
    return c0, c1, c2, c3
