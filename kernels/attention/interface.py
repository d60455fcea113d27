"""The attention op: one function, its custom ops, and the choice of the implementation that serves a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from longctx.kernels import launch, reference
from longctx.kernels.attention import hopper, sdpa, triton_backward, triton_forward
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.hopper_backward import GradientHomes
from longctx.kernels.attention.mask import KeyIntervals
from longctx.kernels.attention.options import Options

IMPLEMENTATIONS = ("auto", "hopper", "triton", "sdpa", "reference")
MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyIntervals | BlockMask,
    scale: float | None = None,
    implementation: str = "auto",
    *,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v with scores = scale * q k^T + mask, and the log-sum-exp of each row: both differentiable.

    q (batch, n_queries, heads, head_dim); k and v (batch, n_keys, kv_heads, head_dim) with heads a multiple of
    kv_heads; all float16, bfloat16 or float32 (float64 for the reference), head_dim up to 256. scale: 1 /
    sqrt(head_dim) by default. `softcap`, `alibi_slopes`, `dropout` and `deterministic` as in `Options`; `seed` (one
    int64) is drawn from torch's generator where dropout needs one. `sink` (heads,): the score of one more key whose
    value is 0, with gradient (Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks).

    Returns out, like q, and lse (batch, heads, n_queries), float32 (float64 for float64 inputs), natural log. A row
    that sees no key has out 0, lse -inf and zero gradients. Raises ValueError where arguments and implementation do
    not fit each other.
    """
    check_inputs(q, k, v)
    _check_mask(mask, sink, q, k)
    if dropout and seed is None:
        seed = launch.new_seed(q.device)
    options = Options(
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        alibi_slopes,
        dropout,
        seed if dropout else None,
        deterministic,
    )
    check_options(options, q)
    call = Call.of(mask, options, choose(implementation, q, mask, options))
    return _attention(q, k, v, sink, *call)


# which implementation -------------------------------------------------------------------------------------------------


def choose(implementation: str, q: Tensor, mask: KeyIntervals | BlockMask, options: Options) -> str:
    """The implementation that serves a call: the one asked for, or for `auto` the fastest that can.

    Raises ValueError if the one asked for cannot serve inputs like `q`, and says why.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    reasons = unsupported(q, mask, options)
    if implementation != "auto":
        if reason := reasons[implementation]:
            raise ValueError(
                f"attention implementation {str(implementation)!r} cannot serve this call: {reason}; "
                "use 'auto' or 'reference'"
            )
        return implementation
    if q.dtype == torch.float64 and q.device.type != "cpu":
        raise ValueError(
            "q is torch.float64 on a GPU: no kernel there takes it; convert to float32, or ask for "
            "implementation='reference', which holds the whole score matrix"
        )
    return next(name for name in by_speed(q, mask) if not reasons[name])


def by_speed(q: Tensor, mask: KeyIntervals | BlockMask) -> tuple[str, ...]:
    """The implementations, fastest first, for such a call; whether each can serve it is another question."""
    if q.device.type == "cpu":
        return "sdpa", "reference", "triton"  # where Triton runs on a CPU, it is the interpreter
    # as timed on H200s: then cuDNN leads, then Triton, then FlashAttention-2, but for head dims whose backward spills
    is_cudnn = isinstance(mask, KeyIntervals) and sdpa.uses_cudnn(q, mask)
    others = ("sdpa", "triton") if is_cudnn or q.shape[-1] > 128 else ("triton", "sdpa")
    return "hopper", *others, "reference"


def unsupported(q: Tensor, mask: KeyIntervals | BlockMask, options: Options) -> dict[str, str | None]:
    """For each implementation why it cannot serve a call like this, or None if it can."""
    return {
        "hopper": hopper.unsupported(q, mask, options),
        "triton": launch.unsupported(q),
        "sdpa": "torch's kernels skip no blocks" if isinstance(mask, BlockMask) else sdpa.unsupported(q, options),
        "reference": None,
    }


def explain(q: Tensor, mask: KeyIntervals | BlockMask, options: Options | None = None) -> str:
    """What `auto` takes for a call, and why none of the others: a line each, fastest first."""
    options = Options(q.shape[-1] ** -0.5) if options is None else options
    chosen, reasons = choose("auto", q, mask, options), unsupported(q, mask, options)
    kind = _kind(mask)

    def verdict(name: str) -> str:
        if reasons[name]:
            return f"cannot: {reasons[name]}"
        if name == chosen:
            return f"chosen: the first that can, for {kind} in {q.dtype} with head_dim {q.shape[-1]}"
        return "can, and comes later"

    return "\n".join(f"{name}: {verdict(name)}" for name in by_speed(q, mask))


def _kind(mask: KeyIntervals | BlockMask) -> str:
    if isinstance(mask, BlockMask):
        return "kept blocks"
    return "key intervals" if mask.start is not None else "a causal mask" if mask.is_causal else "a full mask"


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


def _check_mask(mask: KeyIntervals | BlockMask, sink: Tensor | None, q: Tensor, k: Tensor) -> None:
    problems = []
    if (q.shape[1], k.shape[1]) != (mask.n_queries, mask.n_keys):
        problems.append(
            f"the mask is for {mask.n_queries} queries and {mask.n_keys} keys, "
            f"the call has {q.shape[1]} and {k.shape[1]}"
        )
    bounds = mask.intervals.start if isinstance(mask, BlockMask) else mask.start
    if bounds is not None and bounds.shape[0] not in (1, q.shape[0]):
        problems.append(f"the mask has {bounds.shape[0]} rows of bounds for a batch of {q.shape[0]}")
    if bounds is not None and bounds.device != q.device:
        problems.append(f"the mask is on {bounds.device}, q on {q.device}: move it with mask.to(q.device)")
    if sink is not None and (sink.shape != (q.shape[2],) or sink.device != q.device):
        problems.append(f"sink {tuple(sink.shape)} on {sink.device}: must be ({q.shape[2]},), a score a query head")
    if problems:
        raise ValueError("attention: " + "; ".join(problems))


def check_options(options: Options, q: Tensor) -> None:
    """Raises ValueError, with all that is wrong, unless queries like `q` can be attended from with `options`."""
    problems = []
    batch, n_queries, heads, _ = q.shape
    if not options.scale > 0:
        problems.append(f"scale {options.scale}: must be above 0")
    if options.softcap < 0:
        problems.append(f"softcap {options.softcap}: must be above 0, or 0 for none")
    if not 0 <= options.dropout < 1:
        problems.append(f"dropout {options.dropout}: must be a probability below 1")
    slopes = options.alibi_slopes
    shapes = ((heads,), (batch, heads), (batch, n_queries, heads))
    if slopes is not None and (slopes.shape not in shapes or slopes.dtype != torch.float32):
        problems.append(
            f"alibi_slopes {tuple(slopes.shape)} {slopes.dtype}: must be torch.float32, {' or '.join(map(str, shapes))}"
        )
    for name, tensor in (("alibi_slopes", slopes), ("seed", options.seed)):
        if tensor is not None and tensor.device != q.device:
            problems.append(f"{name} on {tensor.device}, q on {q.device}: must be on one device")
    if options.seed is not None and (options.seed.dtype != torch.int64 or options.seed.numel() != 1):
        problems.append(f"seed {tuple(options.seed.shape)} {options.seed.dtype}: must be one torch.int64")
    if problems:
        raise ValueError("attention: " + "; ".join(problems))


# one block ------------------------------------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyIntervals | BlockMask,
    options: Options,
    implementation: str,
    sink: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One block of attention without autograd: what the ops of this file and of context parallelism are made of.

    `into`: contiguous out and lse over other keys, both in the dtype of sums (float32; float64 for float64), into which
    this block is merged in place, and which are returned. `implementation`: see `choose`.
    """
    implementation = choose(implementation, q, mask, options)
    is_empty = not q.numel() or not k.numel()
    if implementation == "triton" and not is_empty:
        return triton_forward.forward(q, k, v, mask, options, sink, into)
    if is_empty:
        out, lse = _without_keys(q)
    elif implementation == "hopper" and isinstance(mask, KeyIntervals):
        if sink is None:
            return hopper.forward(q, k, v, mask, options, into)
        out, lse = hopper.forward(q, k, v, mask, options)
    elif implementation == "sdpa" and isinstance(mask, KeyIntervals):
        out, lse = sdpa.forward(q, k, v, mask, options.scale)
    else:
        out, lse = reference.attention_forward(q, k, v, mask, options)
    if sink is not None:
        out, lse = reference.add_sink(out, lse, sink)
    if into is None:
        return out, lse
    merged_out, merged_lse = reference.merge(*into, out.to(lse.dtype), lse)
    into[0].copy_(merged_out)
    into[1].copy_(merged_lse)
    return into


def _without_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse of rows that see nothing."""
    lse_dtype = reference.accumulation_dtype(q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=lse_dtype, device=q.device)
    return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: KeyIntervals | BlockMask,
    options: Options,
    implementation: str,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block; `out` and `lse` are those of the whole softmax, of which this block may be a part.

    `into`: dq, dk and dv in the dtype of sums, their last dim contiguous, to which this block's are added in place, and
    which are returned.
    """
    implementation = choose(implementation, q, mask, options)
    if not q.numel() or not k.numel():
        return into or (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    if implementation == "triton":
        return triton_backward.backward(dout, dlse, q, k, v, out, lse, mask, options, into)
    if implementation == "hopper" and isinstance(mask, KeyIntervals):
        return hopper.backward(dout, dlse, q, k, v, out, lse, mask, options, into)
    if implementation == "sdpa" and isinstance(mask, KeyIntervals):
        gradients = sdpa.backward(dout, dlse, q, k, v, out, lse, mask, options.scale)
    else:
        gradients = reference.attention_backward(dout, dlse, q, k, v, out, lse, mask, options)
    return reference.added(gradients, into)


def delta(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out), (batch, heads, n_queries) in the dtype of sums."""
    if launch.choose("auto", dout) == "triton":
        return triton_backward.delta(dout, out)
    return reference.attention_delta(dout, None, out)


ROWS_WITH_A_ROLE = hopper.ITEM_ROWS
_INTERVALS = KeyIntervals.documents(torch.zeros(1, 1, dtype=torch.int64))  # a mask of the kind that a block's is


class ForwardInBlocks:
    """The forward pass over keys that come block by block, merged by their log-sum-exp; at least one of them has keys.

    `out` is like q once the last one has come, `lse` (batch, heads, n_queries) in the dtype of sums.
    """

    def __init__(self, q: Tensor, options: Options, implementation: str) -> None:
        self.q, self.options = q, options
        self.implementation = choose(implementation, q, _INTERVALS, options)
        compute = reference.accumulation_dtype(q.dtype)
        self.sums = torch.empty(q.shape, dtype=compute, device=q.device)
        self.out = self.sums if q.dtype == compute else torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=compute, device=q.device)
        self.has_begun = False

    def add(self, k: Tensor, v: Tensor, mask: KeyIntervals, roles: Tensor, is_last: bool) -> None:
        """One block of keys and values, with at least one key.

        The Hopper kernel goes by the roles of each `ROWS_WITH_A_ROLE` rows (see `tiles.roles`) and writes to `out` what
        later blocks do not change; the others merge all rows, and `out` comes with the last block.
        """
        q = self.q
        if self.implementation == "hopper" and q.numel():
            hopper.forward(q, k, v, mask, self.options, part=hopper.Part(roles, self.out, self.sums, self.lse))
            return
        if not self.has_begun:
            self.sums.zero_()
            self.lse.fill_(-torch.inf)
            self.has_begun = True
        forward(q, k, v, mask, self.options, self.implementation, into=(self.sums, self.lse))
        if is_last and self.out is not self.sums:
            self.out.copy_(self.sums)


class BackwardInBlocks:
    """The backward pass over keys that come block by block: what rows need is computed once, dq added up.

    Arguments as of `backward`; gradients of keys and values in the dtype of sums, those of queries in that of q.
    """

    def __init__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, out: Tensor, lse: Tensor, options: Options,
        implementation: str,
    ) -> None:  # fmt: skip
        self.rows = dout, dlse, q
        self.results = out, lse
        self.options = options
        self.implementation = choose(implementation, q, _INTERVALS, options)
        self.writes_to_homes = self.implementation == "hopper" and hopper.has_own_backward(q)
        if self.writes_to_homes:
            self.blocks = hopper.BackwardInBlocks(dout, dlse, q, out, lse, options)
        else:
            self.sum = torch.zeros(q.shape, dtype=reference.accumulation_dtype(q.dtype), device=q.device)

    def add(self, k: Tensor, v: Tensor, mask: KeyIntervals, into: tuple[Tensor, Tensor] | GradientHomes) -> None:
        """One block of keys and values, whose gradients are added to `into`, dk and dv; or, if it `writes_to_homes`,
        written to these."""
        if not k.numel():
            return
        if self.writes_to_homes:
            self.blocks.add(k, v, mask, into)
            return
        assert not isinstance(into, GradientHomes)
        gradients = self.sum, *into
        backward(*self.rows, k, v, *self.results, mask, self.options, self.implementation, gradients)

    def dq(self) -> Tensor:
        q = self.rows[2]
        return self.blocks.dq(torch.empty_like(q)) if self.writes_to_homes else self.sum.to(q.dtype)


# custom ops -----------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What an attention op is called with besides its tensors with gradients, in the order of its arguments."""

    start: Tensor | None  # of the mask's key intervals, with those down to `is_causal`
    end: Tensor | None
    query_position: Tensor | None
    key_position: Tensor | None
    kept: Tensor | None  # of a mask of blocks, with the sizes of a block
    block_q: int
    block_k: int
    is_causal: bool
    alibi_slopes: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    dropout: float
    deterministic: bool
    implementation: str
    group_name: str  # of the processes that share the sequence; empty: it is whole

    @staticmethod
    def of(mask: KeyIntervals | BlockMask, options: Options, implementation: str, group_name: str = "") -> Call:
        blocks = (mask.kept, mask.block_q, mask.block_k) if isinstance(mask, BlockMask) else (None, 0, 0)
        m = mask.intervals if isinstance(mask, BlockMask) else mask
        return Call(
            m.start, m.end, m.query_position, m.key_position, *blocks, m.is_causal, options.alibi_slopes,
            options.seed, options.scale, options.softcap, options.dropout, options.deterministic, implementation,
            group_name,
        )  # fmt: skip

    def intervals(self, n_queries: int, n_keys: int) -> KeyIntervals:
        return KeyIntervals(
            n_queries, n_keys, self.is_causal, self.start, self.end, self.query_position, self.key_position
        )

    def mask(self, n_queries: int, n_keys: int) -> KeyIntervals | BlockMask:
        intervals = self.intervals(n_queries, n_keys)
        return intervals if self.kept is None else BlockMask(self.kept, self.block_q, self.block_k, intervals)

    def options(self) -> Options:
        return Options(self.scale, self.softcap, self.alibi_slopes, self.dropout, self.seed, self.deterministic)


_CALL_SCHEMA = (
    "Tensor? start, Tensor? end, Tensor? query_position, Tensor? key_position, Tensor? kept, int block_q, int block_k, "
    "bool is_causal, Tensor? alibi_slopes, Tensor? seed, float scale, float softcap, float dropout, "
    "bool deterministic, str implementation, str group_name"
)

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Call], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _rows_of(q: Tensor, _call: Call) -> tuple[int, ...]:
    return q.shape[0], q.shape[2], q.shape[1]


def attention_op(
    name: str, forward: Forward, backward: Backward, lse_shape: Callable[[Tensor, Call], tuple[int, ...]] = _rows_of
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers `longctx::<name>(q, k, v, sink, *call)` and its gradient.

    `forward(q, k, v, sink, call)` gives out and lse, `backward(dout, dlse, q, k, v, out, lse, call)` gives dq, dk and
    dv; dlse is None where no gradient comes through lse. A custom op is opaque to torch.compile, breaks no graph, and
    is seen whole by a recompute policy.
    """

    def op_forward(q, k, v, sink, *call):
        return forward(q, k, v, sink, Call(*call))

    def op_backward(dout, dlse, q, k, v, out, lse, *call):
        return backward(dout.contiguous(), dlse, q, k, v, out, lse, Call(*call))

    op = custom_op(
        f"longctx::{name}",
        op_forward,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sink, {_CALL_SCHEMA}) -> (Tensor, Tensor)",
    )
    backward_op = custom_op(
        f"longctx::{name}_backward",
        op_backward,
        mutates_args=(),
        schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_CALL_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    )

    @op.register_fake
    def _(q, k, v, sink, *call):
        lse = q.new_empty(lse_shape(q, Call(*call)), dtype=reference.accumulation_dtype(q.dtype))
        return q.new_empty(q.shape), lse

    @backward_op.register_fake
    def _(dout, dlse, q, k, v, *_others):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx, inputs, output) -> None:
        q, k, v, sink, *call = inputs
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in call]
        ctx.constants = [value for value in call if not isinstance(value, torch.Tensor)]
        tensors = (value for value in call if isinstance(value, torch.Tensor))
        ctx.save_for_backward(q, k, v, sink, *output, *tensors)

    def autograd(ctx, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, sink, out, lse, *tensors = ctx.saved_tensors
        tensors, constants = iter(tensors), iter(ctx.constants)
        call = [next(tensors if is_tensor else constants) for is_tensor in ctx.is_tensor]
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = backward_op(dout, dlse, q, k, v, out, lse, *call)
        dsink = None
        if sink is not None:
            dsink = reference.sink_gradient(reference.attention_delta(dout, dlse, out), lse, sink)
        return *gradients, dsink, *(None for _ in call)

    op.register_autograd(autograd, setup_context=setup_context)
    return op


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, call.mask(q.shape[1], k.shape[1]), call.options(), call.implementation, sink)


def _attention_backward(dout, dlse, q, k, v, out, lse, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    mask = call.mask(q.shape[1], k.shape[1])
    return backward(dout, dlse, q, k, v, out, lse, mask, call.options(), call.implementation)


_attention = attention_op("attention", _attention_forward, _attention_backward)
