"""Context parallelism of a run: one object that holds how attention crosses the context axis, and the op that uses it.

One op for the whole exchange, so that activation checkpointing can keep its results (`attention_saved`) and never runs
it twice, and torch.compile sees no graph break.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from longctx.config import ModelConfig, Strategy, shares_heads
from longctx.kernels import precision
from longctx.kernels.attention.choice import choose_implementation
from longctx.kernels.attention.custom_op import Call, attention_op
from longctx.kernels.attention.interface import bound_problems, check_inputs, make_options
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Saved
from longctx.kernels.forward_mode import refuse_tangents
from longctx.model.attention import Attend
from longctx.model.transformer import keys_seen
from longctx.parallel.blockwise import Blockwise, SplitCall
from longctx.parallel.gather import gather
from longctx.parallel.load_balance import Split, SplitMask, balanced, in_order
from longctx.parallel.mesh import Mesh
from longctx.parallel.ring import ring
from longctx.parallel.transport import Transport, make_transport
from longctx.parallel.ulysses import Ulysses
from longctx.strategy import Choice

SUPPORTED_OPTIONS = ("scale", "softcap", "deterministic")  # the others are a number or a draw for each head or row


class ContextParallel:
    """How attention crosses the context axis of a run. Made by all ranks of its groups, and closed by all of them."""

    def __init__(self, choice: Choice, transports: Sequence[Transport]) -> None:
        """`transports`: over the context axis, or over its inner and its outer part; none where the axis has size 1."""
        self.choice, self.transports, self.is_alone = choice, tuple(transports), not transports
        self.size = math.prod(transport.size for transport in transports)  # a number: torch.compile traces no generator
        self.exchange = _exchange(choice.strategy, self.transports) if self.transports else None
        # compiled graphs are kept on disk by it: it has to say all that decides the shapes of results
        self.name = f"{choice.strategy} {choice.ulysses_size} context {next(_numbers)}"
        _open[self.name] = self

    @staticmethod
    def over(choice: Choice, mesh: Mesh, timeout_seconds: int) -> ContextParallel:
        """That of a mesh, whose groups have the same timeout.

        Collective; a rank that comes `timeout_seconds` late to an exchange ends the run.
        """
        if mesh.size("context") == 1:
            return ContextParallel(choice, ())
        is_product = choice.strategy == Strategy.ulysses_ring
        groups = mesh.groups_in_context(choice.ulysses_size) if is_product else [mesh.group("context")]
        return ContextParallel(choice, [make_transport(group, 1000 * timeout_seconds) for group in groups])

    @staticmethod
    def of_group(
        group: dist.ProcessGroup | None, strategy: str = "ring", timeout_seconds: int = 600
    ) -> ContextParallel:
        """For a model of one's own: the ranks of `group` share each sequence by `ring`, `gather` or `ulysses`.

        A group of one rank has whole sequences, and its masks are `KeyIntervals`. Collective. A rank that comes
        `timeout_seconds` late to an exchange through symmetric memory ends the run; exchanges by messages go by the
        timeout of `group`. Raises ValueError for other strategies, and on ranks that are not in `group`.
        """
        if strategy not in (usable := [str(name) for name in (Strategy.ring, Strategy.gather, Strategy.ulysses)]):
            raise ValueError(f"strategy={strategy!r} is not one of {', '.join(usable)}")
        if group is None or group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: is none of this rank; give one that it is in, such as dist.group.WORLD")
        choice = Choice(Strategy(strategy), group.size() if strategy == Strategy.ulysses else 1, "as asked for")
        return ContextParallel(choice, [make_transport(group, 1000 * timeout_seconds)] if group.size() > 1 else ())

    def attend(self, implementation: str = "auto", **options: Any) -> ContextAttend:
        """Attention over split sequences, as a module; arguments as of `longctx.ops.attention`.

        Raises ValueError for options that cannot be split.
        """
        return self.replace(Attend(implementation, **options))

    def replace(self, attend: nn.Module) -> ContextAttend:
        """What a model calls in place of its `attend`. Raises ValueError if that has options that cannot be split."""
        return ContextAttend(attend, self)

    def split(self, model: ModelConfig, positions: Tensor) -> Split:
        """Which rank holds which tokens of sequences, so that attention is as much work on each.

        `positions` (batch, tokens): of each token in its document.
        """
        if self.size == 1 or self.choice.splits_heads:
            return in_order(positions.shape[1], self.size)
        return balanced(keys_seen(model, positions).sum(0), self.size)

    def time_waits(self, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        """From now on enters `waiting` wherever the device may wait for keys, values or gradients of other ranks."""
        for transport in self.transports:
            transport.waiting = waiting

    def shared_bytes(self) -> int:
        """Bytes of shared buffers that lie outside torch's caching allocator."""
        return sum(transport.shared_bytes() for transport in self.transports)

    def identity(self) -> dict[str, Any]:
        """What decides how a step is computed, as data: compared when a run is resumed."""
        return {
            "strategy": str(self.choice.strategy),
            "ulysses_size": self.choice.ulysses_size,
            "transports": [type(transport).__name__ for transport in self.transports],
        }

    @property
    def transport(self) -> str:
        """How keys travel, in words; empty where the axis has size 1."""
        return ", ".join(sorted({transport.description for transport in self.transports}))

    def __str__(self) -> str:
        return f"{self.choice.strategy} ({self.choice.reason}) by {self.transport}"

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        """Itself: a copy of a model, as for averaged weights, is on the same ranks."""
        return self

    def close(self) -> None:
        """Drops the transports and their buffers. No rank may still work with them."""
        _open.pop(self.name, None)
        self.transports, self.exchange = (), None


def _exchange(strategy: Strategy, transports: tuple[Transport, ...]) -> Blockwise | Ulysses:
    inner, *outer = transports
    match strategy:
        case Strategy.ring:
            return ring(inner)
        case Strategy.gather:
            return gather(inner)
        case Strategy.ulysses:
            return Ulysses(inner)
        case Strategy.ulysses_ring:
            return Ulysses(inner, ring(outer[0]))
    raise ValueError(f"strategy {strategy}: must be chosen before, see `choose_strategy`")


class ContextAttend(nn.Module):
    """`attend` over a split sequence: q, k and v are one rank's tokens, the mask is that of the whole sequence."""

    def __init__(self, attend: nn.Module, context_parallel: ContextParallel) -> None:
        super().__init__()
        self.attend, self.context_parallel = attend, context_parallel
        self.options: dict[str, Any] = attend.options  # pyright: ignore[reportAttributeAccessIssue]: of `Attend`
        refused = sorted(set(self.options) - set(SUPPORTED_OPTIONS))
        if refused and not context_parallel.is_alone:
            raise ValueError(
                f"attention with {', '.join(refused)} cannot be split over ranks: use {', '.join(SUPPORTED_OPTIONS)}, "
                "or whole sequences on each rank (parallel.context=1)"
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: SplitMask | KeyIntervals) -> Tensor:
        """q (batch, sequence / size, heads, head_dim), k and v alike with kv_heads -> out like q, without its lse.

        Raises ValueError where these, the mask and the ranks do not fit each other, before anything is exchanged.
        """
        if self.context_parallel.is_alone:
            is_whole = isinstance(mask, SplitMask) and mask.split.size == 1
            return self.attend(q, k, v, mask.mask if is_whole else mask)
        if not isinstance(mask, SplitMask):
            raise TypeError(f"{type(mask).__name__}: a split sequence has a SplitMask, as Split.mask makes it")
        q, k, v = precision.autocast(q, k, v)  # pyright: ignore[reportAssignmentType]
        split, whole = mask.split, mask.mask.with_bounds(q.device)
        self._check(q, k, v, whole, split)
        options = make_options(q, **self.options)
        implementation = choose_implementation(str(self.attend.implementation), q, whole, options)
        call = Call(whole, options, implementation)
        refuse_tangents(q, k, v)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return _context_attention(q, k, v, None, *call.flat(), split.order, split.size, self.context_parallel.name)[0]

    def _check(self, q: Tensor, k: Tensor, v: Tensor, whole: KeyIntervals, split: Split) -> None:
        if self.context_parallel.exchange is None:
            raise RuntimeError(CLOSED)
        check_inputs(q, k, v)
        size, heads_over = self.context_parallel.size, self.context_parallel.choice.ulysses_size
        length, starts = len(split.order), whole.start
        assert starts is not None
        problems = []
        if split.size != size:
            problems.append(f"the split is for {split.size} ranks, {size} share a sequence")
        if (whole.n_queries, whole.n_keys) != (length, length):
            problems.append(
                f"the mask is for {whole.n_queries} queries and {whole.n_keys} keys, the split for {length}"
            )
        if (q.shape[1] * size, k.shape[1] * size) != (length, length):
            problems.append(
                f"q has {q.shape[1]} and k {k.shape[1]} tokens: a rank's share of {length} is {length // size}, as "
                "Split.shard gives it"
            )
        problems += bound_problems(starts, q)
        if not shares_heads(q.shape[2], k.shape[2], heads_over):
            problems.append(
                f"{q.shape[2]} query and {k.shape[2]} key heads cannot be shared by {heads_over} ranks: take a ring"
            )
        if problems:
            raise ValueError("attention over a split sequence: " + "; ".join(problems))


# the op ---------------------------------------------------------------------------------------------------------------

CLOSED = "this ContextParallel was closed: close it after the last backward pass"
_numbers = itertools.count()
_open: dict[str, ContextParallel] = {}  # by name: an op can be given only tensors, numbers and strings


def _exchange_of(context: str) -> Blockwise | Ulysses:
    if context not in _open or (found := _open[context].exchange) is None:
        raise RuntimeError(CLOSED)
    return found


def _split(call: Call, order: Tensor, size: int) -> SplitCall:
    return SplitCall(SplitMask(call.mask, Split(order, size)), call.options, call.implementation)  # pyright: ignore[reportArgumentType]: of intervals


def _forward(
    q: Tensor, k: Tensor, v: Tensor, _sink: None, call: Call, order: Tensor, size: int, context: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _exchange_of(context).forward(q, k, v, _split(call, order, size))


def _backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, call: Call, order: Tensor, size: int, context: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _exchange_of(context).backward(dout, dlse, saved, _split(call, order, size))


def _lse_shape(q: Tensor, _order: Tensor, _size: int, context: str) -> tuple[int, ...]:
    return _exchange_of(context).lse_shape(q)


_context_attention = attention_op(
    "context_attention", _forward, _backward, _lse_shape, {"order": "Tensor", "size": "int", "context": "str"}
)
