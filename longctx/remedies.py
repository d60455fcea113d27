"""What to tell whoever starts a run that does not fit: why, and the words of the command line with which it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from longctx.config import (
    AS_FITS,
    Config,
    Optimizer,
    Positions,
    Recompute,
    configured_ulysses_degree,
    shares_heads,
)
from longctx.plan import GIB, host_memory, memory
from longctx.strategy import Choice

USABLE_OF_HOST = 0.92  # of what is free when a run starts: its own code and the system need some
SPARE = 0.1  # of a GPU's: layers recompute less up to here; torch's allocator needs more than is allocated
RESERVED, GAPS = 1.5 * GIB, 0.03  # of a GPU: driver, NCCL and cuBLAS; and what lies between allocations
TILE = 16384  # tokens that remedies name
OF_MEMORY = (
    "recompute",
    "recompute_less_layers",
    "tile",
    "head_groups",
    "offload",
    "offload_optimizer",
)  # keys of parallel
LEAST_HEADS = 4  # query heads of a group that remedies name: fewer do not keep the attention kernels busy
MOST_STEPS = 1 << 17  # thousands of tokens of a sequence that are looked at


def usable(capacity: float) -> float:
    """Bytes of a GPU's that a run can plan with."""
    return (1 - GAPS) * capacity - RESERVED


def with_layers_chosen(
    config: Config, world_size: int, choose: Callable[[Config], Choice], limit: float
) -> Config:  # fmt: skip
    """Numbers of layers that are -1, by what fits `limit` bytes a GPU; other numbers stay as they are.

    `parallel.recompute_less_layers`: the most that fit, 0 if none does, or can, as where layers are offloaded by what
    fits. `parallel.offload`: the fewest with which a run fits; all but the last, if none are enough.
    """
    parallel = config.parallel
    if parallel.recompute_less_layers == AS_FITS:
        config = with_recompute(config, parallel.recompute)
        if parallel.recompute not in _never_mixed(config) and parallel.offload != AS_FITS:
            most = most_recomputing_less(config, parallel.recompute, world_size, choose, limit)
            config = with_recompute(config, parallel.recompute, max(0, most))
    if parallel.offload == AS_FITS:
        least = _fewest_offloaded(_offloading(config, 0), world_size, choose, limit)
        config = _offloading(config, config.model.layers - 1) if least is None else least
    return config


def _offloading(config: Config, layers: int) -> Config:
    return replace(config, parallel=replace(config.parallel, offload=layers))


def _fewest_offloaded(
    config: Config, world_size: int, choose: Callable[[Config], Choice], limit: float
) -> Config | None:  # fmt: skip
    """The configuration with as few layers offloaded, but not fewer than it says, as fit `limit` bytes a GPU."""
    changed = (_offloading(config, layers) for layers in range(config.parallel.offload, config.model.layers))
    return next((other for other in changed if memory(other, world_size, choose(other)).total <= limit), None)


def _policies_from(config: Config) -> list[Recompute]:
    """The configuration's policy of activation checkpointing, and those that keep less."""
    policies = list(Recompute)
    return policies[policies.index(config.parallel.recompute) :]


def host_refusal(
    config: Config, world_size: int, ranks_of_a_machine: int, free_of_host: float,
    choose: Callable[[Config], Choice], free: float,
) -> str | None:  # fmt: skip
    """Why a machine with `free_of_host` bytes cannot hold what its ranks with GPUs put there, and what would do; None:
    it can. The other arguments as of `refusal`."""
    terms = {name: size * ranks_of_a_machine for name, size in host_memory(config, world_size).items() if size}
    of_host = USABLE_OF_HOST * free_of_host
    if sum(terms.values()) <= of_host:
        return None

    def fits(other: Config) -> bool:
        on_gpu = memory(other, world_size, choose(other)).total
        return on_gpu <= free and sum(host_memory(other, world_size).values()) * ranks_of_a_machine <= of_host

    in_foreground = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))
    kept_here = {"offload": 0, "offload_optimizer": False}
    on_gpus = [with_recompute(in_foreground, policy, **kept_here) for policy in _policies_from(config)]
    planned = tiled(in_foreground, world_size, choose, free, free_of_host / ranks_of_a_machine)
    found = [other for other in (in_foreground, *on_gpus, planned) if other is not None and fits(other)]
    fixes = [" with ".join(words(config, other)) for other in found[:2]]
    named = ", ".join(f"{size / GIB:.1f} for {name}" for name, size in terms.items())
    return (
        f"{sum(terms.values()) / GIB:.1f} GiB of host memory are needed on a machine, and {of_host / GIB:.1f} can be "
        f"had: {named}. Set {', or '.join([*fixes, 'more GPUs that share the rest, or a machine with more memory'])}; "
        "parallel.check_memory=false tries all the same"
    )


def refusal(
    config: Config, world_size: int, choose: Callable[[Config], Choice], free: float, free_of_host: float = math.inf
) -> str | None:  # fmt: skip
    """Why a run does not fit GPUs with `free` bytes each, and what would make it fit; None if it does.

    `choose` gives what crosses the context axis for a configuration; `free_of_host`: bytes of host memory a rank.
    """
    needed = memory(config, world_size, choose(config))
    if needed.total <= free:
        return None
    fixes = remedies(config, world_size, choose, free, free_of_host)
    more = "more GPUs that share it (parallel.context, parallel.shard, parallel.tensor), or a smaller model"
    return (
        f"{needed.total / GIB:.1f} GiB are needed on a GPU in the {needed.point}, and {free / GIB:.1f} are free: "
        f"{needed.in_words()}. Set {', or '.join([*fixes, more])}; parallel.check_memory=false tries all the same"
    )


def remedies(
    config: Config, world_size: int, choose: Callable[[Config], Choice], limit: float, of_host: float = math.inf
) -> list[str]:  # fmt: skip
    """Words of the command line that make a run fit `limit` bytes a GPU, and what it then needs."""
    changed = [with_recompute(config, policy) for policy in _policies_from(config)[1:]]
    changed += as_much_kept_as_fits(config, _policies_from(config), world_size, choose, limit)[:1]
    if config.data.sequences_per_micro_batch > 1:
        changed.append(replace(config, data=replace(config.data, sequences_per_micro_batch=1)))

    def needed(other: Config) -> float:
        return memory(other, world_size, choose(other)).total

    fitting = [other for other in changed if needed(other) <= limit]
    if (other := tiled(config, world_size, choose, limit, of_host)) is not None and other != config:
        fitting.append(other)
    least = config if fitting else with_recompute(config, Recompute.full)
    length = longest(least, world_size, choose, limit)
    if 0 < length < config.data.sequence_length:
        fitting.append(replace(least, data=replace(least.data, sequence_length=length)))
    told = [f"{' with '.join(words(config, other))} ({needed(other) / GIB:.1f} GiB)" for other in fitting]
    return list(dict.fromkeys(told))


def tiled(
    config: Config, world_size: int, choose: Callable[[Config], Choice], limit: float, of_host: float = math.inf
) -> Config | None:  # fmt: skip
    """The configuration with tiled blocks and as little offloaded as makes it fit `limit` bytes a GPU and `of_host`
    bytes of host memory a rank; None: nothing does.

    Saved attention is preferred to what is computed again, and few groups of heads to many. The optimizer is offloaded
    last, which costs time, and before it checkpoints are written without a copy in host memory.
    """
    if config.parallel.tensor > 1:
        return None
    assert config.parallel.offload >= 0, "see `with_layers_chosen`"
    can_offload = config.optim.optimizer == Optimizer.adamw
    optimizers = sorted({config.parallel.offload_optimizer, can_offload or config.parallel.offload_optimizer})
    in_background = sorted({config.checkpoint.asynchronous, False}, reverse=True)
    policies = [policy for policy in _policies_from(config) if policy != Recompute.none]
    tile = config.parallel.tile or TILE
    for offload_optimizer, asynchronous, policy, groups in product(
        optimizers, in_background, policies, _head_groups(config)
    ):
        others = {"tile": tile, "head_groups": groups, "offload_optimizer": offload_optimizer}
        checkpoint = replace(config.checkpoint, asynchronous=asynchronous)
        changed = replace(with_recompute(config, policy, **others), checkpoint=checkpoint)
        least = _fewest_offloaded(changed, world_size, choose, limit)
        if least is None:
            continue
        is_on_host = least.parallel.offload or offload_optimizer
        if not is_on_host or sum(host_memory(least, world_size).values()) <= USABLE_OF_HOST * of_host:
            return least
    return None


def _head_groups(config: Config) -> list[int]:
    """The numbers of groups of heads that the configuration can have, from its own on."""
    model, parallel = config.model, config.parallel
    size = configured_ulysses_degree(parallel)
    return [
        n
        for n in range(parallel.head_groups, model.kv_heads + 1)
        if model.kv_heads % n == 0
        and shares_heads(model.heads // n, model.kv_heads // n, size)
        and model.heads // n // size >= min(LEAST_HEADS, model.heads // parallel.head_groups // size)
    ]


def words(before: Config, after: Config) -> list[str]:
    """What to say on the command line for a change of what is kept, where, or at a time."""
    fields = [("parallel", name) for name in ("context", "shard", "strategy", *OF_MEMORY)]
    fields += [("data", name) for name in ("sequences_per_micro_batch", "sequence_length")]
    fields.append(("checkpoint", "asynchronous"))
    values = {f"{group}.{name}": [getattr(getattr(c, group), name) for c in (before, after)] for group, name in fields}
    return [f"{key}={str(new).lower()}" for key, (old, new) in values.items() if new != old]


def with_recompute(config: Config, policy: Recompute, less_layers: int = 0, **others: Any) -> Config:
    """The configuration with another policy of activation checkpointing, and `others` of `parallel`."""
    parallel = replace(config.parallel, recompute=policy, recompute_less_layers=less_layers, **others)
    return replace(config, parallel=parallel)


def most_recomputing_less(
    config: Config, policy: Recompute, world_size: int, choose: Callable[[Config], Choice], limit: float
) -> int:  # fmt: skip
    """How many layers can recompute less than `policy` says, so that a run fits `limit` bytes a GPU and leaves a tenth
    of them; 0: none can; -1: not even without such layers it fits."""

    def needed(layers: int) -> float:
        changed = with_recompute(config, policy, layers)
        return memory(changed, world_size, choose(changed)).total

    if needed(0) > limit:
        return -1
    return next((n for n in range(config.model.layers, 0, -1) if needed(n) <= (1 - SPARE) * limit), 0)


def _never_mixed(config: Config) -> set[Recompute]:
    """Policies with which no layer can recompute less: tiled blocks recompute all but attention at least."""
    return {Recompute.none, Recompute.attention_saved} if config.parallel.is_tiled else {Recompute.none}


def as_much_kept_as_fits(
    config: Config, policies: list[Recompute], world_size: int, choose: Callable[[Config], Choice], limit: float
) -> list[Config]:  # fmt: skip
    """Of each of the `policies` with which a run fits `limit` bytes a GPU: the configuration with as many layers that
    recompute less as fit, unless all do. What keeps most is first."""
    found = []
    for policy in (policy for policy in policies if policy not in _never_mixed(config)):
        layers = most_recomputing_less(config, policy, world_size, choose, limit)
        if 0 <= layers < config.model.layers:
            found.append(with_recompute(config, policy, layers))
    return found


def _bisect(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number that fits, from `least`, which does, to below `most`."""
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def longest(config: Config, world_size: int, choose: Callable[[Config], Choice], limit: float) -> int:
    """The longest sequence with which a run fits `limit` bytes a GPU, in whole thousands of tokens a rank; 0: none.

    Memory grows with the length under one strategy, but may fall where `choose` goes over to another for longer ones.
    """
    parallel = config.parallel
    step = math.lcm(1024 * parallel.context, 2 * parallel.context * parallel.tensor)
    most = MOST_STEPS
    if config.model.positions == Positions.learned:
        most = min(most, config.model.max_positions // step)
    if not most:
        return 0

    def of(steps: int) -> Config:
        return replace(config, data=replace(config.data, sequence_length=steps * step))

    def fits(steps: int) -> bool:
        return memory(of(steps), world_size, choice).total <= limit

    def fits_as_chosen(steps: int) -> bool:
        return fits(steps) and choose(of(steps)) == choice

    best = 0
    for choice in {choose(of(1)), choose(of(most))}:
        steps = _bisect(fits, 0, most + 1)
        if steps and choose(of(steps)) != choice:
            steps = _bisect(fits_as_chosen, 0, steps)
        best = max(best, steps)
    return best * step
