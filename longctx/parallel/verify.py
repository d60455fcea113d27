"""Whether a layout computes what a single rank would: loss and gradients of a short batch, split and whole.

What context parallelism gets wrong it gets wrong silently (targets lost at the ends of shards, documents that see each
other, a hop left out), so the first step of a layout is preceded by this. Parameters and optimizer stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longctx.config import ComputeDtype, Config, UserError
from longctx.model.transformer import Block, Transformer
from longctx.parallel.context_op import ContextAttend
from longctx.parallel.mesh import Mesh
from longctx.parallel.sequence import Split, zigzag

TOKENS = 512  # of the batch, or as many as the axes need
TOLERANCE = {ComputeDtype.float32: 1e-2}  # relative; an error of this kind is of the size of the values themselves
TOLERANCE_OF_16_BITS = 1e-1


def verify_layout(model: Transformer, config: Config, mesh: Mesh, device: torch.device) -> float:
    """The largest relative difference of a gradient, or of the loss, between a split batch and a whole one.

    Raises `UserError` on all ranks if it is more than rounding explains.
    """
    size = mesh.size("context")
    pieces = 2 * size * mesh.size("tensor")
    length = min(config.data.sequence_length, max(1, TOKENS // pieces) * pieces)
    split = _loss_and_gradients(model, config, mesh, zigzag(length, size), device)
    with torch.compiler.set_stance("force_eager"), _without_context(model):
        whole = _loss_and_gradients(model, config, mesh, zigzag(length, 1), device)
    squares = torch.stack(
        [torch.stack(((a - b).square().sum(), b.square().sum())) for a, b in zip(split, whole, strict=True)]
    )
    dist.all_reduce(squares)
    differences = (squares[:, 0] / squares[:, 1].clamp(min=1e-30)).sqrt()
    worst, at = differences.max(0)
    tolerance = TOLERANCE.get(config.precision.compute, TOLERANCE_OF_16_BITS)
    if not worst <= tolerance:  # NaN too
        names = ["the loss", *(f"the gradient of {name}" for name, _ in model.named_parameters())]
        raise UserError(
            f"parallel.verify: {names[int(at)]} of a batch split over {size} ranks differs from that of the whole "
            f"batch by {float(worst):.3g} of its norm; rounding explains {tolerance}. This layout would train wrong: "
            f"use another parallel.strategy, or parallel.context=1, and report this with the configuration"
        )
    return float(worst)


def _loss_and_gradients(
    model: Transformer, config: Config, mesh: Mesh, split: Split, device: torch.device
) -> list[Tensor]:  # fmt: skip
    """The loss and this rank's part of each gradient: float32."""
    length = len(split.order)
    generator = torch.Generator().manual_seed(mesh.reader)
    stream = torch.randint(config.model.vocab_size, (1, length + 1), generator=generator)
    start = torch.zeros(1, length, dtype=torch.int64)
    for border in (length // 3, length // 2, length // 2 + 1):  # inside a shard, at its end, and one token long
        start[:, border:] = border
    rank = mesh.rank("context") if split.size > 1 else 0
    tokens, targets, positions = (
        split.shard(x, rank).to(device) for x in (stream[:, :-1], stream[:, 1:], torch.arange(length) - start)
    )
    ranks_alike = mesh.size("context") // split.size  # whose gradients are added up
    token_weight = torch.tensor(1 / length / mesh.readers, dtype=torch.float32, device=device)
    loss = model(tokens, positions, split.mask(start, device), targets, token_weight / ranks_alike)
    loss.backward()
    total = loss.detach().float()
    dist.all_reduce(total)
    gradients = []
    for parameter in model.parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        gradients.append((gradient.to_local() if isinstance(gradient, DTensor) else gradient).float())
        parameter.grad = None
    return [total, *gradients]


@contextmanager
def _without_context(model: Transformer) -> Iterator[None]:
    """While in it, every rank attends over whole sequences by itself."""
    layers = [block.attention for block in model.blocks if isinstance(block, Block)]
    wrapped = [layer.attend for layer in layers]
    for layer, attend in zip(layers, wrapped, strict=True):
        assert isinstance(attend, ContextAttend)
        layer.attend = attend.attend
    try:
        yield
    finally:
        for layer, attend in zip(layers, wrapped, strict=True):
            layer.attend = attend
