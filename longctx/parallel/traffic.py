"""What attention sends between machines: bytes by strategy, and how fast they go there."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist

from longctx.config import ComputeDtype, Config, Strategy, attended_heads

FLOAT32 = 4  # bytes
FIRST_MESSAGE, LAST_MESSAGE = 1 << 16, 1 << 26  # bytes
LONG_S = 0.1  # a message that takes longer says what the link can do


class Traffic(NamedTuple):
    """Bytes that come to a machine from others in the attention of one layer and micro-batch."""

    forward: float
    backward: float


def between_machines(
    config: Config, strategy: Strategy, ulysses_size: int, ranks_of_a_machine: int, sequences: int
) -> Traffic:
    """That of the machine to which most comes, for a micro-batch of so many sequences, each one document.

    `strategy` is that which is used, no longer auto. Shorter documents send less: a rank fetches what its tokens see.
    """
    model, ranks = config.model, config.parallel.context
    compute = FLOAT32 if config.precision.compute == ComputeDtype.float32 else 2
    tokens = sequences * config.data.sequence_length / ranks  # of one rank
    tensor = config.parallel.tensor
    head = tokens * model.head_dim * tensor  # numbers of one head of each tensor-parallel rank
    heads, kv_heads = attended_heads(config)
    machines = [rank * tensor // ranks_of_a_machine for rank in range(ranks)]

    def shares(size: int, is_inside: bool) -> dict[tuple[int, int], float]:
        """How many ranks' tokens come to one machine from another: to ranks of the same group of `size`, or to those
        with the same place in other groups, which hold two chunks each that not all tokens see."""
        found: dict[tuple[int, int], float] = defaultdict(float)
        for reader, owner in product(range(ranks), repeat=2):
            group, other = reader // size, owner // size
            if is_inside and group == other:
                found[machines[reader], machines[owner]] += 1
            elif not is_inside and group != other and reader % size == owner % size:
                found[machines[reader], machines[owner]] += 1 if other > group else 0.5
        return {pair: share for pair, share in found.items() if pair[0] != pair[1]}

    size = {Strategy.ulysses: ranks, Strategy.ulysses_ring: ulysses_size}.get(strategy, 1)
    part, kv_part = heads / size, max(1, kv_heads // size)
    queries, keys = head * part * compute, 2 * head * kv_part * compute
    gradients = 2 * head * kv_part * (FLOAT32 if size > kv_heads else compute)
    rows = 16 * tokens * tensor * part  # what the softmax's backward pass needs of each
    ring = 2 * head * size * kv_part  # numbers, of the keys and values of a group's tokens and one rank's heads
    inside, outside = shares(size, is_inside=True), shares(size, is_inside=False)

    def most(read: float, returned: float, ring_read: float, ring_returned: float) -> float:
        """Bytes that come to one machine: with each share that it reads of another, and with each that another reads
        of it and returns something for; inside groups, and in the ring over these."""
        coming: dict[int, float] = defaultdict(float)
        for found, to_reader, to_owner in ((inside, read, returned), (outside, ring_read, ring_returned)):
            for (reader, owner), share in found.items():
                coming[reader] += share * to_reader
                coming[owner] += share * to_owner
        return max(coming.values(), default=0.0)

    groups = config.parallel.head_groups
    return Traffic(
        groups * most(queries + keys, queries, ring * compute, 0.0),
        groups * most(2 * queries + rows + keys, queries + gradients, ring * compute, ring * FLOAT32),
    )


def link_rate(group: dist.ProcessGroup, ranks_of_a_machine: int, device: torch.device) -> float:
    """Bytes a second that come to a machine from another while as many leave: those of the slowest.

    Of `group`, so many consecutive ranks are on a machine; each exchanges messages with the rank at its place on the
    machines before and after, four times as large each time until one takes a tenth of a second. Collective.
    """
    rank, ranks = group.rank(), group.size()
    after, before = (dist.get_global_rank(group, (rank + n) % ranks) for n in (ranks_of_a_machine, -ranks_of_a_machine))
    size, seconds = FIRST_MESSAGE, 0.0
    for is_warm in (False, True):
        while True:
            out, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
            dist.barrier(group)
            began = _now(device)
            exchange = [dist.P2POp(dist.isend, out, after, group), dist.P2POp(dist.irecv, into, before, group)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            slowest = torch.tensor(_now(device) - began, dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
            seconds = float(slowest)
            if not is_warm or seconds > LONG_S or size >= LAST_MESSAGE:
                break
            size *= 4
    return ranks_of_a_machine * size / seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
