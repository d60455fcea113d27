"""What a configuration may be: all that is wrong with one at once, each with the value, the rule and the fix."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from longctx.config import (
    Config,
    DataConfig,
    DataSource,
    ModelConfig,
    Optimizer,
    ParallelConfig,
    Positions,
    Recompute,
    RotaryConfig,
    RotaryScaling,
    Strategy,
    attended_heads,
    configured_ulysses_degree,
    keys,
    resolve_shard,
    shares_heads,
)
from longctx.errors import ConfigError

LEAST_SPAN_OF_COPIES = 128  # of which an eighth can be asked for


def check(config: Config, world_size: int) -> None:
    """Raises `ConfigError` with everything that is wrong with `config` on `world_size` ranks."""
    too_small, outside = _check_limits(config)
    model = _check_model(config.model)
    layout = _check_layout(config.parallel, world_size)
    problems = [*too_small, *outside, *_check_ranges(config), *model, *layout]
    if not too_small and not layout and config.parallel.shard:  # the rest divides by these
        problems += _check_batch(config, world_size)
        problems += _check_sharing(config) if not model else []
    if problems:
        raise ConfigError(problems)


def _check_limits(config: Config) -> tuple[list[str], list[str]]:
    """Values outside the limits that stand at their fields: sizes, by which later checks divide, and the others."""
    sizes, others = [], []
    for key in keys(config):
        value, limits = key.value, key.limits
        if value is None or not limits:
            continue
        if problem := limits.problem(value):
            _, may_be_null, meaning = key.help.partition("null: ")
            or_null = f", or null: {meaning}" if may_be_null else ""
            (sizes if limits.is_least_alone else others).append(f"{key.path}={value} {problem}{or_null}")
    return sizes, others


def _check_ranges(config: Config) -> list[str]:
    problems = []
    warmup = config.optim.warmup_steps
    if warmup is not None and warmup >= max(config.optim.steps, 1):
        problems.append(
            f"optim.warmup_steps={warmup} is not less than optim.steps={config.optim.steps}, so the learning rate "
            "never gets to its top; give fewer, or optim.warmup_steps=null for a twentieth of the steps"
        )
    if config.parallel.shard != -1 and config.parallel.shard < 1:
        problems.append(f"parallel.shard={config.parallel.shard}: give 1 or more, or -1 for all ranks that are left")
    problems += _check_recompute(config) + _check_offload(config)
    if not config.name.strip() or Path(config.name).name != config.name or config.name in (".", ".."):
        problems.append(f"name={config.name!r} is no folder name; give one without slashes")
    elif config.name != config.name.strip() or not config.name.isprintable():
        problems.append(f"name={config.name!r} has spaces at an end, or signs that cannot be seen; give one without")
    return problems + _check_data(config.data)


def _check_recompute(config: Config) -> list[str]:
    parallel, layers = config.parallel, config.parallel.recompute_less_layers
    if layers <= 0:  # -1: as many as can, which may be none
        return []
    if parallel.recompute == Recompute.none:
        return [
            f"parallel.recompute_less_layers={layers}: with parallel.recompute=none no layer recomputes anything; set "
            "parallel.recompute=attention_saved or full, or leave it out"
        ]
    if layers > config.model.layers:
        return [f"parallel.recompute_less_layers={layers}: the model has {config.model.layers} layers"]
    if (named := _set_for_tiled_blocks(parallel)) and parallel.recompute == Recompute.attention_saved:
        return [
            f"parallel.recompute_less_layers={layers} with {named}: such blocks always recompute all but attention; "
            "set parallel.recompute=full, or leave one out"
        ]
    return []


def _set_for_tiled_blocks(parallel: ParallelConfig) -> str:
    """What is set that makes blocks tiled: `parallel.tile=8192 and parallel.offload=2`; empty: nothing."""
    is_set = {"tile": parallel.tile, "offload": parallel.offload, "head_groups": parallel.head_groups > 1}
    return " and ".join(f"parallel.{name}={getattr(parallel, name)}" for name in is_set if is_set[name])


def _check_offload(config: Config) -> list[str]:
    parallel, layers = config.parallel, config.model.layers
    problems = []
    named = _set_for_tiled_blocks(parallel)
    if named and parallel.recompute == Recompute.none:
        problems.append(
            f"{named}: such blocks compute all but attention again, and parallel.recompute=none nothing; "
            "set parallel.recompute=attention_saved or full"
        )
    if named and parallel.tensor > 1:
        problems.append(
            f"{named} with parallel.tensor={parallel.tensor}: not served yet; set parallel.tensor=1, and "
            "parallel.context for the GPUs that it frees"
        )
    if parallel.offload >= layers and parallel.offload:
        problems.append(
            f"parallel.offload={parallel.offload}: what the last of the {layers} layers keeps is needed at once; give "
            f"at most {layers - 1}"
        )
    if parallel.offload_optimizer and config.optim.optimizer == Optimizer.muon:
        problems.append(
            "parallel.offload_optimizer is of AdamW's moments, optim.optimizer is muon; set one or the other"
        )
    return problems


def _check_data(data: DataConfig) -> list[str]:
    problems = []
    if data.source == DataSource.prepared and not data.folder and not data.mixture:
        problems.append("data.source=prepared needs data.folder=FOLDER, as tools/prepare_data.py writes it")
    if data.source != DataSource.prepared and (data.folder or data.mixture):
        problems.append(
            f"data.folder and data.mixture are of data=prepared, data.source is {data.source}; add data=prepared"
        )
    if data.folder and data.mixture:
        problems.append(f"data.folder={data.folder} and data.mixture are both given; put the folder into the mixture")
    if data.source == DataSource.recall and data.copies:
        problems.append(f"data.copies={data.copies} is of text, data.source is recall; set data.copies=0")
    spans = [tokens for tokens in data.curriculum.values() if tokens > 0]
    shortest = min([data.sequence_length, *spans])
    if data.copies and shortest < LEAST_SPAN_OF_COPIES:
        where = "data.sequence_length" if shortest == data.sequence_length else "data.curriculum"
        problems.append(
            f"data.copies={data.copies}: in spans of {shortest} tokens ({where}) hardly a copy finds room; give "
            f"{LEAST_SPAN_OF_COPIES} or more, or data.copies=0"
        )
    problems += [
        f"data.mixture: {folder} has the weight {weight}; give one above 0, or leave it out"
        for folder, weight in data.mixture.items()
        if not 0 < weight < math.inf
    ]
    problems += [
        f"data.curriculum: {step}: {span}; give steps from 0 on, or shares of optim.steps below 1, and tokens, 0 for "
        "attention that is not cut"
        for step, span in data.curriculum.items()
        if not isinstance(step, int | float) or step < 0 or span < 0
    ]
    return problems


def _check_rotary(rotary: RotaryConfig, head_dim: int) -> list[str]:
    low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
    if rotary.scaling == RotaryScaling.llama3 and low >= high:
        return [
            f"model.rotary.low_frequency_factor={low:g} is not less than model.rotary.high_frequency_factor={high:g}, "
            "and frequencies between them are blended; Llama 3.1 has 1 and 4"
        ]
    if rotary.scaling == RotaryScaling.yarn and (rotary.beta_slow >= rotary.beta_fast or rotary.theta <= 1):
        return [
            f"model.rotary.scaling=yarn: beta_slow={rotary.beta_slow:g} must be below beta_fast={rotary.beta_fast:g}, "
            f"and theta={rotary.theta:g} above 1; the paper has 1, 32 and 10000"
        ]
    if rotary.scaling in (RotaryScaling.ntk, RotaryScaling.dynamic) and head_dim <= 2:
        return [f"model.head_dim={head_dim}: model.rotary.scaling={rotary.scaling} needs 4 or more"]
    return []


def _check_model(model: ModelConfig) -> list[str]:
    problems = _check_rotary(model.rotary, model.head_dim) if model.positions == Positions.rotary else []
    if model.kv_heads > 0 and model.heads % model.kv_heads:
        problems.append(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; use {_divisors(model.heads)}"
        )
    if model.positions == Positions.rotary and model.head_dim % 2:
        problems.append(f"model.head_dim={model.head_dim} is odd; rotary positions turn pairs, so give an even one")
    if model.no_rotary_every and model.positions != Positions.rotary:
        problems.append(
            f"model.no_rotary_every={model.no_rotary_every} is of model.positions=rotary, which is {model.positions}; "
            "set it to 0"
        )
    return problems


def _check_layout(parallel: ParallelConfig, world_size: int) -> list[str]:
    sizes = {"replicate": parallel.replicate, "context": parallel.context, "tensor": parallel.tensor}
    if parallel.shard >= 1:
        sizes["shard"] = parallel.shard
    problems = [
        f"parallel.{axis}={size} does not divide the {world_size} ranks of this run; use {_divisors(world_size)}"
        for axis, size in sizes.items()
        if size > 0 and world_size % size
    ]
    if problems or min(sizes.values()) < 1:
        return problems
    product = math.prod(sizes.values())
    named = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if parallel.shard == -1 and world_size % product:
        return [f"parallel: {named} = {product} does not divide the {world_size} ranks of this run; change one of them"]
    if parallel.shard != -1 and product < world_size:
        return [
            f"parallel: {named} = {product}, but the run has {world_size} ranks; "
            f"start {product} (torchrun --nproc-per-node) or set parallel.shard=-1"
        ]
    if parallel.shard != -1 and product > world_size:
        return [f"parallel: {named} = {product}, but the run has {world_size} ranks; start {product} or lower a size"]
    return []


def _check_batch(config: Config, world_size: int) -> list[str]:
    data, parallel, model = config.data, config.parallel, config.model
    problems = []
    if parallel.context > 1:
        pieces = 2 * parallel.context * parallel.tensor
        why = f"2 chunks a rank, which balance causal work, x context {parallel.context} x tensor {parallel.tensor}"
    else:
        pieces, why = parallel.tensor, f"tensor {parallel.tensor}"
    if data.sequence_length % pieces:
        near = max(pieces, round(data.sequence_length / pieces) * pieces)
        problems.append(f"data.sequence_length={data.sequence_length} is no multiple of {pieces} ({why}); use {near}")
    readers = parallel.replicate * resolve_shard(parallel, world_size)
    if data.sequences_per_step % readers:
        near = max(1, round(data.sequences_per_step / readers)) * readers
        context = parallel.context * readers // math.gcd(readers, data.sequences_per_step)
        others = parallel.replicate * parallel.tensor
        sharing = replace(config, parallel=replace(parallel, context=context))
        can_share = parallel.shard == -1 and world_size % (context * others) == 0
        can_share = can_share and not _check_batch(sharing, world_size) and not _check_sharing(sharing)
        or_shared = f", or parallel.context={context}, so that more ranks share each sequence" if can_share else ""
        problems.append(
            f"data.sequences_per_step={data.sequences_per_step} is no multiple of the {readers} ranks that read "
            f"sequences of their own; use {near}{or_shared}"
        )
    rotary = model.rotary
    if rotary.scaling == RotaryScaling.dynamic and rotary.longest < data.sequence_length:
        problems.append(
            f"model.rotary.longest={rotary.longest} is less than data.sequence_length={data.sequence_length}, and "
            f"scaling=dynamic goes by it; set model.rotary.longest={data.sequence_length} or more"
        )
    if model.positions == Positions.learned and model.max_positions < data.sequence_length:
        problems.append(
            f"model.max_positions={model.max_positions} is less than data.sequence_length={data.sequence_length}; "
            f"set model.max_positions={data.sequence_length} or shorten the sequence"
        )
    if data.end_of_document is not None and not 0 <= data.end_of_document < model.vocab_size:
        problems.append(
            f"data.end_of_document={data.end_of_document} is no id of model.vocab_size={model.vocab_size}; set the id "
            f"that closes documents in the files, from 0 to {model.vocab_size - 1}"
        )
    if data.source == DataSource.recall:
        needed = data.recall.keys + data.recall.values
        if model.vocab_size < needed:
            problems.append(
                f"model.vocab_size={model.vocab_size} is less than the {needed} ids of the recall stream "
                f"(keys {data.recall.keys} + values {data.recall.values}); set model.vocab_size={needed}"
            )
    return problems


def _check_sharing(config: Config) -> list[str]:
    model, parallel = config.model, config.parallel
    problems = [
        f"parallel.tensor={parallel.tensor} does not divide model.{name}={count}; use {_divisors(count)}"
        for name, count in (("heads", model.heads), ("kv_heads", model.kv_heads), ("mlp_width", model.mlp_width))
        if count % parallel.tensor
    ]
    for name, rows in (("vocab_size", model.vocab_size), ("max_positions", model.max_positions)):
        if rows and -(-rows // parallel.tensor) * (parallel.tensor - 1) >= rows:
            problems.append(
                f"model.{name}={rows} leaves a rank of parallel.tensor={parallel.tensor} without rows; lower that"
            )
    of_rank = model.kv_heads // parallel.tensor
    if not problems and of_rank % parallel.head_groups:
        problems.append(
            f"parallel.head_groups={parallel.head_groups} does not divide the {of_rank} key/value heads of "
            f"model.kv_heads; use {_divisors(of_rank)}"
        )
    if problems or parallel.context == 1:
        return problems
    heads, kv_heads = attended_heads(config)
    axis = "context" if parallel.strategy == Strategy.ulysses else "ulysses"
    size = configured_ulysses_degree(parallel)
    if parallel.context % size:
        problems.append(
            f"parallel.ulysses={size} does not divide parallel.context={parallel.context}; "
            f"use {_divisors(parallel.context)}"
        )
    if heads % size:
        problems.append(
            f"parallel.{axis}={size} with strategy={parallel.strategy} does not divide the {heads} query heads of "
            f"one call of attention; use {_divisors(heads)}, fewer parallel.head_groups, or strategy=ring or gather"
        )
    elif not shares_heads(heads, kv_heads, size):
        problems.append(
            f"parallel.{axis}={size} with strategy={parallel.strategy} neither divides nor is a multiple of the "
            f"{kv_heads} key/value heads of one call of attention; use strategy=ring or gather"
        )
    return problems


def _divisors(n: int) -> str:
    numbers = [str(d) for d in range(1, n + 1) if n % d == 0]
    return numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} or {numbers[-1]}"
