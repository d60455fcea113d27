"""Ring and gather in many steps and rounds, waits, and the check before a run: on gloo ranks."""

from __future__ import annotations

import copy
import inspect
import itertools
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from longctx.config import Config, ParallelConfig, Strategy
from longctx.kernels.attention import choice, passes, reference, tiles
from longctx.kernels.attention.hopper_backward import GradientTargets
from longctx.kernels.attention.interface import attention, make_options
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.model.attention import Attend
from longctx.parallel import blockwise, context_parallel, key_exchange, load_balance, transport, ulysses
from longctx.parallel.blockwise import Budget
from longctx.parallel.context_parallel import SUPPORTED_OPTIONS, ContextParallel
from longctx.parallel.load_balance import zigzag
from longctx.parallel.mesh import make_mesh
from longctx.step_clock import StepClock
from longctx.strategy import Choice, choose_strategy
from ranks import run_on_ranks
from small_models import DOCUMENTS, LENGTH, make_inputs

SHARD = LENGTH // 4 * 2 * 2 * 8 * 4  # bytes of the keys and values of two sequences on one of 4 ranks, in float32
BUDGETS = {
    "a step an owner, a round a step": Budget(step=SHARD, inbox=SHARD),
    "two owners a step": Budget(step=2 * SHARD, inbox=SHARD),
    "two steps a round": Budget(step=SHARD, inbox=2 * SHARD),
    "all at once": Budget(step=9 * SHARD, inbox=9 * SHARD),
}


SPLITS = {"zigzag": (0, 1, 2, 3, 3, 2, 1, 0), "uneven": (3, 1, 0, 0, 2, 1, 3, 2, 2, 0, 1, 3, 0, 3, 2, 1)}


def tensors() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, LENGTH, heads, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=generator) for shape in shapes], make_inputs(DOCUMENTS[:2]).document_start


def made_over_all(strategy: Strategy) -> ContextParallel:
    """Over all ranks of the process group."""
    return ContextParallel.of_group(torch.distributed.group.WORLD, strategy)


def in_blocks(rank: int, window: int, owners: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
    """out, dq, dk and dv of this rank for each budget."""
    whole, start = tensors()
    split, results = load_balance._of_owners(owners, LENGTH, 4), {}
    mask = split.mask(start, torch.device("cpu"))
    mask = mask.windowed(window, torch.device("cpu")) if window else mask
    context_parallel = made_over_all(Strategy.ring)
    for name, budget in BUDGETS.items():
        context_parallel.exchange.budget = budget
        q, k, v, dout = (split.shard(x, rank).requires_grad_() for x in whole)
        out = context_parallel.replace(Attend("reference"))(q, k, v, mask)
        results[name] = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    return results


@pytest.mark.parametrize("window", [0, 11])
@pytest.mark.parametrize("split", SPLITS)
def test_steps_and_rounds(split, window):
    (q, k, v, dout), start = tensors()
    mask = KeyIntervals.documents(start)
    mask = mask.window(window, "cpu") if window else mask
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, mask, implementation="reference")[0]
    expected = [out, *torch.autograd.grad(out, inputs, dout)]
    of_ranks, split = (
        run_on_ranks(4, in_blocks, window, SPLITS[split]),
        load_balance._of_owners(SPLITS[split], LENGTH, 4),
    )
    for name in BUDGETS:
        for rank, results in enumerate(of_ranks):
            for found, whole in zip(results[name], expected, strict=True):
                torch.testing.assert_close(found, split.shard(whole, rank), rtol=2e-5, atol=2e-6)


class LateTransport:
    """One rank's: a copy is made when it is waited for, so what has been overwritten by then is lost."""

    reaches_others, generation, rank, size = True, 0, 0, 8

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}
        self.waiting: list[int] = []

    def scratch(self, name, shape, like, dtype) -> torch.Tensor:
        return self.buffers.setdefault(name, torch.empty(shape, dtype=dtype))

    share = scratch

    def put(self, name, moves, piece_of, source):
        number = moves[0].owner
        self.waiting.append(number)

        def wait() -> None:
            self.waiting.remove(number)
            self.buffers[name][piece_of(moves[0])] += source

        return wait

    def addresses(self, name, moves, piece_of) -> list[tuple[int, int]]:
        return [(self.buffers[name][piece_of(moves[0])].data_ptr(), moves[0].length)]

    def barrier(self) -> None:
        assert not self.waiting


class FilledGradient:
    """In place of `PartialBackward`: the gradients of the keys of step n are all n + 1."""

    writes_to_targets = True

    def __init__(self, inbox_of: LateTransport) -> None:
        self.transport = inbox_of

    def add(self, k, _v, _mask, targets) -> None:
        if not isinstance(targets, GradientTargets):
            for part in targets:
                part.add_(k)
            return
        inbox = self.transport.buffers["inbox"]
        slot = [piece.data_ptr() for piece in inbox].index(int(targets.addresses[0]))
        inbox[slot] += k


@pytest.mark.parametrize("is_straight", list(itertools.product([False, True], repeat=6)))
def test_gradients_of_all_steps_reach_the_inbox(is_straight):
    """Steps whose gradients kernels store at their owners and others, whose copies leave as late as they may."""
    steps = [
        SimpleNamespace(
            moves=[key_exchange.Move(number, 0, 0, 0, 0, tiles.TILE)], n_keys=tiles.TILE, mask=None,
            tiles_have_one_owner=straight, gradient_targets={},
        )
        for number, straight in enumerate(is_straight)
    ]  # fmt: skip
    plan = SimpleNamespace(size=8, distances=[range(number, number + 1) for number in range(len(steps))])
    made, shard = LateTransport(), torch.zeros(1, tiles.TILE, 2, 1, 4)
    made.share("inbox", (len(steps), *shard.shape), shard, shard.dtype).zero_()
    keys = SimpleNamespace(
        transport=made, shard=shard, schedule=SimpleNamespace(plan=plan, steps=steps),
        of_step=lambda number: (number + 1, number + 1),
    )  # fmt: skip
    blockwise._give_gradients(range(len(steps)), keys, FilledGradient(made))
    for number, slot in enumerate(made.buffers["inbox"]):
        assert torch.equal(slot, torch.full_like(slot, number + 1))
    if not all(is_straight):  # and two buffers are used, so that one is filled while the other leaves
        assert len(made.buffers) == 1 + min(2, is_straight.count(False))


def as_on_hopper(q, k, v, mask, options, part) -> None:
    """What the kernel does for each tile of rows, by its merge flags."""
    assert k.shape[1]  # no kernel is launched for a block without keys
    found, found_lse = reference.attention_forward(q, k, v, mask, options)
    for tile, flags in enumerate(part.merge_flags[0].tolist()):
        rows = slice(tile * tiles.MERGED_ROWS, (tile + 1) * tiles.MERGED_ROWS)
        result, lse = found[:, rows], found_lse[:, :, rows]
        if flags & tiles.HAS_BEFORE:
            result, lse = reference.merge(part.sums[:, rows], part.lse[:, :, rows], result, lse)
        if flags:
            part.lse[:, :, rows] = lse
            (part.sums if flags & tiles.HAS_AFTER else part.out)[:, rows] = result


@pytest.mark.parametrize("masked", ["documents", "window"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_rows_are_written_once_by_their_merge_flags(size, masked, poisoned_memory, monkeypatch):
    """Of all ranks, an owner a step, with steps without keys: what comes out is attention over the whole sequence."""
    monkeypatch.setattr(passes.hopper_forward, "forward_on_hopper", as_on_hopper)
    length, generator = 256 * size, torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, length, 1, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    start, split, options = torch.zeros(1, length, dtype=torch.int64), zigzag(length, size), Options(0.3)
    for border in (70, 200, 201, 3 * length // 4) if masked == "documents" else ():
        start[0, border:] = border
    mask = split.mask(start, torch.device("cpu"))
    mask = mask.windowed(100, torch.device("cpu")) if masked == "window" else mask
    expected_out, expected_lse = reference.attention_forward(q, k, v, mask.mask, options)
    empty_steps = 0

    class WholeKeys:
        """The keys of each step out of the whole sequence, in place of those that other ranks send."""

        def __init__(self, _k, _v, schedule, transport) -> None:
            self.schedule, self.rank = schedule, transport.rank

        def of_step(self, number):
            nonlocal empty_steps
            tokens = self.schedule.plan.tokens(number, self.rank)
            step = self.schedule.steps[number]
            assert step.n_keys == len(tokens)
            assert bool(step.merge_flags.any()) == bool(len(tokens))  # a step without keys is no block
            empty_steps += not len(tokens)
            return k[:, tokens], v[:, tokens]

    monkeypatch.setattr(blockwise, "_Keys", WholeKeys)
    for rank in range(size):
        rows = split.held(rank)
        shards = [split.shard(x, rank) for x in (q, k, v)]
        an_owner_a_step = blockwise.Blockwise(SimpleNamespace(rank=rank), Budget(step=0, inbox=0))
        out, lse = an_owner_a_step.forward(*shards, blockwise.SplitCall(mask, options, "hopper"))
        torch.testing.assert_close(out, expected_out[:, rows])
        torch.testing.assert_close(lse, expected_lse[:, :, rows])
    assert empty_steps or size == 2


def test_blocks_are_served_as_intervals_are():
    """On GPUs without Hopper's kernels Triton's come before torch's: once the blocks' kind of mask was mistaken."""
    q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="meta")
    mask = zigzag(8, 2).mask(torch.zeros(1, 8, dtype=torch.int64), torch.device("cpu"))
    assert choice.by_speed(q, mask.mask)[:2] == ("hopper", "triton")


# on GPUs, in bfloat16 -------------------------------------------------------------------------------------------------


def long_case(name: str, masked: str) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """q, k, v and dout, where documents start, and the window.

    Of 4096 tokens every rank has whole tiles, so that kernels write gradients to their owners; of 4608 some have.
    """
    batch, length = (2, 4608) if name == "ring, mixed" else (1, 4096)
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, length, heads, 128) for heads in (16, 4, 4, 16)]
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    start = torch.zeros(batch, length, dtype=torch.int64)
    for border in (700, 1024, 1025, 3000) if masked == "documents" else ():
        start[-1, border:] = border
    return made, start, 300 if masked == "window" else 0


def strategy_on_gpu(rank: int, size: int, name: str, masked: str) -> list[torch.Tensor]:
    """out, dq, dk and dv of this rank."""
    parallel = ParallelConfig(context=size, strategy=Strategy(name.split(",", maxsplit=1)[0]), ulysses=2)
    config, device = Config(parallel=parallel), torch.device("cuda", rank)
    mesh = make_mesh(parallel, size, "cuda")
    ulysses.FLOPS_OF_A_GROUP = 1.0  # several groups of heads
    context_parallel = ContextParallel.over(choose_strategy(config, size), mesh, 60)
    attend = context_parallel.replace(Attend("auto"))
    whole, start, window = long_case(name, masked)
    shard = whole[1].nbytes * 2 // size
    budgets = {"ring, small": Budget(step=shard, inbox=2 * 2 * shard), "ring, mixed": Budget(shard, 8 * 2 * shard)}
    if name in budgets:  # an owner a step, two slots a round or all in one
        context_parallel.exchange.budget = budgets[name]
    split = zigzag(start.shape[1], size)
    mask = split.mask(start, device)
    mask = mask.windowed(window, device) if window else mask
    q, k, v, dout = (split.shard(x, rank).to(device).requires_grad_() for x in whole)
    for _ in range(3):  # the buffers are used again
        out = attend(q, k, v, mask)
        results = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    torch.cuda.synchronize()
    assert set(context_parallel.identity()["transports"]) == {"SymmetricMemory"}
    return [x.float() for x in results]


@pytest.mark.parametrize("masked", ["causal", "documents", "window"])
@pytest.mark.parametrize("strategy", ["ring", "ring, small", "ring, mixed", "gather", "ulysses", "ulysses_ring"])
@pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (2, 4, 8)])
def test_strategies_on_gpus(size, strategy, masked):
    """The error against float64 is at most 1.5 x one GPU's, whatever the number of GPUs."""
    whole, start, window = long_case(strategy, masked)
    mask = KeyIntervals.documents(start).to("cuda")
    mask = mask.window(window, "cuda") if window else mask

    def on_one(dtype: torch.dtype, implementation: str) -> list[torch.Tensor]:
        q, k, v, dout = (x.to("cuda", dtype).requires_grad_() for x in whole)
        out = attention(q, k, v, mask, implementation=implementation)[0]
        return [x.double().cpu() for x in (out, *torch.autograd.grad(out, (q, k, v), dout))]

    truth, single = on_one(torch.float64, "reference"), on_one(torch.bfloat16, "auto")
    of_ranks = run_on_ranks(size, strategy_on_gpu, size, strategy, masked, device="cuda")
    to_sequence = torch.argsort(zigzag(start.shape[1], size).order)
    for parts, true, alone in zip(zip(*of_ranks, strict=True), truth, single, strict=True):
        found = torch.cat(parts, 1)[:, to_sequence].double()
        assert float((found - true).norm()) <= 1.5 * float((alone - true).norm())


def as_whole(rank: int, strategy: Strategy, options: dict) -> list[torch.Tensor]:
    """out, dq, dk and dv of this rank, for an `Attend` with options."""
    whole, start = tensors()
    split = zigzag(LENGTH, 2)
    attend = made_over_all(strategy).replace(Attend("reference", **options))
    q, k, v, dout = (split.shard(x, rank).requires_grad_() for x in whole)
    out = attend(q, k, v, split.mask(start, torch.device("cpu")))
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("options", [{"scale": 0.7}, {"softcap": 1.5}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("strategy", [Strategy.ring, Strategy.gather, Strategy.ulysses])
def test_options_of_an_attend_reach_the_split_attention(strategy, options):
    (q, k, v, dout), start = tensors()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, KeyIntervals.documents(start), implementation="reference", **options)[0]
    expected = [out, *torch.autograd.grad(out, inputs, dout)]
    split = zigzag(LENGTH, 2)
    for rank, results in enumerate(run_on_ranks(2, as_whole, strategy, options)):
        for found, whole in zip(results, expected, strict=True):
            torch.testing.assert_close(found, split.shard(whole, rank), rtol=2e-5, atol=2e-6)


def test_an_option_reaches_the_split_attention_or_is_refused():
    """Each that `attention` has, and each that it will have: none is lost in silence."""
    others = ("q", "k", "v", "mask", "implementation")
    options = [name for name in inspect.signature(attention).parameters if name not in others]
    assert set(SUPPORTED_OPTIONS) == set(options) & set(inspect.signature(make_options).parameters) - {
        "alibi_slopes", "dropout", "seed",
    }  # fmt: skip
    for name in options:
        made = ContextParallel(Choice(Strategy.ring, 1, "as asked for"), [SimpleNamespace(size=2, rank=0)])
        alone = ContextParallel(Choice(Strategy.ring, 1, "as asked for"), [])
        assert alone.replace(Attend("reference", **{name: 1})).options == {name: 1}  # which splits nothing
        if name in SUPPORTED_OPTIONS:
            assert made.replace(Attend("reference", **{name: 1})).options == {name: 1}
            continue
        with pytest.raises(ValueError, match=f"attention with {name} cannot be split over ranks"):
            made.replace(Attend("reference", **{name: 1}))


def test_graphs_kept_on_disk_are_of_one_exchange(monkeypatch):
    """They hold its name, which a later process gives again: the shapes of results must not differ under one."""
    monkeypatch.setattr(context_parallel, "_numbers", itertools.repeat(0))
    choices = [Choice(Strategy.ring, 1, ""), Choice(Strategy.gather, 1, ""), Choice(Strategy.ulysses, 4, "")]
    choices += [Choice(Strategy.ulysses_ring, size, "") for size in (2, 4)]
    assert len({ContextParallel(choice, []).name for choice in choices}) == len(choices)


def test_one_rank_takes_what_many_take():
    """A mask as of a split sequence, and a batch of nothing."""
    attend = ContextParallel(Choice(Strategy.ring, 1, "as asked for"), []).attend("reference")
    q, mask = torch.randn(2, 8, 2, 4), KeyIntervals.causal(8)
    split = load_balance.balanced(torch.arange(8) + 1, 1)
    assert torch.equal(attend(q, q, q, load_balance.SplitMask(mask, split)), attend(q, q, q, mask))


def empty_batch(_rank: int, strategy: str) -> tuple[int, ...]:
    attend = ContextParallel.of_group(torch.distributed.group.WORLD, strategy).attend()
    mask = load_balance.in_order(16, 2).mask(torch.zeros(1, 16, dtype=torch.int64), torch.device("cpu"))
    q = torch.ones(0, 8, 2, 4, requires_grad=True)
    out = attend(q, q, q, mask)
    out.sum().backward()
    return tuple(out.shape)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_an_empty_batch(strategy):
    assert run_on_ranks(2, empty_batch, strategy) == [(0, 8, 2, 4)] * 2


def test_a_mask_that_is_not_split_is_refused():
    transports = [SimpleNamespace(size=2, rank=0)]
    attend = ContextParallel(Choice(Strategy.ring, 1, "as asked for"), transports).attend("reference")
    x = torch.zeros(1, 8, 1, 4)
    with pytest.raises(TypeError, match="KeyIntervals: a split sequence has a SplitMask, as Split.mask makes it"):
        attend(x, x, x, KeyIntervals.causal(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 16, 4, 8)}, "q has 16 and k 8 tokens: a rank's share of 16 is 8"),
        ({"k": (1, 16, 2, 8)}, "q has 8 and k 16 tokens"),
        ({"length": 32}, "q has 8 and k 8 tokens: a rank's share of 32 is 16"),
        ({"mask": KeyIntervals.causal(12)}, "the mask is for 12 queries and 12 keys, the split for 16"),
        ({"mask": KeyIntervals.documents(torch.zeros(3, 16, dtype=torch.int64))}, "3 rows of bounds for a batch of 1"),
        ({"size": 4}, "the split is for 4 ranks, 2 share a sequence"),
        ({"k": (1, 8, 3, 8)}, "4 query heads are no multiple of 3"),
        ({"q": (1, 8, 3, 8), "k": (1, 8, 3, 8), "strategy": Strategy.ulysses}, "3 query and 3 key heads cannot"),
        ({"v": (1, 8, 2, 4)}, "k like v"),
        ({"dtype": torch.int64}, "must be of one floating dtype"),
    ],
)  # fmt: skip
def test_a_share_that_does_not_fit_is_refused_before_ranks_wait(change, message):
    arguments = {"q": (1, 8, 4, 8), "k": (1, 8, 2, 8), "length": 16, "size": 2, "strategy": Strategy.ring} | change
    over_heads = 2 if arguments["strategy"] == Strategy.ulysses else 1
    made = ContextParallel(Choice(arguments["strategy"], over_heads, "as asked for"), ())
    made.is_alone, made.size, made.exchange = False, 2, "never asked"
    split = zigzag(arguments["length"], arguments["size"])
    mask = arguments.get("mask", KeyIntervals.causal(arguments["length"]))
    shapes = arguments["q"], arguments["k"], arguments.get("v", arguments["k"])
    inputs = [torch.zeros(shape, dtype=arguments.get("dtype")) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        made.attend("reference")(*inputs, load_balance.SplitMask(mask, split))
    attend = made.attend("reference")
    assert copy.deepcopy(attend).context_parallel is made
    made.close()
    with pytest.raises(RuntimeError, match="this ContextParallel was closed"):
        attend(*inputs, load_balance.SplitMask(mask, split))
    with pytest.raises(RuntimeError, match="this ContextParallel was closed: close it after the last backward pass"):
        context_parallel._exchange_of(made.name)


def test_splits_are_on_the_cpu_whatever_the_default_is():
    """As where a model is built on the meta device."""
    for split in (zigzag, load_balance.in_order, load_balance._of_owners):
        split.cache_clear()
    work = torch.arange(1024.0) ** 4
    with torch.device("meta"):
        splits = [zigzag(64, 2), load_balance.in_order(64, 2), load_balance.balanced(work, 2)]
    assert [split.order.device.type for split in splits] == ["cpu"] * 3
    assert load_balance.imbalance(work, splits[2]) < 1.03


def test_splits_of_a_validation_serve_training():
    zigzag.cache_clear()
    load_balance._of_owners.cache_clear()
    with torch.inference_mode():
        split = zigzag(48, 2)
    assert not split.order.is_inference()
    assert split.mask(torch.zeros(1, 48, dtype=torch.int64), "cpu").split is split
    with pytest.raises(ValueError, match=r"tokens \(1, 49\): must be \(batch, 48, ...\), as the split is"):
        split.shard(torch.zeros(1, 49), 0)
    with pytest.raises(ValueError, match="document_start"):
        split.mask(torch.zeros(1, 47, dtype=torch.int64), "cpu")


def test_a_group_has_one_of_three_strategies():
    with pytest.raises(ValueError, match="strategy='ulysses_ring' is not one of ring, gather, ulysses"):
        ContextParallel.of_group(None, "ulysses_ring")


def chosen(_rank: int) -> str:
    return transport.make_transport(torch.distributed.group.WORLD).description


def test_without_symmetric_memory_messages_are_sent():
    expected = "sends and receives (no symmetric memory: not all ranks have a GPU)"
    assert run_on_ranks(2, chosen) == [expected] * 2


def waited(rank: int) -> float:
    """Seconds that are counted as waiting while the other rank comes half a second late."""
    made = transport.Messages(torch.distributed.group.WORLD)
    clock = StepClock(torch.device("cpu"))
    made.waiting = partial(clock.part, "context_exposed")
    shard, into = made.share("x", (1, 1, 4, 2), torch.ones(1)), torch.zeros(1, 4, 2)
    shard.fill_(rank)
    time.sleep(0.5 * rank)
    moves = [key_exchange.Move(1 - reader, 0, reader, 0, 0, 4) for reader in range(2)]
    made.get("x", moves, lambda _move: 0, into)()
    assert bool((into == 1 - rank).all())
    return clock.seconds()["context_exposed"]


def test_waiting_for_others_is_measured():
    early, late = run_on_ranks(2, waited)
    assert 0.4 < early < 5
    assert late < 0.3
