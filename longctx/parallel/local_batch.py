"""What one rank holds of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.batch import Batch
from longctx.kernels.attention.key_intervals import KeyIntervals, to_device
from longctx.parallel.load_balance import Split, SplitMask
from longctx.parallel.mesh import Mesh


class LocalBatch(NamedTuple):
    """This rank's slice of a micro-batch, on its device, in the order of the arguments of `Transformer.forward`."""

    tokens: Tensor  # (batch, sequence / context size) int64, as the next and `targets`
    positions: Tensor
    mask: KeyIntervals | SplitMask  # of whole sequences
    targets: Tensor

    @staticmethod
    def of(batch: Batch, split: Split, mesh: Mesh, device: torch.device) -> LocalBatch:
        """The slice of this rank of the context axis; of a split over one rank every rank has the whole batch."""
        rank = mesh.rank("context")
        tokens, positions, targets = (
            to_device(split.shard(x, rank), device) for x in (batch.tokens, batch.positions, batch.targets)
        )
        return LocalBatch(tokens, positions, split.mask(batch.document_start, device), targets)
