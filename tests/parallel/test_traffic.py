"""What attention sends between machines and holds for it: the arithmetic beside the bytes that are received and held,
and the link's rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longctx import plan
from longctx.config import ComputeDtype, Config, ParallelConfig, Strategy
from longctx.model.attention import Attend
from longctx.parallel.context_parallel import ContextParallel
from longctx.parallel.load_balance import zigzag
from longctx.parallel.mesh import make_mesh
from longctx.parallel.traffic import Traffic, between_machines, link_rate
from longctx.parallel.transport import Messages
from longctx.strategy import choose_strategy
from ranks import run_on_ranks

LENGTH, HEAD_DIM, RANKS = 256, 16, 4


def config_of(strategy: Strategy, heads: int, kv_heads: int, compute: ComputeDtype) -> Config:
    config = Config(parallel=ParallelConfig(context=RANKS, strategy=strategy))
    config.model = replace(config.model, heads=heads, kv_heads=kv_heads, head_dim=HEAD_DIM)
    config.data.sequence_length, config.precision.compute = LENGTH, compute
    return config


def context_of(config: Config, ranks_of_a_machine: int) -> ContextParallel:
    choice = choose_strategy(config, ranks_of_a_machine)
    return ContextParallel.over(choice, make_mesh(config.parallel, RANKS, "cpu"), 60)


def attend(context: ContextParallel, config: Config, between: Callable[[], object] = lambda: None) -> None:
    """Both passes over two sequences of one document; `between` is called between them."""
    model, split = config.model, zigzag(LENGTH, RANKS)
    mask = split.mask(torch.zeros(2, LENGTH, dtype=torch.int64), torch.device("cpu"))
    dtype = getattr(torch, config.precision.compute)
    shapes = [(2, LENGTH // RANKS, heads, HEAD_DIM) for heads in (model.heads, model.kv_heads, model.kv_heads)]
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    out = context.replace(Attend("reference"))(q, k, v, mask)
    between()
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))


def received(rank: int, config: Config, ranks_of_a_machine: int) -> list[int]:
    """Bytes that come to this rank from other machines, in a forward and in a backward pass of two sequences."""
    context = context_of(config, ranks_of_a_machine)
    exchange, counted = Messages._exchange, [0]

    def counting(self, messages):
        for source, target, _, into in messages:
            owner = dist.get_global_rank(self.group, source)
            if target == self.rank and owner // ranks_of_a_machine != rank // ranks_of_a_machine:
                counted[-1] += into.nbytes
        return exchange(self, messages)

    with mock.patch.object(Messages, "_exchange", counting):
        attend(context, config, lambda: counted.append(0))
    context.close()
    return counted


@pytest.mark.parametrize(
    ("strategy", "heads", "kv_heads", "ranks_of_a_machine", "compute"),
    [
        ("ring", 4, 2, 2, "float32"),
        ("ring", 4, 2, 2, "bfloat16"),
        ("gather", 4, 2, 2, "bfloat16"),
        ("ulysses", 8, 8, 2, "float32"),
        ("ulysses", 8, 8, 2, "bfloat16"),
        ("ulysses", 8, 2, 2, "bfloat16"),
        ("ulysses_ring", 8, 4, 2, "bfloat16"),
        ("ulysses_ring", 8, 2, 2, "float32"),
        ("ulysses_ring", 8, 1, 2, "bfloat16"),
        ("ring", 4, 2, 1, "float32"),
        ("ulysses", 4, 4, 1, "bfloat16"),
        ("ring", 4, 2, 4, "float32"),
    ],
)
def test_bytes_between_machines(strategy, heads, kv_heads, ranks_of_a_machine, compute):
    """Those of the machine to which most comes. Keys go between groups once, however many queries share them."""
    config = config_of(Strategy(strategy), heads, kv_heads, ComputeDtype(compute))
    choice = choose_strategy(config, ranks_of_a_machine)
    expected = between_machines(config, choice.strategy, choice.ulysses_size, ranks_of_a_machine, 2)
    found = run_on_ranks(RANKS, received, config, ranks_of_a_machine)
    machines = [found[first : first + ranks_of_a_machine] for first in range(0, RANKS, ranks_of_a_machine)]
    sums = [[sum(rank[which] for rank in machine) for machine in machines] for which in range(2)]
    assert Traffic(*(float(max(of_pass)) for of_pass in sums)) == expected


def held(_rank: int, config: Config, ranks_of_a_machine: int) -> int:
    """Bytes of the buffers of this rank after two calls; inside a machine of GPUs, where no gradients wait to leave."""
    context = context_of(config, ranks_of_a_machine)
    for _ in range(2):
        attend(context, config)
    buffers = [item for transport in context.transports for item in transport.buffers.items()]
    context.close()
    is_inside = config.parallel.strategy != Strategy.ulysses_ring
    return sum(buffer.nbytes for name, buffer in buffers if not (is_inside and name.startswith("gradients")))


@pytest.mark.parametrize(
    ("strategy", "heads", "kv_heads", "ranks_of_a_machine"),
    [
        ("ring", 8, 4, 4),
        ("gather", 8, 4, 4),
        ("ulysses", 8, 4, 4),
        ("ulysses", 8, 2, 4),
        ("ulysses_ring", 8, 8, 2),
        ("ulysses_ring", 8, 4, 2),
        ("ulysses_ring", 8, 1, 2),
    ],
)
def test_bytes_that_are_held(strategy, heads, kv_heads, ranks_of_a_machine):
    """Of the rank that holds most: what the planner counts as the exchange of keys."""
    config = config_of(Strategy(strategy), heads, kv_heads, ComputeDtype.bfloat16)
    config.data.sequences_per_step = config.data.sequences_per_micro_batch = 2
    choice = choose_strategy(config, ranks_of_a_machine)
    expected = plan.memory(config, RANKS, choice).terms["exchange of keys"]
    assert max(run_on_ranks(RANKS, held, config, ranks_of_a_machine)) == expected


def test_what_crosses_for_llama_3():
    """8B on two machines of 8, a million tokens, in GiB: trading heads inside a machine saves what a ring repeats."""
    config = Config(parallel=ParallelConfig(context=16))
    config.model = replace(config.model, heads=32, kv_heads=8, head_dim=128)
    config.data.sequence_length = 1 << 20
    found = {
        strategy: [x / 2**30 for x in between_machines(config, strategy, 8, 8, 1)]
        for strategy in (Strategy.ulysses_ring, Strategy.ring, Strategy.ulysses)
    }
    assert found == {
        Strategy.ulysses_ring: [2.0, 5.0],
        Strategy.ring: [16.0, 40.0],
        Strategy.ulysses: [6.0, 12.125],
    }


def rate_of_a_link(rank: int) -> float:
    return link_rate(dist.group.WORLD, 1, torch.device("cpu"))


def test_the_rate_of_a_link_is_that_of_the_slowest():
    first, second = run_on_ranks(2, rate_of_a_link)
    assert first == second
    assert 1e7 < first < 1e12
