"""All-gather attention: every rank fetches all keys and values and computes its own rows in one call.

The form of Llama 3's training (Llama Team 2024, section 3.3.2). Grouped-query attention makes keys and values small.
They are gathered again in the backward pass rather than kept; their gradients are reduce-scattered in float32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.kernels.attention import interface
from longctx.kernels.reference import accumulation_dtype
from longctx.parallel.context_op import ContextAttend, Share, context_op
from longctx.parallel.sequence import sequence_order


def gather_keys_values(k: Tensor, v: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """All ranks' keys and values in the sequence's order: (batch, sequence, kv_heads, head_dim)."""
    mine = torch.stack((k, v)).transpose(1, 2).contiguous()  # (2, n, b, h, d): tokens of all ranks become neighbours
    everyone = mine.new_empty((share.size, *mine.shape))
    dist.all_gather_into_tensor(everyone.flatten(0, 1), mine, group=share.group)
    to_sequence, _ = sequence_order(share.size, k.shape[1] * share.size, k.device)
    keys, values = everyone.transpose(0, 1).flatten(1, 2)[:, to_sequence].transpose(1, 2)
    return keys.contiguous(), values.contiguous()


def scatter_gradients(dk: Tensor, dv: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """The sum over ranks of the gradients of all keys and values, each rank its own tokens: in float32."""
    _, to_rank = sequence_order(share.size, dk.shape[1], dk.device)
    gradients = torch.stack((dk, dv)).to(accumulation_dtype(dk.dtype)).transpose(1, 2)[:, to_rank]
    gradients = gradients.unflatten(1, (share.size, -1)).transpose(0, 1).contiguous()
    mine = torch.empty_like(gradients[0])
    dist.reduce_scatter_tensor(mine, gradients.flatten(0, 1), group=share.group)
    my_dk, my_dv = mine.transpose(1, 2)
    return my_dk.clone(memory_format=torch.contiguous_format), my_dv.clone(memory_format=torch.contiguous_format)


def _forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, share: Share) -> tuple[Tensor, Tensor]:
    keys, values = gather_keys_values(k, v, share)
    return interface.forward(q, keys, values, share.rows, share.options, share.implementation, sink)


def _backward(dout, dlse, q, k, v, out, lse, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = gather_keys_values(k, v, share)
    compute = accumulation_dtype(q.dtype)
    into = (
        torch.zeros(q.shape, dtype=compute, device=q.device),
        torch.zeros(keys.shape, dtype=compute, device=q.device),
        torch.zeros(keys.shape, dtype=compute, device=q.device),
    )
    dq, dk, dv = interface.backward(
        dout, dlse, q, keys, values, out, lse, share.rows, share.options, share.implementation, into
    )
    my_dk, my_dv = scatter_gradients(dk, dv, share)
    return dq.to(q.dtype), my_dk.to(k.dtype), my_dv.to(v.dtype)


_gather_attention = context_op("gather_attention", _forward, _backward)


def gather(attend: nn.Module, group: dist.ProcessGroup) -> ContextAttend:
    """Wraps `attend` so that it works on a sequence split over `group`."""
    return ContextAttend(attend, group, _gather_attention)
