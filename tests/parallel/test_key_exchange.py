"""Who holds which tokens, and which rank fetches what: pure functions, over random documents."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import Config, ModelConfig, ParallelConfig, Strategy
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.tiles import TILE
from longctx.parallel import blockwise, key_exchange, ulysses
from longctx.parallel.key_exchange import make_exchange_plan, spans_of
from longctx.parallel.load_balance import (
    SplitMask,
    _owners_of_pieces,
    balanced,
    imbalance,
    in_order,
    zigzag,
)
from longctx.strategy import Heads, choose_strategy
from thorough import examples


def document_starts(length: int, median: int, seed: int) -> torch.Tensor:
    """(1, length) of documents of log-normal lengths."""
    generator, start, at = torch.Generator().manual_seed(seed), torch.zeros(1, length, dtype=torch.int64), 0
    while at < length:
        start[0, at:] = at
        at += max(1, int(median * torch.randn((), generator=generator).exp()))
    return start


def work_of(start: torch.Tensor) -> torch.Tensor:
    return torch.arange(start.shape[1]) - start[0] + 1


def bounds_in_rank_order(mask: SplitMask) -> tuple[torch.Tensor, torch.Tensor]:
    start, end = (bound[:, mask.split.order] for bound in mask.mask.bounds("cpu"))
    return start, end


def test_zigzag():
    assert zigzag(16, 2).order.tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    assert zigzag(5, 1).order.tolist() == [0, 1, 2, 3, 4]
    assert [tuple(run) for run in spans_of(in_order(12, 3).order, 3)] == [(0, 0, 0, 4), (1, 0, 4, 4), (2, 0, 8, 4)]
    with pytest.raises(ValueError, match="16 tokens is no multiple of 3 ranks"):
        in_order(16, 3)
    with pytest.raises(ValueError, match=r"a sequence of 12 tokens is no multiple of 2 \* 4 chunks"):
        zigzag(12, 4)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("length", "median"), [(1 << 17, 2048), (1 << 17, 16384), (1 << 15, 500)])
def test_documents_are_shared_evenly(size, length, median):
    """Zigzag's are up to twice as uneven. In no more runs than zigzag's, or a few more where shards are small."""
    of_zigzag = []
    for seed in range(12):
        work = work_of(document_starts(length, median, seed))
        split = balanced(work, size)
        assert imbalance(work, split) <= 1.02
        assert len(spans_of(split.order, size)) <= (2 * size - 1) * (1 if length // size > 1 << 14 else 3)
        assert split.order.sort().values.equal(torch.arange(len(work)))
        assert all(bool((split.held(rank).diff() > 0).all()) for rank in range(size))
        of_zigzag.append(imbalance(work, zigzag(len(work), size)))
    assert max(of_zigzag) > 1.05


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_one_document_is_cut_as_zigzag_does(size):
    length = 512 * size
    work = torch.arange(1, length + 1)
    assert balanced(work, size).order.equal(zigzag(length, size).order)
    owners = _owners_of_pieces(work.double().view(-1, TILE).sum(1), size).repeat_interleave(TILE)
    assert all(owners[zigzag(length, size).held(rank)].eq(rank).all() for rank in range(size))


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2, 99]), st.booleans())
def test_a_plan_brings_every_key_that_a_row_sees_once(seed, size, shards_of_a_step, is_balanced):
    length = 2 * size * TILE * 4
    start = document_starts(length, length // 7, seed)
    split = balanced(work_of(start), size) if is_balanced else zigzag(length, size)
    mask = split.mask(start, torch.device("cpu"))
    if seed % 3 == 0:
        mask = mask.windowed(200, torch.device("cpu"))
    first, end = bounds_in_rank_order(mask)
    plan = make_exchange_plan(split.order, first, end, size, shards_of_a_step * length // size, 3)
    assert [d for distances in plan.distances for d in distances] == list(range(size))
    assert max(len(distances) for distances in plan.distances) <= 3
    seen = mask.mask.dense("cpu")[0, 0][split.order].view(size, -1, length)
    for rank in range(size):
        fetched = [plan.tokens(step, rank) for step in range(len(plan.moves))]
        assert all(bool((tokens.diff() > 0).all()) for tokens in fetched)  # ascending, as intervals need
        counts = torch.bincount(torch.cat(fetched), minlength=length)
        assert int(counts.max()) == 1
        assert bool(counts[seen[rank].any(0)].all())
        for step in range(1, len(plan.moves)):
            assert len(fetched[step]) <= shards_of_a_step * length // size
            for move in plan.fetched(step, rank):
                assert split.held(move.owner)[move.place : move.place + move.length].equal(
                    torch.arange(move.first, move.first + move.length)
                )
                assert move.length % TILE == 0  # whose gradients a kernel can write to their owner


def test_what_no_row_needs_is_not_fetched():
    """A window reaches one chunk back, documents that end with a chunk nothing, a causal row what is before it."""
    length, size = 8192, 4
    split = zigzag(length, size)

    def fetched(mask: SplitMask) -> list[int]:
        first, end = bounds_in_rank_order(mask)
        plan = make_exchange_plan(split.order, first, end, size, length, size)
        return [sum(len(plan.tokens(step, rank)) for step in range(1, len(plan.moves))) for rank in range(size)]

    one = torch.zeros(1, length, dtype=torch.int64)
    assert fetched(split.mask(one, torch.device("cpu"))) == [6 * 1024, 5 * 1024, 4 * 1024, 3 * 1024]
    window = split.mask(one, torch.device("cpu")).windowed(256, torch.device("cpu"))
    assert fetched(window) == [256, 512, 512, 256]
    own = (torch.arange(length) // 1024 * 1024).unsqueeze(0)
    assert fetched(split.mask(own, torch.device("cpu"))) == [0, 0, 0, 0]


def test_a_step_takes_as_many_owners_as_its_buffer_holds():
    """Counted by what is fetched: of documents a rank needs little of each other, and takes it in one step."""
    length, size = 8192, 8
    split, share = zigzag(length, size), length // size
    documents = (torch.arange(length) // 700 * 700).unsqueeze(0)
    for start, tokens, most, expected in (
        (documents, share, 7, [range(1), range(1, 8)]),
        (documents, share, 4, [range(1), range(1, 5), range(5, 8)]),
        (torch.zeros_like(documents), share, 7, [range(d, d + 1) for d in range(size)]),
        (torch.zeros_like(documents), 2 * share, 7, [range(1), range(1, 3), range(3, 5), range(5, 7), range(7, 8)]),
        (torch.zeros_like(documents), 1, 7, [range(d, d + 1) for d in range(size)]),
    ):
        first, end = bounds_in_rank_order(split.mask(start, torch.device("cpu")))
        assert make_exchange_plan(split.order, first, end, size, tokens, most).distances == expected


def test_who_gives_gradients_of_which_token():
    split = zigzag(4096, 4)
    first, end = bounds_in_rank_order(split.mask(torch.zeros(1, 4096, dtype=torch.int64), torch.device("cpu")))
    plan = make_exchange_plan(split.order, first, end, 4, 1, 4)
    # rank 2 holds chunks 2 and 5; the later one is seen by ranks 2, 1 and 0, whose last chunks come after it
    assert plan.givers(2, range(4)).tolist() == [0b1111] * 512 + [0b0111] * 512
    assert plan.givers(2, range(1, 4)).tolist() == [0b111] * 512 + [0b011] * 512
    assert plan.givers(2, range(3, 4)).tolist() == [1] * 512 + [0] * 512


def test_runs():
    assert [tuple(run) for run in spans_of(zigzag(16, 2).order, 2)] == [(0, 0, 0, 4), (0, 4, 12, 4), (1, 0, 4, 8)]


def test_groups_are_large_enough_to_launch_and_small_enough_to_hold():
    def groups(tokens: int, size: int, batch: int = 1) -> int:
        """Of 32 heads of 128, causal."""
        pairs = ulysses.visible_pairs(in_order(tokens, size).mask(torch.zeros(1, tokens), torch.device("cpu")))
        assert pairs == tokens * (tokens + 1) / 2
        return ulysses.most_groups(4 * batch * pairs * 32 / size * 128, batch * tokens // size * 32 * 128 * 2)

    assert [groups(1 << 14, 2), groups(1 << 15, 4), groups(1 << 14, 4), groups(1 << 14, 4, batch=4)] == [2, 4, 1, 4]
    documents = torch.arange(1 << 14) // 2 * 2
    mask = SplitMask(KeyIntervals.documents(documents.repeat(3, 1)), in_order(1 << 14, 2))
    assert ulysses.visible_pairs(mask) == 1.5 * (1 << 14)
    assert [ulysses.most_groups(0.0, mib << 20) for mib in (1, 256, 257, 1024, 4096)] == [1, 1, 2, 4, 4]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "groups", "kv_pieces"),
    [(32, 8, 8, 4, 1), (32, 8, 2, 4, 4), (32, 32, 8, 4, 4), (4, 2, 4, 1, 1), (12, 12, 4, 3, 3), (32, 4, 8, 4, 1)],
)
def test_heads_in_groups(heads, kv_heads, size, groups, kv_pieces):
    shared = Heads(heads, kv_heads, size)
    assert (shared.groups, shared.kv_pieces) == (groups, kv_pieces)
    per_query_piece = heads // (size * groups)
    per_kv_piece = max(1, kv_heads // (size * kv_pieces))
    for rank in range(size):
        for group in range(groups):
            first = shared.query_piece(rank, group) * per_query_piece
            wanted = {head * kv_heads // heads for head in range(first, first + per_query_piece)}
            piece = shared.kv_piece(rank, group)
            assert wanted == set(range(piece * per_kv_piece, (piece + 1) * per_kv_piece))


@pytest.mark.parametrize(
    ("parallel", "length", "on_a_machine", "expected"),
    [
        (ParallelConfig(context=8), 1 << 17, 8, (Strategy.gather, 1)),
        (ParallelConfig(context=8), 1 << 20, 8, (Strategy.ring, 1)),
        (ParallelConfig(context=16), 1 << 20, 8, (Strategy.ulysses_ring, 8)),
        (ParallelConfig(context=16, tensor=4), 1 << 20, 8, (Strategy.ulysses_ring, 2)),
        (ParallelConfig(context=4, strategy=Strategy.ulysses), 1 << 17, 8, (Strategy.ulysses, 4)),
        (ParallelConfig(context=8, strategy=Strategy.ulysses_ring, ulysses=2), 1 << 17, 8, (Strategy.ulysses_ring, 2)),
    ],
)
def test_the_strategy_suits_the_machines(parallel, length, on_a_machine, expected):
    model = ModelConfig(heads=32, kv_heads=8, head_dim=128)
    config = Config(model=model, parallel=parallel)
    config.data.sequence_length = length
    chosen = choose_strategy(config, on_a_machine)
    assert (chosen.strategy, chosen.ulysses_size) == expected
    assert chosen.reason


class Addressed:
    """A transport whose buffers lie where their generation says."""

    generation = 0

    def addresses(self, _name, moves, _piece_of):
        return [(1000 * self.generation + move.place, move.length) for move in moves]


def test_addresses_of_tiles_at_their_owner_are_of_its_buffer_as_it_is():
    """One a tile, as far apart as its tokens; and others once the buffer has moved."""
    made, inbox = Addressed(), torch.empty(2, 1, 8, 2, 3, 4)  # float32: 96 bytes a token
    step = SimpleNamespace(moves=[key_exchange.Move(1, 0, 0, 0, 0, 2 * TILE)], gradient_targets={})

    def found() -> list[int]:
        return blockwise._gradient_targets(step, range(2), None, inbox, made).addresses.tolist()

    assert found() == [0, TILE * 96]
    made.generation = 1
    assert found() == [1000, 1000 + TILE * 96]


def test_tiles_of_two_owners_are_told():
    def plan(length: int) -> key_exchange.ExchangePlan:
        order = zigzag(length, 2).order
        start, end = torch.zeros(1, length, dtype=torch.int64), order.unsqueeze(0) + 1
        return key_exchange.make_exchange_plan(order, start, end, 2, length, 2)

    assert plan(4 * TILE).tiles_have_one_owner(1, 0)
    assert not plan(4 * 64).tiles_have_one_owner(1, 1)


def test_two_splits_of_one_mask_are_two_for_caches():
    """Masks of one document share their bounds: Ulysses trains on one split and is validated on another."""
    start = torch.zeros(1, 512, dtype=torch.int64)
    one, other = (split.mask(start, torch.device("cpu")) for split in (zigzag(512, 2), in_order(512, 2)))
    assert ulysses._moves_of_group(one, 1, 0) != ulysses._moves_of_group(other, 1, 0)


def test_short_sequences_are_shared_no_worse_than_by_zigzag():
    start = torch.cat([torch.zeros(100), torch.full((156,), 100)])
    work = torch.arange(256) - start + 1
    assert imbalance(work, balanced(work, 2)) <= imbalance(work, zigzag(256, 2))
