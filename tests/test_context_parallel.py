"""Ring and gather in many steps and rounds, waits, and the check before a run: on gloo ranks."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from distributed import run_on_ranks
from test_parity import DOCUMENTS, GQA, LENGTH, make_inputs

from longctx.config import ComputeDtype, Config, ParallelConfig, Strategy, UserError
from longctx.kernels import reference
from longctx.kernels.attention import interface, tiles
from longctx.kernels.attention.interface import ROWS_WITH_A_ROLE, attention
from longctx.kernels.attention.mask import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.model.attention import Attend
from longctx.parallel import blockwise, exchange, sequence, transport, ulysses
from longctx.parallel.blockwise import Budget
from longctx.parallel.context_op import ContextAttend, context_op
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.parallel.sequence import zigzag
from longctx.parallel.strategy import choose_strategy, wrapper
from longctx.parallel.verify import verify_layout

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


def in_blocks(rank: int, window: int, owners: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
    """out, dq, dk and dv of this rank for each budget."""
    whole, start = tensors()
    split, group, results = sequence._of_owners(owners, LENGTH, 4), torch.distributed.group.WORLD, {}
    mask = split.mask(start, torch.device("cpu"))
    mask = mask.window(window, "cpu") if window else mask
    for number, (name, budget) in enumerate(BUDGETS.items()):
        attend = ContextAttend(Attend("reference"), context_op(f"test_blocks_{number}", budget), group)
        q, k, v, dout = (split.shard(x, rank).requires_grad_() for x in whole)
        out = attend(q, k, v, mask)
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
    of_ranks, split = run_on_ranks(4, in_blocks, window, SPLITS[split]), sequence._of_owners(SPLITS[split], LENGTH, 4)
    for name in BUDGETS:
        for rank, results in enumerate(of_ranks):
            for found, whole in zip(results[name], expected, strict=True):
                torch.testing.assert_close(found, split.shard(whole, rank), rtol=2e-5, atol=2e-6)


class Recorder:
    """A transport and the gradient of one rank: notes which buffers are on their way."""

    rank, size, generation, reaches_others, writes_to_homes = 0, 8, 0, True, True

    def __init__(self) -> None:
        self.taken, self.leaving, self.writes = "", set(), 0

    def meet(self) -> None:
        assert not self.leaving or not self.writes

    def share(self, _name, shape, _like, _dtype):
        return torch.empty(shape)

    def addresses(self, *_arguments):
        return []

    def add(self, *_arguments) -> None:
        self.writes += 1

    def scratch(self, name, shape, _like, _dtype):
        assert name not in self.leaving, f"{name} is overwritten before it has left"
        self.taken = name
        return torch.empty(shape)

    def give(self, *_arguments):
        name = self.taken
        self.leaving.add(name)
        return lambda: self.leaving.discard(name)


@pytest.mark.parametrize("is_aligned", [(0, 1, 0, 0, 0), (0, 0, 1, 0, 1, 0), (1, 1, 0, 1, 0, 0, 0)])
def test_no_buffer_is_overwritten_before_it_has_left(is_aligned):
    """Steps whose gradients kernels give away and others in between: names and waits were once counted apart."""
    size, rank = len(is_aligned), Recorder()
    order = zigzag(2 * size, size).order
    plan = exchange.make_plan(order, torch.zeros(1, 2 * size), torch.full((1, 2 * size), 2 * size), size, 2, size)
    steps = [
        blockwise.Step(moves, 2, KeyIntervals.full(1, 1), torch.empty(0), bool(a))
        for moves, a in zip(plan.moves, is_aligned, strict=True)
    ]
    shard = torch.empty(1, 2, 2, 1, 8)
    keys = SimpleNamespace(
        transport=rank, schedule=blockwise.Schedule(plan, steps), shard=shard, keys_values=lambda _number: shard
    )
    blockwise._give_gradients(range(size), keys, rank)
    assert (rank.writes, rank.leaving) == (size, set())


def test_a_step_without_keys_is_no_block(monkeypatch):
    """It once made the sums of those before zero, where kernels write rows with the last keys they see."""
    steps = [SimpleNamespace(n_keys=n, mask=None, roles=n) for n in (4, 0, 2, 0)]
    added: list[tuple[int, bool]] = []

    class Blocks:
        out, lse = "out", "lse"

        def __init__(self, *_arguments) -> None: ...

        def add(self, k, _v, _mask, roles, is_last) -> None:
            added.append((roles, is_last))
            assert len(k) == roles

    class Keys:
        def __init__(self, *_arguments) -> None: ...

        def keys_values(self, number):
            return torch.empty(steps[number].n_keys, 1, 2)

    monkeypatch.setattr(blockwise, "_setting", lambda *_: (None, SimpleNamespace(steps=steps)))
    monkeypatch.setattr(blockwise, "ForwardInBlocks", Blocks)
    monkeypatch.setattr(blockwise, "_Pass", Keys)
    call = SimpleNamespace(options=lambda: None, implementation="")
    assert blockwise.forward(None, None, None, call, Budget(1, 1)) == ("out", "lse")
    assert added == [(4, False), (2, True)]


def as_on_hopper(q, k, v, mask, options, part) -> None:
    """What the kernel does for each block of rows, by its role."""
    found, found_lse = reference.attention_forward(q, k, v, mask, options)
    for block, role in enumerate(part.roles[0].tolist()):
        rows = slice(block * ROWS_WITH_A_ROLE, (block + 1) * ROWS_WITH_A_ROLE)
        result, lse = found[:, rows], found_lse[:, :, rows]
        if role & tiles.HAS_BEFORE:
            result, lse = reference.merge(part.sums[:, rows], part.lse[:, :, rows], result, lse)
        if role:
            part.lse[:, :, rows] = lse
            (part.sums if role & tiles.HAS_AFTER else part.out)[:, rows] = result


@pytest.mark.parametrize("masked", ["documents", "window"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_rows_are_written_once_by_their_roles(size, masked, poisoned_memory, monkeypatch):
    """Of all ranks, an owner a step, with steps without keys: what comes out is attention over the whole sequence."""
    monkeypatch.setattr(interface.hopper, "forward", as_on_hopper)
    monkeypatch.setattr(interface, "choose", lambda *_: "hopper")
    length, generator = 256 * size, torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, length, 1, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    start, split, options = torch.zeros(1, length, dtype=torch.int64), zigzag(length, size), Options(0.3)
    for border in (70, 200, 201, 3 * length // 4) if masked == "documents" else ():
        start[0, border:] = border
    mask = split.mask(start, torch.device("cpu"))
    mask = mask.window(100, "cpu") if masked == "window" else mask
    expected = reference.attention_forward(q[:, split.order], k, v, mask, options)
    empty_steps = 0
    for rank in range(size):
        rows = slice(rank * 256, (rank + 1) * 256)
        schedule = blockwise._schedule_of(mask, rank, size, 1, 1, torch.device("cpu"))
        blocks = interface.ForwardInBlocks(split.shard(q, rank), options, "hopper")
        blocks.out = torch.empty_like(blocks.sums)  # as of 16-bit dtypes
        for number, step in enumerate(schedule.steps):
            tokens = schedule.plan.tokens(number, rank)
            empty_steps += not len(tokens)
            if len(tokens):
                blocks.add(k[:, tokens], v[:, tokens], step.mask, step.roles, is_last=False)
        torch.testing.assert_close(blocks.out, expected[0][:, rows])
        torch.testing.assert_close(blocks.lse, expected[1][:, :, rows])
    assert empty_steps or size == 2


def test_blocks_are_served_as_intervals_are():
    """On GPUs without Hopper's kernels Triton's come before torch's: once the blocks' kind of mask was mistaken."""
    q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="meta")
    assert interface.by_speed(q, interface._INTERVALS)[:2] == ("hopper", "triton")


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
    attend = wrapper(choose_strategy(config, size), mesh, 60)(Attend("auto"))
    whole, start, window = long_case(name, masked)
    shard = whole[1].nbytes * 2 // size
    budgets = {"ring, small": Budget(step=shard, inbox=2 * 2 * shard), "ring, mixed": Budget(shard, 8 * 2 * shard)}
    if name in budgets:  # an owner a step, two slots a round or all in one
        attend.op = context_op("test_small_budget", budgets[name])
    split = zigzag(start.shape[1], size)
    mask = split.mask(start, device)
    mask = mask.window(window, device) if window else mask
    q, k, v, dout = (split.shard(x, rank).to(device).requires_grad_() for x in whole)
    for _ in range(3):  # the buffers are used again
        out = attend(q, k, v, mask)
        results = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    torch.cuda.synchronize()
    assert {made.description for made in transport.in_use()} == {transport.SymmetricMemory.description}
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


def test_a_mask_in_the_order_of_the_sequence_is_refused():
    message = run_on_ranks(2, refused)[0]
    assert message == "the mask of a split sequence must have its rows in the ranks' order: make it by Split.mask"


def refused(_rank: int) -> str:
    op = context_op("test_refused", Budget(1, 1))
    x = torch.zeros(1, 8, 1, 4)
    try:
        ContextAttend(Attend("reference"), op, torch.distributed.group.WORLD)(x, x, x, KeyIntervals.causal(16))
    except ValueError as error:
        return str(error)
    return ""


def chosen(_rank: int) -> str:
    return transport.choose(torch.distributed.group.WORLD).description


def test_without_symmetric_memory_messages_are_sent():
    expected = "sends and receives (no symmetric memory: not all ranks have a GPU)"
    assert run_on_ranks(2, chosen) == [expected] * 2


def waited(rank: int) -> float:
    """Seconds that are counted as waiting while the other rank comes half a second late."""
    made = transport.Messages(torch.distributed.group.WORLD)
    made.is_timed = True
    shard, into = made.share("x", (1, 1, 4, 2), torch.ones(1)), torch.zeros(1, 4, 2)
    shard.fill_(rank)
    time.sleep(0.5 * rank)
    moves = [exchange.Move(1 - reader, 0, reader, 0, 0, 4) for reader in range(2)]
    made.fetch("x", moves, lambda _move: 0, into)()
    assert bool((into == 1 - rank).all())
    return made.take_waited_s()


def test_waiting_for_others_is_measured():
    early, late = run_on_ranks(2, waited)
    assert 0.4 < early < 5
    assert late < 0.3


# the check before a run ----------------------------------------------------------------------------------------------


def verified(_rank: int, parallel: ParallelConfig, broken: str, compute=ComputeDtype.float32) -> float | str:
    if broken == "dropped hop":
        within = exchange._within
        exchange._within = lambda run, ranges: [] if run.owner == 1 else within(run, ranges)
    config = Config(model=GQA, parallel=parallel)
    config.precision.compute = compute
    mesh = make_mesh(parallel, torch.distributed.get_world_size(), "cpu")
    chosen = choose_strategy(config, torch.distributed.get_world_size())
    model = parallelize(config, mesh, chosen, torch.device("cpu"))
    try:
        return verify_layout(model, config, mesh, torch.device("cpu"))
    except UserError as error:
        return str(error)


LAYOUTS = {
    "ring": ParallelConfig(context=2, strategy=Strategy.ring),
    "gather, tensor": ParallelConfig(context=2, tensor=2, strategy=Strategy.gather),
    "ulysses, shard": ParallelConfig(context=2, shard=2, strategy=Strategy.ulysses),
    "ulysses x ring": ParallelConfig(context=4, strategy=Strategy.ulysses_ring, ulysses=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_right_layout_is_verified(name):
    ranks = 2 if name == "ring" else 4
    assert all(0 < found < 1e-4 for found in run_on_ranks(ranks, verified, LAYOUTS[name], ""))


def test_what_rounding_explains_is_no_error():
    """Gradients of the first layers' keys are mostly noise in bfloat16; once a layout was refused for that."""
    differences = run_on_ranks(2, verified, LAYOUTS["ring"], "", ComputeDtype.bfloat16)
    assert all(1e-3 < found < 1 for found in differences)


@pytest.mark.parametrize("compute", [ComputeDtype.float32, ComputeDtype.bfloat16])
def test_a_wrong_layout_is_refused(compute):
    for message in run_on_ranks(2, verified, LAYOUTS["ring"], "dropped hop", compute):
        assert "of a batch split over 2 ranks differs from that of the whole batch" in message
        assert "use another parallel.strategy, or parallel.context=1" in message
