"""All-gather attention: each rank fetches all keys and values it needs while it works with its own, then uses them.

The form of Llama 3's training (Llama Team 2024, section 3.3.2). Grouped-query attention makes keys and values small.
They are fetched again in the backward pass rather than kept.
"""

from __future__ import annotations

from longctx.parallel.blockwise import Blockwise, Budget
from longctx.parallel.transport import Transport

EVERYTHING = 1 << 60


def gather(transport: Transport) -> Blockwise:
    """All-gather attention over the ranks of a transport."""
    return Blockwise(transport, Budget(step=EVERYTHING, inbox=EVERYTHING))
