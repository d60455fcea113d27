"""The loss of a step and its scale, written once: for training, for the check before it, and for the tests.

    loss = (sum of the losses of all valid tokens of the global batch) / (number of these tokens)

It is a mean over tokens, never a mean of means: micro-batches, ranks and documents may have any number of them.
Gradients are summed over micro-batches, and by FSDP over the ranks of `replicate`, `shard` and `context`, which hold
different tokens. The ranks of `tensor` hold the same ones, and each computes the whole loss of these.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.parallel.local_batch import LocalBatch
from longctx.parallel.mesh import Mesh


def _untimed(_name: str) -> AbstractContextManager:
    return nullcontext()


def token_weight(valid_tokens: float, device: torch.device, alike: int = 1) -> Tensor:
    """What the loss of each token is multiplied by: 1 / `valid_tokens` of the global batch, float32.

    `alike`: how many ranks whose gradients are summed hold the same tokens.
    """
    return torch.tensor(1 / max(valid_tokens, 1) / alike, dtype=torch.float32, device=device)


def forward_backward(
    model: nn.Module, batch: LocalBatch, weight: Tensor, part: Callable[[str], AbstractContextManager] = _untimed
) -> Tensor:
    """Adds the gradients of a micro-batch to those of the model; returns this rank's part of the loss, float32.

    `part`: around the forward and the backward pass, with their names, to time them.
    """
    with part("forward"):
        loss = model(*batch, weight)
    with part("backward"):
        loss.backward()
    return loss.detach()


def global_loss(parts: Tensor, mesh: Mesh) -> Tensor:
    """The loss of the step in nats a token, from the sum of this rank's parts, in place. Collective."""
    dist.all_reduce(parts)
    parts /= mesh.size("tensor")
    return parts
