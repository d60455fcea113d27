"""How a model and a sequence are spread over ranks.

As a library, around a model of one's own: `ContextParallel.of_group(group, "ring")` holds the exchange, its `attend()`
is the attention of a split sequence, and a `Split` says who holds which tokens. `examples/ring_attention.py` shows all.
"""

from longctx.parallel.context_parallel import ContextParallel
from longctx.parallel.load_balance import Split, SplitMask, balanced, in_order, zigzag

__all__ = ["ContextParallel", "Split", "SplitMask", "balanced", "in_order", "zigzag"]
