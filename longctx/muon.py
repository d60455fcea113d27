"""Muon over sharded matrices: momentum as the parameters are, and each update orthogonalised once, by one rank.

Muon moves a matrix by its momentum with all singular values brought near one (Jordan et al. 2024), which takes the
whole matrix. Here every rank keeps the momentum of the part it holds. In a step the parts of a matrix go to its owner,
which brings them together, and the parts of the result come back: two all-to-all exchanges a bucket of matrices. Owners
are dealt out by work, so ranks do as much each. Any layout of FSDP2, HSDP and tensor parallelism is served, parts of
uneven size and empty ones too, and gives what one process would, to rounding.

torch.optim.Muon takes one matrix at a time, whole on every rank. Of the libraries, muonium orthogonalises each shard by
itself, which is another optimizer at every number of ranks; Megatron's is for one axis of ranks; Dion's is on no index.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longctx.local_part import index_of, local_of, parts_of_ranks

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al., as torch.optim.Muon has them
ITERATIONS = 5
BUCKET_ELEMENTS = 2**26  # that a rank brings together at a time

Box = tuple[slice, ...]  # rows and columns of a matrix


class Matrix(NamedTuple):
    """A parameter, and who does what for it."""

    parameter: Tensor
    boxes: list[Box]  # by rank: the part it holds
    senders: list[int]  # ranks that together hold each part once
    owner: int

    def size_of_part(self, rank: int) -> int:
        return math.prod(box.stop - box.start for box in self.boxes[rank])


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; the rate of a matrix is times sqrt(max(1, rows/columns)).

    parameters: matrices, whole or DTensors over all ranks of the run. dtype: that Newton-Schulz computes in.
    Collective: all ranks call `step` with gradients of the same parameters.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        matrices = [p for group in self.param_groups for p in group["params"]]
        for p in matrices:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        is_sharded = isinstance(matrices[0], DTensor)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if is_sharded else (0, 1)
        self.device = local_of(matrices[0]).device
        self.buckets = list(in_buckets(matrices, self.ranks))

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  without a closure
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        for bucket in self.buckets:
            updates = self._orthogonalized(bucket, self._nesterov(bucket, momentum))
            held = [local_of(matrix.parameter) for matrix in bucket]
            torch._foreach_mul_(held, 1 - lr * group["weight_decay"])
            by_rate: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for matrix, here, update in zip(bucket, held, updates, strict=True):
                rows, columns = matrix.parameter.shape
                by_rate[lr * math.sqrt(max(1, rows / columns))].append((here, update.view_as(here)))
            for rate, pairs in by_rate.items():
                torch._foreach_add_(*zip(*pairs, strict=True), alpha=-rate)

    def _nesterov(self, bucket: list[Matrix], momentum: float) -> list[Tensor]:
        """Takes the gradients into the momentum; returns what this rank holds of the updates, each (elements,).

        The gradients are written over: copies of a bucket of them would take as much as they do.
        """
        gradients = [local_of(_gradient(matrix.parameter)) for matrix in bucket]
        means = [local_of(self.state[matrix.parameter]["momentum_buffer"]) for matrix in bucket]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, means, momentum)
        sizes = [gradient.numel() for gradient in gradients]
        parts = list(gradients[0].new_empty(sum(sizes), dtype=self.dtype).split(sizes))
        torch._foreach_copy_([part.view_as(here) for part, here in zip(parts, gradients, strict=True)], gradients)
        return parts

    def _orthogonalized(self, bucket: list[Matrix], parts: list[Tensor]) -> list[Tensor]:
        """This rank's parts of the bucket's updates, orthogonalised as whole matrices by their owners."""
        everyone, mine = range(self.ranks), [m for m in bucket if m.owner == self.rank]
        outgoing = [
            [part for m, part in zip(bucket, parts, strict=True) if m.owner == owner and self.rank in m.senders]
            for owner in everyone
        ]
        incoming = [[m.size_of_part(rank) if rank in m.senders else 0 for m in mine] for rank in everyone]
        arrived = self._exchange(outgoing, incoming)
        wholes = [_assembled(m, [arrived[rank][number] for rank in m.senders]) for number, m in enumerate(mine)]
        wholes = orthogonalize(wholes)
        results = [[whole[m.boxes[rank]].flatten() for m, whole in zip(mine, wholes, strict=True)] for rank in everyone]
        back = self._exchange(
            results, [[m.size_of_part(self.rank) for m in bucket if m.owner == owner] for owner in everyone]
        )
        by_owner = [iter(pieces) for pieces in back]
        return [next(by_owner[m.owner]) for m in bucket]

    def _exchange(self, outgoing: list[list[Tensor]], incoming: list[list[int]]) -> list[list[Tensor]]:
        """Sends `outgoing[r]` to rank r; returns what came from each rank, cut to pieces of `incoming[r]` elements."""
        if self.ranks == 1:
            return outgoing
        sent = [sum(len(piece) for piece in pieces) for pieces in outgoing]
        came = [sum(sizes) for sizes in incoming]
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        buffer = torch.cat([nothing, *(piece for pieces in outgoing for piece in pieces)])
        arrived = buffer.new_empty(sum(came))
        dist.all_to_all_single(arrived, buffer, came, sent)
        return [list(part.split(sizes)) for part, sizes in zip(arrived.split(came), incoming, strict=True)]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _assembled(matrix: Matrix, parts: list[Tensor]) -> Tensor:
    """The whole matrix of the parts, (elements,) each, that its senders hold."""
    if len(parts) == 1:
        return parts[0].view(matrix.parameter.shape)
    whole = parts[0].new_empty(matrix.parameter.shape)
    for rank, part in zip(matrix.senders, parts, strict=True):
        held = whole[matrix.boxes[rank]]
        held.copy_(part.view_as(held))
    return whole


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix with its singular values near one, by Newton-Schulz iterations; those of one shape are a batch."""
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        by_shape[min(rows, columns), max(rows, columns)].append(number)
    results = list(matrices)
    for numbers in by_shape.values():
        batch = torch.stack([m.T if m.shape[0] > m.shape[1] else m for m in (matrices[n] for n in numbers)])
        for number, result in zip(numbers, newton_schulz(batch), strict=True):
            results[number] = result if result.shape == matrices[number].shape else result.T
    return results


def newton_schulz(x: Tensor) -> Tensor:
    """x (batch, rows, columns), rows <= columns -> U S V^T of x = U D V^T, S at most 1.2 and mostly from 0.7 on.

    The quintic iteration of Jordan et al. (2024), whose coefficients lift small singular values as fast as they can;
    those below some thousandth of the norm stay smaller.
    """
    a, b, c = NEWTON_SCHULZ
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=1e-7).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def in_buckets(parameters: list[Tensor], ranks: int) -> Iterator[list[Matrix]]:
    """The matrices with their owners, the same on every rank, in buckets of some `BUCKET_ELEMENTS` a rank.

    Those of one shape stand together, the largest first; each goes to the rank with the least work so far.
    """
    parameters = sorted(parameters, key=lambda p: sorted(p.shape), reverse=True)
    ends = list(accumulate(p.numel() for p in parameters))
    bucket, work = [], [0] * ranks
    limit = BUCKET_ELEMENTS * ranks
    for parameter, end in zip(parameters, ends, strict=True):
        if bucket and end // limit > (end - parameter.numel()) // limit:
            yield bucket
            bucket = []
        owner = min(range(ranks), key=work.__getitem__)
        work[owner] += parameter.numel() * min(parameter.shape)
        bucket.append(_matrix(parameter, owner))
    yield bucket


def _matrix(parameter: Tensor, owner: int) -> Matrix:
    """Of the ranks that hold the same part, the one nearest to the owner sends it."""
    if not isinstance(parameter, DTensor):
        rows, columns = parameter.shape
        return Matrix(parameter, [(slice(0, rows), slice(0, columns))], [0], owner)
    boxes = [index_of(part) for part in parts_of_ranks(parameter)]
    holders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, (rows, columns) in enumerate(boxes):
        holders[rows.start, rows.stop, columns.start, columns.stop].append(rank)
    senders = sorted(min(same, key=lambda rank: abs(rank - owner)) for same in holders.values())
    return Matrix(parameter, boxes, senders, owner)
