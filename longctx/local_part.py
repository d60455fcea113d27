"""Which part of a distributed tensor a rank holds.

Torch's own answer (`compute_local_shape_and_global_offset`, `distribute_tensor`) is another than what FSDP2 over tensor
parallelism holds, where rows do not come out even: 50257 rows over 2 x 4 ranks end with 6280 and 6282, not twice 6281
(torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard


def local_part(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's part of `tensor`, a contiguous block."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    return _part_at(tensor, coordinate)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, laid out over ranks or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """A tensor laid out over ranks as `tensor` is, of which this one holds `local`, on whatever device that is."""
    return DTensor(local, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else local  # pyright: ignore[reportCallIssue]


def parts_of_ranks(tensor: DTensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The same of every rank, by its number in the run; `tensor` must be on all of them."""
    mesh = tensor.device_mesh
    coordinates = product(*(range(mesh.size(i)) for i in range(mesh.ndim)))
    found = {rank: _part_at(tensor, at) for rank, at in zip(mesh.mesh.flatten().tolist(), coordinates, strict=True)}
    return [found[rank] for rank in range(len(found))]


def index_of(part: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[slice, ...]:
    """Where a part (shape and offset) lies in the whole tensor, to index that with."""
    return tuple(slice(begin, begin + size) for size, begin in zip(*part, strict=True))


def _part_at(tensor: DTensor, coordinate: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    mesh, placements = tensor.device_mesh, tensor.placements
    # what tensor parallelism had left is what FSDP has split (a strided shard), though its mesh dim stands first
    order = sorted(range(mesh.ndim), key=lambda i: isinstance(placements[i], _StridedShard))
    return part(
        tuple(tensor.shape),
        [
            (placements[i].dim, mesh.size(i), coordinate[i])  # pyright: ignore[reportAttributeAccessIssue]
            for i in order
            if not placements[i].is_replicate()
        ],
    )


def part(shape: tuple[int, ...], splits: list[tuple[int, int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of what `splits` leave: each (dim, into how many, which), one after the other, as chunks."""
    sizes, offset = list(shape), [0] * len(shape)
    for dim, pieces, which in splits:
        size = -(-sizes[dim] // pieces)
        begin = min(which * size, sizes[dim])
        offset[dim] += begin
        sizes[dim] = min(size, sizes[dim] - begin)
    return tuple(sizes), tuple(offset)
