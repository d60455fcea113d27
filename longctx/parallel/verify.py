"""Whether a layout computes what a single rank would: loss and gradients of a short batch, split and whole.

What context parallelism gets wrong it gets wrong silently (targets lost at the ends of shards, documents that see each
other, a hop left out), so the first step of a layout is preceded by this. How much rounding may explain is measured:
the whole batch once more, with attention's results off by half a unit. Parameters and optimizer stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import ComputeDtype, Config, layer_windows
from longctx.errors import UserError
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.tiles import TILE
from longctx.local_part import local_of
from longctx.model.transformer import Block, Transformer
from longctx.parallel.context_parallel import ContextAttend, ContextParallel
from longctx.parallel.load_balance import in_order
from longctx.parallel.local_batch import LocalBatch
from longctx.parallel.loss import forward_backward, global_loss, token_weight
from longctx.parallel.mesh import Mesh

TOLERANCE = {ComputeDtype.float32: 1e-3}  # relative; an error of this kind is of the size of the values themselves
TOLERANCE_OF_16_BITS = 2e-2
# allowed difference: so many times the change that comes of attention's results being off by half a unit in the last
# place; for the weights of keys in bfloat16 that change alone can be 10 %
NOISE = 5
# of the norm of all gradients: differences count against that much at least, since gradients that are 0 (of biases of
# keys, and of keys of which a row sees one) are rounding and nothing else
LEAST_SHARE = 1e-3
MOST_TOKENS = 2048  # of a sequence, for the sake of windows


def verify_layout(
    model: Transformer, config: Config, mesh: Mesh, context_parallel: ContextParallel, device: torch.device
) -> float:  # fmt: skip
    """The relative difference of all gradients together between a split batch and a whole one.

    Raises `UserError` on all ranks if that of the loss, or of one gradient, is more than rounding explains.
    """
    size = mesh.size("context")
    # chunks of whole tiles, whose gradients kernels give to other ranks, and more than one window, if it is short
    tiles = 2 * size * mesh.size("tensor") * TILE
    wanted = max(tiles, *(min(2 * window, MOST_TOKENS) for window in layer_windows(config.model)))
    length = min(config.data.sequence_length, -(-wanted // tiles) * tiles)
    with torch.compiler.set_stance("force_eager"):  # graphs are compiled for the lengths to come
        split = _loss_and_gradients(model, config, mesh, length, context_parallel, device)
        with _attending(model, lambda attend: attend.attend):
            whole = _loss_and_gradients(model, config, mesh, length, None, device)
        with _attending(model, lambda attend: _RoundedOtherwise(attend.attend)):
            rounded = _loss_and_gradients(model, config, mesh, length, None, device)
    squares = [(a - b).square().sum() for other in (split, rounded) for a, b in zip(other, whole, strict=True)]
    squares = torch.stack(squares + [x.square().sum() for x in whole]).view(3, -1)
    dist.all_reduce(squares)
    of_all = squares[2, 1:].sum()
    least = torch.zeros_like(squares[2])
    least[1:] = LEAST_SHARE**2 * of_all
    differences, noise = (squares[:2] / squares[2].maximum(least).clamp(min=1e-30)).sqrt()
    tolerance = NOISE * noise + TOLERANCE.get(config.precision.compute, TOLERANCE_OF_16_BITS)
    worst, at = (differences / tolerance).max(0)
    if not worst <= 1:  # NaN too
        names = ["the loss", *(f"the gradient of {name}" for name, _ in model.named_parameters())]
        raise UserError(
            f"parallel.verify: {names[int(at)]} of a batch split over {size} ranks differs from that of the whole "
            f"batch by {float(differences[at]):.3g} of its norm; rounding explains {float(tolerance[at]):.2g}. This "
            f"layout would train wrong: use another parallel.strategy, or parallel.context=1, and report this with the "
            f"configuration"
        )
    return float((squares[0, 1:].sum() / of_all.clamp(min=1e-30)).sqrt())


def _loss_and_gradients(
    model: Transformer, config: Config, mesh: Mesh, length: int, context_parallel: ContextParallel | None,
    device: torch.device,
) -> list[Tensor]:  # fmt: skip
    """The loss and this rank's part of each gradient, float32: split by `context_parallel`, None: whole.

    Of two micro-batches: two sequences with documents of their own, split as these are, and one of one document.
    """
    size, generator = mesh.size("context"), torch.Generator().manual_seed(mesh.reader)
    chunk = length // (2 * size)
    # inside a shard, at its end, and after one token; in another row elsewhere; nowhere
    micro_batches = [[{length // 3, chunk, chunk + 1}, {2 * length // 3}], [set()]]
    total = torch.zeros((), device=device)
    for borders in micro_batches:
        stream = torch.randint(config.model.vocab_size, (len(borders), length + 1), generator=generator)
        start = torch.zeros(len(borders), length, dtype=torch.int64)
        for row, of_row in zip(start, borders, strict=True):
            for border in sorted(of_row):
                row[border:] = border
        batch = Batch(stream[:, :-1], stream[:, 1:], torch.arange(length) - start, start)
        split = context_parallel.split(config.model, batch.positions) if context_parallel else in_order(length, 1)
        weight = token_weight(3 * length * mesh.readers, device, alike=size // split.size)
        total += forward_backward(model, LocalBatch.of(batch, split, mesh, device), weight).float()
    total = global_loss(total, mesh)
    gradients = []
    for parameter in model.parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        gradients.append(local_of(gradient).float())
        parameter.grad = None
    return [total, *gradients]


class _RoundedOtherwise(nn.Module):
    """An `attend` whose results are off by half a unit in the last place, up or down."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: KeyIntervals) -> Tensor:
        out = self.attend(q, k, v, mask)
        generator = torch.Generator(out.device).manual_seed(0)
        up = torch.randint(2, out.shape, generator=generator, device=out.device)
        return (out.float() * (1 + torch.finfo(out.dtype).eps * (up - 0.5))).to(out.dtype)


@contextmanager
def _attending(model: Transformer, replaced: Callable[[ContextAttend], nn.Module]) -> Iterator[None]:
    """While in it, attention is what `replaced` makes of the split one."""
    layers = [block.attention for block in model.blocks if isinstance(block, Block)]
    wrapped = [layer.attend for layer in layers]
    for layer, attend in zip(layers, wrapped, strict=True):
        assert isinstance(attend, ContextAttend)
        layer.attend = replaced(attend)
    try:
        yield
    finally:
        for layer, attend in zip(layers, wrapped, strict=True):
            layer.attend = attend
