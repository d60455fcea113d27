"""Attention over a split sequence, block by block: what ring and gather have in common.

A rank keeps its queries and works through the keys of one step after the other (see `exchange`), while those of the
next are on their way. The kernels merge the blocks' results by their log-sum-exp, add up the gradient of the queries,
and hand those of the keys to their owners in float32, who add them up in the order of the distances.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.attention.interface import (
    ROWS_WITH_A_ROLE,
    BackwardInBlocks,
    Call,
    ForwardInBlocks,
    GradientHomes,
)
from longctx.kernels.attention.key_gradients import MOST_SLOTS, add_up
from longctx.kernels.attention.mask import KeyIntervals, once_a_mask, to_device
from longctx.kernels.attention.tiles import roles
from longctx.kernels.reference import accumulation_dtype
from longctx.parallel.exchange import ALIGNMENT, Move, Plan, make_plan
from longctx.parallel.sequence import in_ranks_order, on_cpu
from longctx.parallel.transport import PieceOf, Transport, Wait, copy_rows, transport_of


@dataclass(frozen=True)
class Step:
    """One block of this rank: its keys and what its rows see of them."""

    moves: list[Move]  # of all ranks
    n_keys: int
    mask: KeyIntervals
    roles: Tensor  # of blocks of rows in the forward pass, see `tiles.roles`
    is_aligned: bool  # whether each tile of keys has one owner
    homes: dict = field(default_factory=dict)  # of the gradients of its keys, see `_homes`


@dataclass(frozen=True)
class Schedule:
    """What this rank does for a mask."""

    plan: Plan
    steps: list[Step]
    known_givers: dict[range, Tensor] = field(default_factory=dict)

    def givers(self, rank: int, distances: range, device: torch.device) -> Tensor:
        """`Plan.givers` on the device."""
        if distances not in self.known_givers:
            self.known_givers[distances] = to_device(self.plan.givers(rank, distances), device)
        return self.known_givers[distances]


@once_a_mask
def _schedule_of(
    mask: KeyIntervals, rank: int, size: int, tokens_of_a_step: int, most_owners: int, device: torch.device
) -> Schedule:  # fmt: skip
    """For the mask of a split sequence, whose rows are in the ranks' order."""
    here = on_cpu(mask)
    plan = make_plan(here.positions("cpu")[0][0].long(), *here.bounds("cpu"), size, tokens_of_a_step, most_owners)
    (start, end), (position, _) = mask.bounds(device), mask.positions(device)
    share = mask.n_queries // size
    mine = torch.arange(rank * share, (rank + 1) * share, device=device)
    rows = KeyIntervals(
        share, mask.n_keys, start=start[:, mine], end=end[:, mine], query_position=position[:, mine]
    )  # fmt: skip
    masks = [rows.keys(to_device(plan.tokens(step, rank), device)) for step in range(len(plan.moves))]
    steps = []
    for step, of_rows in enumerate(roles(masks, ROWS_WITH_A_ROLE)):
        is_aligned = all(move.length % ALIGNMENT == 0 for move in plan.fetched(step, rank))
        steps.append(Step(plan.moves[step], masks[step].n_keys, masks[step], of_rows, is_aligned))
    return Schedule(plan, steps)


# the two passes -------------------------------------------------------------------------------------------------------


class _Pass:
    """The keys and values of one step after the other: of step 0 the rank's own, of the others fetched in time.

    A shard is (batch, tokens, 2, kv_heads, head_dim): keys and values of a token beside each other.
    """

    def __init__(self, k: Tensor, v: Tensor, schedule: Schedule, transport: Transport) -> None:
        self.schedule, self.transport = schedule, transport
        self.name = transport.in_turn("shard")  # what was shared the time before may still be read
        batch, tokens, heads, width = k.shape
        self.shard = transport.share(self.name, (1, batch, tokens, 2, heads, width), k)[0]
        copy_rows(self.shard[:, :, 0], k)
        copy_rows(self.shard[:, :, 1], v)
        transport.meet()
        self.next = self._fetch(1)

    def _fetch(self, number: int) -> tuple[Tensor, Wait] | None:
        if number >= len(self.schedule.steps):
            return None
        step, (batch, _, *rest) = self.schedule.steps[number], self.shard.shape
        buffer = self.transport.scratch(f"keys {number % 2}", (batch, step.n_keys, *rest), self.shard)
        return buffer, self.transport.fetch(self.name, step.moves, lambda _move: 0, buffer)

    def keys_values(self, number: int) -> Tensor:
        """(batch, keys of the step, 2, kv_heads, head_dim); begins to fetch those of the step after."""
        if number == 0:
            return self.shard
        assert self.next is not None
        buffer, wait = self.next
        wait()
        self.next = self._fetch(number + 1)
        return buffer


class Budget(NamedTuple):
    """Bytes that a rank holds at a time of what others own."""

    step: int  # keys and values that a step works on; while it does, as many of the next arrive
    inbox: int  # gradients from other ranks that wait to be added up


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, budget: Budget) -> tuple[Tensor, Tensor]:
    """One rank's rows: out like q, lse (batch, heads, tokens) in the dtype of sums."""
    transport, schedule = _setting(q, k, call, budget)
    attention = ForwardInBlocks(q, call.options(), call.implementation)
    keys = _Pass(k, v, schedule, transport)
    last = max(number for number, step in enumerate(schedule.steps) if step.n_keys)
    for number, step in enumerate(schedule.steps):
        step_k, step_v = keys.keys_values(number).unbind(2)
        if step.n_keys:
            attention.add(step_k, step_v, step.mask, step.roles, number == last)
    return attention.out, attention.lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call,
    budget: Budget, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq of one rank's rows, like q; dk and dv of its keys, like these but of `dtype`."""
    transport, schedule = _setting(q, k, call, budget)
    gradient = BackwardInBlocks(dout, dlse, q, out, lse, call.options(), call.implementation)
    keys = _Pass(k, v, schedule, transport)
    rounds = _rounds(schedule.plan, _slots(k, budget))
    of_rounds = dtype if len(rounds) == 1 else accumulation_dtype(k.dtype)
    dk, dv = (torch.empty(k.shape, dtype=of_rounds, device=k.device) for _ in range(2))
    for steps in rounds:
        _give_gradients(steps, keys, gradient)
        givers = schedule.givers(transport.rank, _distances(schedule.plan, steps), k.device)
        add_up(transport.shared["inbox"], givers, dk, dv, is_added=steps.start > 0)
    return gradient.dq(), dk.to(dtype), dv.to(dtype)


def _give_gradients(steps: range, keys: _Pass, gradient: BackwardInBlocks) -> None:
    """The steps of a round; returns once the gradients are in their owners' inboxes, one slot a distance."""
    transport, plan = keys.transport, keys.schedule.plan
    if steps.start:
        transport.meet()  # all have added up those of the round before
    slots = _distances(plan, steps)
    shard, sums = keys.shard, accumulation_dtype(keys.shard.dtype)
    inbox = transport.share("inbox", (len(slots), *shard.shape), shard, sums)

    def slot(move: Move) -> int:
        return slots.index(move.distance(plan.size))

    waits: list[Wait] = []
    for number in steps:
        step, (k, v) = keys.schedule.steps[number], keys.keys_values(number).unbind(2)
        if gradient.writes_to_homes and transport.reaches_others and step.is_aligned:
            gradient.add(k, v, step.mask, _homes(step, slots, slot, inbox, transport))
            continue
        if len(waits) > 1:
            waits[-2]()  # of those that were in this buffer
        shape = shard.shape[0], step.n_keys, *shard.shape[2:]
        given = transport.scratch(f"gradients {len(waits) % 2}", shape, shard, sums)
        given.zero_()
        gradient.add(k, v, step.mask, (given[:, :, 0], given[:, :, 1]))
        waits.append(transport.give("inbox", step.moves, slot, given))
    for wait in waits:
        wait()
    transport.meet()


def _homes(step: Step, slots: range, slot: PieceOf, inbox: Tensor, transport: Transport) -> GradientHomes:
    """Where kernels write the gradients of a step's keys; found once for a mask and its buffers."""
    key = transport.generation, slots, inbox.shape
    if key not in step.homes:
        row_bytes = inbox.stride(2) * inbox.element_size()
        addresses = [
            address + row * row_bytes
            for address, length in transport.addresses("inbox", step.moves, slot)
            for row in range(0, length, ALIGNMENT)
        ]
        step.homes[key] = to_device(torch.tensor(addresses, dtype=torch.int64), inbox.device)
    return GradientHomes(step.homes[key], inbox[0])


def _setting(q: Tensor, k: Tensor, call: Call, budget: Budget) -> tuple[Transport, Schedule]:
    transport = transport_of(call.group_name)
    length = q.shape[1] * transport.size
    mask = in_ranks_order(call.intervals(length, length))
    tokens_of_a_step = budget.step // (2 * k[:, :1].nbytes)
    most_owners = _slots(k, budget)
    return transport, _schedule_of(mask, transport.rank, transport.size, tokens_of_a_step, most_owners, q.device)


def _slots(k: Tensor, budget: Budget) -> int:
    """Of an inbox, each with the gradients from one rank."""
    return max(1, min(MOST_SLOTS, budget.inbox // (2 * k.numel() * accumulation_dtype(k.dtype).itemsize)))


def _rounds(plan: Plan, slots: int) -> list[range]:
    """Steps whose gradients are held at the same time."""
    rounds: list[range] = []
    for step in range(len(plan.distances)):
        if rounds and len(_distances(plan, range(rounds[-1].start, step + 1))) <= slots:
            rounds[-1] = range(rounds[-1].start, step + 1)
        else:
            rounds.append(range(step, step + 1))
    return rounds


def _distances(plan: Plan, steps: range) -> range:
    return range(plan.distances[steps.start].start, plan.distances[steps.stop - 1].stop)
