"""Parameters, gradients and optimizer state split over ranks: FSDP2, with float32 masters and a compute dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from longctx.config import ComputeDtype, Config
from longctx.local_part import index_of, local_part
from longctx.model.transformer import Transformer, initial_value
from longctx.parallel.mesh import Mesh
from longctx.parallel.torch_versions import parameter_groups
from longctx.plan import units_of_blocks


def apply_fsdp(model: Transformer, mesh: Mesh, config: Config) -> None:
    """FSDP2: a block, or several small ones, are a unit: gathered for its forward pass and again for its backward pass.

    The last of them stays gathered between the two. A head with a weight of its own is a unit with the final norm and
    does so too. Then the embedding is a unit, gathered for its forward pass alone, since its backward pass does not
    read it. All else is the root unit, which stays gathered until the backward pass is over: learned positions, and a
    weight that embedding and head share. Gradients are reduce-scattered by sum, not by mean: the loss is divided by the
    number of tokens of the global batch, see `loss`.
    """
    if mesh.size("replicate") > 1:
        fsdp_mesh = mesh.parameters["replicate", "shard_context"]
    else:
        fsdp_mesh = mesh.parameters["shard_context"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # the angles of the rotary positions stay float32
    if config.precision.compute != ComputeDtype.float32:
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, config.precision.compute), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for layers in units_of_blocks(config):
        unit, is_last = [model.blocks[layer] for layer in layers], layers.stop == len(model.blocks)
        fully_shard(unit, mesh=fsdp_mesh, mp_policy=policy, reshard_after_forward=not is_last)
    if not model.config.tied_embeddings:
        fully_shard(model.embedding, mesh=fsdp_mesh, mp_policy=policy).set_unshard_in_backward(False)
        fully_shard([model.final_norm, model.head], mesh=fsdp_mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=fsdp_mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def time_waits(model: Transformer, waiting: Callable[[], AbstractContextManager[None]]) -> None:
    """Enters `waiting` wherever the step may stand still for FSDP: for parameters and for its sums of gradients.

    FSDP2 has no public place for it; in these methods of its parameter groups, of torch 2.11 to 2.15, a GPU's stream
    waits for collectives, and a CPU does them. Packing and unpacking on that stream are counted too.
    """

    def timed(wait: Callable[..., None]) -> Callable[..., None]:
        def timed_wait(*arguments: object, **named: object) -> None:
            with waiting():
                wait(*arguments, **named)

        return timed_wait

    groups = [g for module in model.modules() if isinstance(module, FSDPModule) for g in parameter_groups(module)]
    for group in {id(group): group for group in groups}.values():  # modules of one unit have the same
        if group.mesh_info.mesh.size() == 1:  # nobody to wait for
            continue
        for name in ("unshard", "wait_for_unshard", "post_backward", "finalize_backward"):
            setattr(group, name, timed(getattr(group, name)))


def sum_over_replicas(model: nn.Module, is_last: bool) -> None:
    """Of the micro-batches of a step the last one alone is followed by the sum over replicas (HSDP), of all of them."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def materialize(model: Transformer, seed: int, device: torch.device) -> None:
    """Gives a model on the meta device its initial values, the same ones in every layout."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = initial_value(name, parameter, model.config, seed, device)
            assert isinstance(parameter, DTensor)
            parameter.to_local().copy_(whole[index_of(local_part(parameter))])
