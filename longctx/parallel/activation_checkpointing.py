"""Activation checkpointing: what the backward pass computes again instead of keeping it. (Chen et al. 2016)"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed._composable import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from longctx.config import Recompute
from longctx.kernels.attention import interface  # noqa: F401  registers the op named below
from longctx.parallel import context_parallel  # noqa: F401  registers the op named below


def attention_ops() -> set:
    """The ops whose results `attention_saved` keeps."""
    return {torch.ops.longctx.attention.default, torch.ops.longctx.context_attention.default}


def _keep_attention(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in attention_ops() else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(block: nn.Module, policy: Recompute) -> None:
    """Applies a policy to one block of the model.

    `full`: only the block's input is saved. `attention_saved` (selective): the attention's output and log-sum-exp too,
    so that nothing that grows with the square of the sequence is computed twice. `none`: everything is saved.
    """
    if policy == Recompute.full:
        checkpoint(block)
    elif policy == Recompute.attention_saved:
        checkpoint(block, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))
