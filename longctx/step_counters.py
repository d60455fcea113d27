"""What ranks tell each other of a step: counters by name, reduced over all ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

NORMS_APART = 1e-2  # relative


class Summed(NamedTuple):
    """Counters of the sequences that this rank has read; over all ranks their sums.

    The ranks of one reader (`Mesh.ranks_of_a_reader`) read the same sequences, and each of them counts these.
    """

    valid_targets: float
    tflops: float  # of forward and backward
    documents: float
    unread: float  # 1 if this rank could not read its sequences


class Memory(NamedTuple):
    """Of this rank, at most so far; over all ranks the largest. What a CPU does not have is 0."""

    peak_alloc_gib: float  # transports included; on CPUs of the process
    transport_gib: float  # shared buffers beside the caching allocator
    host_gib: float
    peak_reserved_gib: float = 0.0
    peak_of_device: float = 0.0  # share
    alloc_retries: float = 0.0  # times that the caching allocator had to give memory back and try again


class Largest(NamedTuple):
    """Of this rank; over all ranks the largest."""

    norm: float  # of the gradient, which is the same on all ranks; -inf: not finite
    minus_norm: float
    is_not_finite: float  # 1 if the norm is not
    imbalance: float  # of attention: work of this rank over the mean of its context axis
    busy_s: float  # of forward and backward passes, without what they waited for other ranks
    minus_busy_s: float  # of the fastest rank, negative
    stop_signal: float  # number of the signal that asks this rank to stop; 0: none
    save_asked: float  # 1 if this rank was asked for a checkpoint
    save_failed: float  # 1 if this rank knows that the checkpoint being written came to nothing
    memory: Memory

    @property
    def are_norms_apart(self) -> bool:
        """Whether the finite norms of ranks differ by more than the order of sums explains."""
        return math.isfinite(self.norm) and self.norm + self.minus_norm > NORMS_APART * self.norm

    @property
    def slowest_over_fastest(self) -> float:
        """Seconds of the slowest rank over those of the fastest."""
        return self.busy_s / max(-self.minus_busy_s, 1e-9)


def summed(mine: Summed) -> Summed:
    """The counters over all ranks. Collective, on the CPU: no GPU is waited for."""
    values = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return Summed(*values.tolist())


def largest(mine: Largest) -> Largest:
    """The counters over all ranks. Collective, on the CPU: no GPU is waited for."""
    values = torch.tensor([*mine[:-1], *mine.memory], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    own, memory = values[: -len(mine.memory)].tolist(), values[-len(mine.memory) :].tolist()
    return Largest(*own, memory=Memory(*memory))
