"""Schedules, and optimizers that take the same step in every layout."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from longctx import offloaded_adamw
from longctx.config import Config, OptimConfig, Optimizer, ParallelConfig, Schedule
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.local_part import local_of
from longctx.optim import Optimizers, global_norm
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.schedule import decay_start, schedule
from ranks import run_on_ranks
from runs import TINY


def test_schedules():
    optim = OptimConfig(steps=110, warmup_steps=10, final_lr_fraction=0.1)
    assert [schedule(s, optim) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule(10, optim) == 1
    assert schedule(60, optim) == pytest.approx(0.55)
    assert schedule(109, optim) == pytest.approx(0.1, abs=3e-4)
    wsd = OptimConfig(steps=100, warmup_steps=0, schedule=Schedule.wsd, decay_fraction=0.2, final_lr_fraction=0.0)
    assert [schedule(s, wsd) for s in (0, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])
    assert schedule(1000, OptimConfig(steps=10, schedule=Schedule.constant)) == 1
    to_zero = replace(wsd, warmup_steps=30, decay_fraction=1.0)  # falls from where the warm-up has ended
    assert [schedule(s, to_zero) for s in (29, 30, 65, 100)] == pytest.approx([1, 1, 0.5, 0])
    assert schedule(9, OptimConfig(steps=10, warmup_steps=10, schedule=Schedule.wsd)) == 1


def test_from_which_step_on_the_rate_falls():
    """A share of the steps, rounded, after the warm-up; of no step at a share of 0."""
    for share, start in ((0.29, 71), (0.0, 100), (1.0, 10)):  # 0.29 * 100 < 29
        optim = OptimConfig(steps=100, warmup_steps=10, decay_fraction=share, schedule=Schedule.wsd)
        assert decay_start(optim) == start
        rates = [schedule(step, optim) for step in range(100)]
        assert all(rate == 1 for rate in rates[10 : start + 1])
        assert all(rate < 1 for rate in rates[start + 1 :])


def take_steps(_rank: int, parallel: ParallelConfig, optimizer: Optimizer):
    """Norms of the gradient and the parameters after three steps, and the optimizer's state."""
    world_size = torch.distributed.get_world_size()
    mesh = make_mesh(parallel, world_size, "cpu")
    config = Config(model=TINY, parallel=parallel, optim=OptimConfig(optimizer=optimizer, warmup_steps=0, lr=1e-2))
    config.precision.compute = config.precision.compute.float32
    model, _ = parallelize(config, mesh, 1, torch.device("cpu"))
    optimizers = Optimizers(model, config.optim, is_offloaded=parallel.offload_optimizer)
    tokens = torch.randint(8192, (4, 32), generator=torch.Generator().manual_seed(0))
    mine = tokens.chunk(mesh.readers)[mesh.reader]
    positions = torch.arange(32).expand_as(mine)
    norms = []
    for step in range(3):
        (model(mine, positions, KeyIntervals.causal(32), mine).sum() / tokens.numel()).backward()
        norm = global_norm(list(model.parameters()))
        torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), 0.5, norm)
        norms.append(norm)
        optimizers.step(step)
        optimizers.zero_grad()
    state = {name: local_of(value) for name, value in optimizers.state().items()}
    return torch.stack(norms), {name: p.full_tensor() for name, p in model.named_parameters()}, state


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        (Optimizer.adamw, [(ParallelConfig(), 2)]),
        *(
            pytest.param(optimizer, [(ParallelConfig(), 2), (ParallelConfig(replicate=2), 2),
                                     (ParallelConfig(tensor=2), 2), (ParallelConfig(tensor=2), 4),
                                     (ParallelConfig(replicate=2), 4)], marks=pytest.mark.slow)
            for optimizer in (Optimizer.adamw, Optimizer.muon)
        ),
    ],
)  # fmt: skip
def test_steps_do_not_depend_on_the_layout(optimizer, layouts):
    """Nor norms of the gradient, to which they are clipped."""
    norms, parameters, _ = run_on_ranks(1, take_steps, ParallelConfig(), optimizer)[0]
    assert float(norms.min()) > 0.5
    tolerance = 1e-4  # Adam's first steps are signs, and Muon lifts small singular values: the order of a sum shows
    for parallel, ranks in layouts:
        other_norms, other, _ = run_on_ranks(ranks, take_steps, parallel, optimizer)[0]
        torch.testing.assert_close(other_norms, norms, rtol=5e-5, atol=0)
        for name, value in parameters.items():
            difference = float((other[name] - value).norm() / value.norm())
            assert difference < tolerance, (name, difference)


def take_steps_in_pieces(rank: int, parallel: ParallelConfig):
    """As `take_steps`, with AdamW's parameters cut into pieces of 1024 numbers at most."""
    with mock.patch.object(offloaded_adamw, "MOMENTS_PIECE", 1024):
        return take_steps(rank, parallel, Optimizer.adamw)


def test_offloaded_moments_give_the_same_bits():
    for parallel, ranks in ((ParallelConfig(), 2), (ParallelConfig(tensor=2), 2)):
        kept = run_on_ranks(ranks, take_steps, parallel, Optimizer.adamw)
        offloaded = run_on_ranks(ranks, take_steps_in_pieces, replace(parallel, offload_optimizer=True))
        for (_, parameters, state), (_, others, other_state) in zip(kept, offloaded, strict=True):
            assert all(torch.equal(value, others[name]) for name, value in parameters.items())
            assert set(state) == set(other_state)
            assert all(torch.equal(value, other_state[name]) for name, value in state.items())


def test_muon_takes_the_matrices_of_the_blocks():
    with torch.device("meta"):
        from longctx.model.transformer import Transformer

        model = Transformer(TINY)
    adamw, muon = Optimizers(model, OptimConfig(optimizer=Optimizer.muon)).optimizers
    names = {p: n for n, p in model.named_parameters()}
    by_muon = {names[p] for g in muon.param_groups for p in g["params"]}
    by_adamw = {names[p]: g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert by_muon == {n for n in names.values() if n.startswith("blocks.") and "norm" not in n}
    assert by_adamw["embedding.weight"] == 0.1
    assert by_adamw["final_norm.weight"] == by_adamw["blocks.0.mlp_norm.weight"] == 0
    assert by_muon | set(by_adamw) == set(names.values())


@pytest.mark.parametrize(
    ("optimizer", "is_offloaded"), [(Optimizer.adamw, False), (Optimizer.adamw, True), (Optimizer.muon, False)]
)
def test_state_is_made_without_changing_parameters(optimizer, is_offloaded):
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 6)])
    model.embedding = torch.nn.Embedding(5, 4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = Optimizers(model, OptimConfig(optimizer=optimizer), is_offloaded=is_offloaded)
    state = optimizers.state()
    assert all(float(s.abs().sum()) == 0 for s in state.values())
    assert "exp_avg.embedding.weight" in state
    assert ("momentum_buffer.blocks.0.weight" in state) == (optimizer == Optimizer.muon)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizers.updates == 0
    optimizers.updates = 7
    assert optimizers.updates == 7


def test_wsd_falls_to_the_fraction_that_is_asked_for():
    wsd = OptimConfig(steps=100, warmup_steps=0, schedule=Schedule.wsd, decay_fraction=0.2, final_lr_fraction=0.1)
    assert [schedule(step, wsd) for step in (80, 90, 100)] == pytest.approx([1, 0.55, 0.1])


def test_adamw_has_the_configured_betas():
    made = Optimizers(torch.nn.Linear(3, 2), OptimConfig(beta1=0.8, beta2=0.7, eps=1e-5, warmup_steps=0))
    assert {(group["betas"], group["eps"]) for group in made.optimizers[0].param_groups} == {((0.8, 0.7), 1e-5)}
