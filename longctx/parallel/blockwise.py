"""Attention over a split sequence, block by block: what ring and gather have in common.

A rank keeps its queries and works through the keys of one step after the other (see `key_exchange`), while those of the
next are prefetched. The kernels merge the blocks' results by their log-sum-exp, add up the gradient of the queries, and
hand those of the keys to their owners in float32, who add them up in the order of the distances.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.attention.hopper_backward import GradientTargets
from longctx.kernels.attention.key_gradients import MOST_SLOTS, add_up
from longctx.kernels.attention.key_intervals import KeyIntervals, to_device
from longctx.kernels.attention.mask_cache import cached_per_mask
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.attention.passes import PartialBackward, PartialForward
from longctx.kernels.attention.tiles import MERGED_ROWS, TILE, merge_flags
from longctx.kernels.precision import accumulation_dtype
from longctx.parallel.key_exchange import ExchangePlan, Move, make_exchange_plan
from longctx.parallel.load_balance import SplitMask
from longctx.parallel.transport import PieceOf, Transport, Wait, copy_rows


class SplitCall(NamedTuple):
    """What an attention over a split sequence is called with beside its tensors with gradients."""

    mask: SplitMask
    options: Options
    implementation: str  # as `choice.choose_implementation` gives it for the whole mask


class Budget(NamedTuple):
    """Bytes that a rank holds at a time of what others own."""

    step: int  # keys and values that a step works on; while it does, as many of the next arrive
    inbox: int  # gradients from other ranks that wait to be added up


# what a rank does for a mask ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One block of keys of this rank, and what its rows do with it."""

    moves: list[Move]  # of all ranks
    n_keys: int  # 0: this rank only sends
    mask: KeyIntervals  # of this rank's rows over the keys of the step
    merge_flags: Tensor  # of each `MERGED_ROWS` rows, forward: skip, first, middle or last, see `tiles.merge_flags`
    tiles_have_one_owner: bool  # then kernels may store the gradients of keys straight into the owners' memory
    gradient_targets: dict = field(default_factory=dict)  # where they do, see `_gradient_targets`


@dataclass(frozen=True)
class Schedule:
    """The steps of this rank for a mask."""

    plan: ExchangePlan
    steps: list[Step]
    known_givers: dict[range, Tensor] = field(default_factory=dict)

    def givers(self, rank: int, distances: range, device: torch.device) -> Tensor:
        """`ExchangePlan.givers` on the device."""
        if distances not in self.known_givers:
            self.known_givers[distances] = to_device(self.plan.givers(rank, distances), device)
        return self.known_givers[distances]


@cached_per_mask
def schedule_of(
    mask: SplitMask, rank: int, tokens_of_a_step: int, most_owners: int, device: torch.device
) -> Schedule:  # fmt: skip
    """The schedule of `rank`; a step takes so many tokens and owners at most, see `make_exchange_plan`."""
    order, size = mask.split.order, mask.split.size
    start, end = (bound[:, order] for bound in mask.on_cpu().bounds("cpu"))
    plan = make_exchange_plan(order, start, end, size, tokens_of_a_step, most_owners)
    rows = mask.of_rank(rank, device)
    masks = [rows.keys(to_device(plan.tokens(step, rank), device)) for step in range(len(plan.moves))]
    steps = [
        Step(plan.moves[number], step_mask.n_keys, step_mask, flags, plan.tiles_have_one_owner(number, rank))
        for number, (step_mask, flags) in enumerate(zip(masks, merge_flags(masks, MERGED_ROWS), strict=True))
    ]
    return Schedule(plan, steps)


# the two passes -------------------------------------------------------------------------------------------------------


class _Keys:
    """The keys and values of one step after the other: of step 0 the rank's own, of the others prefetched.

    A shard is (batch, tokens, 2, kv_heads, head_dim): keys and values of a token beside each other.
    """

    def __init__(self, k: Tensor, v: Tensor, schedule: Schedule, transport: Transport) -> None:
        self.schedule, self.transport = schedule, transport
        self.name = transport.double_buffered("shard")  # what was shared the time before may still be read
        batch, tokens, heads, width = k.shape
        self.shard = transport.share(self.name, (1, batch, tokens, 2, heads, width), k)[0]
        copy_rows(self.shard[:, :, 0], k)
        copy_rows(self.shard[:, :, 1], v)
        transport.barrier()
        self.next = self._prefetch(1)

    def _prefetch(self, number: int) -> tuple[Tensor, Wait] | None:
        if number >= len(self.schedule.steps):
            return None
        step, (batch, _, *rest) = self.schedule.steps[number], self.shard.shape
        buffer = self.transport.scratch(f"keys {number % 2}", (batch, step.n_keys, *rest), self.shard)
        return buffer, self.transport.get(self.name, step.moves, lambda _move: 0, buffer)

    def of_step(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, keys of the step, kv_heads, head_dim) each; starts to fetch those of the next."""
        if number == 0:
            return self.shard[:, :, 0], self.shard[:, :, 1]
        assert self.next is not None
        buffer, wait = self.next
        wait()
        self.next = self._prefetch(number + 1)
        return buffer[:, :, 0], buffer[:, :, 1]


class Blockwise:
    """Attention of one rank's queries over a sequence that is split over the ranks of a transport."""

    def __init__(self, transport: Transport, budget: Budget) -> None:
        self.transport, self.budget = transport, budget

    def lse_shape(self, q: Tensor) -> tuple[int, ...]:
        """Of what `forward` returns."""
        return q.shape[0], q.shape[2], q.shape[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: SplitCall) -> tuple[Tensor, Tensor]:
        """One rank's rows: out like q, lse (batch, heads, tokens) in the dtype of sums."""
        schedule = self._schedule(k, call.mask)
        attention = PartialForward(q, call.options, call.implementation)
        keys = _Keys(k, v, schedule, self.transport)
        for number, step in enumerate(schedule.steps):
            step_k, step_v = keys.of_step(number)
            if step.n_keys:
                attention.add(step_k, step_v, step.mask, step.merge_flags)
        return attention.results()

    def backward(
        self, dout: Tensor, dlse: Tensor | None, saved: Saved, call: SplitCall, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq of one rank's rows, like q; dk and dv of its keys, like these but of `dtype`, if that is given."""
        q, k, v, out, lse = saved
        dtype, transport, schedule = dtype or k.dtype, self.transport, self._schedule(k, call.mask)
        gradient = PartialBackward(dout, dlse, q, out, lse, call.options, call.implementation)
        keys = _Keys(k, v, schedule, transport)
        rounds = _rounds(schedule.plan, self._slots(k))
        of_rounds = dtype if len(rounds) == 1 else accumulation_dtype(k.dtype)
        dk, dv = (torch.empty(k.shape, dtype=of_rounds, device=k.device) for _ in range(2))
        for steps in rounds:
            _give_gradients(steps, keys, gradient)
            givers = schedule.givers(transport.rank, _distances(schedule.plan, steps), k.device)
            add_up(transport.shared["inbox"], givers, dk, dv, is_added=steps.start > 0)
        return gradient.dq(), dk.to(dtype), dv.to(dtype)

    def _schedule(self, k: Tensor, mask: SplitMask) -> Schedule:
        tokens_of_a_step = self.budget.step // max(1, 2 * k[:, :1].nbytes)
        return schedule_of(mask, self.transport.rank, tokens_of_a_step, self._slots(k), k.device)

    def _slots(self, k: Tensor) -> int:
        """Of an inbox, each with the gradients from one rank."""
        return max(
            1, min(MOST_SLOTS, self.budget.inbox // max(1, 2 * k.numel() * accumulation_dtype(k.dtype).itemsize))
        )


def _give_gradients(steps: range, keys: _Keys, gradient: PartialBackward) -> None:
    """The steps of a round; returns once the gradients are in their owners' inboxes, one slot a distance."""
    transport, plan = keys.transport, keys.schedule.plan
    if steps.start:
        transport.barrier()  # all have added up those of the round before
    slots = _distances(plan, steps)
    shard, sums = keys.shard, accumulation_dtype(keys.shard.dtype)
    inbox = transport.share("inbox", (len(slots), *shard.shape), shard, sums)

    def slot(move: Move) -> int:
        return slots.index(move.distance(plan.size))

    can_store = gradient.writes_to_targets and transport.reaches_others
    is_straight = [can_store and keys.schedule.steps[number].tiles_have_one_owner for number in steps]
    waits: dict[int, Wait] = {}
    for number, handover in zip(steps, handovers(is_straight), strict=True):
        step, (k, v) = keys.schedule.steps[number], keys.of_step(number)
        if handover.buffer is None:
            gradient.add(k, v, step.mask, _gradient_targets(step, slots, slot, inbox, transport))
            continue
        if handover.after is not None:
            waits.pop(handover.after)()
        shape = shard.shape[0], step.n_keys, *shard.shape[2:]
        given = transport.scratch(f"gradients {handover.buffer}", shape, shard, sums)
        given.zero_()
        gradient.add(k, v, step.mask, (given[:, :, 0], given[:, :, 1]))
        waits[number - steps.start] = transport.put("inbox", step.moves, slot, given)
    for wait in waits.values():
        wait()
    transport.barrier()


class Handover(NamedTuple):
    """How the gradients of the keys of a step come to their owners."""

    buffer: int | None  # the scratch buffer, of two, that they are copied from; None: kernels store them there
    after: int | None  # the step of the round whose gradients must have left this buffer before


def handovers(is_straight: list[bool]) -> list[Handover]:
    """Of the steps of a round, given for each whether kernels store its gradients straight to the owners."""
    made: list[Handover] = []
    last_in: list[int | None] = [None, None]  # each buffer
    buffer = 0
    for number, goes_straight in enumerate(is_straight):
        if goes_straight:
            made.append(Handover(None, None))
            continue
        made.append(Handover(buffer, last_in[buffer]))
        last_in[buffer] = number
        buffer = 1 - buffer
    return made


def _gradient_targets(step: Step, slots: range, slot: PieceOf, inbox: Tensor, transport: Transport) -> GradientTargets:
    """Where kernels write the gradients of a step's keys; found once for a mask and its buffers."""
    key = transport.generation, slots, inbox.shape
    if key not in step.gradient_targets:
        row_bytes = inbox.stride(2) * inbox.element_size()
        addresses = [
            address + row * row_bytes
            for address, length in transport.addresses("inbox", step.moves, slot)
            for row in range(0, length, TILE)
        ]
        step.gradient_targets[key] = to_device(torch.tensor(addresses, dtype=torch.int64), inbox.device)
    return GradientTargets(step.gradient_targets[key], inbox[0])


def _rounds(plan: ExchangePlan, slots: int) -> list[range]:
    """Steps whose gradients are held at the same time."""
    rounds: list[range] = []
    for step in range(len(plan.distances)):
        if rounds and len(_distances(plan, range(rounds[-1].start, step + 1))) <= slots:
            rounds[-1] = range(rounds[-1].start, step + 1)
        else:
            rounds.append(range(step, step + 1))
    return rounds


def _distances(plan: ExchangePlan, steps: range) -> range:
    return range(plan.distances[steps.start].start, plan.distances[steps.stop - 1].stop)
