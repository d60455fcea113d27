"""Attention in plain torch: the specification, the path of the CPU, the truth of the tests.

Sums and exponentials are in float32, or in float64 where the inputs are; results have the inputs' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.dropout import kept
from longctx.kernels.precision import accumulation_dtype


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """(batch, keys, kv_heads, head_dim) -> (batch, keys, n_heads, head_dim): each serves a group of queries."""
    return x if x.shape[2] == n_heads else x.repeat_interleave(n_heads // x.shape[2], dim=2)


def sum_repeated_heads(dx: Tensor, n_kv_heads: int) -> Tensor:
    """The gradient of `repeat_heads`: sums the heads of each group."""
    if dx.shape[2] == n_kv_heads:
        return dx
    return dx.unflatten(2, (n_kv_heads, dx.shape[2] // n_kv_heads)).sum(3)


def added(
    gradients: tuple[Tensor, Tensor, Tensor], into: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`into` with `gradients` added in place, or these where there is nothing to add to."""
    if into is None:
        return gradients
    for target, gradient in zip(into, gradients, strict=True):
        target.add_(gradient)
    return into


def attention_scores(
    q: Tensor, k: Tensor, mask: KeyIntervals | BlockMask, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Masked scores, (batch, heads, n_queries, n_keys), and the slope of the softcap at each, if there is one."""
    compute = accumulation_dtype(q.dtype)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(compute), repeat_heads(k, q.shape[2]).to(compute)) * options.scale
    slope = None
    if options.softcap:
        squashed = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * squashed, 1 - squashed**2
    if (slopes := options.slopes(*q.shape[:3])) is not None:
        query_position, key_position = mask.positions(q.device)
        distance = (query_position.unsqueeze(-1) - key_position).abs().unsqueeze(1)
        scores = scores - slopes.to(compute).transpose(1, 2).unsqueeze(-1) * distance
    return scores.masked_fill(~mask.dense(q.device), -torch.inf), slope


def dropout_weight(mask: KeyIntervals | BlockMask, options: Options, batch: int, heads: int) -> Tensor:
    """(batch, heads, n_queries, n_keys) float64: 0 for what dropout drops, 1 / (1 - dropout) for what it keeps."""
    assert options.seed is not None
    query_position, key_position = mask.positions(options.seed.device)
    stream = torch.arange(batch * heads, device=options.seed.device).view(batch, heads, 1, 1)
    keeps = kept(options.seed, options.threshold, stream, query_position[:, None, :, None], key_position)
    return keeps.to(torch.float64) / (1 - options.dropout)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals | BlockMask, options: Options
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v, and the log-sum-exp of each row of scores.

    q (batch, n_queries, heads, head_dim); k, v (batch, n_keys, kv_heads, head_dim), heads a multiple of kv_heads.
    Returns out like q and lse (batch, heads, n_queries) in float32 (float64 for float64), natural log. A row that sees
    no key has out 0 and lse -inf. The whole score matrix is in memory. (Dao et al. 2022, FlashAttention, Alg. 0)
    """
    scores, _ = attention_scores(q, k, mask, options)
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.exp(scores - finite_lse(lse).unsqueeze(-1))
    if options.seed is not None:
        probabilities = probabilities * dropout_weight(mask, options, q.shape[0], q.shape[2]).to(probabilities.dtype)
    out = torch.einsum("bhij,bjhd->bihd", probabilities, repeat_heads(v, q.shape[2]).to(probabilities.dtype))
    return out.to(q.dtype).contiguous(), lse


def finite_lse(lse: Tensor) -> Tensor:
    """`lse` with -inf (a row without keys) as +inf, so that exp(score - lse) is 0 there and never NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys from that over each: out (b, n, h, d) in float32, lse (b, h, n)."""
    total = torch.logaddexp(lse, part_lse)
    reference = finite_lse(total)
    weight, part_weight = ((x - reference).exp().transpose(1, 2).unsqueeze(-1) for x in (lse, part_lse))
    return out * weight + part * part_weight, total


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one more key, of score `sink` (heads,) and value 0: out (b, n, h, d), lse (b, h, n)."""
    total = torch.logaddexp(lse, sink.to(lse.dtype).view(1, -1, 1).expand_as(lse))
    return (out.to(lse.dtype) * (lse - finite_lse(total)).exp().transpose(1, 2).unsqueeze(-1)).to(out.dtype), total


def attention_delta(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """rowsum(dout * out) - dlse, (batch, heads, n_queries): what the gradient of a score has subtracted."""
    compute = accumulation_dtype(out.dtype)
    delta = (dout.to(compute) * out.to(compute)).sum(-1).transpose(1, 2)
    return delta if dlse is None else delta - dlse


def sink_gradient(delta: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient to `sink` (heads,); delta and lse (batch, heads, n_queries), lse with the sink in it."""
    return -(torch.exp(sink.to(lse.dtype).view(1, -1, 1) - finite_lse(lse)) * delta).sum((0, 2)).to(sink.dtype)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    mask: KeyIntervals | BlockMask,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_forward` to q, k and v."""
    q, k, v, out, lse = saved
    compute = accumulation_dtype(q.dtype)
    heads, kv_heads = q.shape[2], k.shape[2]
    scores, slope = attention_scores(q, k, mask, options)
    probabilities = torch.exp(scores - finite_lse(lse).unsqueeze(-1))
    dout = dout.to(compute)
    dprobabilities = torch.einsum("bihd,bjhd->bhij", dout, repeat_heads(v, heads).to(compute))
    kept = probabilities
    if options.seed is not None:
        weight = dropout_weight(mask, options, q.shape[0], heads).to(compute)
        kept, dprobabilities = probabilities * weight, dprobabilities * weight
    dv = torch.einsum("bhij,bihd->bjhd", kept, dout)
    delta = attention_delta(dout, dlse, out).masked_fill(lse == -torch.inf, 0)  # of rows without keys dlse may be NaN
    dscores = probabilities * (dprobabilities - delta.unsqueeze(-1)) * options.scale
    if slope is not None:
        dscores = dscores * slope
    dq = torch.einsum("bhij,bjhd->bihd", dscores, repeat_heads(k, heads).to(compute))
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q.to(compute))
    dk, dv = sum_repeated_heads(dk, kv_heads), sum_repeated_heads(dv, kv_heads)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
