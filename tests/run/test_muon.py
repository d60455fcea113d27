"""Muon over shards: torch's results on one process, the same ones on several, and what each rank keeps and does."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from longctx import muon
from longctx.local_part import index_of, local_part
from longctx.muon import Muon, in_buckets, newton_schulz
from ranks import run_on_ranks

SHAPES = [(8, 8), (8, 8), (12, 8), (8, 12), (3, 8), (8, 12), (12, 8)]  # 3 rows are less than 4 ranks
STEPS = 3


def matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def as_model() -> nn.Module:
    model = nn.Module()
    for number, value in enumerate(matrices(0)):
        layer = nn.Linear(value.shape[1], value.shape[0], bias=False)
        layer.weight.data = value
        model.add_module(f"layer{number}", layer)
    return model


def test_one_process_takes_the_steps_of_torch():
    ours, theirs = ([nn.Parameter(value) for value in matrices(0)] for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = Muon(ours, dtype=torch.bfloat16, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(STEPS):
        for a, b, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, matrices(0), strict=True):
        moved = (b - before).norm()
        assert moved > 0.05
        assert (a - b).norm() < 1e-3 * moved


def test_newton_schulz_lifts_singular_values():
    x = torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(0))
    u, before, v = torch.linalg.svd(x, full_matrices=False)
    result = newton_schulz(x)
    diagonal = u.mT @ result @ v.mT
    values = diagonal.diagonal(dim1=1, dim2=2)
    assert before.max() / before.min() > 3
    assert 0.65 < values.min() < values.max() < 1.25
    assert (diagonal - torch.diag_embed(values)).abs().max() < 1e-4
    square = torch.linalg.svdvals(newton_schulz(torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))))
    assert square.max() < 1.25
    assert square.quantile(0.15) > 0.65  # the least are a thousandth of the norm, and stay below


def shard(model: nn.Module, layout: str, device: str) -> None:
    """FSDP2 over all ranks, with replicas, over tensor parallelism that has split rows or columns, or with both."""
    ranks = dist.get_world_size()
    if layout == "shard":
        fully_shard(model, mesh=init_device_mesh(device, (ranks,)))
    elif layout == "replicate":
        fully_shard(model, mesh=init_device_mesh(device, (2, ranks // 2), mesh_dim_names=("replicate", "shard")))
    else:
        replicas = 2 if layout == "replicate, tensor" else 1
        names = ("replicate", "shard", "tensor")
        mesh = init_device_mesh(device, (replicas, ranks // 2 // replicas, 2), mesh_dim_names=names)
        styles = {f"layer{n}": (ColwiseParallel, RowwiseParallel)[n % 2]() for n in range(len(SHAPES))}
        parallelize_module(model, mesh["tensor"], styles)
        fully_shard(model, mesh=mesh["replicate", "shard"] if replicas > 1 else mesh["shard"])


def steps_on_ranks(_rank: int, layout: str, bucket: int, device: str):
    """Whole parameters after some steps; what this rank keeps of the momentum, and how much it orthogonalises."""
    model = as_model().to(device)
    shard(model, layout, device)
    parameters = list(model.parameters())
    with mock.patch.object(muon, "BUCKET_ELEMENTS", bucket):
        optimizer = Muon(parameters, 0.02, 0.9, 0.1, torch.float32)
    for step in range(STEPS):
        for p, gradient in zip(parameters, matrices(step + 1), strict=True):
            p.grad = torch.zeros_like(p)
            p.grad.to_local().copy_(gradient[index_of(local_part(p))])
        optimizer.step()
    kept = [optimizer.state[p]["momentum_buffer"].to_local().numel() for p in parameters]
    mine = [m.parameter.numel() for bucket in optimizer.buckets for m in bucket if m.owner == dist.get_rank()]
    return [p.full_tensor().cpu() for p in parameters], sum(kept), sum(mine), len(optimizer.buckets)


@pytest.mark.parametrize(
    ("layout", "ranks", "copies", "bucket", "device"),
    [
        ("shard", 4, 1, 2**26, "cpu"),
        ("shard", 4, 1, 50, "cpu"),
        ("replicate", 4, 2, 50, "cpu"),
        ("tensor", 2, 1, 50, "cpu"),
        ("tensor", 4, 1, 50, "cpu"),
        ("replicate, tensor", 4, 2, 50, "cpu"),
        pytest.param("shard", 2, 1, 50, "cuda", marks=pytest.mark.gpu(2)),
        pytest.param("tensor", 2, 1, 50, "cuda", marks=pytest.mark.gpu(2)),
    ],
)
def test_shards_take_the_steps_of_one_process(layout, ranks, copies, bucket, device):
    single = [nn.Parameter(value) for value in matrices(0)]
    optimizer = Muon(single, 0.02, 0.9, 0.1, torch.float32)
    for step in range(STEPS):
        for p, gradient in zip(single, matrices(step + 1), strict=True):
            p.grad = gradient
        optimizer.step()

    results = run_on_ranks(ranks, steps_on_ranks, layout, bucket, device, device=device)
    elements = sum(p.numel() for p in single)
    for parameters, *_ in results:
        for p, expected in zip(parameters, single, strict=True):
            torch.testing.assert_close(p, expected.detach(), rtol=0, atol=2e-6)
    assert sum(kept for _, kept, _, _ in results) == copies * elements
    owned = [mine for _, _, mine, _ in results]
    assert sum(owned) == elements  # each matrix once
    assert max(owned) <= elements / ranks + 96  # and nobody has more than a matrix beyond the mean
    assert {buckets for *_, buckets in results} == {1 if bucket > elements else -(-elements // (ranks * bucket))}


def test_matrices_of_a_shape_stand_together():
    (bucket,) = in_buckets([torch.empty(shape) for shape in SHAPES], ranks=1)
    shapes = [sorted(m.parameter.shape) for m in bucket]
    assert shapes == sorted(shapes, reverse=True)
    assert sum(a != b for a, b in pairwise(shapes)) == len({*map(tuple, shapes)}) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_nothing_is_nothing(dtype):
    assert newton_schulz(torch.zeros(1, 4, 8, dtype=dtype)).eq(0).all()
