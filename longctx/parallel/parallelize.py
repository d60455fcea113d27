"""Model -> parallel model. The order of the calls is the content."""

from __future__ import annotations

import torch

from longctx.config import Config, Recompute
from longctx.model.transformer import Block, Transformer
from longctx.parallel.mesh import Mesh
from longctx.parallel.recompute import apply_recompute
from longctx.parallel.shard import materialize, shard_parameters
from longctx.parallel.strategy import Chosen, wrapper
from longctx.parallel.tensor import apply_tensor_parallelism


def parallelize(config: Config, mesh: Mesh, context: Chosen, device: torch.device) -> Transformer:
    """The model of `config` on this rank, initialised, ready to train."""
    with torch.device("meta"):
        model = Transformer(config.model)

    if mesh.size("tensor") > 1:  # first: what follows shards each rank's part
        apply_tensor_parallelism(model, mesh.parameters["tensor"])

    wrap = wrapper(context, mesh, config.parallel.timeout_seconds) if mesh.size("context") > 1 else None
    for block in model.blocks:
        assert isinstance(block, Block)
        if wrap:
            block.attention.attend = wrap(block.attention.attend)
        apply_recompute(block, config.parallel.recompute)
        if config.parallel.compile:  # after recompute: its hooks run between the compiled parts
            block.compile(fullgraph=config.parallel.recompute == Recompute.none)

    shard_parameters(model, mesh, config.precision)  # last: it gathers what the calls above have made
    materialize(model, config.seed, device)
    return model
