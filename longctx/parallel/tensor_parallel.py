"""Tensor parallelism with sequence parallelism between the matrix products, by DTensor.

(Shoeybi et al. 2019; Korthikanti et al. 2022.) Queries, keys, values and the MLP's inner width are split by columns,
the projections back by rows; norms and residual stream hold a share of the rank's tokens each. The vocabulary matrix is
split by rows and stays so: each rank has the logits of its classes, and the losses' sums are added up between them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from longctx.model.transformer import Block, Transformer
from longctx.parallel import dtensor_rules  # noqa: F401  what the fused ops do with DTensors


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Splits the parameters of `model` over the one axis of `mesh` and arranges the collectives around its layers."""
    tokens = Shard(1)
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens)
    parallelize_module(model, mesh, {"embedding": embedding, "final_norm": SequenceParallel()})
    # what a collective has not finished yet loses its gradient on the way into a compiled block (torch 2.13)
    model.embedding.register_forward_hook(lambda _embedding, _inputs, x: x.clone())
    if model.position_embedding is not None:
        parallelize_module(model, mesh, {"position_embedding": embedding})
    if model.head.weight is not None:
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight, mesh, [Shard(0)]))
    for block in model.blocks:
        assert isinstance(block, Block)
        parallelize_module(block, mesh, _block_plan(block, tokens))
        _shard_residual(block.mlp_norm, mesh, tokens)
    _split_head_by_classes(model.head, mesh)


def _block_plan(block: Block, tokens: Shard) -> dict:
    plan = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(tokens, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(output_layouts=tokens),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(Replicate(),)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=tokens),
    }
    if block.mlp.gate is not None:
        plan["mlp.gate"] = ColwiseParallel()
    if list(block.attention.query_norm.parameters()):  # per head, and heads are split
        plan["attention.query_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        plan["attention.key_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan


def _shard_residual(norm: nn.Module, mesh: DeviceMesh, tokens: Shard) -> None:
    """The residual that a norm adds, and the sum, are the rank's tokens as a plain tensor outside, a shard inside."""

    def shard(_norm: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return inputs, {"residual": DTensor.from_local(keywords["residual"], mesh, [tokens])}

    def unwrap(_norm: nn.Module, _inputs: tuple, results: tuple[Tensor, DTensor]) -> tuple[Tensor, Tensor]:
        return results[0], results[1].to_local()

    norm.register_forward_pre_hook(shard, with_kwargs=True)
    norm.register_forward_hook(unwrap)


def _split_head_by_classes(head: nn.Module, mesh: DeviceMesh) -> None:
    """Hidden states and weight are shards; the targets are the same on every rank, and so is what comes out."""

    def with_whole_targets(_head: nn.Module, inputs: tuple[DTensor, DTensor | None, Tensor | None, Tensor | None]):
        hidden, tied_weight, targets, token_weight = inputs
        if targets is None:  # logits; torch 2.11 does not flatten (batch, sequence) where the sequence is split
            hidden = hidden.redistribute(placements=[Replicate()])
        else:
            targets = DTensor.from_local(targets, mesh, [Replicate()])
        return hidden, tied_weight, targets, token_weight

    def whole(_head: nn.Module, _inputs, results: DTensor) -> Tensor:
        return results.full_tensor().clone()  # FSDP2 warns of views, which may be written to

    head.register_forward_pre_hook(with_whole_targets)
    head.register_forward_hook(whole)
