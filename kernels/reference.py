"""Every op in plain torch: the specification, the path of the CPU, the truth of the tests.

Each op computes in float32, or in float64 where its inputs are float64, and rounds its results to the inputs' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# attention -----------------------------------------------------------------------------------------------------------


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """(batch, keys, kv_heads, head_dim) -> (batch, keys, n_heads, head_dim): each K/V head serves a group of queries."""
    return x if x.shape[2] == n_heads else x.repeat_interleave(n_heads // x.shape[2], dim=2)


def sum_repeated_heads(dx: Tensor, n_kv_heads: int) -> Tensor:
    """The gradient of `repeat_heads`: sums the heads of each group."""
    if dx.shape[2] == n_kv_heads:
        return dx
    return dx.unflatten(2, (n_kv_heads, dx.shape[2] // n_kv_heads)).sum(3)


def visible(start: Tensor, end: Tensor, n_keys: int) -> Tensor:
    """(batch or 1, 1, n_queries, n_keys) bool: True where `start <= key < end`."""
    key = torch.arange(n_keys, device=start.device)
    return ((key >= start.unsqueeze(-1)) & (key < end.unsqueeze(-1))).unsqueeze(1)


def _scores(q: Tensor, k: Tensor, start: Tensor, end: Tensor, scale: float) -> Tensor:
    compute = accumulation_dtype(q.dtype)
    k = repeat_heads(k, q.shape[2])
    scores = torch.einsum("bihd,bjhd->bhij", q.to(compute), k.to(compute)) * scale
    return scores.masked_fill(~visible(start, end, k.shape[1]), -torch.inf)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, and the log-sum-exp of each row of scores.

    q (batch, n_queries, heads, head_dim); k, v (batch, n_keys, kv_heads, head_dim), heads a multiple of kv_heads;
    start, end (batch or 1, n_queries): row i sees the keys start[i] <= j < end[i].
    Returns out like q and lse (batch, heads, n_queries) in float32 (float64 for float64), natural log. A row that
    sees no key has out 0 and lse -inf. The whole score matrix is in memory. (Dao et al. 2022, FlashAttention, Alg. 0)
    """
    scores = _scores(q, k, start, end, scale)
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.exp(scores - finite_lse(lse).unsqueeze(-1))
    out = torch.einsum("bhij,bjhd->bihd", probabilities, repeat_heads(v, q.shape[2]).to(probabilities.dtype))
    return out.to(q.dtype).contiguous(), lse


def finite_lse(lse: Tensor) -> Tensor:
    """`lse` with -inf (a row without keys) as +inf, so that exp(score - lse) is 0 there and never NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_forward` to q, k and v.

    `out` and `lse` may be those of a softmax over more keys than `k` holds: the result is then this block's share.
    """
    compute = accumulation_dtype(q.dtype)
    heads, kv_heads = q.shape[2], k.shape[2]
    probabilities = torch.exp(_scores(q, k, start, end, scale) - finite_lse(lse).unsqueeze(-1))
    dout = dout.to(compute)
    delta = (dout * out.to(compute)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    dv = torch.einsum("bhij,bihd->bjhd", probabilities, dout)
    dprobabilities = torch.einsum("bihd,bjhd->bhij", dout, repeat_heads(v, heads).to(compute))
    dscores = probabilities * (dprobabilities - delta.unsqueeze(-1)) * scale
    dq = torch.einsum("bhij,bjhd->bihd", dscores, repeat_heads(k, heads).to(compute))
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q.to(compute))
    dk, dv = sum_repeated_heads(dk, kv_heads), sum_repeated_heads(dv, kv_heads)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


# norms ---------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim of x (..., width). (Zhang and Sennrich 2019)"""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim of x (..., width). (Ba et al. 2016)"""
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


# rotary --------------------------------------------------------------------------------------------------------------


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim/2]) by a position's angles: the half-split form of Llama and GPT-NeoX.

    x (batch, sequence, heads, head_dim); cos, sin (batch or 1, sequence, head_dim / 2). (Su et al. 2021, RoFormer)
    """
    compute = accumulation_dtype(x.dtype)
    first, second = x.to(compute).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# losses --------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token, nats: logits (..., vocabulary), targets (...) with -100 for none. Losses (...), fp32 or fp64."""
    flat = logits.flatten(0, -2).to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="none").view_as(targets)


def project_to_vocabulary(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """hidden (..., width) @ weight (vocabulary, width)^T, squashed to +-softcap by tanh where one is given."""
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, chunk_tokens: int = 8192
) -> Tensor:
    """`cross_entropy(project_to_vocabulary(hidden, weight), targets)` with the logits of one chunk of tokens at a time.

    hidden (batch, sequence, width), weight (vocabulary, width), targets (batch, sequence). The logits of a chunk are
    made again in the backward pass. Losses (batch, sequence), nats, 0 where the target is -100.
    """
    tokens, labels = hidden.flatten(0, -2), targets.flatten()

    def chunk_losses(chunk: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(project_to_vocabulary(chunk, weight, softcap), labels)

    if tokens.shape[0] <= chunk_tokens:
        return chunk_losses(tokens, labels).view_as(targets).clone()  # no view: module hooks refuse one
    losses = [
        checkpoint(chunk_losses, chunk, chunk_labels, use_reentrant=False)
        for chunk, chunk_labels in zip(tokens.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    ]
    return torch.cat(losses).view_as(targets).clone()  # pyright: ignore[reportArgumentType]  checkpoint is untyped


# pointwise -----------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. (Shazeer 2020, GLU Variants Improve Transformer)"""
    return F.silu(gate) * up
