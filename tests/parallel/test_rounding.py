"""What is summed over ranks is summed in float32, and what positions are is not rounded: 16-bit runs on gloo ranks."""

from __future__ import annotations

import pytest
import torch

from longctx.config import ComputeDtype, Config, ParallelConfig, Strategy
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.parallel import fsdp
from longctx.parallel.blockwise import Budget
from longctx.parallel.context_parallel import ContextParallel
from longctx.parallel.load_balance import zigzag
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from ranks import run_on_ranks
from runs import TINY


def policies(_rank: int) -> set[tuple]:
    """Of all units of FSDP: dtype of parameters and of sums of gradients, and whether what goes in is cast."""
    parallel, seen, original = ParallelConfig(), [], fsdp.fully_shard
    config = Config(model=TINY, parallel=parallel)
    config.precision.compute = ComputeDtype.bfloat16

    def spy(*modules, **options):
        seen.append(options["mp_policy"])
        return original(*modules, **options)

    fsdp.fully_shard = spy
    try:
        parallelize(config, make_mesh(parallel, 2, "cpu"), 2, torch.device("cpu"))
    finally:
        fsdp.fully_shard = original
    return {(policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) for policy in seen}


def test_gradients_are_summed_in_float32_and_positions_are_not_rounded():
    """Tables of cosines and sines go into each unit in float32: in bfloat16 far positions would be the same."""
    assert run_on_ranks(2, policies) == [{(torch.bfloat16, torch.float32, False)}] * 2


def key_errors(rank: int, strategy: str, many_rounds: bool) -> list[float]:
    """Relative errors to float64 of this rank's gradients of keys and values in bfloat16."""
    context = ContextParallel.of_group(torch.distributed.group.WORLD, strategy)
    if many_rounds:
        context.exchange.budget = Budget(step=1, inbox=1)
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randn((1, 512, heads, 8), generator=generator).bfloat16() for heads in (16, 2, 2, 16)]
    split = zigzag(512, 4)
    q, k, v, dout = (split.shard(x, rank).requires_grad_() for x in whole)
    out = context.attend("reference")(q, k, v, split.mask(torch.zeros(1, 512, dtype=torch.int64), torch.device("cpu")))
    found = torch.autograd.grad(out, (k, v), dout)
    exact = [x.double().requires_grad_() for x in whole[:3]]
    truth = attention(*exact, KeyIntervals.causal(512), implementation="reference")[0]
    expected = [split.shard(x, rank) for x in torch.autograd.grad(truth, exact[1:], whole[3].double())]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(("strategy", "many_rounds"), [("ring", True), ("ring", False), ("ulysses", False)])
def test_gradients_of_keys_are_summed_in_float32(strategy, many_rounds):
    """Over rounds of a ring, and over the ranks that share a key head; 0.0028 at most, more where sums are rounded."""
    found = run_on_ranks(4, key_errors, Strategy(strategy), many_rounds)
    assert max(error for errors in found for error in errors) < 0.003
