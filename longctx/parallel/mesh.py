"""The axes of a run and who is where on them.

Ranks count fastest along `tensor`, then `context`, `shard` and `replicate`: the neighbours that talk most are the
closest. The same ranks are seen twice: `data`, in which a sequence is split, and `parameters`, in which the parameters
are, where the ranks of `shard` and `context` together hold one copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longctx.config import ParallelConfig, resolve_shard

AXES = ("replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Mesh:
    """The process groups of a run."""

    data: DeviceMesh  # replicate, shard, context, tensor
    parameters: DeviceMesh  # replicate, shard_context, tensor

    def size(self, axis: str) -> int:
        return self.data[axis].size()

    def rank(self, axis: str) -> int:
        """This rank's place on an axis of `data`."""
        return self.data.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.data.get_group(axis)

    def groups_in_context(self, inner: int) -> list[dist.ProcessGroup]:
        """Splits the context axis in two: `inner` consecutive ranks, and the ranks at the same place in these groups.

        Returns the inner and the outer group of this rank. Collective.
        """
        sizes = self.readers, self.size("context") // inner, inner, self.size("tensor")
        mesh = init_device_mesh(self.data.device_type, sizes, mesh_dim_names=("data", "outer", "inner", "tensor"))
        return [mesh.get_group("inner"), mesh.get_group("outer")]

    @property
    def readers(self) -> int:
        """How many different sequences are read at a time."""
        return self.size("replicate") * self.size("shard")

    @property
    def ranks_of_a_reader(self) -> int:
        """How many ranks read the same sequences: those of the context and the tensor axis."""
        return self.size("context") * self.size("tensor")

    @property
    def reader(self) -> int:
        """Which of them this rank works on."""
        return self.rank("replicate") * self.size("shard") + self.rank("shard")


def make_mesh(parallel: ParallelConfig, world_size: int, device_type: str) -> Mesh:
    """The groups of every axis; the sizes are those `config.check` has accepted. Needs a process group."""
    shard = resolve_shard(parallel, world_size)
    data_sizes = (parallel.replicate, shard, parallel.context, parallel.tensor)
    parameter_sizes = (parallel.replicate, shard * parallel.context, parallel.tensor)
    return Mesh(
        init_device_mesh(device_type, data_sizes, mesh_dim_names=("replicate", "shard", "context", "tensor")),
        init_device_mesh(device_type, parameter_sizes, mesh_dim_names=("replicate", "shard_context", "tensor")),
    )
