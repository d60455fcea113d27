"""How attention crosses the context axis: the strategy that is configured, or the one that suits the machines; and how
ranks that trade tokens for heads share these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from longctx.config import Config, Strategy, attended_heads, shares_heads, ulysses_groups

GIB = 1 << 30
MOST_GATHERED = 4 * GIB  # of keys, values and their gradients on a rank
MOST_GROUPS = 4  # of a rank's query heads, where ranks trade heads


class Choice(NamedTuple):
    """What is used, and why."""

    strategy: Strategy
    ulysses_size: int = 1  # ranks that trade heads
    reason: str = ""

    @property
    def splits_heads(self) -> bool:
        """Whether each rank attends from all tokens of the sequence, with its share of the heads."""
        return self.strategy == Strategy.ulysses


WHOLE_SEQUENCES = Choice(Strategy.gather, reason="a rank has whole sequences")


def choose_strategy(config: Config, ranks_of_a_machine: int) -> Choice:
    """The strategy of a checked configuration. Axes count fastest along `tensor`, so that a machine has whole ones."""
    parallel = config.parallel
    if parallel.context == 1:
        return WHOLE_SEQUENCES
    near = _most_trading_heads(config, ranks_of_a_machine // parallel.tensor)
    if parallel.strategy == Strategy.ulysses:
        return Choice(Strategy.ulysses, parallel.context, "as configured")
    if parallel.strategy == Strategy.ulysses_ring:
        return Choice(Strategy.ulysses_ring, parallel.ulysses or near, "as configured")
    if parallel.strategy != Strategy.auto:
        return Choice(parallel.strategy, 1, "as configured")
    if parallel.context * parallel.tensor > ranks_of_a_machine:
        if near > 1:
            return Choice(Strategy.ulysses_ring, near, f"{near} ranks of a machine trade heads, keys go between these")
        return Choice(Strategy.ring, 1, "the axis spans machines, and heads cannot be shared inside one")
    gathered = _gathered_bytes(config)
    size = f"keys and values of a sequence and their gradients take {gathered / GIB:.1f} GiB"
    if gathered <= MOST_GATHERED:
        return Choice(Strategy.gather, 1, f"{size}: few large kernels")
    return Choice(Strategy.ring, 1, f"{size}: a few shards at a time")


def strategy_for(ranks_of_a_machine: int) -> Callable[[Config], Choice]:
    """`choose_strategy` as planners ask for it: by the configuration alone, without a reason, which names its size."""
    return lambda config: choose_strategy(config, ranks_of_a_machine)._replace(reason="")


def _most_trading_heads(config: Config, most: int) -> int:
    heads, kv_heads = attended_heads(config)
    context = config.parallel.context
    sizes = [n for n in range(1, min(most, context) + 1) if context % n == 0 and shares_heads(heads, kv_heads, n)]
    return max(sizes, default=1)


def _gathered_bytes(config: Config) -> int:
    most = min(config.data.sequences_per_micro_batch, config.data.sequences_per_step)
    tokens = most * config.data.sequence_length
    width = 2 * attended_heads(config)[1] * config.model.head_dim
    return tokens * width * (2 + 4)  # bfloat16, and float32 of the gradients


# heads that go for tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """How `size` ranks that trade tokens for heads share these: rank by rank, and each rank's group by group."""

    heads: int
    kv_heads: int
    size: int
    most_groups: int = MOST_GROUPS
    keys_travel_on: bool = False  # to other groups of ranks: once, not for each group of query heads that share them

    @cached_property
    def groups(self) -> int:
        """Of a rank's query heads, equal ones, each with whole key/value heads or a part of one."""
        most = min(self.most_groups, self._kv_heads_of_a_rank) if self.keys_travel_on else self.most_groups
        return ulysses_groups(self.heads, self.kv_heads, self.size, most)

    @cached_property
    def kv_pieces(self) -> int:
        """Into how many pieces a rank's key/value heads are cut."""
        return min(self.groups, self._kv_heads_of_a_rank)

    @property
    def _kv_heads_of_a_rank(self) -> int:
        return max(1, self.kv_heads // self.size)

    @property
    def sharers(self) -> int:
        """Ranks that share a key/value head."""
        return max(1, self.size // self.kv_heads)

    def query_piece(self, rank: int, group: int) -> int:
        return rank * self.groups + group

    def kv_piece(self, rank: int, group: int) -> int:
        """Of those that are shared; see `gradient_piece`."""
        return self.gradient_piece(rank, group) // self.sharers

    def gradient_piece(self, rank: int, group: int) -> int:
        """As `kv_piece`, one for each rank that shares it."""
        return rank * self.kv_pieces + group * self.kv_pieces // self.groups

    def starts_piece(self, group: int) -> bool:
        """Whether the groups before had other key/value heads."""
        return group == 0 or self.gradient_piece(0, group) != self.gradient_piece(0, group - 1)

    def ends_piece(self, group: int) -> bool:
        return group + 1 == self.groups or self.starts_piece(group + 1)
