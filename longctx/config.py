"""Every knob of a run: what it means, its unit, and what it may be.

Standard library only. Hydra fills these dataclasses (see `train.py`); `check` then looks at the whole and reports
everything that is wrong at once. Each part of the program is handed its own piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can mend: shown as its message alone, without a trace."""


class ConfigError(UserError):
    """A configuration that cannot run: every problem, each with the value, the rule and the fix."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in this run's configuration:", *(f"  - {p}" for p in problems)]))


# the choices: OmegaConf reads an enum by its member's name, so names and values are the same word ---------------------


class Norm(StrEnum):
    rms_norm = "rms_norm"
    layer_norm = "layer_norm"


class Activation(StrEnum):
    swiglu = "swiglu"
    gelu = "gelu"


class Positions(StrEnum):
    rotary = "rotary"
    learned = "learned"


class RotaryScaling(StrEnum):
    none = "none"
    linear = "linear"
    ntk = "ntk"
    dynamic = "dynamic"
    yarn = "yarn"
    llama3 = "llama3"


class AttentionImplementation(StrEnum):
    auto = "auto"
    hopper = "hopper"
    triton = "triton"
    sdpa = "sdpa"
    reference = "reference"


class FusedImplementation(StrEnum):
    auto = "auto"
    triton = "triton"
    reference = "reference"


class DataSource(StrEnum):
    builtin = "builtin"
    prepared = "prepared"
    recall = "recall"


class TokenDtype(StrEnum):
    auto = "auto"
    uint16 = "uint16"
    uint32 = "uint32"


class Strategy(StrEnum):
    auto = "auto"
    ring = "ring"
    gather = "gather"
    ulysses = "ulysses"
    ulysses_ring = "ulysses_ring"


class Recompute(StrEnum):
    none = "none"
    attention_saved = "attention_saved"
    full = "full"


class Optimizer(StrEnum):
    adamw = "adamw"
    muon = "muon"


class Schedule(StrEnum):
    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class OnUsr1(StrEnum):
    save = "save"
    stop = "stop"


class ComputeDtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


# the groups ----------------------------------------------------------------------------------------------------------


@dataclass
class RotaryConfig:
    """Rotary position embedding and its scalings to longer contexts."""

    theta: float = 10000.0  # base of the frequencies
    scaling: RotaryScaling = RotaryScaling.none
    factor: float = 1.0  # by how much slow dimensions are stretched
    original_length: int = 8192  # context the frequencies were first trained at, tokens (dynamic, yarn, llama3)
    longest: int = 0  # dynamic: the longest sequence the model is used with, tokens
    low_frequency_factor: float = 1.0  # llama3: wavelengths over original_length / this are divided by `factor`
    high_frequency_factor: float = 4.0  # llama3: wavelengths under original_length / this are kept
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this within original_length are kept
    beta_slow: float = 1.0  # yarn: those that turn less often are divided by `factor`
    attention_factor: float | None = None  # yarn: what cosines and sines are multiplied by; null: by the paper's rule


@dataclass
class ModelConfig:
    """The shape of the transformer. A preset of `configs/model` fills it."""

    vocab_size: int = 8192
    layers: int = 4
    width: int = 128  # of the residual stream
    heads: int = 4
    kv_heads: int = 4  # fewer than `heads`: grouped-query attention
    head_dim: int = 32
    mlp_width: int = 512
    norm: Norm = Norm.rms_norm
    norm_eps: float = 1e-5
    activation: Activation = Activation.swiglu
    positions: Positions = Positions.rotary
    max_positions: int = 0  # learned positions only: rows of the table, tokens
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys
    qkv_bias: bool = False
    projection_bias: bool = False  # of the attention's output projection and of the MLP
    tied_embeddings: bool = True  # the output projection is the token embedding
    window: int = 0  # keys a sliding-window layer sees; 0: every layer sees all
    full_attention_every: int = 0  # with `window`: of so many layers the last sees all keys; 0: none does
    logit_softcap: float | None = None  # logits are squashed to +- this by tanh
    init_std: float = 0.02  # of every weight matrix; output projections: divided by sqrt(2 * layers)
    attention: AttentionImplementation = AttentionImplementation.auto
    fused_ops: FusedImplementation = FusedImplementation.auto  # norms, rotary positions, SwiGLU, cross entropy
    init_from: str = ""  # folder with weights of Hugging Face (config.json, *.safetensors) that a new run starts with


@dataclass
class RecallConfig:
    """The synthetic stream `data=recall`: pairs of a key and its value, each key's value drawn anew a sequence."""

    keys: int = 64  # distinct keys
    values: int = 64  # distinct values


@dataclass
class DataConfig:
    """What the model reads."""

    source: DataSource = DataSource.builtin
    folder: str = ""  # source=prepared: of tools/prepare_data.py, of Megatron's *.bin and *.idx, or of nanoGPT's *.bin
    mixture: dict[str, float] = field(default_factory=dict)  # in place of `folder`: several, and their shares
    tokenizer: str = ""  # tokenizer.json of Megatron's and nanoGPT's files: for samples and bits a byte
    token_dtype: TokenDtype = TokenDtype.auto  # of nanoGPT's files; auto: uint16, up to a vocabulary of 65,536
    # id that closes a document in nanoGPT's files; null: the tokenizer's, without one GPT-2's 50256
    end_of_document: int | None = None
    cache_folder: str = "~/.cache/longctx"  # where source=builtin keeps its tokens
    sequence_length: int = 2048  # tokens
    sequences_per_step: int = 8  # over all ranks and accumulation steps
    sequences_per_micro_batch: int = 1  # on one data rank at a time
    separate_documents: bool = True  # attention stays inside a document and positions restart with each
    # {step: tokens}: from that step on attention is cut every so many tokens; empty: never. Each step reads the same
    # tokens with or without, so that a short start costs neither order nor batch size
    curriculum: dict[int, int] = field(default_factory=dict)
    validation_sequences: int = 16
    recall_sequences: int = 4  # of validation: synthetic ones that ask over which distances the model recalls
    check_hashes: bool = False  # read every shard in full at start and compare its sha256 with the manifest
    recall: RecallConfig = field(default_factory=RecallConfig)


@dataclass
class ParallelConfig:
    """How many ranks share what. The product of the four sizes is the number of ranks."""

    replicate: int = 1  # copies of the sharded model (HSDP)
    shard: int = -1  # ranks that share parameters and read different data (FSDP2); -1: all that are left
    context: int = 1  # ranks that share a sequence; they share parameters too
    tensor: int = 1  # ranks that share every matrix product
    strategy: Strategy = Strategy.auto  # how attention crosses the context axis; auto: by its size, heads and machines
    ulysses: int = 0  # strategy=ulysses_ring: ranks that trade heads, a divisor of context; 0: most that a machine has
    verify: bool = True  # before the first step of a layout, compare it with attention on whole sequences
    recompute: Recompute = Recompute.none  # what the backward pass computes again to save memory
    compile: bool = False  # torch.compile each block
    timeout_seconds: int = 600  # a collective that takes longer ends the run
    # a step that would take longer after a signal to stop is abandoned, and the state before it saved; torchrun kills
    # its ranks 30 seconds after a signal of its own (--shutdown-timeout), and the save needs time too
    stop_seconds: int = 20
    check_memory: bool = True  # refuse at start what cannot fit the memory there is


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Optimizer = Optimizer.adamw
    steps: int = 100
    lr: float = 3e-4  # AdamW, at the top of the schedule
    muon_lr: float = 0.02  # Muon (weight matrices of the blocks; the rest takes AdamW), scaled by matrix shape
    muon_momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; vectors have none
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping
    schedule: Schedule = Schedule.cosine
    warmup_steps: int | None = None  # null: a twentieth of the steps, at most 100
    decay_fraction: float = 0.2  # wsd: the share of the steps in which the rate falls
    final_lr_fraction: float = 0.1  # of lr, at the last step
    max_skipped_steps: int = 10  # so many non-finite steps in a row end the run


@dataclass
class PrecisionConfig:
    """Number formats. Master weights, their gradients and the optimizer's state are float32."""

    compute: ComputeDtype = ComputeDtype.bfloat16
    tf32: bool = True  # float32 matrix products may run in TF32 on NVIDIA GPUs


@dataclass
class CheckpointConfig:
    """When the run is saved, and from what it starts."""

    every_steps: int = 500  # 0: not in between
    asynchronous: bool = True  # written by a thread while training goes on, from a copy in host memory
    at_end: bool = True  # after the last step, and when a signal stops the run
    keep: int = 2  # newest committed checkpoints that stay
    # auto: the newest committed one of this run, if any; never: none, and a folder that has some is refused; or the
    # path of a step folder, from which this run branches off (and goes on with its own newer ones when restarted)
    resume: str = "auto"
    # what SIGUSR1 asks for, which batch systems send ahead of a limit: to save and go on, or to save and stop
    on_usr1: OnUsr1 = OnUsr1.save


@dataclass
class LoggingConfig:
    """What is shown, how often."""

    every_steps: int = 1  # metrics and console line
    validate_every_steps: int = 100  # 0: only at the end
    wandb: WandbMode = WandbMode.auto  # auto: as WANDB_MODE says; without it online with an API key, else offline
    wandb_project: str = ""  # empty: as WANDB_PROJECT says; without it longctx
    wandb_timeout_seconds: int = 20  # a server that has not answered by then is left alone
    peak_tflops: float | None = None  # of one device, for MFU; null: known for common GPUs
    trace_step: int = 0  # number of a step whose timeline rank 0 writes into the run's folder; 0: none
    sample_prompts: list[str] = field(default_factory=lambda: ["import", "class Tensor", "def __init__(self"])
    sample_tokens: int = 64  # generated after each prompt at the end; 0: none


@dataclass
class Config:
    """One run."""

    name: str = "run"
    folder: str = "runs"  # the run's files are in folder/name
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_folder(self) -> Path:
        return Path(self.folder) / self.name


# checks --------------------------------------------------------------------------------------------------------------


def resolve_shard(parallel: ParallelConfig, world_size: int) -> int:
    """`parallel.shard`, with -1 as the ranks that the other axes leave (0 if they do not divide the ranks)."""
    if parallel.shard != -1:
        return parallel.shard
    others = parallel.replicate * parallel.context * parallel.tensor
    return world_size // others if world_size % others == 0 else 0


def warmup_steps(optim: OptimConfig) -> int:
    """Steps of the warm-up: `optim.warmup_steps`, with null as a twentieth of the steps, at most 100."""
    return min(100, optim.steps // 20) if optim.warmup_steps is None else optim.warmup_steps


def check(config: Config, world_size: int) -> None:
    """Raises `ConfigError` with everything that is wrong with `config` on `world_size` ranks."""
    too_small, model = _check_sizes(config), _check_model(config.model)
    layout = _check_layout(config.parallel, world_size)
    problems = [*too_small, *_check_ranges(config), *model, *layout]
    if not too_small and not layout:  # the rest divides by these
        problems += _check_batch(config, world_size)
        problems += _check_sharing(config) if not model else []
    if problems:
        raise ConfigError(problems)


_AT_LEAST_ONE = (
    "model.vocab_size", "model.layers", "model.width", "model.heads", "model.kv_heads", "model.head_dim",
    "model.mlp_width", "model.rotary.original_length", "data.sequence_length", "data.sequences_per_step",
    "data.sequences_per_micro_batch", "data.recall.keys", "data.recall.values", "parallel.replicate",
    "parallel.context", "parallel.tensor", "parallel.timeout_seconds", "parallel.stop_seconds",
    "optim.steps", "optim.max_skipped_steps",
    "checkpoint.keep", "logging.every_steps", "logging.wandb_timeout_seconds",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "parallel.ulysses", "model.window", "model.full_attention_every", "model.max_positions", "model.rotary.longest",
    "data.validation_sequences", "data.recall_sequences", "optim.lr", "optim.muon_lr", "optim.weight_decay",
    "optim.clip_norm", "checkpoint.every_steps", "logging.validate_every_steps",
    "logging.sample_tokens", "logging.trace_step", "seed",
)  # fmt: skip
_FRACTIONS = ("optim.decay_fraction", "optim.final_lr_fraction")
_BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.muon_momentum")
_POSITIVE = ("optim.eps", "model.norm_eps", "model.init_std", "model.rotary.theta", "model.rotary.factor")


def _value(config: Config, path: str) -> float:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_sizes(config: Config) -> list[str]:
    return [
        f"{path}={_value(config, path)} is less than {least}; give {least} or more"
        for least, paths in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO))
        for path in paths
        if _value(config, path) < least
    ]


def _check_ranges(config: Config) -> list[str]:
    problems = [
        f"{path}={_value(config, path)} is outside 0 to 1; give a fraction"
        for path in _FRACTIONS
        if not 0 <= _value(config, path) <= 1
    ]
    problems += [
        f"{path}={_value(config, path)} must be at least 0 and below 1"
        for path in _BELOW_ONE
        if not 0 <= _value(config, path) < 1
    ]
    problems += [f"{path}={_value(config, path)} must be above 0" for path in _POSITIVE if not _value(config, path) > 0]
    peak = config.logging.peak_tflops
    if peak is not None and peak <= 0:
        problems.append(f"logging.peak_tflops={peak} must be above 0; null: known for common GPUs")
    warmup = config.optim.warmup_steps
    if warmup is not None and warmup < 0:
        problems.append(
            f"optim.warmup_steps={warmup} is less than 0; give 0 or more, or null for a twentieth of the steps"
        )
    elif warmup is not None and warmup >= max(config.optim.steps, 1):
        problems.append(
            f"optim.warmup_steps={warmup} is not less than optim.steps={config.optim.steps}, so the learning rate "
            "never gets to its top; give fewer, or optim.warmup_steps=null for a twentieth of the steps"
        )
    if config.parallel.shard != -1 and config.parallel.shard < 1:
        problems.append(f"parallel.shard={config.parallel.shard}: give 1 or more, or -1 for all ranks that are left")
    if not config.name.strip() or Path(config.name).name != config.name or config.name in (".", ".."):
        problems.append(f"name={config.name!r} is no folder name; give one without slashes")
    elif config.name != config.name.strip() or not config.name.isprintable():
        problems.append(f"name={config.name!r} has spaces at an end, or signs that cannot be seen; give one without")
    return problems + _check_data(config.data)


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
    problems += [
        f"data.mixture: {folder} has the weight {weight}; give one above 0, or leave it out"
        for folder, weight in data.mixture.items()
        if not 0 < weight < math.inf
    ]
    problems += [
        f"data.curriculum: {step}: {span}; give steps from 0 on, and 1 to data.sequence_length={data.sequence_length} "
        "tokens"
        for step, span in data.curriculum.items()
        if step < 0 or not 1 <= span <= data.sequence_length
    ]
    return problems


def attention_span(data: DataConfig, step: int) -> int | None:
    """Every so many tokens attention is cut in `step` (from 0 on), by the curriculum; None: nowhere."""
    begun = [first for first in data.curriculum if first <= step]
    return data.curriculum[max(begun)] if begun else None


def _check_model(model: ModelConfig) -> list[str]:
    problems = []
    if model.kv_heads > 0 and model.heads % model.kv_heads:
        problems.append(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; use {_divisors(model.heads)}"
        )
    if model.positions == Positions.rotary and model.head_dim % 2:
        problems.append(f"model.head_dim={model.head_dim} is odd; rotary positions turn pairs, so give an even one")
    if model.logit_softcap is not None and model.logit_softcap <= 0:
        problems.append(f"model.logit_softcap={model.logit_softcap} must be above 0; null is none")
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
    readers = parallel.replicate * resolve_shard(parallel, world_size) * data.sequences_per_micro_batch
    if data.sequences_per_step % readers:
        near = max(1, round(data.sequences_per_step / readers)) * readers
        problems.append(
            f"data.sequences_per_step={data.sequences_per_step} is no multiple of {readers} (data ranks "
            f"{readers // data.sequences_per_micro_batch} x sequences_per_micro_batch "
            f"{data.sequences_per_micro_batch}); use {near}"
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
    if problems or parallel.context == 1:
        return problems
    heads, kv_heads = model.heads // parallel.tensor, model.kv_heads // parallel.tensor
    if parallel.strategy == Strategy.ulysses:
        axis, size = "context", parallel.context
    elif parallel.strategy == Strategy.ulysses_ring and parallel.ulysses:
        axis, size = "ulysses", parallel.ulysses
    else:
        return problems
    if parallel.context % size:
        problems.append(
            f"parallel.ulysses={size} does not divide parallel.context={parallel.context}; "
            f"use {_divisors(parallel.context)}"
        )
    if heads % size:
        problems.append(
            f"parallel.{axis}={size} with strategy={parallel.strategy} does not divide the {heads} query heads a "
            f"tensor rank has; use {_divisors(heads)}, or strategy=ring or gather"
        )
    elif not shares_heads(heads, kv_heads, size):
        problems.append(
            f"parallel.{axis}={size} with strategy={parallel.strategy} neither divides nor is a multiple of the "
            f"{kv_heads} key/value heads a tensor rank has; use strategy=ring or gather"
        )
    return problems


def shares_heads(heads: int, kv_heads: int, size: int) -> bool:
    """Whether `size` ranks can trade tokens for heads."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _divisors(n: int) -> str:
    numbers = [str(d) for d in range(1, n + 1) if n % d == 0]
    return numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} or {numbers[-1]}"
