"""What an attention does to its scores besides masking them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longctx.kernels import launch


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
        return launch.dropout_threshold(self.dropout)
