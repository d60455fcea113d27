"""Ring attention: each rank works through the keys and values of one other after the other, and keeps its queries.

(Liu et al. 2023, Ring Attention with Blockwise Transformers.) Unlike the paper's ring, blocks are not passed on: each
rank copies the keys it needs from their owner. At most two steps' keys of other ranks are in memory, however long the
sequence. Short shards are batched, several owners a step, so that kernels stay long.
"""

from __future__ import annotations

from longctx.parallel.blockwise import Blockwise, Budget
from longctx.parallel.transport import Transport

MIB = 1 << 20
BUDGET = Budget(step=256 * MIB, inbox=2048 * MIB)


def ring(transport: Transport) -> Blockwise:
    """Ring attention over the ranks of a transport."""
    return Blockwise(transport, BUDGET)
