"""Who holds which tokens of a sequence: pure functions of sizes and of the work of each token.

Zigzag: a sequence is cut into 2 * size chunks and rank r holds chunks r and 2 * size - 1 - r, so that under a causal
mask of one document all ranks have the same work. Where documents make the work uneven, the sequence is cut elsewhere,
into as many runs. A rank's tokens stay in ascending order, and every rank holds equally many. Ranks that trade heads
hold one run of tokens each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longctx.kernels.attention.key_intervals import KeyIntervals, to_device
from longctx.kernels.attention.mask_cache import cached_per_mask
from longctx.kernels.attention.tiles import TILE

TOLERANCE = 1.02  # most to mean work over ranks, above which runs are cut elsewhere


@dataclass(frozen=True, eq=False)
class Split:
    """Which of `size` ranks holds which tokens of each sequence of a batch."""

    order: Tensor  # (sequence,) int64 on the CPU: the tokens of rank 0, of rank 1, ...
    size: int

    def held(self, rank: int) -> Tensor:
        """Indices in the sequence, ascending, of the tokens that `rank` holds: (sequence / size,)."""
        return self.order.view(self.size, -1)[rank]

    def shard(self, tokens: Tensor, rank: int) -> Tensor:
        """The share of `tokens` (batch, sequence, ...) that `rank` holds: (batch, sequence / size, ...)."""
        self._check_length("tokens", tokens)
        return tokens if self.size == 1 else tokens[:, to_device(self.held(rank), tokens.device)]

    def _check_length(self, name: str, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != len(self.order):
            raise ValueError(f"{name} {tuple(x.shape)}: must be (batch, {len(self.order)}, ...), as the split is")

    def mask(self, document_start: Tensor, device: torch.device | str) -> KeyIntervals | SplitMask:
        """The mask of whole sequences from `document_start` (batch, sequence), which is on the CPU."""
        self._check_length("document_start", document_start)
        length, device = document_start.shape[1], torch.device(device)
        if not document_start.any():  # one document a sequence
            mask = KeyIntervals.causal(length)
            return mask if self.size == 1 else SplitMask(mask.with_bounds(device), self)
        on_cpu = KeyIntervals.documents(document_start)
        mask = on_cpu.to(device)
        if self.size == 1:
            return mask
        if device.type != "cpu":
            _copied_to_cpu.keep(mask, on_cpu)
        return SplitMask(mask, self)


@dataclass(frozen=True, eq=False)
class SplitMask:
    """The mask of a sequence that is split over ranks: what attention takes there in place of a `KeyIntervals`."""

    mask: KeyIntervals  # of the whole sequence, rows in the order of its tokens, with bounds
    split: Split

    def windowed(self, size: int, device: torch.device) -> SplitMask:
        """As of `KeyIntervals`."""
        return SplitMask(self.mask.windowed(size, device), self.split)

    def of_rank(self, rank: int, device: torch.device) -> KeyIntervals:
        """The rows that `rank` holds, over all keys of the sequence."""
        return self.mask.rows(to_device(self.split.held(rank), device))

    def on_cpu(self) -> KeyIntervals:
        """`mask` on the CPU; of documents that `Split.mask` has made, without waiting for the device."""
        assert self.mask.start is not None
        return self.mask if self.mask.start.device.type == "cpu" else _copied_to_cpu(self.mask)

    @property
    def is_owned(self) -> bool:
        """As of `KeyIntervals`."""
        return self.mask.is_owned

    def identity(self) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """The tensors and sizes that the mask consists of, see `mask_cache`."""
        tensors, sizes = self.mask.identity()
        return (*tensors, self.split.order), (*sizes, self.split.size)


@cached_per_mask
def _copied_to_cpu(mask: KeyIntervals) -> KeyIntervals:
    return mask.to("cpu")


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what validation makes, training may use
def zigzag(length: int, size: int) -> Split:
    """Two chunks a rank, one from either end. Raises ValueError if the sequence cannot be cut so."""
    if size == 1:
        return Split(torch.arange(length, device="cpu"), 1)
    if length % (2 * size):
        raise ValueError(
            f"a sequence of {length} tokens is no multiple of 2 * {size} chunks; {_padding(length, 2 * size)}"
        )
    return _of_owners(tuple(min(chunk, 2 * size - 1 - chunk) for chunk in range(2 * size)), length, size)


def _padding(length: int, parts: int) -> str:
    return f"pad it to {-(-length // parts) * parts}, with a document of its own whose targets are ignored"


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def in_order(length: int, size: int) -> Split:
    """One run of tokens a rank, as few pieces as can be: where ranks trade heads, all have the same work anyway."""
    if length % size:
        raise ValueError(f"a sequence of {length} tokens is no multiple of {size} ranks; {_padding(length, size)}")
    return Split(torch.arange(length, device="cpu"), size)


def balanced(work: Tensor, size: int) -> Split:
    """Zigzag where that shares the work evenly, else runs of other lengths that do: 2 * size - 1 in all, or a few more.

    work (sequence,): of each token, in any unit, such as the number of keys it sees.
    """
    length, work = len(work), work.double().cpu()
    even = zigzag(length, size)
    if imbalance(work, even) <= TOLERANCE:
        return even
    piece = math.gcd(length // size, TILE)
    of_pieces = work.view(-1, piece).sum(1)
    owners = _evened(_owners_of_pieces(of_pieces, size), of_pieces, size)
    return min(even, _of_owners(tuple(owners.tolist()), length, size), key=lambda split: imbalance(work, split))


def imbalance(work: Tensor, split: Split) -> float:
    """Work of the most loaded rank over the mean."""
    of_ranks = work.double()[split.order].view(split.size, -1).sum(1)
    return float(of_ranks.max() / of_ranks.mean()) if of_ranks.any() else 1.0


def _owners_of_pieces(work: Tensor, size: int) -> Tensor:
    """A rank for each piece, so that all have as many pieces and nearly the same work.

    The last rank takes a window of neighbouring pieces, the one before it a window of what is left, closed up, and so
    on. Of as many pieces as a rank is due, some window has no more than the mean work and some no less; on the way from
    one to the other comes the one to take. Under a causal mask of one document it lies in the middle, and all of it is
    zigzag. (Necklace splitting, of two kinds of beads: Goldberg and West 1985, Alon 1987)
    """
    share, left = len(work) // size, torch.arange(len(work), device="cpu")
    owners = torch.zeros(len(work), dtype=torch.int64, device="cpu")
    for rank in range(size - 1, 0, -1):
        before = torch.nn.functional.pad(work[left].cumsum(0), (1, 0))
        of_windows = before[share:] - before[:-share]
        first = int((of_windows - before[-1] / (rank + 1)).abs().argmin())
        owners[left[first : first + share]] = rank
        left = torch.cat([left[:first], left[first + share :]])
    return owners


def _evened(owners: Tensor, work: Tensor, size: int) -> Tensor:
    """The same but for pieces that the most and the least loaded rank exchange, where shards of few pieces need it."""
    owners = owners.clone()
    loads = torch.zeros(size, dtype=work.dtype, device="cpu").index_add(0, owners, work)
    for _ in range(2 * size):
        most, least = int(loads.argmax()), int(loads.argmin())
        if loads[most] <= TOLERANCE * loads.mean():
            break
        mine, other = (owners == most).nonzero().flatten(), (owners == least).nonzero().flatten()
        gain = work[mine].unsqueeze(1) - work[other]  # of each pair of pieces
        wanted = (loads[most] - loads[least]) / 2
        give, take = divmod(int((gain - wanted).abs().argmin()), len(other))
        if not 0 < gain[give, take] < 2 * wanted:
            break
        owners[mine[give]], owners[other[take]] = least, most
        loads[most] -= gain[give, take]
        loads[least] += gain[give, take]
    return owners


@lru_cache(maxsize=64)  # masks are known by their splits
@torch.inference_mode(False)
def _of_owners(owners: tuple[int, ...], length: int, size: int) -> Split:
    """Pieces of equal length, given the rank of each."""
    chunks, owner = torch.arange(length, device="cpu").view(len(owners), -1), torch.tensor(owners, device="cpu")
    return Split(torch.cat([chunks[owner == rank].flatten() for rank in range(size)]), size)
