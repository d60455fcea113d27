"""All-gather attention: each rank fetches all keys and values it needs while it works with its own, then uses them.

The form of Llama 3's training (Llama Team 2024, section 3.3.2). Grouped-query attention makes keys and values small.
They are fetched again in the backward pass rather than kept.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from longctx.parallel.blockwise import Budget
from longctx.parallel.context_op import ContextAttend, context_op

EVERYTHING = 1 << 60
_gather_attention = context_op("gather_attention", Budget(step=EVERYTHING, inbox=EVERYTHING))


def gather(attend: nn.Module, group: dist.ProcessGroup) -> ContextAttend:
    """Wraps `attend` so that it works on a sequence split over `group`."""
    return ContextAttend(attend, _gather_attention, group)
