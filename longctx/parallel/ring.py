"""Ring attention: keys and values go round the ranks, one shard a hop, while each rank keeps its queries.

(Liu et al. 2023, Ring Attention with Blockwise Transformers.) Partial results are merged in float32 by their
log-sum-exp, by the Triton kernels themselves. In the backward pass the gradient of a shard travels with it in float32
and is home after the last hop.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.kernels.attention import interface
from longctx.kernels.reference import accumulation_dtype
from longctx.parallel.context_op import ContextAttend, Share, context_op


class Neighbours:
    """Sends to the next rank of the ring while receiving from the one before."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.next = dist.get_global_rank(group, (rank + 1) % size)
        self.before = dist.get_global_rank(group, (rank - 1) % size)

    def start(self, outgoing: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Begins the exchange; the received tensor holds its values once `finish` has returned."""
        incoming = torch.empty_like(outgoing)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, self.next, self.group),
                dist.P2POp(dist.irecv, incoming, self.before, self.group),
            ]
        )
        return incoming, works

    @staticmethod
    def finish(exchange: tuple[Tensor, list[dist.Work]]) -> Tensor:
        incoming, works = exchange
        for work in works:
            work.wait()
        return incoming


def owner_at(hop: int, rank: int, size: int) -> int:
    """Whose keys and values `rank` holds at `hop`."""
    return (rank - hop) % size


def _forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, share: Share) -> tuple[Tensor, Tensor]:
    ring = Neighbours(share.group)
    compute = accumulation_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=compute, device=q.device)
    keys_values = torch.stack((k, v))
    for hop in range(share.size):
        exchange = ring.start(keys_values) if hop + 1 < share.size else None
        owner = owner_at(hop, share.rank, share.size)
        hop_mask = share.keys_of(owner)
        hop_sink = sink if hop == 0 else None
        interface.forward(
            q, keys_values[0], keys_values[1], hop_mask, share.options, share.implementation, hop_sink, into=(out, lse)
        )
        if exchange:
            keys_values = ring.finish(exchange)
    return out.to(q.dtype), lse


def _backward(dout, dlse, q, k, v, out, lse, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    ring = Neighbours(share.group)
    compute = accumulation_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=compute, device=q.device)
    keys_values = torch.stack((k, v))
    gradients, gradient_exchange = keys_values, None
    for hop in range(share.size):
        exchange = ring.start(keys_values) if hop + 1 < share.size else None
        owner = owner_at(hop, share.rank, share.size)
        hop_mask = share.keys_of(owner)
        hop_k, hop_v = keys_values
        gradients = torch.zeros(keys_values.shape, dtype=compute, device=q.device)  # of the shard at hand
        into = (dq, gradients[0], gradients[1])
        interface.backward(dout, dlse, q, hop_k, hop_v, out, lse, hop_mask, share.options, share.implementation, into)
        if gradient_exchange:  # what the ranks before have found for it
            gradients += ring.finish(gradient_exchange)
        gradient_exchange = ring.start(gradients) if share.size > 1 else None
        if exchange:
            keys_values = ring.finish(exchange)
    if gradient_exchange:
        gradients = ring.finish(gradient_exchange)
    dk, dv = gradients
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


_ring_attention = context_op("ring_attention", _forward, _backward)


def ring(attend: nn.Module, group: dist.ProcessGroup) -> ContextAttend:
    """Wraps `attend` so that it works on a sequence split over `group`."""
    return ContextAttend(attend, group, _ring_attention)
