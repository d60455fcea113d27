"""flash-attention's interface: the names, arguments, layouts and results of flash-attention 2.8 (Dao 2023).

    from longctx.kernels.compat.flash_attn import flash_attn_func  # instead of: from flash_attn import ...

Beside them the older names `flash_attn_unpadded_*` and the modules `FlashSelfAttention` and `FlashCrossAttention`.
These mask as 2.1 and later do: of unequal lengths the last query sees the last key (before: the first the first).
What is different: float32 is taken too, any head dim up to 256; `softmax_lse` has a gradient and is -inf where a row
sees no key; softmax_scale must be above 0; the right limit of a window holds also where the keys are fewer. With
dropout, `S_dmask` is the softmax itself, negative where an entry was dropped, and not rounded up to tiles.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.kernels import hardware
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals, banded, sequence_of_rows
from longctx.kernels.attention.mask_cache import cached_per_mask
from longctx.kernels.attention.options import Options
from longctx.kernels.attention.reference import attention_scores, dropout_weight, finite_lse
from longctx.kernels.dropout import new_seed

Window = tuple[int, int]
Result = Any  # a tensor, or three: a caller knows which it has asked for


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """softmax(q k^T * softmax_scale) v: q (batch, n_queries, heads, head_dim), k, v (batch, n_keys, kv_heads, dim).

    `causal` is aligned to the bottom right. `window_size` (left, right): row i sees the keys from i - left to
    i + right, where the last row is at the last key; -1 for no limit. `softcap`: 0 for none. `alibi_slopes`: (heads,)
    or (batch, heads), float32. `dropout_p` draws from torch's generator.

    Returns out like q; with `return_attn_probs` also softmax_lse (batch, heads, n_queries) float32, and S_dmask (batch,
    heads, n_queries, n_keys) if there is dropout (empty if not: it is as large as the score matrix).
    """
    left, right = _limits(window_size, causal)
    mask = _mask(q.shape[1], k.shape[1], causal, left, right, q.device)
    out, lse, options = _attend(q, k, v, mask, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic)
    if not return_attn_probs:
        return out
    return out, lse, q.new_empty(0) if options.seed is None else _signed_probabilities(q, k, lse, mask, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with kv (batch, n_keys, 2, kv_heads, head_dim)."""
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with qkv (batch, sequence, 3, heads, head_dim)."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` over sequences side by side: q (total_q, heads, head_dim), k, v (total_k, kv_heads, head_dim).

    Sequence s has the rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] and the keys cu_seqlens_k[s]:cu_seqlens_k[s + 1], both
    int32; rows past the last have out 0, and what is in them does not matter (in a CUDA graph, and under torch.compile,
    it has to be finite). The offsets are checked once, which waits for the device, and not again as
    long as the same tensors are passed: write to them through torch, or pass new ones. `alibi_slopes` (heads,) or
    (sequences, heads).

    Returns out like q; with `return_attn_probs` also softmax_lse (heads, total_q), and S_dmask (sequences, heads,
    max_seqlen_q, max_seqlen_k) if there is dropout.
    """
    if block_table is not None:
        raise ValueError("block_table: a paged cache of keys is for inference, pass None")
    if q.ndim != 3 or k.ndim != 3:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: sequences side by side are (total, heads, head_dim)")
    left, right = _limits(window_size, causal)
    mask = _sequences_mask((cu_seqlens_q, cu_seqlens_k), q.shape[0], k.shape[0], causal, left, right)
    unused = q.shape[0] - mask.n_queries
    q, k, v = q[: mask.n_queries], k[: mask.n_keys], v[: mask.n_keys]
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        sequences = cu_seqlens_q.numel() - 1
        if alibi_slopes.shape != (sequences, q.shape[1]) or alibi_slopes.device != q.device:
            raise ValueError(
                f"alibi_slopes {tuple(alibi_slopes.shape)} on {alibi_slopes.device}: must be ({q.shape[1]},) or "
                f"({sequences}, {q.shape[1]}) on {q.device}"
            )
        alibi_slopes = _slope_of_rows(alibi_slopes, cu_seqlens_q, q.shape[0])
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    whole, whole_lse, options = _attend(q, k, v, mask, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic)
    out, lse = whole.squeeze(0), whole_lse.squeeze(0)
    if unused:
        out, lse = F.pad(out, (0, 0, 0, 0, 0, unused)), F.pad(lse, (0, unused), value=-torch.inf)
    if not return_attn_probs:
        return out
    if options.seed is None:
        return out, lse, q.new_empty(0)
    probabilities = q.new_zeros(cu_seqlens_q.numel() - 1, q.shape[2], max_seqlen_q, max_seqlen_k)
    for sequence, (rows, keys) in enumerate(zip(_ranges(cu_seqlens_q), _ranges(cu_seqlens_k), strict=True)):
        part = _signed_probabilities(q, k, whole_lse, mask, options, rows, keys)
        probabilities[sequence, :, : part.shape[2], : part.shape[3]] = part[0]
    return out, lse, probabilities


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with kv (total_k, 2, kv_heads, head_dim)."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with qkv (total, 3, heads, head_dim)."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


# names of flash-attention 1 -------------------------------------------------------------------------------------------


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Result:
    """`flash_attn_varlen_func` under its old name; softmax_lse is (sequences, heads, max_seqlen_q), -inf at its end."""
    result = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip
    if isinstance(result, Tensor):
        return result
    out, lse, probabilities = result
    padded = lse.new_full((cu_seqlens_q.numel() - 1, q.shape[1], max_seqlen_q), -torch.inf)
    for sequence, rows in enumerate(_ranges(cu_seqlens_q)):
        padded[sequence, :, : rows.numel()] = lse[:, rows]
    return out, padded, probabilities


def flash_attn_unpadded_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Result:
    """`flash_attn_unpadded_func` with kv (total_k, 2, kv_heads, head_dim)."""
    k, v = kv.unbind(1)
    return flash_attn_unpadded_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        return_attn_probs, deterministic,
    )  # fmt: skip


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Result:
    """`flash_attn_unpadded_func` with qkv (total, 3, heads, head_dim)."""
    q, k, v = qkv.unbind(1)
    return flash_attn_unpadded_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        return_attn_probs, deterministic,
    )  # fmt: skip


def flash_attn_unpadded_qkvpacked_split_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen0: int,
    max_seqlen1: int,
    batch_size0: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_unpadded_qkvpacked_func` where the first `batch_size0` sequences are at most `max_seqlen0` long.

    The original ran two kernels, one for each part; here one launch serves sequences of all lengths. S_dmask comes in
    two parts, (batch_size0, ..., max_seqlen0, max_seqlen0) and the rest with max_seqlen1.
    """
    longest = max(max_seqlen0, max_seqlen1)
    result = flash_attn_unpadded_qkvpacked_func(
        qkv, cu_seqlens, longest, dropout_p, softmax_scale, causal, return_attn_probs, deterministic
    )
    if isinstance(result, Tensor):
        return result
    out, lse, probabilities = result
    if not probabilities.numel():
        return out, lse, probabilities, probabilities
    first = probabilities[:batch_size0, :, :max_seqlen0, :max_seqlen0]
    return out, lse, first, probabilities[batch_size0:, :, :max_seqlen1, :max_seqlen1]


# modules --------------------------------------------------------------------------------------------------------------


class _FlashModule(nn.Module):
    """The settings that `FlashSelfAttention` and `FlashCrossAttention` share."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale, self.window_size = causal, softmax_scale, window_size
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.deterministic = deterministic

    def settings(self, causal: bool | None) -> dict:
        """Keyword arguments of the functions."""
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if self.alibi_slopes is None else self.alibi_slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_FlashModule):
    """Attention of packed q, k and v as a module; dropout while training."""

    def forward(
        self, qkv: Tensor, causal: bool | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Result:
        """qkv (batch, sequence, 3, heads, head_dim), or (total, 3, heads, head_dim) with cu_seqlens and max_seqlen.

        Returns (batch, sequence, heads, head_dim) or (total, heads, head_dim).
        """
        settings = self.settings(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **settings)
        if max_seqlen is None:
            raise ValueError("cu_seqlens without max_seqlen: give the length of the longest sequence")
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **settings)


class FlashCrossAttention(_FlashModule):
    """Attention of q over packed k and v as a module; dropout while training."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Window = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Result:
        """q (batch, n_queries, heads, head_dim) and kv (batch, n_keys, 2, kv_heads, head_dim); or, with cu_seqlens
        and max_seqlen of both, (total_q, heads, head_dim) and (total_k, 2, kv_heads, head_dim). Returns out like q.
        """
        settings = self.settings(causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **settings)
        if cu_seqlens_k is None or max_seqlen is None or max_seqlen_k is None:
            raise ValueError("cu_seqlens needs max_seqlen, cu_seqlens_k and max_seqlen_k beside it")
        return flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **settings)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyIntervals,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Options]:
    """Out, lse, and the options they were made with, of (batch, sequence, heads, head_dim)."""
    options = Options(
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        max(softcap, 0.0),
        alibi_slopes,
        dropout_p,
        new_seed(q.device) if dropout_p else None,
        deterministic,
    )
    out, lse = attention(
        q, k, v, mask, scale=options.scale, softcap=options.softcap, alibi_slopes=options.alibi_slopes,
        dropout=options.dropout, seed=options.seed, deterministic=options.deterministic,
    )  # fmt: skip
    return out, lse, options


# masks and probabilities ----------------------------------------------------------------------------------------------


def _limits(window_size: Window, causal: bool) -> tuple[int | None, int | None]:
    """The keys to the left and right of a row that it sees; None: all. A causal mask already limits the right."""
    left, right = (None if int(limit) < 0 else int(limit) for limit in window_size)
    return left, None if causal else right


def _mask(
    n_queries: int, n_keys: int, causal: bool, left: int | None, right: int | None, device: torch.device
) -> KeyIntervals:
    if left is None and right is None:
        return KeyIntervals(n_queries, n_keys, is_causal=causal)
    return banded(KeyIntervals(n_queries, n_keys, is_causal=causal), left, right, device)


@cached_per_mask
def _sequences_mask(
    cu_seqlens: tuple[Tensor, Tensor], n_queries: int, n_keys: int, causal: bool, left: int | None, right: int | None
) -> KeyIntervals:
    """Made once for the same offsets (of queries, of keys), so that all layers share its tiles.

    It ends with the last sequence, as what lies past that may be anything, NaN too, where waiting for the device to
    know it is possible.
    """
    if not hardware.is_recording():
        lengths = zip((n_queries, n_keys), cu_seqlens, strict=True)
        n_queries, n_keys = (min(n, max(0, int(c[-1]))) if c.ndim == 1 and len(c) else n for n, c in lengths)
    mask = KeyIntervals.sequences(*cu_seqlens, n_queries, n_keys, causal)
    return mask if left is None and right is None else mask.band(left, right, cu_seqlens[0].device)


def _slope_of_rows(slopes: Tensor, cu_seqlens_q: Tensor, n_queries: int) -> Tensor:
    """Slopes (sequences, heads) as (1, n_queries, heads)."""
    _, sequence = sequence_of_rows(cu_seqlens_q, n_queries)
    return slopes[sequence.clamp(max=slopes.shape[0] - 1)].unsqueeze(0)


def _ranges(cu_seqlens: Tensor) -> list[Tensor]:
    """Of each sequence the indices of its tokens."""
    offsets = cu_seqlens.tolist()
    return [torch.arange(first, last, device=cu_seqlens.device) for first, last in pairwise(offsets)]


def _signed_probabilities(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: KeyIntervals,
    options: Options,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """(batch, heads, rows, keys) in q's dtype: the softmax, negative where dropout drops. The matrix is in memory."""
    if rows is not None and keys is not None:
        slopes = options.alibi_slopes
        if slopes is not None and slopes.ndim == 3:
            slopes = slopes[:, rows]
        options = Options(options.scale, options.softcap, slopes, options.dropout, options.seed)
        q, k, lse, mask = q[:, rows], k[:, keys], lse[:, :, rows], mask.rows(rows).keys(keys)
    with torch.no_grad():
        scores, _ = attention_scores(q, k, mask, options)
        probabilities = torch.exp(scores - finite_lse(lse).unsqueeze(-1))
        is_kept = dropout_weight(mask, options, q.shape[0], q.shape[2]) > 0
        return torch.where(is_kept, probabilities, -probabilities).to(q.dtype)
