"""Tensor parallelism with sequence parallelism between the matrix products, by DTensor.

(Shoeybi et al. 2019; Korthikanti et al. 2022.) Queries, keys, values and the MLP's inner width are split by columns,
the projections back by rows; norms and residual stream hold a share of the rank's tokens each. The vocabulary matrix is
stored split by rows; for the loss each rank fetches it whole and works on its share of the tokens.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from longctx.model.transformer import Block, Transformer


def apply_tensor_parallelism(model: Transformer, mesh: DeviceMesh) -> None:
    """Splits the parameters of `model` over the one axis of `mesh` and arranges the collectives around its layers."""
    tokens = Shard(1)
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens)
    parallelize_module(model, mesh, {"embedding": embedding, "final_norm": SequenceParallel()})
    if model.position_embedding is not None:
        parallelize_module(model, mesh, {"position_embedding": embedding})
    if model.output_weight is not None:
        model.output_weight = nn.Parameter(distribute_tensor(model.output_weight, mesh, [Shard(0)]))
    for block in model.blocks:
        assert isinstance(block, Block)
        parallelize_module(block, mesh, _block_plan(block, tokens))
    _split_head_by_tokens(model.head, mesh)


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


def _split_head_by_tokens(head: nn.Module, mesh: DeviceMesh) -> None:
    def take_share(_head: nn.Module, inputs: tuple[DTensor, DTensor, Tensor | None]):
        hidden, weight, targets = inputs
        weight = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        if targets is not None:
            targets = targets.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].contiguous()
        return hidden.to_local(), weight, targets

    def put_together(_head: nn.Module, _inputs, results: Tensor) -> Tensor:
        return DTensor.from_local(results, mesh, [Shard(1)]).full_tensor()

    head.register_forward_pre_hook(take_share)
    head.register_forward_hook(put_together)
