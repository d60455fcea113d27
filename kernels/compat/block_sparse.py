"""Block-sparse attention: only the blocks of the score matrix that a layout keeps are computed, forward and backward.

(Dao et al. 2022, FlashAttention, section 3.3.) The kernels are those of dense attention; they walk a list of the tiles
that hold a kept block, so time is proportional to what is kept. `flash_blocksparse_attn_func` and
`FlashBlocksparseAttention` have the interface of flash-attention 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from longctx.kernels import precision
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.interface import attention, check_inputs
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.mask_cache import cached_per_mask
from longctx.kernels.precision import accumulation_dtype

LAYOUT_ROWS, LAYOUT_COLUMNS = 16, 256  # queries and keys of a block in flash-attention's layout


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    block_q: int,
    block_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    deterministic: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the keys in the kept blocks of its row: equal to dense attention under that mask.

    q (batch, n_queries, heads, head_dim); k and v (batch, n_keys, kv_heads, head_dim). `layout`: true where a block of
    `block_q` queries and `block_k` keys is kept, (rows, columns) for all heads or (heads, rows, columns), with rows and
    columns enough for n_queries and n_keys. `is_causal` (bottom-right aligned) hides keys of kept blocks too. scale:
    1 / sqrt(head_dim) by default. Returns out like q and lse (batch, heads, n_queries), both differentiable; a row
    without a kept key has out 0 and lse -inf. Raises ValueError where shapes do not fit.
    """
    q, k, v = precision.autocast(q, k, v)  # pyright: ignore[reportAssignmentType]
    check_inputs(q, k, v)
    if block_q < 1 or block_k < 1:
        raise ValueError(f"blocks of {block_q} x {block_k}: must have 1 or more queries and keys")
    kept = layout.unsqueeze(0) if layout.ndim == 2 else layout
    n_queries, n_keys, heads = q.shape[1], k.shape[1], q.shape[2]
    rows, columns = -(-n_queries // block_q), -(-n_keys // block_k)
    if kept.ndim != 3 or kept.shape[0] not in (1, heads) or kept.shape[1] < rows or kept.shape[2] < columns:
        raise ValueError(
            f"layout {tuple(layout.shape)}: {n_queries} queries and {n_keys} keys in blocks of {block_q} x {block_k} "
            f"need ({rows}, {columns}), or ({heads}, {rows}, {columns}) for a layout a head"
        )
    if layout.device != q.device:
        raise ValueError(f"layout on {layout.device}, q on {q.device}: must be on one device")
    kept = _kept_blocks((layout,), rows, columns)
    mask = KeyIntervals(n_queries, n_keys, is_causal=is_causal).with_bounds(q.device)
    return attention(
        q, k, v, BlockMask(kept, block_q, block_k, mask), scale, implementation,
        dropout=dropout, deterministic=deterministic,
    )  # fmt: skip


@cached_per_mask
def _kept_blocks(layout: tuple[Tensor], rows: int, columns: int) -> Tensor:
    """The part of the layout that is used, bool and contiguous: one tensor for all layers, which share its tiles."""
    return (layout[0].reshape(-1, *layout[0].shape[-2:])[:, :rows, :columns] != 0).contiguous()


# flash-attention's interface ------------------------------------------------------------------------------------------


def flash_blocksparse_attn_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    blockmask: Tensor,
    dropout_p: float,
    max_s: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    convert_mask: bool = True,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Block-sparse attention inside each of the sequences that lie side by side.

    qkv (total, 3, heads, head_dim); cu_seqlens (sequences + 1,) int32, which is read on the CPU; `blockmask`
    (>= max_s / 16, >= max_s / 256), or a mask a head in front: nonzero where 16 queries and 256 keys of each sequence
    are kept. With `convert_mask=False` it is what `convert_blockmask` returns. Returns out (total, heads, head_dim);
    with `return_attn_probs` also an empty tensor where flash-attention has the probabilities, and softmax_lse (heads,
    total).
    """
    layout = blockmask
    if not convert_mask:
        layout = _layout_of_converted((blockmask,))
    offsets = cu_seqlens.tolist()
    lengths = {last - first for first, last in pairwise(offsets)}
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] > qkv.shape[0] or min(lengths) < 0 or max(lengths) > max_s:
        raise ValueError(
            f"cu_seqlens {offsets[:8]}... with max_s {max_s} over {qkv.shape[0]} tokens: must have 2 or more "
            "entries, start at 0, never decrease, end within the tokens, and no sequence may be longer than max_s"
        )

    def attend(part: Tensor) -> tuple[Tensor, Tensor]:  # part (batch, sequence, 3, heads, head_dim)
        q, k, v = part.unbind(2)
        return block_sparse_attention(q, k, v, layout, LAYOUT_ROWS, LAYOUT_COLUMNS, causal, softmax_scale, dropout_p)

    if len(lengths) == 1 and offsets[-1] == qkv.shape[0]:  # sequences of one length are a batch
        out, lse = attend(qkv.unflatten(0, (len(offsets) - 1, -1)))
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1, 2)
    else:
        parts = [attend(qkv[first:last].unsqueeze(0)) for first, last in pairwise(offsets) if first < last]
        rest = torch.zeros_like(qkv[offsets[-1] :, 0])
        out = torch.cat([*(part[0] for part, _ in parts), rest])
        rest_lse = rest[..., 0].T.to(accumulation_dtype(qkv.dtype)) - torch.inf
        lse = torch.cat([*(part[0] for _, part in parts), rest_lse], dim=1)
    return (out, qkv.new_empty(0), lse) if return_attn_probs else out


def convert_blockmask(blockmask: Tensor, causal: bool) -> Tensor:
    """The layout in flash-attention's column form: (columns, rows) int32, of each column the kept rows, padded with -1.

    A row's index is times 4, plus 1 at the first kept block of its row, plus 2 at the last.
    """
    if causal:
        raise ValueError("causal=True: the column form knows no causal mask; pass causal to the function instead")
    kept = blockmask != 0
    columns = kept.shape[1]
    order = torch.sort(kept.to(torch.uint8), dim=0, stable=True, descending=True).indices.T  # kept rows first
    is_kept = torch.gather(kept.T, 1, order)
    column = torch.arange(columns, device=kept.device)
    first = torch.where(kept, column, columns).amin(1)
    last = torch.where(kept, column, -1).amax(1)
    marks = (first[order] == column[:, None]) * 1 + (last[order] == column[:, None]) * 2
    return torch.where(is_kept, order * 4 + marks, -1).to(torch.int32)


@cached_per_mask
def _layout_of_converted(blockmask: tuple[Tensor]) -> Tensor:
    (converted,) = blockmask
    columns, rows = converted.shape
    kept = torch.zeros(columns, rows + 1, dtype=torch.bool, device=converted.device)
    kept.scatter_(1, torch.where(converted >= 0, converted // 4, rows).to(torch.int64), True)
    return kept[:, :rows].T.contiguous()


class SparsityConfig(Protocol):
    """What says which blocks are kept."""

    def make_layout(self, max_seq_length: int) -> Tensor:
        """(max_seq_length / 16, max_seq_length / 256), or one a head in front, nonzero where a block is kept."""
        ...


class FlashBlocksparseAttention(nn.Module):
    """Block-sparse self-attention as a module. `sparsity_config` has `make_layout(max_seq_length)`, which gives
    (rows of 16, columns of 256); the layout is a buffer. Dropout while training."""

    layout: Tensor

    def __init__(
        self,
        sparsity_config: SparsityConfig,
        softmax_temp: float | None = None,
        attention_dropout: float = 0.0,
        max_seq_length: int = 2048,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        del dtype  # flash-attention takes one too; the layout is bool
        super().__init__()
        self.softmax_temp, self.dropout_p = softmax_temp, attention_dropout
        length = -(-max_seq_length // LAYOUT_COLUMNS) * LAYOUT_COLUMNS
        self.register_buffer("layout", sparsity_config.make_layout(length).to(device))

    def forward(
        self,
        qkv: Tensor,
        attn_mask: None = None,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
        convert_mask: bool = True,
    ) -> tuple[Tensor, None]:
        """qkv (batch, sequence, 3, heads, head_dim), or with `cu_seqlens` and `max_s` (total, 3, heads, head_dim).

        `key_padding_mask` (batch, sequence) bool: true for the tokens there are; the others get 0. As flash-attention's
        it knows no `attn_mask` and gives no weights; `convert_mask` makes no difference. Returns out without the 3, and
        None in place of the weights.
        """
        if attn_mask is not None or need_weights:
            raise ValueError("attn_mask and need_weights: block-sparse attention has neither; give the layout instead")
        del convert_mask
        dropout = self.dropout_p if self.training else 0.0
        if cu_seqlens is not None:
            if max_s is None:
                raise ValueError("cu_seqlens without max_s: give the length of the longest sequence")
            out = self._attend(qkv, cu_seqlens, max_s, dropout, causal)
            return out, None
        batch, length = qkv.shape[:2]
        if key_padding_mask is None:
            offsets = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)
            out = self._attend(qkv.flatten(0, 1), offsets, length, dropout, causal)
            return out.unflatten(0, (batch, length)), None
        offsets = torch.zeros(batch + 1, dtype=torch.int32)
        offsets[1:] = key_padding_mask.sum(1).cumsum(0)
        out = self._attend(qkv[key_padding_mask], offsets, length, dropout, causal)
        padded = torch.zeros_like(qkv[:, :, 0])
        padded[key_padding_mask] = out
        return padded, None

    def _attend(self, qkv: Tensor, cu_seqlens: Tensor, max_s: int, dropout: float, causal: bool) -> Tensor:
        out = flash_blocksparse_attn_func(qkv, cu_seqlens, self.layout, dropout, max_s, self.softmax_temp, causal)
        assert isinstance(out, Tensor)
        return out
