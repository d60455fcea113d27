"""The options of an attention, and what its backward pass gets from the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from longctx.kernels.dropout import dropout_threshold


@dataclass(frozen=True, eq=False)
class Options:
    """score = scale * q k, squashed to softcap * tanh(score / softcap), minus slope * |distance|; then the softmax.

    `softcap`: 0 for none (Gemma Team 2024). `alibi_slopes`: (heads,), (batch, heads), or one a row (batch, n_queries,
    heads), float32, without gradient (Press et al. 2021). `dropout`: probability with which an entry of the softmax is
    dropped; `seed`, one int64 on the device, and the entry's positions decide. `deterministic`: the backward pass gives
    the same bits each time.
    """

    scale: float
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    deterministic: bool = False

    def slopes(self, batch: int, rows: int, heads: int) -> Tensor | None:
        """ALiBi's slopes as a view (batch, rows, heads)."""
        slopes = self.alibi_slopes
        if slopes is None:
            return None
        return (slopes.unsqueeze(-2) if slopes.ndim < 3 else slopes).expand(batch, rows, heads)

    @property
    def threshold(self) -> int:
        """An entry is dropped where its 32 random bits are below this."""
        return dropout_threshold(self.dropout)


class Saved(NamedTuple):
    """What the backward pass gets from the forward pass.

    `out` and `lse` may be those of a softmax over more keys than `k` holds: gradients are then this block's share.
    """

    q: Tensor  # (batch, n_queries, heads, head_dim)
    k: Tensor  # (batch, n_keys, kv_heads, head_dim)
    v: Tensor  # like k
    out: Tensor  # like q
    lse: Tensor  # (batch, heads, n_queries) float32 or float64
