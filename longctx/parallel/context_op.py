"""What all strategies share: an attention over a split sequence as one custom op, and the module that calls it.

One op for the whole exchange, so that a recompute policy can keep its results (`attention_saved`) and never runs it
twice, and torch.compile sees no graph break.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from longctx.kernels.attention.interface import Call, attention_op
from longctx.kernels.attention.mask import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.parallel import blockwise
from longctx.parallel.blockwise import Budget


def context_op(name: str, budget: Budget) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers `longctx::<name>`: as `attention_op`, block by block, on one rank's tokens."""

    def forward(q, k, v, _sink, call: Call):
        return blockwise.forward(q, k, v, call, budget)

    def backward(dout, dlse, q, k, v, out, lse, call: Call):
        return blockwise.backward(dout, dlse, q, k, v, out, lse, call, budget, k.dtype)

    return attention_op(name, forward, backward)


class ContextAttend(nn.Module):
    """`attend` over a split sequence: q, k and v are one rank's tokens, the mask is that of the whole sequence.

    `op` works over `groups`, the innermost first.
    """

    def __init__(
        self, attend: nn.Module, op: Callable[..., tuple[Tensor, Tensor]], *groups: dist.ProcessGroup
    ) -> None:  # fmt: skip
        super().__init__()
        self.attend, self.op, self.group_names = attend, op, " ".join(group.group_name for group in groups)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> Tensor:
        """q (batch, sequence / size, heads, head_dim), k and v alike with kv_heads -> out like q.

        The rows of `mask` are in the ranks' order, see `Split.mask`.
        """
        options = Options(q.shape[-1] ** -0.5)
        call = Call.of(mask, options, str(self.attend.implementation), self.group_names)
        return self.op(q.contiguous(), k.contiguous(), v.contiguous(), None, *call)[0]
