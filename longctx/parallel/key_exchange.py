"""Which keys each rank needs of which other, and in what order it fetches them: pure functions, without processes.

Ranks take the others by their distance: rank r first works with its own keys, then with those of r + 1, r + 2, ...
(modulo the number of ranks), and copies come in that order too, so that no two begin with the same. Of each owner only
the tokens are fetched that some row of the rank can see, and a step takes as many owners as its buffer holds of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.attention.tiles import TILE


class Span(NamedTuple):
    """Tokens that are contiguous in the sequence and in the shard of one rank."""

    owner: int
    place: int  # of the first in the owner's shard
    first: int  # token of the sequence
    length: int


class Move(NamedTuple):
    """Tokens whose keys and values one rank fetches from another, and whose gradients go the other way."""

    owner: int
    place: int  # in the owner's shard
    reader: int
    position: int  # among the keys of the reader's step
    first: int  # token of the sequence
    length: int

    def distance(self, size: int) -> int:
        """How many of `size` ranks after the reader the owner comes."""
        return (self.owner - self.reader) % size


@dataclass(frozen=True)
class ExchangePlan:
    """What all ranks do; the same on all of them."""

    size: int
    distances: list[range]  # of the owners that a step takes; step 0 is a rank's own keys
    moves: list[list[Move]]  # of each step, of all ranks; positions ascend with the tokens

    def fetched(self, step: int, rank: int) -> list[Move]:
        """What `rank` works on in `step`."""
        return [move for move in self.moves[step] if move.reader == rank]

    def tokens(self, step: int, rank: int) -> Tensor:
        """Indices in the sequence, ascending, of the keys that `rank` sees in `step`: int64."""
        parts = [torch.arange(move.first, move.first + move.length) for move in self.fetched(step, rank)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def tiles_have_one_owner(self, step: int, rank: int) -> bool:
        """Whether each tile of the keys that `rank` sees in `step` comes from a single owner."""
        return all(move.length % TILE == 0 for move in self.fetched(step, rank))

    def givers(self, owner: int, distances: range) -> Tensor:
        """Which readers give gradients of each token of `owner`'s shard: int64, bit i the i-th of `distances`."""
        bits = torch.zeros(sum(move.length for move in self.fetched(0, owner)), dtype=torch.int64)
        for move in (move for step in self.moves for move in step if move.owner == owner):
            if (distance := move.distance(self.size)) in distances:
                bits[move.place : move.place + move.length] |= 1 << (distance - distances.start)
        return bits


def spans_of(order: Tensor, size: int) -> list[Span]:
    """The runs of a split sequence, rank by rank; order (sequence,): the tokens of rank 0, of rank 1, ..."""
    share = len(order) // size
    starts = torch.ones(len(order), dtype=torch.bool)
    starts[1:] = order[1:] != order[:-1] + 1
    starts[::share] = True
    begins = [*starts.nonzero().flatten().tolist(), len(order)]
    return [Span(begin // share, begin % share, int(order[begin]), end - begin) for begin, end in pairwise(begins)]


def make_exchange_plan(
    order: Tensor, start: Tensor, end: Tensor, size: int, tokens_of_a_step: int, most_owners: int
) -> ExchangePlan:  # fmt: skip
    """The plan of a split sequence whose rows see the keys from `start` to `end` - 1.

    order (sequence,); start and end (batch, sequence), in that order: integers on the CPU. `tokens_of_a_step`: how many
    fetched ones a rank holds at a time; what it needs of one owner it takes at once anyway. `most_owners`: of a step.
    """
    runs, share = spans_of(order, size), len(order) // size
    needs = _needs(runs, start, end, share, size)
    fetched = [  # tokens, rank by rank, from each distance
        [sum(move.length for move in _moves(runs, needs, rank, range(d, d + 1), size)) for d in range(size)]
        for rank in range(size)
    ]
    distances = [range(1)]
    for d in range(1, size):
        first = distances[-1].start
        tokens = max(sum(of_rank[first : d + 1]) for of_rank in fetched)
        if first and d - first < most_owners and tokens <= tokens_of_a_step:
            distances[-1] = range(first, d + 1)
        else:
            distances.append(range(d, d + 1))
    moves = [[move for rank in range(size) for move in _moves(runs, needs, rank, step, size)] for step in distances]
    return ExchangePlan(size, distances, moves)


def _needs(runs: list[Span], start: Tensor, end: Tensor, share: int, size: int) -> list[list[range]]:
    """Ranges of the keys that rows of each rank may see: of every run the first to the last that a row of it sees."""
    needs: list[list[range]] = [[] for _ in range(size)]
    for run in runs:
        rows = slice(run.owner * share + run.place, run.owner * share + run.place + run.length)
        of_rows = start[:, rows], end[:, rows]
        sees = of_rows[0] < of_rows[1]
        if sees.any():
            needs[run.owner].append(range(int(of_rows[0][sees].min()), int(of_rows[1][sees].max())))
    return needs


def _moves(runs: list[Span], needs: list[list[range]], reader: int, distances: range, size: int) -> list[Move]:
    """What one rank fetches in a step; its own keys it takes whole."""
    owners = {(reader + distance) % size for distance in distances}
    moves, position = [], 0
    for run in sorted((run for run in runs if run.owner in owners), key=lambda run: run.first):
        whole = range(run.length)
        for part in [whole] if run.owner == reader else _within(run, needs[reader]):
            moves.append(Move(run.owner, run.place + part.start, reader, position, run.first + part.start, len(part)))
            position += len(part)
    return moves


def _within(run: Span, ranges: list[range]) -> list[range]:
    """The parts of a span that lie in any of the ranges, counted from its first token, widened to whole tiles.

    So each tile has one owner.
    """
    parts: list[range] = []
    for needed in sorted(ranges, key=lambda r: r.start):
        start, end = max(needed.start - run.first, 0), min(needed.stop - run.first, run.length)
        if start >= end:
            continue
        start, end = start // TILE * TILE, min(-(-end // TILE) * TILE, run.length)
        if parts and start <= parts[-1].stop:
            parts[-1] = range(parts[-1].start, max(parts[-1].stop, end))
        else:
            parts.append(range(start, end))
    return parts
