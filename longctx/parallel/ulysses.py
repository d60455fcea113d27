"""Ulysses: trades tokens for heads, so that each rank attends over the whole sequence with its share of the heads.

(Jacobs et al. 2023, DeepSpeed Ulysses.) Where the axis is larger than the number of key/value heads, each of those is
repeated just often enough that every rank has one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from longctx.kernels.attention.mask import KeyIntervals, once_a_mask
from longctx.kernels.reference import repeat_heads


class Ulysses(nn.Module):
    """`attend` over a split sequence: q, k and v are one rank's tokens, the mask is that of the whole sequence."""

    def __init__(self, attend: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.attend, self.group, self.size = attend, group, dist.get_world_size(group)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> tuple[Tensor, Tensor]:
        """q (batch, sequence / size, heads, head_dim), k and v alike with kv_heads; out and lse of the same rows."""
        kv_heads = max(k.shape[2], self.size)
        k, v = repeat_heads(k, kv_heads), repeat_heads(v, kv_heads)
        whole, to_sequence, to_ranks = in_sequence_order(mask)
        out, lse = self.attend(*(self._heads_for_tokens(x, to_sequence) for x in (q, k, v)), whole)
        lse = self._tokens_for_heads(lse.transpose(1, 2).unsqueeze(-1), to_ranks)
        return self._tokens_for_heads(out, to_ranks), lse.squeeze(-1).transpose(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """Piece i of dim 0 goes to rank i, which receives them in the order of the ranks."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def _heads_for_tokens(self, x: Tensor, to_sequence: Tensor) -> Tensor:
        """(batch, sequence / size, heads, dim) -> (batch, sequence, heads / size, dim)."""
        pieces = x.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4)  # rank, token, batch, head, dim
        received = self._exchange(pieces.flatten(0, 1))  # tokens of rank 0, of rank 1, ...
        return received[to_sequence].transpose(0, 1).contiguous()

    def _tokens_for_heads(self, x: Tensor, to_ranks: Tensor) -> Tensor:
        """(batch, sequence, heads / size, dim) -> (batch, sequence / size, heads, dim)."""
        received = self._exchange(x.transpose(0, 1)[to_ranks])
        pieces = received.unflatten(0, (self.size, -1)).permute(2, 1, 0, 3, 4)  # batch, token, rank, head, dim
        return pieces.flatten(2, 3).contiguous()


@once_a_mask
def in_sequence_order(mask: KeyIntervals) -> tuple[KeyIntervals, Tensor, Tensor]:
    """Of a mask whose rows are in the ranks' order: the same in the sequence's, and both orders as indices.

    `by_rank[to_sequence]` is in the sequence's order, `by_sequence[to_ranks]` in the ranks'.
    """
    if mask.start is None or mask.query_position is None:
        raise ValueError("the mask of a split sequence must have its rows in the ranks' order: make it by Split.mask")
    to_ranks = mask.query_position[0].long()
    to_sequence = torch.argsort(to_ranks)
    return mask.rows(to_sequence), to_sequence, to_ranks
