"""The attention op: one function, what it accepts, and its custom op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx.kernels import precision
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.choice import choose_implementation, explain_choice
from longctx.kernels.attention.custom_op import Call, attention_op
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.passes import attention_backward, attention_forward
from longctx.kernels.dropout import new_seed
from longctx.kernels.forward_mode import refuse_tangents

MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyIntervals | BlockMask,
    scale: float | None = None,
    implementation: str = "auto",
    *,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v with scores = scale * q k^T + mask, and the log-sum-exp of each row: both differentiable.

    q (batch, n_queries, heads, head_dim); k and v (batch, n_keys, kv_heads, head_dim) with heads a multiple of
    kv_heads; all float16, bfloat16 or float32 (float64 for the reference), head_dim up to 256. scale: 1 /
    sqrt(head_dim) by default. `softcap`: scores become softcap * tanh(score / softcap); 0 or None: they do not.
    `alibi_slopes`, float32 (heads,), (batch, heads) or (batch, n_queries, heads): slope times distance is taken off.
    `dropout`: probability with which an entry of the softmax is dropped; its `seed` (one int64) is drawn from torch's
    generator. `deterministic`: the same bits each time. `sink` (heads,): the score of one more key whose value is 0,
    with gradient (Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks). All has to be finite,
    what a mask hides too (0 * NaN is NaN), but for what lies past the last sequence of `flash_attn_varlen_func`.

    In torch.autocast q, k and v are cast first, as by torch's attention. Returns out, like q, and lse (batch, heads,
    n_queries), float32 (float64 for float64 inputs), natural log. A row that sees no key has out 0, lse -inf and zero
    gradients. Raises ValueError where arguments and implementation do not fit each other, TypeError for no mask.
    """
    q, k, v = precision.autocast(q, k, v)  # pyright: ignore[reportAssignmentType]
    check_inputs(q, k, v)
    _check_mask(mask, sink, q, k)
    options = make_options(
        q, scale, softcap=softcap, alibi_slopes=alibi_slopes, dropout=dropout, seed=seed, deterministic=deterministic
    )
    call = Call(mask, options, choose_implementation(implementation, q, mask, options))
    refuse_tangents(q, k, v, sink, alibi_slopes)
    return _attention(q, k, v, sink, *call.flat())


def explain(
    q: Tensor, mask: KeyIntervals | BlockMask, scale: float | None = None, *, softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None, sink: Tensor | None = None, dropout: float = 0.0, deterministic: bool = False,
) -> str:  # fmt: skip
    """What `auto` takes for such a call of `attention`, and why none of the others: a line each, fastest first."""
    (q,) = precision.autocast(q)  # pyright: ignore[reportAssignmentType]
    _check_kind(mask)
    del sink  # every implementation has it
    no_seed = torch.zeros(1, dtype=torch.int64, device=q.device)  # none is drawn to explain
    options = make_options(
        q, scale, softcap=softcap, alibi_slopes=alibi_slopes, dropout=dropout, seed=no_seed, deterministic=deterministic
    )
    return explain_choice(q, mask, options)


def make_options(
    q: Tensor,
    scale: float | None = None,
    *,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
) -> Options:
    """The options of an attention from queries like `q`, with the defaults of `attention`. Raises ValueError."""
    if dropout and seed is None:
        seed = new_seed(q.device)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    options = Options(factor, softcap or 0.0, alibi_slopes, dropout, seed if dropout else None, deterministic)
    check_options(options, q)
    return options


# what a call must be --------------------------------------------------------------------------------------------------


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError, with all that is wrong, unless these are the queries, keys and values of one attention."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be 4-dimensional, k like v"
        )
    problems = []
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        problems.append(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head_dim")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        problems.append(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads")
    if not 0 < q.shape[3] <= MAX_HEAD_DIM:
        problems.append(f"head_dim {q.shape[3]}: must be 1 to {MAX_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        problems.append(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: must be of one floating dtype")
    if not q.device == k.device == v.device:
        problems.append(f"q on {q.device}, k on {k.device}, v on {v.device}: must be on one device")
    if problems:
        raise ValueError("attention: " + "; ".join(problems))


def _check_kind(mask: KeyIntervals | BlockMask) -> None:
    if not isinstance(mask, KeyIntervals | BlockMask):
        raise TypeError(f"attention: mask is a {type(mask).__name__}, must be a KeyIntervals or BlockMask")


def _check_mask(mask: KeyIntervals | BlockMask, sink: Tensor | None, q: Tensor, k: Tensor) -> None:
    _check_kind(mask)
    problems = []
    if (q.shape[1], k.shape[1]) != (mask.n_queries, mask.n_keys):
        problems.append(
            f"the mask is for {mask.n_queries} queries and {mask.n_keys} keys, "
            f"the call has {q.shape[1]} and {k.shape[1]}"
        )
    bounds = mask.intervals.start if isinstance(mask, BlockMask) else mask.start
    problems += kept_problems(mask, q) if isinstance(mask, BlockMask) else []
    problems += [] if bounds is None else bound_problems(bounds, q)
    if sink is not None and not isinstance(sink, Tensor):
        problems.append(f"sink {sink!r}: must be a tensor ({q.shape[2]},), a score a query head")
    elif sink is not None and (sink.shape != (q.shape[2],) or sink.device != q.device or not sink.is_floating_point()):
        problems.append(
            f"sink {tuple(sink.shape)} on {sink.device}, {sink.dtype}: must be ({q.shape[2]},), a score a query head"
        )
    if problems:
        raise ValueError("attention: " + "; ".join(problems))


def kept_problems(mask: BlockMask, q: Tensor) -> list[str]:
    """What is wrong with a mask of blocks for queries like `q`."""
    kept, problems = mask.kept, []
    blocks = -(-mask.n_queries // mask.block_q), -(-mask.n_keys // mask.block_k)
    if kept.dtype != torch.bool or kept.shape not in ((1, *blocks), (q.shape[2], *blocks)):
        problems.append(
            f"kept {tuple(kept.shape)} {kept.dtype}: must be torch.bool, (1 or {q.shape[2]}, {blocks[0]}, {blocks[1]})"
        )
    if not kept.is_contiguous() or kept.device != q.device:
        problems.append(f"kept is to be contiguous and on {q.device}: give kept.contiguous().to(q.device)")
    if mask.intervals.start is None:
        problems.append("its intervals have no bounds: give intervals.with_bounds(q.device)")
    return problems


def bound_problems(bounds: Tensor, q: Tensor) -> list[str]:
    """What is wrong with the bounds of a mask (batch or 1, rows) for queries like `q`."""
    problems = []
    if bounds.shape[0] not in (1, q.shape[0]):
        problems.append(f"the mask has {bounds.shape[0]} rows of bounds for a batch of {q.shape[0]}")
    if bounds.device != q.device:
        problems.append(f"the mask is on {bounds.device}, q on {q.device}: move it with mask.to(q.device)")
    return problems


def check_options(options: Options, q: Tensor) -> None:
    """Raises ValueError, with all that is wrong, unless queries like `q` can be attended from with `options`."""
    problems = []
    batch, n_queries, heads, _ = q.shape
    if isinstance(options.scale, Tensor | str) or not 0 < options.scale < math.inf:
        problems.append(f"scale {options.scale}: must be finite, above 0 and no tensor: multiply a learned one into q")
    if not 0 <= options.softcap < math.inf:
        problems.append(f"softcap {options.softcap}: must be finite and above 0, or 0 for none")
    if not 0 <= options.dropout < 1:
        problems.append(f"dropout {options.dropout}: must be a probability below 1")
    slopes = options.alibi_slopes
    shapes = ((heads,), (batch, heads), (batch, n_queries, heads))
    if slopes is not None and (slopes.shape not in shapes or slopes.dtype != torch.float32):
        problems.append(
            f"alibi_slopes {tuple(slopes.shape)} {slopes.dtype}: must be torch.float32, {' or '.join(map(str, shapes))}"
        )
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        problems.append("alibi_slopes get no gradient here: give them detached")
    seed = options.seed
    if seed is not None and not isinstance(seed, Tensor):
        raise ValueError(f"attention: seed {seed!r}: must be a tensor, such as torch.tensor(1, device=q.device)")
    for name, tensor in (("alibi_slopes", slopes), ("seed", seed)):
        if tensor is not None and tensor.device != q.device:
            problems.append(f"{name} on {tensor.device}, q on {q.device}: must be on one device")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        problems.append(f"seed {tuple(seed.shape)} {seed.dtype}: must be one torch.int64")
    if problems:
        raise ValueError("attention: " + "; ".join(problems))


# the custom op --------------------------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    return attention_forward(q, k, v, *call, sink)


def _backward(dout: Tensor, dlse: Tensor | None, saved: Saved, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(dout, dlse, saved, *call)


_attention = attention_op("attention", _forward, _backward)
