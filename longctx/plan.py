"""What a run needs at least, known before anything is made: standard library only."""

from __future__ import annotations

from pathlib import Path

from longctx.config import Activation, Config, ModelConfig, Norm, Optimizer, Positions, resolve_shard

FLOAT32 = 4  # bytes
CGROUPS = Path("/sys/fs/cgroup")


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
    tables = model.vocab_size * (1 if model.tied_embeddings else 2)
    tables += model.max_positions if model.positions == Positions.learned else 0
    return matrices, model.layers * block + norm + tables * model.width


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
