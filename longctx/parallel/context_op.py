"""What ring and gather share: an attention over a split sequence as one custom op with its gradient.

One op for the whole exchange, so that a recompute policy can keep its results (`attention_saved`) and never runs it
twice, and torch.compile sees no graph break.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from longctx.kernels.attention.interface import choose, empty_results
from longctx.kernels.attention.mask import KeyIntervals, once_a_mask
from longctx.parallel.sequence import held_tokens


class Block:
    """How one block of attention is computed: scale and implementation, and this rank's place on the context axis."""

    def __init__(self, scale: float, implementation: str, group_name: str) -> None:
        self.scale, self.implementation = scale, implementation
        self.group = _resolve_process_group(GroupName(group_name))
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)


Forward = Callable[[Tensor, Tensor, Tensor, KeyIntervals, Block], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@lru_cache(maxsize=8)
def _causal(length: int, device: torch.device) -> KeyIntervals:
    start, end = KeyIntervals.causal(length).bounds(device)
    return KeyIntervals(length, length, start=start, end=end)


def whole_mask(q: Tensor, start: Tensor | None, end: Tensor | None, is_causal: bool, size: int) -> KeyIntervals:
    """The mask of the whole sequence, written out, of which `q` holds one share."""
    length = q.shape[1] * size
    if start is None and is_causal:
        return _causal(length, q.device)
    return KeyIntervals(length, length, is_causal, start, end)


@once_a_mask
def rows_of(mask: KeyIntervals, rank: int, size: int, device: torch.device) -> KeyIntervals:
    """The rows that `rank` holds, over all keys."""
    return mask.rows(held_tokens(rank, size, mask.n_queries, device))


@once_a_mask
def keys_of(rows: KeyIntervals, owner: int, size: int, device: torch.device) -> KeyIntervals:
    """Of a mask over all keys, that over the keys `owner` holds."""
    return rows.keys(held_tokens(owner, size, rows.n_keys, device))


def context_op(name: str, forward: Forward, backward: Backward):
    """Registers `longctx::<name>` and its backward op from functions of (q, k, v, mask of the sequence, block)."""

    @torch.library.custom_op(f"longctx::{name}", mutates_args=())
    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        is_causal: bool,
        scale: float,
        implementation: str,
        group_name: str,
    ) -> tuple[Tensor, Tensor]:
        block = Block(scale, implementation, group_name)
        return forward(q, k, v, whole_mask(q, start, end, is_causal, block.size), block)

    @torch.library.custom_op(f"longctx::{name}_backward", mutates_args=())
    def backward_op(
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        is_causal: bool,
        scale: float,
        implementation: str,
        group_name: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        block = Block(scale, implementation, group_name)
        mask = whole_mask(q, start, end, is_causal, block.size)
        return backward(dout.contiguous(), dlse, q, k, v, out, lse, mask, block)

    @op.register_fake
    def _(q, k, v, start, end, is_causal, scale, implementation, group_name):
        return empty_results(q)

    @backward_op.register_fake
    def _(dout, dlse, q, k, v, out, lse, start, end, is_causal, scale, implementation, group_name):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx, inputs, output) -> None:
        q, k, v, start, end, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, start, end, *output)

    def autograd(ctx, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, start, end, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = backward_op(dout, dlse, q, k, v, out, lse, start, end, *ctx.settings)
        return *gradients, None, None, None, None, None, None

    op.register_autograd(autograd, setup_context=setup_context)
    return op


class ContextAttend(nn.Module):
    """`attend` over a split sequence: q, k and v are one rank's tokens, the mask is that of the whole sequence."""

    def __init__(self, attend: nn.Module, group: dist.ProcessGroup, op) -> None:
        super().__init__()
        self.attend, self.group, self.op = attend, group, op

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> tuple[Tensor, Tensor]:
        """q (batch, sequence / size, heads, head_dim), k and v alike with kv_heads; out and lse of the same rows."""
        implementation = choose(str(self.attend.implementation), q)
        scale = q.shape[-1] ** -0.5
        return self.op(
            q.contiguous(), k.contiguous(), v.contiguous(), mask.start, mask.end, mask.is_causal, scale,
            implementation, self.group.group_name,
        )  # fmt: skip
