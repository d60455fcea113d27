"""What a run needs of memory and of time, known before anything is made: standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from longctx.config import (
    Activation,
    ComputeDtype,
    Config,
    ModelConfig,
    Norm,
    Optimizer,
    Positions,
    Recompute,
    Strategy,
    groups_of_heads,
    layer_windows,
    micro_batch,
    recompute_by_layer,
    resolve_shard,
)
from longctx.kernels.loss.chunks import tokens_of_a_chunk

GIB = 1 << 30
FLOAT32 = 4  # bytes
CGROUPS = Path("/sys/fs/cgroup")
RATES = Path(__file__).parent / "rates"
MOST_STEPS = 1 << 17  # thousands of tokens of a sequence that are looked at


def parameters(model: ModelConfig) -> tuple[int, int]:
    """How many parameters a model has: in the matrices of its blocks, and in all else."""
    attention = model.width * model.head_dim * 2 * (model.heads + model.kv_heads)
    branches = 3 if model.activation == Activation.swiglu else 2
    matrices = model.layers * (attention + branches * model.width * model.mlp_width)

    norm = model.width * (2 if model.norm == Norm.layer_norm else 1)
    block = 2 * norm
    if model.qk_norm:
        block += 2 * model.head_dim
    if model.qkv_bias:
        block += model.head_dim * (model.heads + 2 * model.kv_heads)
    if model.projection_bias:
        block += model.width + (branches - 1) * model.mlp_width + model.width
    return matrices, model.layers * block + _root_parameters(model)


def _root_parameters(model: ModelConfig) -> int:
    """Of the embeddings, the last norm and the head."""
    tables = model.vocab_size * (1 if model.tied_embeddings else 2)
    tables += model.max_positions if model.positions == Positions.learned else 0
    return model.width * (tables + (2 if model.norm == Norm.layer_norm else 1))


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that take part in matrix products a token: all but embeddings, norms and biases."""
    return parameters(model)[0] + model.width * model.vocab_size


def state_bytes(config: Config, world_size: int) -> int:
    """Bytes a rank holds whatever its activations are: parameters, gradients and the optimizer's state, float32.

    Ranks along shard, context and tensor share them.
    """
    matrices, rest = parameters(config.model)
    parallel = config.parallel
    ranks = resolve_shard(parallel, world_size) * parallel.context * parallel.tensor
    adamw = 4 * FLOAT32  # a parameter, its gradient, two moments
    if config.optim.optimizer == Optimizer.adamw:
        return (matrices + rest) * adamw // ranks
    muon = 3 * FLOAT32  # a parameter, its gradient, one momentum
    return (rest * adamw + matrices * muon) // ranks


# memory of a step ----------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What a GPU holds where a training step needs most: bytes by what they are for."""

    point: str  # of the step
    terms: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    def in_words(self) -> str:
        """The terms in GiB, largest first: `64.0 saved for the backward pass, 46.0 working set of a block`."""
        largest = sorted(self.terms.items(), key=lambda term: -term[1])
        return ", ".join(f"{size / GIB:.1f} {name}" for name, size in largest if size >= 0.05 * GIB)


class _Block(NamedTuple):
    """Bytes of a block under one policy of activation checkpointing."""

    kept: float  # for its backward pass
    in_mlp: float  # of the working set of its backward pass, while it is in the MLP
    in_attention: float


def padded_head_dim(head_dim: int) -> int:
    """Columns that the attention kernels compute with: 64, 128 or 256."""
    return next(width for width in (64, 128, 256, head_dim) if head_dim <= width)


@dataclass(frozen=True)
class _Sizes:
    """Bytes on one rank, of which everything else is made."""

    block: int  # parameters of one block, a number
    root: int  # of embedding, head and last norm
    table: int  # of the vocabulary matrix, where the losses are made
    first_matrix: int  # of the MLP's output projection, whose gradient comes first
    ranks: int  # that share parameters
    compute: int  # bytes of a number that is computed with
    hidden: float  # one hidden state of all tokens of a micro-batch
    blocks: dict[Recompute, _Block]
    of_rows: float  # of a block's working set, inside the op of attention
    normed: float  # statistics of a norm
    logits: float  # of a chunk of tokens
    batch: float


def _readers(config: Config, world_size: int) -> int:
    """Ranks that read sequences of their own."""
    return config.parallel.replicate * resolve_shard(config.parallel, world_size)


def _micro_batches(config: Config, world_size: int) -> int:
    """Of each rank in a step."""
    readers = _readers(config, world_size)
    return config.data.sequences_per_step // (readers * micro_batch(config.data, readers))


def _sizes(config: Config, world_size: int) -> _Sizes:
    model, parallel, data = config.model, config.parallel, config.data
    compute = FLOAT32 if config.precision.compute == ComputeDtype.float32 else 2
    shard = resolve_shard(parallel, world_size)
    tokens = micro_batch(data, _readers(config, world_size)) * data.sequence_length // parallel.context
    width, mlp = compute * model.width, compute * model.mlp_width / parallel.tensor
    queries, keys = (compute * n * model.head_dim / parallel.tensor for n in (model.heads, model.kv_heads))
    lse = FLOAT32 * model.heads / parallel.tensor
    normed = FLOAT32 * (1 if model.norm == Norm.rms_norm else 2)
    in_qk_norm = queries + keys + FLOAT32 * (model.heads + model.kv_heads) / parallel.tensor if model.qk_norm else 0
    saved_of_mlp, inside_mlp = (3, 5) if model.activation == Activation.swiglu else (2, 3)  # times its width
    share = width / parallel.tensor  # of a hidden state between the products, where tokens are split

    projected = queries + 2 * keys
    padded = padded_head_dim(model.head_dim) / model.head_dim
    of_rows = queries * padded * FLOAT32 / compute + 2 * lse  # inside the op: sums of dq, and what it needs of rows
    inside_attention = of_rows + 2 * lse + queries + 2 * keys  # and gradients
    attended = queries + lse
    again_in_mlp = 2 * width + share + projected + 2 * normed + in_qk_norm + width + inside_mlp * mlp
    again_in_attention = 2 * width + projected + normed + in_qk_norm + queries + inside_attention
    blocks = {
        Recompute.none: _Block(
            2 * share + 2 * width + projected + attended + 2 * normed + in_qk_norm + saved_of_mlp * mlp,
            width + (inside_mlp - saved_of_mlp) * mlp,
            queries + inside_attention - saved_of_mlp * mlp - width,
        ),
        Recompute.attention_saved: _Block(share + attended, again_in_mlp, again_in_attention),
        Recompute.full: _Block(share, again_in_mlp + attended, again_in_attention + attended),
    }

    root = _root_parameters(model)
    rotation = 2 * FLOAT32 * (model.head_dim // 2) if model.positions == Positions.rotary else 0
    masks = 12 * len(set(layer_windows(model))) * parallel.context  # bounds and tiles of whole sequences
    vocabulary = model.vocab_size // parallel.tensor
    return _Sizes(
        block=(sum(parameters(model)) - root) // model.layers // parallel.tensor,
        root=root // parallel.tensor,
        table=vocabulary * model.width,
        first_matrix=model.width * model.mlp_width // parallel.tensor,
        ranks=shard * parallel.context,
        compute=compute,
        hidden=width * tokens,
        blocks={policy: _Block(*(size * tokens for size in block)) for policy, block in blocks.items()},
        of_rows=of_rows * tokens,
        normed=normed * tokens,
        logits=float(compute * vocabulary * min(tokens, tokens_of_a_chunk(tokens, width, compute * vocabulary))),
        batch=float((4 * 8 + rotation + masks) * tokens),
    )


def inside_attention(config: Config, world_size: int) -> float:
    """Bytes of a backward pass of attention that are neither its inputs nor its results."""
    return _sizes(config, world_size).of_rows


def inside_losses(config: Config, world_size: int) -> float:
    """The same of the losses."""
    return _sizes(config, world_size).logits


def _exchange_bytes(config: Config, sizes: _Sizes, strategy: Strategy) -> float:
    """What the context axis takes of a rank: shares of keys, values and their gradients, and what it fetches."""
    model, parallel = config.model, config.parallel
    ranks = parallel.context
    if ranks == 1:
        return 0.0
    head = sizes.hidden / model.width / parallel.tensor * model.head_dim
    queries, keys = head * model.heads, 2 * head * model.kv_heads
    gradients = keys * FLOAT32 / sizes.compute
    if strategy == Strategy.ulysses:
        heads, kv_heads = model.heads // parallel.tensor, model.kv_heads // parallel.tensor
        groups = groups_of_heads(heads, kv_heads, ranks, most=4)
        sharers = max(1, ranks * parallel.tensor // model.kv_heads)
        given = gradients * sharers if sharers > 1 else keys
        fetched = 4 * queries + (keys + gradients) * sharers
        return queries * (4 + 8 / model.head_dim) + keys + given + fetched / groups
    if strategy == Strategy.gather:
        return 2 * keys + ranks * gradients + (ranks - 1) * keys
    slots = min(ranks, max(1, int(2 * GIB / gradients)))
    return 2 * keys + slots * gradients + 2 * max(keys, min(GIB / 4, (ranks - 1) * keys))


def memory(config: Config, world_size: int, strategy: Strategy = Strategy.gather) -> Memory:
    """What a rank of `world_size` GPUs needs for a step with the fused kernels, at the point where that is most.

    `strategy` is the one that crosses the context axis, no longer auto. Traced over the model as it is spread, see
    tests/model/test_plan.py; what is inside the ops (sums of dq, logits of a chunk) and what ranks exchange is counted
    by hand. Left out: what the GPU's driver, NCCL and cuBLAS hold, about 1.5 GiB; gaps between allocations; Muon's
    buckets, up to a GiB; and gradients of keys on their way where kernels cannot store them at their owners (other GPUs
    than Hopper, several machines). Ulysses between machines is counted as the ring.
    """
    model, sizes = config.model, _sizes(config, world_size)
    layers, alone = model.layers, sizes.ranks == 1
    count = sizes.block * layers + sizes.root
    accumulates = _micro_batches(config, world_size) > 1
    moments = 2 * count
    if config.optim.optimizer == Optimizer.muon:
        moments -= parameters(model)[0] // config.parallel.tensor
    state = {
        "parameters": FLOAT32 * count / sizes.ranks,
        "optimizer": FLOAT32 * moments / sizes.ranks,
        "batch and masks": sizes.batch,
        "exchange of keys": _exchange_bytes(config, sizes, strategy),
    }
    whole_gradients = FLOAT32 * count / sizes.ranks
    gathered_root, gathered_block = sizes.compute * sizes.root, sizes.compute * sizes.block
    table_gradient, embedding_gradient = FLOAT32 * sizes.table, sizes.compute * sizes.table

    policies = recompute_by_layer(config)
    of_mlp = 3 if model.activation == Activation.swiglu else 2  # matrices

    def kept(blocks: int) -> float:
        return sum(sizes.blocks[policy].kept for policy in policies[:blocks])

    held = 0 if model.tied_embeddings else table_gradient  # until the sum over ranks is there

    def gradients(blocks: int) -> float:
        return whole_gradients if accumulates else FLOAT32 * sizes.block * blocks / sizes.ranks

    points = {
        "losses": state | {
            "gradients": gradients(0),
            "gathered parameters": gathered_root + (0 if alone else gathered_block),
            "saved for the backward pass": kept(layers),
            "losses": 3 * sizes.hidden + sizes.normed + sizes.logits + table_gradient,
        },
        "gradient of the embedding": state | {
            "gradients": gradients(layers) + FLOAT32 * sizes.block,
            "gathered parameters": gathered_root,
            "losses": table_gradient + embedding_gradient * (2 if model.tied_embeddings else 1) + sizes.hidden,
        },
        "sum of the embedding's gradients over ranks": state | {
            "gradients": gradients(layers) + FLOAT32 * sizes.root * (3 if alone else 1),
            "losses": 0.0 if alone else max(embedding_gradient, FLOAT32 * sizes.root / sizes.ranks) + held,
        },
        "update": state | {"gradients": whole_gradients},
    }  # fmt: skip
    saved = config.parallel.attention_saved_layers
    ends = {0, 1, saved - 1, saved, saved + 1, layers - 1}  # between which memory changes by a line
    for done in ends & set(range(layers)):  # blocks whose backward pass is over
        block = sizes.blocks[policies[layers - 1 - done]]
        next_block = 0 if alone or done == layers - 1 else gathered_block
        before = FLOAT32 * sizes.block if done else 0  # whose sum over ranks goes on
        for part, work, first in (("MLP", block.in_mlp, 1), ("attention", block.in_attention, of_mlp)):
            points[f"backward pass of layer {layers - done}, in its {part}"] = state | {
                "gradients": gradients(done) + before + first * sizes.compute * sizes.first_matrix,
                "gathered parameters": gathered_root + gathered_block + next_block,
                "saved for the backward pass": kept(layers - done),
                "working set of a block": work,
                "losses": table_gradient,
            }
        points[f"sum of the gradients of layer {layers - done} over ranks"] = state | {
            "gradients": gradients(done) + FLOAT32 * sizes.block * (3 if alone else 1),
            "gathered parameters": gathered_root + next_block,
            "saved for the backward pass": kept(layers - done - 1),
            "losses": table_gradient + sizes.hidden,
        }
    point = max(points, key=lambda name: sum(points[name].values()))
    return Memory(point, points[point])


def is_foreseen(attention: str, fused_ops: str) -> bool:
    """Whether `memory` is that of a model with these implementations: not with torch's own. auto: with the kernels."""
    return not any(name in attention for name in ("sdpa", "reference")) and fused_ops != "reference"


def refusal(config: Config, world_size: int, choose: Callable[[Config], Strategy], free: float) -> str | None:
    """Why a run does not fit GPUs with `free` bytes each, and what would make it fit; None if it does.

    `choose` gives the strategy of the context axis for a configuration.
    """
    needed = memory(config, world_size, choose(config))
    if needed.total <= free:
        return None
    fixes = remedies(config, world_size, choose, free)
    more = "more GPUs that share it (parallel.context, parallel.shard, parallel.tensor), or a smaller model"
    return (
        f"{needed.total / GIB:.1f} GiB are needed on a GPU in the {needed.point}, and {free / GIB:.1f} are free: "
        f"{needed.in_words()}. Set {', or '.join([*fixes, more])}; parallel.check_memory=false tries all the same"
    )


def remedies(config: Config, world_size: int, choose: Callable[[Config], Strategy], limit: float) -> list[str]:
    """Words of the command line that make a run fit `limit` bytes a GPU, and what it then needs."""
    policies = list(Recompute)
    changed = [with_recompute(config, p) for p in policies[policies.index(config.parallel.recompute) + 1 :]]
    saved = most_attention_saved(config, world_size, choose, limit)
    if 0 <= saved < recompute_by_layer(config).count(Recompute.attention_saved):
        changed.append(with_recompute(config, Recompute.full, saved))
    if config.data.sequences_per_micro_batch > 1:
        changed.append(replace(config, data=replace(config.data, sequences_per_micro_batch=1)))

    def needed(other: Config) -> float:
        return memory(other, world_size, choose(other)).total

    fitting = [other for other in changed if needed(other) <= limit]
    least = config if fitting else with_recompute(config, Recompute.full)
    length = longest(least, world_size, choose, limit)
    if 0 < length < config.data.sequence_length:
        fitting.append(replace(least, data=replace(least.data, sequence_length=length)))
    return [f"{' with '.join(_words(config, other))} ({needed(other) / GIB:.1f} GiB)" for other in fitting]


def _words(before: Config, after: Config) -> list[str]:
    """What to say on the command line for a remedy."""
    fields = (
        ("parallel", "recompute"), ("parallel", "attention_saved_layers"), ("data", "sequences_per_micro_batch"),
        ("data", "sequence_length"),
    )  # fmt: skip
    values = {f"{group}.{name}": [getattr(getattr(c, group), name) for c in (before, after)] for group, name in fields}
    return [f"{key}={new}" for key, (old, new) in values.items() if new != old]


def with_recompute(config: Config, policy: Recompute, saved_layers: int = 0) -> Config:
    """The configuration with another policy of activation checkpointing."""
    parallel = replace(config.parallel, recompute=policy, attention_saved_layers=saved_layers)
    return replace(config, parallel=parallel)


def most_attention_saved(config: Config, world_size: int, choose: Callable[[Config], Strategy], limit: float) -> int:
    """Of how many layers attention can be saved with full recompute, so that a run fits `limit` bytes a GPU; -1: not
    even of none."""
    for layers in range(config.model.layers, -1, -1):
        changed = with_recompute(config, Recompute.full, layers)
        if memory(changed, world_size, choose(changed)).total <= limit:
            return layers
    return -1


def _bisect(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number that fits, from `least`, which does, to below `most`."""
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def longest(config: Config, world_size: int, choose: Callable[[Config], Strategy], limit: float) -> int:
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
        return memory(of(steps), world_size, strategy).total <= limit

    def fits_as_chosen(steps: int) -> bool:
        return fits(steps) and choose(of(steps)) == strategy

    best = 0
    for strategy in {choose(of(1)), choose(of(most))}:
        steps = _bisect(fits, 0, most + 1)
        if steps and choose(of(steps)) != strategy:
            steps = _bisect(fits_as_chosen, 0, steps)
        best = max(best, steps)
    return best * step


# time of a step ------------------------------------------------------------------------------------------------------


def is_timed(config: Config) -> bool:
    """Whether there are rates for what the model is computed in and for its heads."""
    return config.precision.compute != ComputeDtype.float32 and config.model.head_dim <= 256


def rates(gpu: str) -> dict[str, Any]:
    """What was measured of a GPU, by the name of its file in `rates/`: h200. Raises `KeyError` with those there are."""
    file = RATES / f"{gpu}.json"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in RATES.glob("*.json")))
        raise KeyError(f"gpu={gpu}: no rates of it; there are {known}")
    return json.loads(file.read_text())


def rates_of_device(name: str) -> dict[str, Any] | None:
    """The rates of the GPU that calls itself so, if it was measured."""
    return next((r for f in sorted(RATES.glob("*.json")) if (r := json.loads(f.read_text()))["gpu"] == name), None)


def flops(config: Config) -> tuple[float, float]:
    """Of a step of all ranks, forward: attention's, if each sequence is one document, and those of the products."""
    model, data = config.model, config.data
    length, tokens = data.sequence_length, data.sequence_length * data.sequences_per_step
    pairs = sum(length**2 / 2 if not w or w >= length else w * length for w in layer_windows(model))
    attention = 4.0 * model.heads * model.head_dim * pairs * data.sequences_per_step
    return attention, 2.0 * matmul_parameters(model) * tokens


def seconds(config: Config, world_size: int, of: dict[str, Any]) -> dict[str, float]:
    """What a step takes with the `rates` of a GPU, by what it is for; communication is hidden.

    Rates are of 16 bits: see `is_timed`.
    """
    model, recompute, assumed = config.model, config.parallel.recompute, of["assumed"]
    attention, products = (work / world_size for work in flops(config))
    width = str(padded_head_dim(model.head_dim))
    attention *= padded_head_dim(model.head_dim) / model.head_dim
    forward, backward = (of["attention_tflops"][width][name] * 1e12 for name in ("forward", "backward"))
    tokens = config.data.sequence_length * config.data.sequences_per_step / world_size
    matrices, rest = parameters(model)
    again = 0 if recompute == Recompute.none else matrices - model.layers * model.width * model.mlp_width
    attention_again = recompute_by_layer(config).count(Recompute.full) / model.layers
    ranks = resolve_shard(config.parallel, world_size) * config.parallel.context * config.parallel.tensor
    others = assumed["other_kernels_us_a_token_of_width_4096"]
    product_rate = of["product_tflops"] * 1e12 * assumed["share_of_product_tflops"]
    return {
        "attention": attention * ((1 + attention_again) / forward + 2.5 / backward),
        "products": (3 * products + 2 * again * tokens) / product_rate,
        "other kernels": others * 1e-6 * tokens * model.layers * model.width / 4096,
        "launches": assumed["launches_ms_a_layer"] * 1e-3 * model.layers * _micro_batches(config, world_size),
        "optimizer": 28 * (matrices + rest) / ranks / (of["memory_tb_per_s"] * 1e12),
    }


# this machine, and words ---------------------------------------------------------------------------------------------


def available_host_bytes() -> int | None:
    """Memory that processes of this machine can still take, a container's limit included; None: it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    for folder, limit, used in (
        (CGROUPS, "memory.max", "memory.current"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(stat.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))  # which is given up
            free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()) + cached)
        except (OSError, ValueError):  # "max": no limit
            continue
    return free


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `4 h`, `3 days`."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
