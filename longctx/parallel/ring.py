"""Ring attention: each rank works through the keys and values of one other after the other, and keeps its queries.

(Liu et al. 2023, Ring Attention with Blockwise Transformers.) Nothing goes round: every rank fetches what it needs from
its owner. Of others' keys a rank holds two steps at a time, however long the sequence; a step takes as many owners as
fit, so that short shards are no short kernels.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from longctx.parallel.blockwise import Budget
from longctx.parallel.context_op import ContextAttend, context_op

MIB = 1 << 20
BUDGET = Budget(step=256 * MIB, inbox=2048 * MIB)
_ring_attention = context_op("ring_attention", BUDGET)


def ring(attend: nn.Module, group: dist.ProcessGroup) -> ContextAttend:
    """Wraps `attend` so that it works on a sequence split over `group`."""
    return ContextAttend(attend, _ring_attention, group)
