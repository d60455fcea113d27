"""How attention crosses the context axis: the strategy that is configured, or the one that suits the machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from longctx.config import Config, Strategy, attended_heads, shares_heads

GIB = 1 << 30
MOST_GATHERED = 4 * GIB  # of keys, values and their gradients on a rank


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
