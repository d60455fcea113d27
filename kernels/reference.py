"""Every op in plain torch: the specification, the path of the CPU, the truth of the tests.

Sums, exponentials and angles are in float32, or in float64 where the inputs are; results have the inputs' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.mask import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.kernels.launch import dropout_threshold
from longctx.kernels.loss_options import PLAIN, LossOptions


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# attention -----------------------------------------------------------------------------------------------------------


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


def kept(seed: Tensor, threshold: int, stream: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Which entries dropout keeps, of a shape to which the integers that name them broadcast; see `philox`."""
    return philox(seed, stream, row, column)[0] >= threshold


def kept_of_rows(seed: Tensor, threshold: int, row: Tensor, column: Tensor) -> Tensor:
    """As `kept`, in norms: four columns share the words of one counter, (column // 4, row, 0, 0)."""
    words = torch.stack(torch.broadcast_tensors(*philox(seed, torch.zeros_like(column), row, column // 4)))
    place = (column % 4).expand(words.shape[1:])
    return words.gather(0, place.unsqueeze(0)).squeeze(0) >= threshold


def philox(seed: Tensor, stream: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits, as int64, for each counter.

    Philox-4x32 with ten rounds (Salmon et al. 2011): the counter is (column, row, stream, 0), in attention (key
    position, row position, batch * heads + head, 0), the key the seed.
    """
    word = torch.tensor(2**32 - 1, device=seed.device)
    c0, c1 = column.to(torch.int64) & word, row.to(torch.int64) & word
    c2, c3 = stream, torch.zeros_like(stream)
    key0, key1 = seed & word, (seed >> 32) & word

    def high_word(x: Tensor, factor: int) -> Tensor:  # of a product of two 32-bit words, without passing 2^63
        return ((x >> 16) * factor + ((x & 0xFFFF) * factor >> 16)) >> 16

    for _ in range(10):
        c0, c1, c2, c3 = (
            high_word(c2, 0xCD9E8D57) ^ c1 ^ key0,
            c2 * 0xCD9E8D57 & word,
            high_word(c0, 0xD2511F53) ^ c3 ^ key1,
            c0 * 0xD2511F53 & word,
        )
        key0, key1 = key0 + 0x9E3779B9 & word, key1 + 0xBB67AE85 & word
    return c0, c1, c2, c3


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
    return (out.to(lse.dtype) * (lse - total).exp().transpose(1, 2).unsqueeze(-1)).to(out.dtype), total


def attention_delta(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """rowsum(dout * out) - dlse, (batch, heads, n_queries): what the gradient of a score has subtracted."""
    compute = accumulation_dtype(out.dtype)
    delta = (dout.to(compute) * out.to(compute)).sum(-1).transpose(1, 2)
    return delta if dlse is None else delta - dlse


def sink_gradient(delta: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient to `sink` (heads,); delta and lse (batch, heads, n_queries), lse with the sink in it."""
    return -(torch.exp(sink.to(lse.dtype).view(1, -1, 1) - lse) * delta).sum((0, 2)).to(sink.dtype)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: KeyIntervals | BlockMask,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_forward` to q, k and v.

    `out` and `lse` may be those of a softmax over more keys than `k` holds: the result is then this block's share.
    """
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
    dscores = probabilities * (dprobabilities - attention_delta(dout, dlse, out).unsqueeze(-1)) * options.scale
    if slope is not None:
        dscores = dscores * slope
    dq = torch.einsum("bhij,bjhd->bihd", dscores, repeat_heads(k, heads).to(compute))
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q.to(compute))
    dk, dv = sum_repeated_heads(dk, kv_heads), sum_repeated_heads(dv, kv_heads)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


# norms ---------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dim of x. (Zhang and Sennrich 2019)

    x (..., width), weight (width,), or (groups, width) where x is (..., groups, width).
    """
    if weight is None or (weight.ndim == 1 and weight.dtype == x.dtype and not weight_offset):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    compute = accumulation_dtype(x.dtype)
    return (F.rms_norm(x.to(compute), (x.shape[-1],), None, eps) * (weight.to(compute) + weight_offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float = 0.0) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (weight_offset + weight) + bias over the last dim of x. (Ba et al. 2016)

    Shapes as in `rms_norm`.
    """
    if weight is None or (weight.ndim == 1 and weight.dtype == x.dtype and not weight_offset):
        return F.layer_norm(x, (x.shape[-1],), weight, None if bias is None else bias.to(x.dtype), eps)
    compute = accumulation_dtype(x.dtype)
    y = F.layer_norm(x.to(compute), (x.shape[-1],), None, None, eps) * (weight.to(compute) + weight_offset)
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def dropout_add(
    x: Tensor, residual: Tensor | None, dropout: float, seed: Tensor | None, row_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dropout(x) + residual in `dtype`; the elements of x (..., width) are named by row and column, see `kept`."""
    compute = accumulation_dtype(x.dtype)
    if seed is None and residual is not None and residual.dtype == x.dtype == dtype:
        return x + residual
    if seed is not None:
        rows = row_ids if row_ids is not None else torch.arange(x[..., 0].numel(), device=x.device).view(x.shape[:-1])
        column = torch.arange(x.shape[-1], device=x.device)
        keeps = kept_of_rows(seed, dropout_threshold(dropout), rows.unsqueeze(-1), column)
        x = torch.where(keeps, x.to(compute) / (1 - dropout), 0)
    if residual is not None:
        x = x.to(compute) + residual.to(compute)
    return x.to(dtype)


# rotary --------------------------------------------------------------------------------------------------------------


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """Turns pairs of dims of x (batch, sequence, heads, head_dim); shapes and pairs as in `longctx.kernels.rotary`."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim].to(accumulation_dtype(x.dtype)), x[..., rotary_dim:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


# losses --------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, options: LossOptions = PLAIN) -> Tensor:
    """Loss of each token in nats: logits (..., classes), targets (...) -> (...), fp32 or fp64; see `LossOptions`."""
    flat, flat_targets = logits.flatten(0, -2), targets.flatten()
    found = cross_entropy_statistics(flat, flat_targets, options, 0)
    return losses_of_statistics(found, flat_targets, options, logits.shape[-1])[0].view_as(targets)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32 or float64; the logits themselves where softcap is 0."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cross_entropy_statistics(logits: Tensor, targets: Tensor, options: LossOptions, first_class: int) -> Tensor:
    """What a loss needs of logits (tokens, classes) of the classes from `first_class` on, as (4, tokens).

    The maximum of x, the sum of exp(x - maximum), x at the target (0 where its class is not here), and the sum of x.
    """
    x = capped(logits, options.softcap)
    peak = x.amax(-1).detach()
    total = (x - peak.unsqueeze(-1)).exp().sum(-1)
    column = targets - first_class
    is_here = (column >= 0) & (column < x.shape[1])
    at_target = torch.where(is_here, x.gather(1, torch.where(is_here, column, 0).unsqueeze(1)).squeeze(1), 0)
    return torch.stack((peak, total, at_target, x.sum(-1) if options.label_smoothing else torch.zeros_like(peak)))


def losses_of_statistics(
    statistics: Tensor, targets: Tensor, options: LossOptions, n_classes: int
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each token, from the statistics of all `n_classes` classes."""
    peak, total, at_target, plain = statistics
    lse = peak + total.log()
    smoothing = options.label_smoothing
    # differences to the maximum first: large logits cancel exactly
    losses = total.log() + (1 - smoothing) * (peak - at_target)
    if options.z_loss:
        losses = losses + options.z_loss * lse**2
    if smoothing:
        losses = losses + smoothing * (peak - plain / n_classes)
    losses = torch.where((targets >= 0) & (targets < n_classes), losses, torch.nan)
    return torch.where(targets != options.ignore_index, losses, 0), lse


def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, lse: Tensor, weights: Tensor, options: LossOptions, first_class: int,
    n_classes: int,
) -> Tensor:  # fmt: skip
    """Gradient of sum(weights * losses) to the logits (tokens, classes); weights (tokens,) or a single number.

    The classes are those from `first_class` on of `n_classes`, `lse` is that of all of them.
    """
    x = capped(logits, options.softcap)
    gradient = (x - lse.unsqueeze(1)).exp_()
    if options.z_loss:
        gradient *= (1 + 2 * options.z_loss * lse).unsqueeze(1)
    if options.label_smoothing:
        gradient -= options.label_smoothing / n_classes
    column = targets - first_class
    is_here = (column >= 0) & (column < x.shape[1])
    at_target = torch.where(is_here, 1 - options.label_smoothing, 0.0).to(gradient.dtype).unsqueeze(1)
    gradient.scatter_add_(1, torch.where(is_here, column, 0).unsqueeze(1), -at_target)
    if options.softcap:
        gradient *= 1 - (x / options.softcap) ** 2
    weights = torch.where((targets >= 0) & (targets < n_classes), weights.to(gradient.dtype), torch.nan)
    gradient *= weights.unsqueeze(1)
    return gradient.masked_fill_((targets == options.ignore_index).unsqueeze(1), 0).to(logits.dtype)


def project_to_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """hidden (..., width) @ weight (vocabulary, width)^T + bias, squashed to +-softcap by tanh where one is given."""
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return logits if softcap is None else capped(logits, softcap)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: LossOptions = PLAIN
) -> Tensor:
    """`cross_entropy(project_to_vocabulary(hidden, weight, bias), targets)`, all logits at once."""
    return cross_entropy(project_to_vocabulary(hidden, weight, bias), targets, options)


# pointwise -----------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. (Shazeer 2020, GLU Variants Improve Transformer)"""
    return F.silu(gate) * up


def gelu_backward(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of tanh's GELU of x (..., width): the gradient of x, the GELU, the gradient's sum over rows in fp32 or fp64."""
    dx = torch.ops.aten.gelu_backward(dout, x, approximate="tanh")
    return dx, F.gelu(x, approximate="tanh"), dx.flatten(0, -2).sum(0, dtype=accumulation_dtype(x.dtype))


# softmax -------------------------------------------------------------------------------------------------------------


def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """softmax(scale * x + mask) over the last dim of x (..., rows, columns); 0 where nothing takes part.

    mask: boolean, True where a column takes part, or floating. (see `longctx.kernels.softmax`)
    """
    score = x.to(accumulation_dtype(x.dtype)) * scale
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
    if causal:
        visible = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril(x.shape[-1] - x.shape[-2])
        score = score.masked_fill(~visible, -torch.inf)
    empty = (score == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(score.masked_fill(empty, 0), -1).masked_fill(empty, 0).to(x.dtype)
