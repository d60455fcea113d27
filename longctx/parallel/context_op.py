"""What ring and gather share: an attention over a split sequence as one custom op.

One op for the whole exchange, so that a recompute policy can keep its results (`attention_saved`) and never runs it
twice, and torch.compile sees no graph break.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from longctx.kernels.attention.interface import Call, attention_op
from longctx.kernels.attention.mask import KeyIntervals, once_a_mask
from longctx.kernels.attention.options import Options
from longctx.parallel.sequence import held_tokens


class Share:
    """One rank's share of an attention: its place on the context axis, and the mask of its rows over all keys."""

    def __init__(self, q: Tensor, call: Call) -> None:
        self.options, self.implementation = call.options(), call.implementation
        self.group = _resolve_process_group(GroupName(call.group_name))
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        length = q.shape[1] * self.size
        mask = call.intervals(length, length).written_out(q.device)
        self.rows = _rows_of(mask, self.rank, self.size, q.device)

    def keys_of(self, owner: int) -> KeyIntervals:
        """The mask of this rank's rows over the keys that `owner` holds."""
        assert self.rows.start is not None
        return _keys_of(self.rows, owner, self.size, self.rows.start.device)


@once_a_mask
def _rows_of(mask: KeyIntervals, rank: int, size: int, device: torch.device) -> KeyIntervals:
    return mask.rows(held_tokens(rank, size, mask.n_queries, device))


@once_a_mask
def _keys_of(rows: KeyIntervals, owner: int, size: int, device: torch.device) -> KeyIntervals:
    return rows.keys(held_tokens(owner, size, rows.n_keys, device))


Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Share], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def context_op(name: str, forward: Forward, backward: Backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers `longctx::<name>`: as `attention_op`, with a `Share` in place of the call."""
    return attention_op(
        name,
        lambda q, k, v, sink, call: forward(q, k, v, sink, Share(q, call)),
        lambda dout, dlse, q, k, v, out, lse, call: backward(dout, dlse, q, k, v, out, lse, Share(q, call)),
    )


class ContextAttend(nn.Module):
    """`attend` over a split sequence: q, k and v are one rank's tokens, the mask is that of the whole sequence."""

    def __init__(self, attend: nn.Module, group: dist.ProcessGroup, op: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.attend, self.group, self.op = attend, group, op

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> tuple[Tensor, Tensor]:
        """q (batch, sequence / size, heads, head_dim), k and v alike with kv_heads; out and lse of the same rows."""
        options = Options(q.shape[-1] ** -0.5)
        call = Call.of(mask, options, str(self.attend.implementation), self.group.group_name)
        return self.op(q.contiguous(), k.contiguous(), v.contiguous(), None, *call)
