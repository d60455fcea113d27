"""What the backward pass computes again instead of keeping it. (Chen et al. 2016, Sublinear Memory Cost)"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed._composable import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from longctx.config import Recompute
from longctx.parallel import gather, ring, ulysses  # noqa: F401  registers the ops named below


def attention_ops() -> set:
    """The ops whose results `attention_saved` keeps."""
    ops = torch.ops.longctx
    names = "attention", "ring_attention", "gather_attention", "ulysses_attention"
    return {getattr(ops, name).default for name in names}


def _keep_attention(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in attention_ops() else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(block: nn.Module, policy: Recompute) -> None:
    """`full`: a block keeps its input alone. `attention_saved`: attention's output and log-sum-exp too, so that
    nothing that grows with the square of the sequence is computed twice. `none`: everything is kept."""
    if policy == Recompute.full:
        checkpoint(block)
    elif policy == Recompute.attention_saved:
        checkpoint(block, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))
