"""What a run needs of memory, known before anything is made: standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    attended_heads,
    layer_windows,
    micro_batch,
    recompute_by_layer,
    resolve_shard,
)
from longctx.kernels.loss.chunks import tokens_of_a_chunk
from longctx.strategy import WHOLE_SEQUENCES, Choice, Heads

GIB = 1 << 30
UNIT_BYTES = 64 << 20  # of blocks that FSDP gathers together; a larger one is gathered by itself
FLOAT32 = 4  # bytes
# an offloaded optimizer's moments come in pieces of so many numbers (a power of two, so that a CPU's vector
# instructions take the same ones together): one comes, one is updated, one leaves
MOMENTS_PIECE, MOMENTS_IN_FLIGHT = 1 << 26, 3


def parameters(model: ModelConfig) -> tuple[int, int]:
    """How many parameters a model has: in the matrices of its blocks, and in all else."""
    attention = model.width * model.head_dim * 2 * (model.heads + model.kv_heads)
    branches = _of_mlp(model)
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


def _of_mlp(model: ModelConfig) -> int:
    """Matrices of the MLP of a block."""
    return 3 if model.activation == Activation.swiglu else 2


def _root_parameters(model: ModelConfig) -> int:
    """Of the embeddings, the last norm and the head."""
    tables = model.vocab_size * (1 if model.tied_embeddings else 2)
    tables += model.max_positions if model.positions == Positions.learned else 0
    return model.width * (tables + (2 if model.norm == Norm.layer_norm else 1))


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that take part in matrix products a token: all but embeddings, norms and biases."""
    return parameters(model)[0] + model.width * model.vocab_size


def checkpoint_bytes(config: Config) -> int:
    """Of a checkpoint: parameters and the optimizer's state, float32."""
    matrices, rest = parameters(config.model)
    of_matrices = 2 if config.optim.optimizer == Optimizer.muon else 3  # with one momentum, or AdamW's two moments
    return FLOAT32 * (of_matrices * matrices + 3 * rest)


def state_bytes(config: Config, world_size: int) -> int:
    """Bytes a rank holds whatever its activations are: parameters, gradients and the optimizer's state, float32.

    Ranks along shard, context and tensor share them.
    """
    parallel = config.parallel
    ranks = resolve_shard(parallel, world_size) * parallel.context * parallel.tensor
    return (checkpoint_bytes(config) + FLOAT32 * sum(parameters(config.model))) // ranks


def units_of_blocks(config: Config) -> list[range]:
    """The layers whose blocks FSDP gathers together, unit by unit: of small ones as many as have 64 MiB together.

    What a unit costs the CPU, some milliseconds a step, does not depend on its size.
    """
    model, layers = config.model, config.model.layers
    numbers = (sum(parameters(model)) - _root_parameters(model)) // layers // config.parallel.tensor
    most = max(1, UNIT_BYTES // (numbers * bytes_of_a_number(config)))
    units = -(-layers // most)
    return [range(layers * unit // units, layers * (unit + 1) // units) for unit in range(units)]


def bytes_of_a_number(config: Config) -> int:
    """Of what is computed with."""
    return FLOAT32 if config.precision.compute == ComputeDtype.float32 else 2


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
    """Bytes a token of a block under one policy of activation checkpointing."""

    kept: float  # for its backward pass
    in_mlp: float  # of the working set of its backward pass, while it is in the MLP
    in_attention: float
    in_projections: float = 0.0  # of queries, keys and values; of tiled blocks, of others less than attention needs

    def times(self, tokens: float) -> _Block:
        return _Block(*(size * tokens for size in self))


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
    after_attention: int  # of the matrices of a block that come after attention
    ranks: int  # that share parameters
    compute: int  # bytes of a number that is computed with
    hidden: float  # one hidden state of all tokens of a micro-batch
    blocks: dict[Recompute, _Block]  # in bytes
    tiles: int  # of tokens, in which a block is computed
    of_rows: float  # of a block's working set, inside the op of attention
    normed: float  # statistics of a norm
    logits: float  # of a chunk of tokens
    batch: float


def _readers(config: Config, world_size: int) -> int:
    """Ranks that read sequences of their own."""
    return config.parallel.replicate * resolve_shard(config.parallel, world_size)


def micro_batches_of(config: Config, world_size: int) -> int:
    """Of each rank in a step."""
    readers = _readers(config, world_size)
    return config.data.sequences_per_step // (readers * micro_batch(config.data, readers))


def _sizes(config: Config, world_size: int) -> _Sizes:
    model, parallel, data = config.model, config.parallel, config.data
    assert parallel.offload >= 0, "see `remedies.with_layers_chosen`"
    compute = bytes_of_a_number(config)
    shard = resolve_shard(parallel, world_size)
    tokens = micro_batch(data, _readers(config, world_size)) * data.sequence_length // parallel.context
    width, mlp = compute * model.width, compute * model.mlp_width / parallel.tensor
    queries, keys = (compute * n * model.head_dim / parallel.tensor for n in (model.heads, model.kv_heads))
    lse = FLOAT32 * model.heads / parallel.tensor
    normed = FLOAT32 * (1 if model.norm == Norm.rms_norm else 2)
    in_qk_norm = queries + keys + FLOAT32 * (model.heads + model.kv_heads) / parallel.tensor if model.qk_norm else 0
    saved_of_mlp, inside_mlp = 2, 3  # times its width
    if model.activation == Activation.swiglu:  # with tensor parallelism the last product keeps its input, too
        saved_of_mlp, inside_mlp = 3 if parallel.tensor > 1 else 2, 5
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

    of_tile = min(parallel.tile, tokens) / tokens if parallel.tile else 1
    if parallel.is_tiled:
        groups = parallel.head_groups
        of_tokens = width + queries  # gradients of the residual stream and of attention's output
        of_group = projected + inside_attention
        if groups > 1:
            of_tokens += 2 * keys  # gradients, of all groups
            of_group += 2 * queries  # its own part of out and dout
        in_tile = 2 * width + normed + inside_mlp * mlp
        in_projections = 3 * width + normed + in_qk_norm + 2 * projected - keys
        saved = _Block(
            share + attended,
            width + queries + in_tile * of_tile,
            of_tokens + of_group / groups,
            width + projected + in_projections * of_tile,
        )
        again = _Block(share, saved.in_mlp + attended, saved.in_attention + attended, saved.in_projections)
        of_rows /= groups
        blocks |= {Recompute.attention_saved: saved, Recompute.full: again}

    root = _root_parameters(model)
    rotation = 2 * FLOAT32 * (model.head_dim // 2) if model.positions == Positions.rotary else 0
    masks = 12 * len(set(layer_windows(model))) * parallel.context  # bounds and tiles of whole sequences
    vocabulary = model.vocab_size // parallel.tensor
    return _Sizes(
        block=(sum(parameters(model)) - root) // model.layers // parallel.tensor,
        root=root // parallel.tensor,
        table=vocabulary * model.width,
        first_matrix=model.width * model.mlp_width // parallel.tensor,
        after_attention=model.width * (model.heads * model.head_dim + _of_mlp(model) * model.mlp_width),
        ranks=shard * parallel.context,
        compute=compute,
        hidden=width * tokens,
        blocks={policy: block.times(tokens) for policy, block in blocks.items()},
        tiles=-(-tokens // parallel.tile) if parallel.tile else 1,
        of_rows=of_rows * tokens,
        normed=normed * tokens,
        logits=float(compute * vocabulary * min(tokens, tokens_of_a_chunk(tokens, width, compute * vocabulary))),
        batch=float((4 * 8 + rotation + masks) * tokens),
    )


def tiles_of(config: Config, world_size: int) -> int:
    """Tiles of a micro-batch's tokens in which a block is computed."""
    return _sizes(config, world_size).tiles


def inside_attention(config: Config, world_size: int) -> float:
    """Bytes of a backward pass of attention that are neither its inputs nor its results."""
    return _sizes(config, world_size).of_rows


def inside_losses(config: Config, world_size: int) -> float:
    """The same of the losses."""
    return _sizes(config, world_size).logits


class _Ring(NamedTuple):
    """Keys that go round, and their gradients: its ranks, and what each brings, in bytes."""

    ranks: int
    keys: float  # and values
    gradients: float

    @property
    def slots(self) -> int:
        """Ranks whose gradients a rank holds at a time."""
        return min(self.ranks, max(1, int(2 * GIB / self.gradients)))

    @property
    def steps(self) -> tuple[float, float]:
        """Bytes of the keys of other ranks that a rank has at a time, in two buffers."""
        others, most = (self.ranks - 1) * self.keys, GIB / 4
        return (others, 0.0) if others <= most else (max(self.keys, most), max(self.keys, most))

    @property
    def held(self) -> float:
        """Bytes of a rank: its keys (those of the call before may still be read), what it fetches, and gradients."""
        return 2 * self.keys + sum(self.steps) + self.slots * self.gradients

    @property
    def leaving(self) -> float:
        """Bytes of gradients on their way, where kernels cannot store them at their owners: of two steps."""
        first, second = self.steps
        return (first + (second or self.keys)) * self.gradients / self.keys


def _traded(config: Config, choice: Choice) -> Heads:
    return Heads(*attended_heads(config), choice.ulysses_size, keys_travel_on=choice.strategy == Strategy.ulysses_ring)


def _ring(config: Config, sizes: _Sizes, choice: Choice) -> _Ring:
    """Where ranks trade heads, a ring of as many fewer ranks, each with the keys of more tokens that are worked on at a
    time; of Ulysses alone one rank."""
    keys = 2 * _heads_bytes(config, sizes, attended_heads(config)[1])
    if choice.strategy in (Strategy.ulysses, Strategy.ulysses_ring):
        traded = _traded(config, choice)
        keys *= traded.sharers / traded.kv_pieces
    return _Ring(config.parallel.context // choice.ulysses_size, keys, keys * FLOAT32 / sizes.compute)


def _exchange_bytes(config: Config, sizes: _Sizes, choice: Choice) -> float:
    """The buffers of the context axis on a rank: of keys, values and their gradients, and of what it fetches."""
    ranks = config.parallel.context
    if ranks == 1:
        return 0.0
    heads, kv_heads = attended_heads(config)
    queries, keys = _heads_bytes(config, sizes, heads), 2 * _heads_bytes(config, sizes, kv_heads)
    gradients = keys * FLOAT32 / sizes.compute
    if choice.strategy == Strategy.gather:
        return 2 * keys + ranks * gradients + (ranks - 1) * keys
    ring, traded = _ring(config, sizes, choice), _traded(config, choice)
    if choice.strategy == Strategy.ring:
        return ring.held
    douts = queries * (1 + 16 / (sizes.compute * config.model.head_dim))  # with delta in each row
    given = gradients * traded.sharers if traded.sharers > 1 else keys
    fetched = min(2, traded.groups) / traded.groups * (queries + douts)
    fetched += min(2, traded.kv_pieces) * ring.keys
    held = 3 * queries + douts + keys + given + fetched
    return held if choice.strategy == Strategy.ulysses else held + ring.held + ring.leaving  # between machines


def _heads_bytes(config: Config, sizes: _Sizes, heads: int) -> float:
    """Bytes of so many heads of the tokens of a rank."""
    return sizes.hidden / config.model.width * config.model.head_dim * heads


def _key_sums(config: Config, sizes: _Sizes, choice: Choice) -> float:
    """Bytes of the gradients of keys in float32 that a backward pass adds up: in a ring those of a rank, if it takes
    several rounds; where ranks trade heads those of the heads that are worked on, and what a ring around it returns."""
    if config.parallel.context == 1 or choice.strategy == Strategy.gather:
        return 0.0
    ring = _ring(config, sizes, choice)
    if choice.strategy == Strategy.ring:
        return ring.gradients if ring.slots < ring.ranks else 0.0
    return ring.gradients * (2 if choice.strategy == Strategy.ulysses_ring else 1)


def _moments_in_flight(config: Config, sizes: _Sizes) -> float:
    """Bytes of an offloaded optimizer on the GPU during the update."""
    if not config.parallel.offload_optimizer:
        return 0
    return 2 * FLOAT32 * MOMENTS_IN_FLIGHT * min(MOMENTS_PIECE, max(sizes.table, sizes.first_matrix) / sizes.ranks)


def memory(config: Config, world_size: int, choice: Choice = WHOLE_SEQUENCES) -> Memory:
    """What a rank of `world_size` GPUs needs for a step with the fused kernels, at the point where that is most.

    `choice`: of what crosses the context axis, no longer auto. Traced over the model as it is spread, see
    tests/model/test_plan.py. Buffers of the exchange are counted as tests/parallel/test_traffic.py finds them, and what
    is inside the ops (sums of dq, logits of a chunk) by hand. Left out: what the GPU's driver, NCCL and cuBLAS hold,
    about 1.5 GiB; gaps between allocations; Muon's buckets, up to a GiB; and gradients of keys on their way where
    kernels cannot store them at their owners (other GPUs than Hopper, a ring or gather over several machines).
    """
    model, sizes = config.model, _sizes(config, world_size)
    layers, alone = model.layers, sizes.ranks == 1
    count = sizes.block * layers + sizes.root
    accumulates = micro_batches_of(config, world_size) > 1
    moments = 0 if config.parallel.offload_optimizer else 2 * count
    if config.optim.optimizer == Optimizer.muon:
        moments -= parameters(model)[0] // config.parallel.tensor
    state = {
        "parameters": FLOAT32 * count / sizes.ranks,
        "optimizer": FLOAT32 * moments / sizes.ranks,
        "batch and masks": sizes.batch,
        "exchange of keys": _exchange_bytes(config, sizes, choice),
    }
    whole_gradients = FLOAT32 * count / sizes.ranks
    table_gradient, embedding_gradient = FLOAT32 * sizes.table, sizes.compute * sizes.table
    # units of parameters that are gathered together: with one table for both embedding and head these are the root,
    # which stays gathered; else each is its own; the last blocks' stays gathered for its backward pass
    of_head = 0 if model.tied_embeddings else sizes.table
    units = units_of_blocks(config)
    gathered_units = [sizes.compute * sizes.block * len(blocks) for blocks in units]
    gathered_head, gathered_last = sizes.compute * of_head, gathered_units[-1]
    gathered_root = sizes.compute * (sizes.root - 2 * of_head)
    last = sizes.root - of_head  # whose sum over ranks is the last

    policies, offloaded = recompute_by_layer(config), config.parallel.offload

    def kept(blocks: int, here: int = 0) -> float:
        """Of the first so many blocks; of those that are offloaded, so many are on the GPU."""
        first = max(0, min(blocks, offloaded) - here)
        return sum(sizes.blocks[policy].kept for policy in policies[first:blocks])

    held = 0 if of_head else table_gradient  # in the backward pass of blocks

    def gradients(blocks: int) -> float:
        """Of the last so many blocks, and of a head of its own."""
        return whole_gradients if accumulates else FLOAT32 * (sizes.block * blocks + of_head) / sizes.ranks

    points = {
        "losses": state | {
            "gradients": whole_gradients if accumulates else 0.0,
            "gathered parameters": gathered_root + gathered_head + gathered_last
            + (0 if alone else gathered_head or gathered_last),
            "saved for the backward pass": kept(layers),
            "losses": 3 * sizes.hidden + sizes.normed + sizes.logits + table_gradient,
        },
        "sum of the head's gradients over ranks": state | {
            "gradients": (whole_gradients if accumulates else 0.0) + FLOAT32 * of_head * (2 + 1 / sizes.ranks),
            "gathered parameters": gathered_root + gathered_last,
            "saved for the backward pass": kept(layers),
            "losses": held + sizes.hidden,
        },
        "gradient of the embedding": state | {
            "gradients": gradients(layers) + FLOAT32 * sizes.block * len(units[0]),
            "gathered parameters": gathered_root,
            "losses": held + embedding_gradient * (2 if model.tied_embeddings else 1) + sizes.hidden,
        },
        "sum of the embedding's gradients over ranks": state | {
            "gradients": gradients(layers) + FLOAT32 * last * (3 if alone else 1),
            "losses": 0.0 if alone else (sum if of_head else max)((embedding_gradient, FLOAT32 * last / sizes.ranks)),
        },
        "update": state | {
            "gradients": whole_gradients,
            "optimizer": state["optimizer"] + _moments_in_flight(config, sizes),
        },
    }  # fmt: skip
    in_mlp = sizes.compute * sizes.first_matrix  # gradients of weights
    in_attention = sizes.compute * (
        sizes.after_attention if config.parallel.is_tiled else _of_mlp(model) * sizes.first_matrix
    )
    in_projections = in_attention + sizes.compute * 2 * model.width * model.kv_heads * model.head_dim
    if sizes.tiles > 1:
        in_mlp = FLOAT32 * sizes.after_attention
    key_sums = _key_sums(config, sizes, choice)
    for unit, blocks in reversed(list(enumerate(units))):  # as the backward pass comes to them
        done = layers - blocks.stop  # blocks whose gradients are summed over ranks, or going to be
        next_unit = 0 if alone or not unit else gathered_units[unit - 1]
        before = FLOAT32 * (sizes.block * len(units[unit + 1]) if done else of_head)  # whose sum over ranks goes on
        for number in blocks:
            block = sizes.blocks[policies[number]]
            is_near, is_here = number <= offloaded > 0, number < offloaded  # the layer before comes back; this one is
            of_unit = sizes.compute * sizes.block * (blocks.stop - 1 - number)  # gradients, not summed yet
            parts = [
                ("MLP", block.in_mlp, in_mlp),
                ("attention", block.in_attention + key_sums, in_attention),
            ]
            if config.parallel.is_tiled:
                parts.append(("projections", block.in_projections, in_projections))
            for part, work, made in parts:
                points[f"backward pass of layer {number + 1}, in its {part}"] = state | {
                    "gradients": gradients(done) + before + of_unit + made,
                    "gathered parameters": gathered_root + gathered_units[unit] + next_unit,
                    "saved for the backward pass": kept(number + 1, is_near + is_here),
                    "working set of a block": work,
                    "losses": held,
                }
        points[f"sum of the gradients of layer {blocks.start + 1} over ranks"] = state | {
            "gradients": gradients(done) + FLOAT32 * sizes.block * len(blocks) * (3 if alone else 1),
            "gathered parameters": gathered_root + next_unit,
            "saved for the backward pass": kept(blocks.start, blocks.start <= offloaded > 0),
            "losses": held + sizes.hidden,
        }
    point = max(points, key=lambda name: sum(points[name].values()))
    return Memory(point, points[point])


def host_memory(config: Config, world_size: int) -> dict[str, float]:
    """What a rank with a GPU takes of its machine's memory for the whole run, in bytes, by what it is for."""
    parallel, sizes = config.parallel, _sizes(config, world_size)
    policies = recompute_by_layer(config)[: parallel.offload]
    count = (sizes.block * config.model.layers + sizes.root) / sizes.ranks
    is_copied = config.checkpoint.asynchronous and (config.checkpoint.every_steps > 0 or config.checkpoint.at_end)
    return {
        "activations": sum(sizes.blocks[policy].kept for policy in policies),
        "optimizer": 2 * FLOAT32 * count if parallel.offload_optimizer else 0.0,
        "copy for checkpoints": state_bytes(config, world_size) - FLOAT32 * count if is_copied else 0.0,
    }


def is_foreseen(attention: str, fused_ops: str) -> bool:
    """Whether `memory` is that of a model with these implementations: not with torch's own. auto: with the kernels."""
    return not any(name in attention for name in ("sdpa", "reference")) and fused_ops != "reference"
