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
from longctx.kernels.reference import accumulation_dtype
from longctx.parallel import blockwise


def context_op(name: str, step_bytes: int, inbox_bytes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers `longctx::<name>`: as `attention_op`, on one rank's tokens, with the mask of the whole sequence.

    `step_bytes`: of fetched keys and values that a step works on; while it does, those of the next arrive.
    `inbox_bytes`: of gradients from other ranks that wait to be added up.
    """

    def tokens_of_a_step(k: Tensor) -> int:
        return step_bytes // (2 * k[:, :1].nbytes)

    def forward(q, k, v, _sink, call: Call):
        return blockwise.forward(q, k, v, call, tokens_of_a_step(k))

    def backward(dout, dlse, q, k, v, out, lse, call: Call):
        slots = inbox_bytes // (2 * k.numel() * accumulation_dtype(k.dtype).itemsize)
        return blockwise.backward(dout, dlse, q, k, v, out, lse, call, tokens_of_a_step(k), slots)

    return attention_op(name, forward, backward)


class ContextAttend(nn.Module):
    """`attend` over a split sequence: q, k and v are one rank's tokens, the mask is that of the whole sequence."""

    def __init__(self, attend: nn.Module, group: dist.ProcessGroup, op: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.attend, self.group, self.op = attend, group, op

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> Tensor:
        """q (batch, sequence / size, heads, head_dim), k and v alike with kv_heads -> out like q.

        The rows of `mask` are in the ranks' order, see `Split.mask`.
        """
        options = Options(q.shape[-1] ** -0.5)
        call = Call.of(mask, options, str(self.attend.implementation), self.group.group_name)
        return self.op(q.contiguous(), k.contiguous(), v.contiguous(), None, *call)[0]
