"""Ulysses: trades tokens for heads, so that each rank attends over the whole sequence with its share of the heads.

(Jacobs et al. 2023, DeepSpeed Ulysses.) A rank's heads are taken in groups: while it attends with one, the next one's
tokens arrive and the last one's results leave, and it holds no more than two of whole sequences (as UPipe does, Ghadia
et al. 2025), besides what it shares of its own tokens. Where the axis is larger than the number of key/value heads,
ranks share these, and the gradients of each are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from longctx.kernels.attention import interface
from longctx.kernels.attention.interface import BackwardInBlocks, Call, attention_op, delta
from longctx.kernels.attention.mask import KeyIntervals, once_a_mask
from longctx.kernels.reference import accumulation_dtype
from longctx.parallel import blockwise, ring
from longctx.parallel.context_op import ContextAttend
from longctx.parallel.exchange import Move, runs_of
from longctx.parallel.sequence import in_ranks_order, on_cpu
from longctx.parallel.transport import Wait, copy_rows, transport_of

MOST_GROUPS = 4
FLOPS_OF_A_GROUP = 5e11  # forward, of less than which it has too few tiles for a GPU, and takes the CPU too long
BYTES_OF_A_GROUP = 256 << 20  # of queries, of more than which it takes too much memory


@dataclass(frozen=True)
class Heads:
    """How `size` ranks share the heads: rank by rank, and each rank's group by group."""

    heads: int
    kv_heads: int
    size: int
    most_groups: int = MOST_GROUPS

    @cached_property
    def groups(self) -> int:
        """Of a rank's query heads, equal ones, each with whole key/value heads or a part of one."""
        of_rank, kv_of_rank = self.heads // self.size, max(1, self.kv_heads // self.size)
        fitting = [n for n in range(1, self.most_groups + 1) if of_rank % n == 0]
        return max(n for n in fitting if kv_of_rank % n == 0 or n % kv_of_rank == 0)

    @cached_property
    def kv_pieces(self) -> int:
        """Into how many pieces a rank's key/value heads are cut."""
        return min(self.groups, max(1, self.kv_heads // self.size))

    @property
    def sharers(self) -> int:
        """Ranks that share a key/value head."""
        return max(1, self.size // self.kv_heads)

    def query_piece(self, rank: int, group: int) -> int:
        return rank * self.groups + group

    def kv_piece(self, rank: int, group: int) -> int:
        """Of those that are shared; see `gradient_piece`."""
        return self.gradient_piece(rank, group) // self.sharers

    def gradient_piece(self, rank: int, group: int) -> int:
        """As `kv_piece`, one for each rank that shares it."""
        return rank * self.kv_pieces + group * self.kv_pieces // self.groups

    def starts_piece(self, group: int) -> bool:
        """Whether the groups before had other key/value heads."""
        return group == 0 or self.gradient_piece(0, group) != self.gradient_piece(0, group - 1)

    def ends_piece(self, group: int) -> bool:
        return group + 1 == self.groups or self.starts_piece(group + 1)


def _pieces(x: Tensor, n: int) -> Tensor:
    """(batch, tokens, heads, ...) -> (n, batch, tokens, heads / n, ...), a view."""
    return x.unflatten(2, (n, -1)).movedim(2, 0)


def _heads(pieces: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back, as a copy."""
    n, batch, tokens, heads, width = pieces.shape
    x = pieces.new_empty((batch, tokens, n * heads, width), dtype=dtype)
    copy_rows(_pieces(x, n), pieces)
    return x


@once_a_mask
def _pairs(mask: KeyIntervals) -> float:
    """Of a query and a key it sees, in a sequence: the mean of a batch."""
    start, end = on_cpu(mask).bounds("cpu")
    return float((end - start).clamp(min=0).sum()) / len(start)


def most_groups(flops: float, query_bytes: int) -> int:
    """How many groups of heads are worth their launches, given the work of a rank's forward pass on a GPU."""
    return max(1, min(MOST_GROUPS, max(int(flops / FLOPS_OF_A_GROUP), -(-query_bytes // BYTES_OF_A_GROUP))))


@once_a_mask
def _in_groups_order(mask: KeyIntervals, size: int, groups: int, group: int) -> tuple[KeyIntervals, list[Move]]:
    """For the ranks of `group` of `groups`, each of `size` ranks beside each other, which trade heads.

    Of a mask whose rows are in the ranks' order: the same with the tokens of each group ascending, and how those of
    this group come there. A single group has the whole sequence, in its order.
    """
    assert mask.query_position is not None
    order = mask.query_position[0].long().view(groups, -1)
    ascending = torch.argsort(order, 1)
    first_rows = torch.arange(groups, device=order.device).unsqueeze(1) * order.shape[1]
    here = on_cpu(mask).positions("cpu")[0][0]
    mine = here.long().view(groups, -1)[group]
    runs = runs_of(mine, size)
    positions = torch.searchsorted(mine.sort().values, torch.tensor([run.first for run in runs])).tolist()
    moves = [
        Move(run.owner, run.place, reader, position, run.first, run.length)
        for reader in range(size)
        for run, position in zip(runs, positions, strict=True)
    ]
    return mask.rows((ascending + first_rows).flatten()), moves


class _Exchange:
    """What both passes share: the mask of the tokens that a group has together, and how heads travel.

    The buffers of the transport have a piece for each group of heads of each rank: "queries" and what is like them by
    `Heads.query_piece`, "keys" (keys and values of a token beside each other) by `kv_piece`, their gradients by
    `gradient_piece`.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        inner, *outer = call.group_name.split()
        self.transport = transport_of(inner)
        beyond = transport_of(outer[0]) if outer else None
        group, groups = (beyond.rank, beyond.size) if beyond else (0, 1)
        size = self.transport.size
        self.length = q.shape[1] * size
        whole = in_ranks_order(call.intervals(self.length * groups, self.length * groups))
        self.mask, self.moves = _in_groups_order(whole, size, groups, group)
        batch, _, n_heads, head_dim = q.shape
        flops = 4 * batch * _pairs(whole) / groups * n_heads / size * head_dim
        self.heads = Heads(n_heads, k.shape[2], size, most_groups(flops, q.nbytes) if q.is_cuda else MOST_GROUPS)
        self.call = call
        if beyond:  # over which the tokens of this group are one shard
            self.call = Call.of(self.mask, call.options(), call.implementation, outer[0])
        self.is_whole = beyond is None
        self.leaving: list[tuple[Tensor, Wait]] = []  # which must live until they have left
        copy_rows(self.share("queries", q.shape[3], q), self.of_queries(q))
        n = size * self.heads.kv_pieces // self.heads.sharers
        for number, x in enumerate((k, v)):
            pieces = _pieces(x, n)
            shape = *pieces.shape[:3], 2, *pieces.shape[3:]
            copy_rows(self.transport.share("keys", shape, k)[:, :, :, number], pieces)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of a group's heads."""
        if self.is_whole:
            return interface.forward(q, k, v, self.mask, self.call.options(), self.call.implementation)
        return blockwise.forward(q, k, v, self.call, ring.BUDGET)

    def backward(
        self, dout: Tensor, of_rows: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dkeys: Tensor
    ) -> Tensor:  # fmt: skip
        """dq; the gradients of keys and values are added to `dkeys`. `of_rows`: delta."""
        out = q.new_zeros(q.shape[3]).expand(q.shape)  # then -delta stands for delta as the gradient of lse
        if self.is_whole:
            call = self.call
            gradient = BackwardInBlocks(dout, -of_rows, q, out, lse, call.options(), call.implementation)
            gradient.add(k, v, self.mask, (dkeys[:, :, 0], dkeys[:, :, 1]))
            return gradient.dq()
        dq, *of_keys = blockwise.backward(dout, -of_rows, q, k, v, out, lse, self.call, ring.BUDGET, dkeys.dtype)
        for number, gradient in enumerate(of_keys):
            dkeys[:, :, number] += gradient
        return dq

    def of_queries(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads, ...) in the pieces of queries, a view."""
        return _pieces(x, self.heads.size * self.heads.groups)

    def share(self, name: str, width: int, like: Tensor) -> Tensor:
        """The pieces of a buffer with rows like those of queries."""
        return self.transport.share(name, (*self.of_queries(like).shape[:-1], width), like)

    def arriving(self, *names: str) -> Iterator[tuple[int, list[Tensor]]]:
        """Group by group, of this rank's heads all tokens of what others share by these names.

        While one is worked on, the next is on its way.
        """
        here: dict[str, Tensor] = {}
        coming = self._fetch(0, names)
        for group in range(self.heads.groups):
            for name, (tensor, wait) in coming.items():
                wait()
                here[name] = tensor
            coming = self._fetch(group + 1, names) if group + 1 < self.heads.groups else {}
            yield group, [here[name] for name in names]

    def _fetch(self, group: int, names: tuple[str, ...]) -> dict[str, tuple[Tensor, Wait]]:
        fetched = {}
        for name in names:
            if name == "keys" and not self.heads.starts_piece(group):
                continue
            piece_of = self.heads.kv_piece if name == "keys" else self.heads.query_piece
            turn = self.heads.gradient_piece(0, group) if name == "keys" else group
            shared = self.transport.shared[name]
            shape = shared.shape[1], self.length, *shared.shape[3:]
            into = self.transport.scratch(f"{name} {turn % 2}", shape, shared)
            wait = self.transport.fetch(name, self.moves, lambda move, of=piece_of: of(move.reader, group), into)
            fetched[name] = into, wait
        return fetched

    def give(self, name: str, piece_of: Callable[[int, int], int], group: int, x: Tensor) -> None:
        """Sends all tokens of this rank's heads of a group to who holds them."""
        while len(self.leaving) > 2:  # dQ and dK and dV of the group before
            self.leaving.pop(0)[1]()
        self.leaving.append((x, self.transport.give(name, self.moves, lambda move: piece_of(move.reader, group), x)))

    def finish(self) -> None:
        """Waits until all has left and arrived."""
        for _, wait in self.leaving:
            wait()
        self.transport.meet()


def _forward(q: Tensor, k: Tensor, v: Tensor, _sink: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    exchange = _Exchange(q, k, v, call)
    transport, heads = exchange.transport, exchange.heads
    outs = exchange.share("outs", q.shape[3], q)
    transport.meet()
    parts = []
    for group, (queries, keys) in exchange.arriving("queries", "keys"):
        out, lse = exchange.forward(queries, keys[:, :, 0], keys[:, :, 1])
        exchange.give("outs", heads.query_piece, group, out)
        parts.append(lse)
    exchange.finish()
    return _heads(outs, q.dtype), torch.cat(parts, 1)


def _backward(dout, _dlse, q, k, v, out, lse, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    exchange = _Exchange(q, k, v, call)
    transport, heads = exchange.transport, exchange.heads
    head_dim = q.shape[3]
    compute = accumulation_dtype(q.dtype)
    _share_with_delta(exchange, dout, delta(dout, out))
    dqueries = exchange.share("dqueries", head_dim, q)
    shape = heads.size * heads.kv_pieces, *transport.shared["keys"].shape[1:]
    shared_dkeys = transport.share("dkeys", shape, k, k.dtype if heads.sharers == 1 else compute)
    transport.meet()
    lse_of_groups = lse.chunk(heads.groups, 1)
    dkeys = None
    for group, (queries, keys, douts) in exchange.arriving("queries", "keys", "douts"):
        if dkeys is None:
            dkeys = torch.zeros(keys.shape, dtype=compute, device=q.device)
        of_rows = _delta_of(douts, head_dim, compute)
        dq = exchange.backward(
            douts[..., :head_dim], of_rows, queries, keys[:, :, 0], keys[:, :, 1], lse_of_groups[group], dkeys
        )
        exchange.give("dqueries", heads.query_piece, group, dq)
        if heads.ends_piece(group):
            exchange.give("dkeys", heads.gradient_piece, group, dkeys.to(shared_dkeys.dtype))
            dkeys = None
    exchange.finish()
    of_heads = shared_dkeys.unflatten(0, (-1, heads.sharers))
    of_heads = of_heads.sum(1) if heads.sharers > 1 else of_heads.squeeze(1)
    dk, dv = (_heads(x, k.dtype) for x in of_heads.unbind(3))
    return _heads(dqueries, q.dtype), dk, dv


def _share_with_delta(exchange: _Exchange, dout: Tensor, of_rows: Tensor) -> None:
    """dout (batch, tokens, heads, head_dim) and behind it delta (batch, heads, tokens), in rows of whole 16 bytes."""
    at, width = _place_of_delta(dout.shape[3], dout.dtype, of_rows.dtype)
    both = exchange.share("douts", width, dout)
    copy_rows(both[..., : dout.shape[3]], exchange.of_queries(dout))
    both.view(of_rows.dtype)[..., at] = exchange.of_queries(of_rows.transpose(1, 2))


def _delta_of(both: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    at, _ = _place_of_delta(head_dim, both.dtype, dtype)
    return both.view(dtype)[..., at].transpose(1, 2)


def _place_of_delta(head_dim: int, dtype: torch.dtype, delta_dtype: torch.dtype) -> tuple[int, int]:
    """Where delta is in a row, counted in its own dtype, and how wide a row is, in that of dout."""
    begin = -(-head_dim * dtype.itemsize // 16) * 16
    return begin // delta_dtype.itemsize, (begin + 16) // dtype.itemsize


def _lse_shape(q: Tensor, call: Call) -> tuple[int, ...]:
    """Of all tokens, of this rank's heads: as the backward pass needs it."""
    size = dist.get_world_size(_resolve_process_group(GroupName(call.group_name.split()[0])))
    return q.shape[0], q.shape[2] // size, q.shape[1] * size


_ulysses_attention = attention_op("ulysses_attention", _forward, _backward, _lse_shape)


def ulysses(attend: nn.Module, group: dist.ProcessGroup) -> ContextAttend:
    """Wraps `attend` so that it works on a sequence split over `group`, which divides the query heads."""
    return ContextAttend(attend, _ulysses_attention, group)


def ulysses_ring(attend: nn.Module, inner: dist.ProcessGroup, outer: dist.ProcessGroup) -> ContextAttend:
    """Wraps `attend`: ranks of `inner` trade heads, and keys go over `outer` as in a ring.

    (Fang and Zhao 2024, USP.) A sequence is split over the ranks of `inner` of the first rank of `outer`, then of the
    second, ...
    """
    return ContextAttend(attend, _ulysses_attention, inner, outer)
