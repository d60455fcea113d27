"""What ranks tell each other of a step: counters by name, reduced over all ranks."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist


class Summed(NamedTuple):
    """Counters of the sequences that this rank has read; over all ranks their sums.

    The ranks of one reader (`Mesh.ranks_of_a_reader`) read the same sequences, and each of them counts these.
    """

    valid_targets: float
    tflops: float  # of forward and backward
    documents: float
    unread: float  # 1 if this rank could not read its sequences


class Largest(NamedTuple):
    """Of this rank; over all ranks the largest."""

    imbalance: float  # of attention: work of this rank over the mean of its context axis
    stop_signal: float  # number of the signal that asks this rank to stop; 0: none
    save_asked: float  # 1 if this rank was asked for a checkpoint
    save_failed: float  # 1 if this rank knows that the checkpoint being written came to nothing


Counters = TypeVar("Counters", Summed, Largest)


def reduced(mine: Counters) -> Counters:
    """The counters over all ranks, each reduced as its type says. Collective, on the CPU: no GPU is waited for."""
    values = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.SUM if isinstance(mine, Summed) else dist.ReduceOp.MAX)
    return type(mine)(*values.tolist())
