"""Model -> parallel model. The order of the calls is the content."""

from __future__ import annotations

import torch

from longctx.config import Config, Recompute, Strategy
from longctx.model.transformer import Block, Transformer
from longctx.parallel.gather import gather
from longctx.parallel.mesh import Mesh
from longctx.parallel.recompute import apply_recompute
from longctx.parallel.ring import ring
from longctx.parallel.shard import materialize, shard_parameters
from longctx.parallel.tensor import apply_tensor_parallelism
from longctx.parallel.ulysses import ulysses

STRATEGIES = {Strategy.ring: ring, Strategy.gather: gather, Strategy.ulysses: ulysses}


def parallelize(config: Config, mesh: Mesh, device: torch.device) -> Transformer:
    """The model of `config` on this rank, initialised, ready to train."""
    with torch.device("meta"):
        model = Transformer(config.model)

    if mesh.size("tensor") > 1:  # first: what follows shards each rank's part
        apply_tensor_parallelism(model, mesh.parameters["tensor"])

    for block in model.blocks:
        assert isinstance(block, Block)
        if mesh.size("context") > 1:
            wrap = STRATEGIES[config.parallel.strategy]
            block.attention.attend = wrap(block.attention.attend, mesh.group("context"))
        apply_recompute(block, config.parallel.recompute)
        if config.parallel.compile:  # after recompute: its hooks run between the compiled parts
            block.compile(fullgraph=config.parallel.recompute == Recompute.none)

    shard_parameters(model, mesh, config.precision)  # last: it gathers what the calls above have made
    materialize(model, config.seed, device)
    return model
