"""Model -> parallel model. The order of the calls is the content."""

from __future__ import annotations

import torch

from longctx.config import Config, Recompute, recompute_by_layer
from longctx.model.transformer import Block, Transformer
from longctx.parallel.activation_checkpointing import apply_activation_checkpointing
from longctx.parallel.context_parallel import ContextParallel
from longctx.parallel.fsdp import apply_fsdp, materialize
from longctx.parallel.mesh import Mesh
from longctx.parallel.offload import ActivationOffload
from longctx.parallel.tensor_parallel import apply_tensor_parallel
from longctx.parallel.tiled_block import TiledBlock
from longctx.strategy import choose_strategy


def parallelize(
    config: Config, mesh: Mesh, ranks_of_a_machine: int, device: torch.device
) -> tuple[Transformer, ContextParallel]:
    """The model of `config` on this rank, initialised, ready to train, and how its attention crosses the context axis.

    Collective: called by all ranks of `mesh`.
    """
    with torch.device("meta"):
        model = Transformer(config.model)

    if mesh.size("tensor") > 1:  # first: what follows shards each rank's part
        apply_tensor_parallel(model, mesh.parameters["tensor"])

    choice = choose_strategy(config, ranks_of_a_machine)
    context_parallel = ContextParallel.over(choice, mesh, config.parallel.timeout_seconds)
    parallel = config.parallel
    offload = ActivationOffload(parallel.offload, device) if parallel.offload else None
    if parallel.compile:  # blocks differ by window, positions, pass and batch, and torch refuses more than 8 versions
        torch._dynamo.config.recompile_limit = 64
    for layer, (block, recompute) in enumerate(zip(model.blocks, recompute_by_layer(config), strict=True)):
        assert isinstance(block, Block)
        if mesh.size("context") > 1:
            block.attention.attend = context_parallel.replace(block.attention.attend)
        if parallel.is_tiled:
            block.run = TiledBlock(block, layer, parallel.tile, recompute, offload, parallel.head_groups)
            continue
        # checkpointing runs a block again up to the last product's inputs, and tensor parallelism calls it as a layer
        block.mlp.fuses_down = recompute == Recompute.none and mesh.size("tensor") == 1
        apply_activation_checkpointing(block, recompute)
        if parallel.compile:  # after activation checkpointing: its hooks run between the compiled parts
            block.compile(fullgraph=recompute == Recompute.none)

    apply_fsdp(model, mesh, config)  # last: it gathers what the calls above have made
    materialize(model, config.seed, device)
    return model, context_parallel
