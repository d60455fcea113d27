"""The check before a run: right layouts pass it, wrong ones do not, and ranks agree on it."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from longctx.config import ComputeDtype, Config, ParallelConfig, Positions, Strategy
from longctx.errors import UserError
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.parallel import key_exchange, load_balance, verify
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.parallel.verify import verify_layout
from ranks import run_on_new_ranks, run_on_ranks
from small_models import GQA


def verified(_rank: int, parallel: ParallelConfig, broken: str, compute=ComputeDtype.float32) -> float | str:
    if broken == "dropped hop":
        within = key_exchange._within
        key_exchange._within = lambda run, ranges: [] if run.owner == 1 else within(run, ranges)
    if broken == "row 0 for all":
        of_rank = load_balance.SplitMask.of_rank

        def of_row_0(self, rank: int, device: torch.device) -> KeyIntervals:
            mask = of_rank(self, rank, device)
            assert mask.start is not None
            assert mask.end is not None
            return replace(mask, start=mask.start[:1].expand_as(mask.start), end=mask.end[:1].expand_as(mask.end))

        load_balance.SplitMask.of_rank = of_row_0
    config = Config(model=GQA, parallel=parallel)
    config.precision.compute = compute
    mesh = make_mesh(parallel, torch.distributed.get_world_size(), "cpu")
    model, context = parallelize(config, mesh, torch.distributed.get_world_size(), torch.device("cpu"))
    try:
        return verify_layout(model, config, mesh, context, torch.device("cpu"))
    except UserError as error:
        return str(error)


def verified_model(_rank: int, changes: dict, compute: ComputeDtype) -> float | str:
    parallel = ParallelConfig(context=2, strategy=Strategy.ulysses)
    config = Config(model=replace(GQA, **changes), parallel=parallel)
    config.precision.compute = compute
    mesh = make_mesh(parallel, torch.distributed.get_world_size(), "cpu")
    model, context = parallelize(config, mesh, torch.distributed.get_world_size(), torch.device("cpu"))
    return verify_layout(model, config, mesh, context, torch.device("cpu"))


@pytest.mark.parametrize("compute", [ComputeDtype.float32, ComputeDtype.bfloat16])
@pytest.mark.parametrize(
    "changes", [{"window": 1}, {"qkv_bias": True, "positions": Positions.learned, "max_positions": 4096}], ids=str
)
def test_gradients_that_are_nothing_but_rounding_refuse_no_layout(changes, compute):
    """Of queries and keys where a row sees one key, and of biases of keys, the gradient is 0."""
    most = 1e-4 if compute == ComputeDtype.float32 else 0.05
    assert all(0 < found < most for found in run_on_ranks(2, verified_model, changes, compute))


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


@pytest.mark.parametrize(
    ("broken", "compute"),
    [
        ("dropped hop", ComputeDtype.float32),
        ("dropped hop", ComputeDtype.bfloat16),
        ("row 0 for all", ComputeDtype.float32),
    ],
)
def test_a_wrong_layout_is_refused(broken, compute):
    for message in run_on_new_ranks(2, verified, LAYOUTS["ring"], broken, compute):
        assert "of a batch split over 2 ranks differs from that of the whole batch" in message
        assert "use another parallel.strategy, or parallel.context=1" in message


def looked_at(_rank: int, window: int, spoil: bool) -> tuple[list[int], float | str]:
    """The lengths that are looked at, and what is found; with `spoil` all that is split is NaN."""
    parallel = ParallelConfig(context=2, strategy=Strategy.ring)
    config = Config(model=replace(GQA, window=window), parallel=parallel)
    config.precision.compute = ComputeDtype.float32
    mesh = make_mesh(parallel, 2, "cpu")
    model, context = parallelize(config, mesh, 2, torch.device("cpu"))
    lengths, original = [], verify._loss_and_gradients

    def spy(model, config, mesh, length, context_parallel, device):
        lengths.append(length)
        found = original(model, config, mesh, length, context_parallel, device)
        return [x * torch.nan for x in found] if spoil and context_parallel else found

    with mock.patch.object(verify, "_loss_and_gradients", spy):
        try:
            return lengths, verify_layout(model, config, mesh, context, torch.device("cpu"))
        except UserError as error:
            return lengths, str(error)


def test_what_is_not_a_number_is_refused():
    for _, found in run_on_ranks(2, looked_at, 0, True):
        assert "differs from that of the whole batch by nan" in found


def test_windows_lie_inside_what_is_looked_at():
    for lengths, _ in run_on_ranks(2, looked_at, 700, False):
        assert lengths == [1536] * 3


def test_ranks_find_the_same():
    one, other = (found for _, found in run_on_ranks(2, looked_at, 0, False))
    assert one == other
