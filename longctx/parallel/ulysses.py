"""Ulysses: trades tokens for heads, so that each rank attends over the whole sequence with its share of the heads.

(Jacobs et al. 2023, DeepSpeed Ulysses.) A rank's heads are taken in groups: while it attends with one, the next one's
tokens arrive and the last one's results leave, and it holds no more than two of whole sequences (as UPipe does, Ghadia
et al. 2025), besides what it shares of its own tokens. Where the axis is larger than the number of key/value heads,
ranks share these, and the gradients of each are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longctx.kernels.attention import passes
from longctx.kernels.attention.custom_op import Call
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.mask_cache import cached_per_mask
from longctx.kernels.attention.options import Saved
from longctx.kernels.precision import accumulation_dtype
from longctx.parallel.blockwise import Blockwise, SplitCall
from longctx.parallel.key_exchange import Move, spans_of
from longctx.parallel.load_balance import Split, SplitMask
from longctx.parallel.transport import Transport, Wait, copy_rows
from longctx.strategy import MOST_GROUPS, Heads

FLOPS_OF_A_GROUP = 5e11  # forward, of less than which it has too few tiles for a GPU, and takes the CPU too long
BYTES_OF_A_GROUP = 256 << 20  # of queries, of more than which it takes too much memory


def _pieces(x: Tensor, n: int) -> Tensor:
    """(batch, tokens, heads, ...) -> (n, batch, tokens, heads / n, ...), a view."""
    return x.unflatten(2, (n, -1)).movedim(2, 0)


def _heads(pieces: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back, as a copy."""
    n, batch, tokens, heads, width = pieces.shape
    x = pieces.new_empty((batch, tokens, n * heads, width), dtype=dtype)
    copy_rows(_pieces(x, n), pieces)
    return x


@cached_per_mask
def visible_pairs(mask: SplitMask) -> float:
    """Pairs of a query and a key it sees in a sequence: the mean over the batch."""
    start, end = mask.on_cpu().bounds("cpu")
    return float((end - start).clamp(min=0).sum()) / len(start)


def most_groups(flops: float, query_bytes: int) -> int:
    """How many groups of heads are worth their launches, given the work of a rank's forward pass on a GPU."""
    return max(1, min(MOST_GROUPS, max(int(flops / FLOPS_OF_A_GROUP), -(-query_bytes // BYTES_OF_A_GROUP))))


@cached_per_mask
def _moves_of_group(mask: SplitMask, groups: int, group: int) -> list[Move]:
    """How the tokens of one of `groups`, each of as many neighbouring ranks, come together there in ascending order."""
    mine = mask.split.order.view(groups, -1)[group]
    size = mask.split.size // groups
    spans = spans_of(mine, size)
    positions = torch.searchsorted(mine.sort().values, torch.tensor([span.first for span in spans])).tolist()
    return [
        Move(span.owner, span.place, reader, position, span.first, span.length)
        for reader in range(size)
        for span, position in zip(spans, positions, strict=True)
    ]


@cached_per_mask
def _split_over_groups(mask: SplitMask, groups: int) -> Split:
    """Which of `groups` of neighbouring ranks holds which tokens; those of a group are ascending."""
    return Split(mask.split.order.view(groups, -1).sort(1).values.flatten(), groups)


class _Exchange:
    """What both passes share: the mask of the tokens that a group has together, and how heads travel.

    The buffers of the transport have a piece for each group of heads of each rank: "queries" and what is like them by
    `Heads.query_piece`, "keys" (keys and values of a token beside each other) by `kv_piece`, their gradients by
    `gradient_piece`.
    """

    def __init__(self, ulysses: Ulysses, q: Tensor, k: Tensor, v: Tensor, call: SplitCall) -> None:
        self.transport, self.outer = ulysses.transport, ulysses.outer
        size, groups, group = self.transport.size, ulysses.groups, ulysses.group
        self.length = q.shape[1] * size
        self.moves = _moves_of_group(call.mask, groups, group)
        batch, _, n_heads, head_dim = q.shape
        flops = 4 * batch * visible_pairs(call.mask) / groups * n_heads / size * head_dim
        most = most_groups(flops, q.nbytes) if q.is_cuda else MOST_GROUPS
        self.heads = Heads(n_heads, k.shape[2], size, most, keys_travel_on=self.outer is not None)
        self.whole = Call(call.mask.mask, call.options, call.implementation)
        self.split = call._replace(mask=SplitMask(call.mask.mask, _split_over_groups(call.mask, groups)))
        self.leaving: list[tuple[Tensor, Wait]] = []  # which must live until they have left
        copy_rows(self.share("queries", q.shape[3], q), self.of_queries(q))
        n = size * self.heads.kv_pieces // self.heads.sharers
        for number, x in enumerate((k, v)):
            pieces = _pieces(x, n)
            shape = *pieces.shape[:3], 2, *pieces.shape[3:]
            copy_rows(self.transport.share("keys", shape, k)[:, :, :, number], pieces)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of a group's heads."""
        if self.outer is None:
            return passes.attention_forward(q, k, v, *self.whole)
        return self.outer.forward(q, k, v, self.split)

    def backward(
        self, dout: Tensor, of_rows: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dkeys: Tensor
    ) -> Tensor:  # fmt: skip
        """dq; the gradients of keys and values are added to `dkeys`. `of_rows`: delta = rowsum(dout * out)."""
        # kernels compute delta - dlse from `out`: with out = 0 and dlse = -delta that is the same, and no out travels
        out = q.new_zeros(q.shape[3]).expand(q.shape)
        if self.outer is None:
            mask, options, implementation = self.whole
            assert isinstance(mask, KeyIntervals)
            gradient = passes.PartialBackward(dout, -of_rows, q, out, lse, options, implementation)
            gradient.add(k, v, mask, (dkeys[:, :, 0], dkeys[:, :, 1]))
            return gradient.dq()
        saved = Saved(q, k, v, out, lse)
        dq, *of_keys = self.outer.backward(dout, -of_rows, saved, self.split, dkeys.dtype)
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
            wait = self.transport.get(name, self.moves, lambda move, of=piece_of: of(move.reader, group), into)
            fetched[name] = into, wait
        return fetched

    def put(self, name: str, piece_of: Callable[[int, int], int], group: int, x: Tensor) -> None:
        """Sends all tokens of this rank's heads of a group to who holds them."""
        while len(self.leaving) > 2:  # dQ and dK and dV of the group before
            self.leaving.pop(0)[1]()
        self.leaving.append((x, self.transport.put(name, self.moves, lambda move: piece_of(move.reader, group), x)))

    def finish(self) -> None:
        """Waits until all has left and arrived."""
        for _, wait in self.leaving:
            wait()
        self.transport.barrier()


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


class Ulysses:
    """Attention over a split sequence of which each rank takes all tokens and its share of the heads.

    The ranks of `transport`, which are neighbours, trade tokens for heads. With `outer`, these are one of several
    groups (`groups`, of which this is number `group`), each with its share of the tokens, and keys go between the
    groups as that has it: Ulysses inside, a ring outside. (Fang and Zhao 2024, USP)
    """

    def __init__(self, transport: Transport, outer: Blockwise | None = None) -> None:
        self.transport, self.outer = transport, outer
        self.group, self.groups = (outer.transport.rank, outer.transport.size) if outer else (0, 1)

    def lse_shape(self, q: Tensor) -> tuple[int, ...]:
        """Of all tokens of the group, of this rank's heads: as the backward pass needs it."""
        return q.shape[0], q.shape[2] // self.transport.size, q.shape[1] * self.transport.size

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: SplitCall) -> tuple[Tensor, Tensor]:
        """One rank's rows: out like q; lse see `lse_shape`."""
        exchange = _Exchange(self, q, k, v, call)
        heads = exchange.heads
        outs = exchange.share("outs", q.shape[3], q)
        self.transport.barrier()
        parts = []
        for group, (queries, keys) in exchange.arriving("queries", "keys"):
            out, lse = exchange.forward(queries, keys[:, :, 0], keys[:, :, 1])
            exchange.put("outs", heads.query_piece, group, out)
            parts.append(lse)
        exchange.finish()
        return _heads(outs, q.dtype), torch.cat(parts, 1)

    def backward(
        self, dout: Tensor, _dlse: Tensor | None, saved: Saved, call: SplitCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq of one rank's rows, dk and dv of its keys, like these."""
        q, k, v, out, lse = saved
        exchange = _Exchange(self, q, k, v, call)
        transport, heads, head_dim = self.transport, exchange.heads, q.shape[3]
        compute = accumulation_dtype(q.dtype)
        _share_with_delta(exchange, dout, passes.delta(dout, out))
        dqueries = exchange.share("dqueries", head_dim, q)
        shape = heads.size * heads.kv_pieces, *transport.shared["keys"].shape[1:]
        shared_dkeys = transport.share("dkeys", shape, k, k.dtype if heads.sharers == 1 else compute)
        transport.barrier()
        lse_of_groups = lse.chunk(heads.groups, 1)
        dkeys = None
        for group, (queries, keys, douts) in exchange.arriving("queries", "keys", "douts"):
            if dkeys is None:
                dkeys = torch.zeros(keys.shape, dtype=compute, device=q.device)
            of_rows = _delta_of(douts, head_dim, compute)
            dq = exchange.backward(
                douts[..., :head_dim], of_rows, queries, keys[:, :, 0], keys[:, :, 1], lse_of_groups[group], dkeys
            )
            exchange.put("dqueries", heads.query_piece, group, dq)
            if heads.ends_piece(group):
                exchange.put("dkeys", heads.gradient_piece, group, dkeys.to(shared_dkeys.dtype))
                dkeys = None
        exchange.finish()
        of_heads = shared_dkeys.unflatten(0, (-1, heads.sharers))
        of_heads = of_heads.sum(1) if heads.sharers > 1 else of_heads.squeeze(1)
        dk, dv = (_heads(x, k.dtype) for x in of_heads.unbind(3))
        return _heads(dqueries, q.dtype), dk, dv
