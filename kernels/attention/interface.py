"""The attention op: one function, its custom ops, and the choice of the implementation that serves a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from longctx.kernels import reference
from longctx.kernels.attention import sdpa
from longctx.kernels.attention.mask import KeyIntervals

IMPLEMENTATIONS = ("auto", "sdpa", "reference")


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals, scale: float | None = None, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, and the log-sum-exp of each row of scores, both differentiable.

    q (batch, n_queries, heads, head_dim); k and v (batch, n_keys, kv_heads, head_dim) with heads a multiple of
    kv_heads; all of one floating dtype. scale: 1 / sqrt(head_dim) by default. Returns out, like q, and lse (batch,
    heads, n_queries), float32 (float64 for float64 inputs), natural log. A row that sees no key has out 0, lse -inf
    and zero gradients. Raises ValueError where shapes, mask and implementation do not fit.
    """
    _check_shapes(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attention(q, k, v, mask.start, mask.end, mask.is_causal, scale, choose(implementation, q), "")


def choose(implementation: str, q: Tensor) -> str:
    """The implementation that serves a call: the one asked for, or for `auto` the fastest that can.

    Raises ValueError if the one asked for cannot serve inputs like `q`, and says why.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "reference":
        return implementation
    reason = sdpa.unsupported(q)
    if reason and implementation == "sdpa":
        raise ValueError(f"attention implementation 'sdpa' cannot serve this call: {reason}; use 'auto' or 'reference'")
    return "reference" if reason else "sdpa"


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> None:
    problems = []
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be 4-dimensional, k like v")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        problems.append(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head_dim")
    if q.shape[2] % k.shape[2]:
        problems.append(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads")
    if (q.shape[1], k.shape[1]) != (mask.n_queries, mask.n_keys):
        problems.append(
            f"the mask is for {mask.n_queries} queries and {mask.n_keys} keys, "
            f"the call has {q.shape[1]} and {k.shape[1]}"
        )
    if mask.start is not None and mask.start.shape[0] not in (1, q.shape[0]):
        problems.append(f"the mask has {mask.start.shape[0]} rows of bounds for a batch of {q.shape[0]}")
    if not q.dtype == k.dtype == v.dtype:
        problems.append(f"q {q.dtype}, k {k.dtype}, v {v.dtype} differ in dtype")
    if problems:
        raise ValueError("attention: " + "; ".join(problems))


# one block ----------------------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """One block of attention without autograd: what the ops of this file and of context parallelism are made of."""
    if implementation == "sdpa":
        return sdpa.forward(q, k, v, mask, scale)
    return reference.attention_forward(q, k, v, *mask.bounds(q.device), scale)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: KeyIntervals,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block; `out` and `lse` are those of the whole softmax, of which this block may be a part."""
    if implementation == "sdpa":
        return sdpa.backward(dout, dlse, q, k, v, out, lse, mask, scale)
    return reference.attention_backward(dout, dlse, q, k, v, out, lse, *mask.bounds(q.device), scale)


# custom ops ----------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What an attention op is called with besides its tensors."""

    start: Tensor | None  # of the mask's key intervals, with `end`
    end: Tensor | None
    is_causal: bool
    scale: float
    implementation: str
    group_name: str  # of the processes that share the sequence; empty: it is whole


Forward = Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def attention_op(name: str, forward: Forward, backward: Backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers `longctx::<name>(q, k, v, *call)` and its gradient.

    `forward(q, k, v, call)` gives out and lse, `backward(dout, dlse, q, k, v, out, lse, call)` gives dq, dk and dv;
    dlse is None where no gradient comes through lse. A custom op is opaque to torch.compile, breaks no graph, and is
    seen whole by a recompute policy.
    """

    @custom_op(f"longctx::{name}", mutates_args=())
    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        is_causal: bool,
        scale: float,
        implementation: str,
        group_name: str,
    ) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, Call(start, end, is_causal, scale, implementation, group_name))

    @custom_op(f"longctx::{name}_backward", mutates_args=())
    def backward_op(
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        is_causal: bool,
        scale: float,
        implementation: str,
        group_name: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(start, end, is_causal, scale, implementation, group_name)
        return backward(dout.contiguous(), dlse, q, k, v, out, lse, call)

    @op.register_fake
    def _(q, k, v, *_call):
        batch, n_queries, heads, _ = q.shape
        lse = q.new_empty((batch, heads, n_queries), dtype=reference.accumulation_dtype(q.dtype))
        return q.new_empty(q.shape), lse

    @backward_op.register_fake
    def _(dout, dlse, q, k, v, *_others):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx, inputs, output) -> None:
        q, k, v, start, end, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, start, end, *output)

    def autograd(ctx, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, start, end, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = backward_op(dout, dlse, q, k, v, out, lse, start, end, *ctx.settings)
        return *gradients, None, None, None, None, None, None

    op.register_autograd(autograd, setup_context=setup_context)
    return op


def _mask_of(q: Tensor, k: Tensor, call: Call) -> KeyIntervals:
    return KeyIntervals(q.shape[1], k.shape[1], call.is_causal, call.start, call.end)


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, _mask_of(q, k, call), call.scale, call.implementation)


def _attention_backward(dout, dlse, q, k, v, out, lse, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dout, dlse, q, k, v, out, lse, _mask_of(q, k, call), call.scale, call.implementation)


_attention = attention_op("attention", _attention_forward, _attention_backward)
