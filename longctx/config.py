"""Every key of a run: its type, its default, what it means, its unit, and its limits.

Standard library only. Hydra fills these dataclasses (see `train.py`); `config_checks.check` then looks at the whole and
reports everything that is wrong at once. Each part of the program is handed its own piece.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

AS_FITS = -1  # of parallel.recompute_less_layers and parallel.offload: by the memory that there is


class Limits(NamedTuple):
    """What a number may be; None: no limit there."""

    least: float | None = None
    most: float | None = None
    below: float | None = None
    above: float | None = None

    @property
    def is_least_alone(self) -> bool:
        return self == Limits(least=self.least) and self.least is not None

    def problem(self, value: float) -> str | None:
        """The rule that a value breaks and the fix, or None if it breaks none."""
        rules = (
            (self.least, operator.ge), (self.most, operator.le), (self.below, operator.lt), (self.above, operator.gt)
        )  # fmt: skip
        if value in (math.inf, -math.inf):
            return f"must be finite and {self}"
        return None if all(limit is None or holds(value, limit) for limit, holds in rules) else self.rule

    @property
    def rule(self) -> str:
        """In words."""
        if self.is_least_alone:
            return f"is less than {self.least}; give {self.least} or more"
        if self.most is not None:
            return f"is outside {self.least} to {self.most}; give a fraction"
        if self.below is not None:
            return f"must be at least {self.least} and below {self.below}"
        return f"must be above {self.above}"

    def __str__(self) -> str:
        """In few words, for help."""
        words = (
            (self.least, f"at least {self.least}"), (self.above, f"above {self.above}"),
            (self.most, f"at most {self.most}"), (self.below, f"below {self.below}"),
        )  # fmt: skip
        return ", ".join(word for limit, word in words if limit is not None)


def knob(
    default: Any = None, help: str = "", *, factory: Callable[[], Any] | None = None, least: float | None = None,
    most: float | None = None, below: float | None = None, above: float | None = None,
) -> Any:  # fmt: skip
    """A field of the configuration, with what people are told of it."""
    metadata = {"help": help, "limits": Limits(least, most, below, above)}
    if factory is None:
        return field(default=default, metadata=metadata)
    return field(default_factory=factory, metadata=metadata)


# the choices: OmegaConf reads an enum by its member's name, so names and values are the same word ---------------------


class Norm(StrEnum):
    """Normalisation: over the root mean square, or over mean and variance."""

    rms_norm = "rms_norm"
    layer_norm = "layer_norm"


class Activation(StrEnum):
    """Of the MLP: gated by SiLU, or GELU (tanh form)."""

    swiglu = "swiglu"
    gelu = "gelu"


class Positions(StrEnum):
    """Rotary embedding of queries and keys, or a learned table."""

    rotary = "rotary"
    learned = "learned"


class RotaryScaling(StrEnum):
    """How rotary frequencies are changed for contexts longer than trained (names as of transformers)."""

    none = "none"
    linear = "linear"
    ntk = "ntk"
    dynamic = "dynamic"
    yarn = "yarn"
    llama3 = "llama3"


class AttentionImplementation(StrEnum):
    """The attention backend: Gluon on Hopper, Triton, torch's own kernels or plain torch; auto: the fastest."""

    auto = "auto"
    hopper = "hopper"
    triton = "triton"
    sdpa = "sdpa"
    reference = "reference"


class FusedImplementation(StrEnum):
    """The backend of the other fused ops: Triton, or plain torch; auto: the fastest that can."""

    auto = "auto"
    triton = "triton"
    reference = "reference"


class DataSource(StrEnum):
    """Built-in Python text, a prepared corpus, or a synthetic stream that asks for recall."""

    builtin = "builtin"
    prepared = "prepared"
    recall = "recall"


class TokenDtype(StrEnum):
    """Bytes of a token in files that do not say it."""

    auto = "auto"
    uint16 = "uint16"
    uint32 = "uint32"


class Strategy(StrEnum):
    """How attention crosses the context axis: keys go round, are gathered, heads are traded, or both."""

    auto = "auto"
    ring = "ring"
    gather = "gather"
    ulysses = "ulysses"
    ulysses_ring = "ulysses_ring"


class Recompute(StrEnum):
    """Activation checkpointing: nothing is computed again, all but attention, or everything."""

    none = "none"
    attention_saved = "attention_saved"
    full = "full"


class Optimizer(StrEnum):
    """AdamW for all parameters, or Muon for the weight matrices of the blocks and AdamW for the rest."""

    adamw = "adamw"
    muon = "muon"


class Schedule(StrEnum):
    """Of the learning rate: cosine, warm-up-stable-decay, or constant after warm-up."""

    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class OnUsr1(StrEnum):
    """What SIGUSR1 asks for: to save and go on, or to save and stop."""

    save = "save"
    stop = "stop"


class ComputeDtype(StrEnum):
    """The dtype that blocks compute in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class WandbMode(StrEnum):
    """Where Weights & Biases gets its numbers."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


# the groups ----------------------------------------------------------------------------------------------------------


@dataclass
class RotaryConfig:
    """Rotary position embedding and its scalings to longer contexts."""

    theta: float = knob(10000.0, "base of the frequencies", above=0)
    scaling: RotaryScaling = knob(RotaryScaling.none, "how frequencies are changed for contexts longer than trained")
    factor: float = knob(1.0, "by how much slow dimensions are stretched", above=0)
    original_length: int = knob(
        8192, "tokens of the context the frequencies were first trained at (dynamic, yarn, llama3)", least=1
    )
    longest: int = knob(0, "dynamic: tokens of the longest sequence the model is used with", least=0)
    low_frequency_factor: float = knob(
        1.0, "llama3: wavelengths over original_length / this are divided by `factor`", above=0
    )
    high_frequency_factor: float = knob(4.0, "llama3: wavelengths under original_length / this are kept", above=0)
    beta_fast: float = knob(
        32.0, "yarn: dimensions that turn more often than this within original_length are kept", above=0
    )
    beta_slow: float = knob(1.0, "yarn: those that turn less often are divided by `factor`", above=0)
    attention_factor: float | None = knob(
        None, "yarn: what cosines and sines are multiplied by; null: by the paper's rule", above=0
    )


@dataclass
class ModelConfig:
    """The shape of the transformer, which a preset of `configs/model` fills, and the kernels it runs on."""

    vocab_size: int = knob(8192, "rows of the token embedding; at least the tokenizer's vocabulary", least=1)
    layers: int = knob(4, "transformer blocks", least=1)
    width: int = knob(128, "hidden size: width of the residual stream", least=1)
    heads: int = knob(4, "query heads", least=1)
    kv_heads: int = knob(4, "key/value heads; fewer than `heads`: grouped-query attention", least=1)
    head_dim: int = knob(32, "width of a head; heads * head_dim may differ from `width`", least=1)
    mlp_width: int = knob(512, "intermediate size of the MLP", least=1)
    norm: Norm = knob(Norm.rms_norm, "normalisation before attention, before the MLP, and at the end")
    norm_eps: float = knob(1e-5, "added to the mean square, or to the variance", above=0)
    activation: Activation = knob(Activation.swiglu, "of the MLP")
    positions: Positions = knob(Positions.rotary, "how a token knows its place in its document")
    max_positions: int = knob(0, "learned positions only: rows of the table, tokens", least=0)
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    no_rotary_every: int = knob(
        0, "of so many layers the last turns neither queries nor keys (NoPE); 0: all turn them", least=0
    )
    qk_norm: bool = knob(False, "RMSNorm over head_dim of queries and keys")
    qkv_bias: bool = knob(False, "bias of the query, key and value projections")
    projection_bias: bool = knob(False, "bias of the attention's output projection and of the MLP")
    tied_embeddings: bool = knob(True, "the output projection is the token embedding")
    window: int = knob(0, "keys a sliding-window layer sees; 0: every layer sees all", least=0)
    full_attention_every: int = knob(
        0, "with `window`: of so many layers the last sees all keys; 0: none does", least=0
    )
    logit_softcap: float | None = knob(None, "logits are squashed to +- this by tanh; null: no limit", above=0)
    init_std: float = knob(
        0.02, "standard deviation of initial weights; output projections: divided by sqrt(2 * layers)", above=0
    )
    attention: AttentionImplementation = knob(AttentionImplementation.auto, "attention backend; auto: the fastest")
    fused_ops: FusedImplementation = knob(
        FusedImplementation.auto, "backend of norms, rotary positions, SwiGLU and cross entropy; auto: the fastest"
    )
    init_from: str = knob(
        "", "folder with weights of Hugging Face (config.json, *.safetensors) that a new run starts with; empty: none"
    )


@dataclass
class RecallConfig:
    """The synthetic stream `data=recall`: pairs of a key and its value, each key's value drawn anew a sequence."""

    keys: int = knob(64, "distinct keys", least=1)
    values: int = knob(64, "distinct values", least=1)


@dataclass
class DataConfig:
    """What the model is trained on."""

    source: DataSource = knob(DataSource.builtin, "where tokens come from")
    folder: str = knob(
        "", "source=prepared: of tools/prepare_data.py, of Megatron's *.bin and *.idx, or of nanoGPT's *.bin"
    )
    mixture: dict[str, float] = knob(help="in place of `folder`: several, and their shares", factory=dict)
    tokenizer: str = knob("", "tokenizer.json of Megatron's and nanoGPT's files: for samples and bits a byte")
    token_dtype: TokenDtype = knob(TokenDtype.auto, "of nanoGPT's files; auto: uint16, up to a vocabulary of 65,536")
    end_of_document: int | None = knob(
        None, "id that closes a document in nanoGPT's files; null: the tokenizer's, without one GPT-2's 50256"
    )
    cache_folder: str = knob("~/.cache/longctx", "where source=builtin keeps its tokens")
    site_packages: bool = knob(
        False, "source=builtin: of all packages installed beside torch too, often several times as much text"
    )
    copies: float = knob(
        0.0, "share of the training sequences that are random ids of which half come back: teaches recall", least=0,
        below=1,
    )  # fmt: skip
    sequence_length: int = knob(2048, "tokens of a training sequence: the context length", least=1)
    sequences_per_step: int = knob(8, "global batch size: over all ranks and accumulated micro-batches", least=1)
    sequences_per_micro_batch: int = knob(
        1,
        "micro-batch size on one data-parallel rank, or the next smaller one that divides its share of the step; "
        "gradients of several are accumulated",
        least=1,
    )
    separate_documents: bool = knob(True, "attention stays inside a document and positions restart with each")
    curriculum: dict[Any, int] = knob(
        help="{step: tokens}: from that step on attention is cut every so many tokens, 0: not; a step below 1 is a "
        "share of optim.steps; empty: never. Each step reads the same text with or without, so that a short start "
        "costs neither order nor batch size",
        factory=dict,
    )
    check_hashes: bool = knob(False, "read every shard in full at start and compare its sha256 with the manifest")
    recall: RecallConfig = field(default_factory=RecallConfig)


@dataclass
class ParallelConfig:
    """How many ranks share what. The product of the four sizes is the number of ranks."""

    replicate: int = knob(1, "data-parallel replicas of the sharded model (the outer axis of HSDP)", least=1)
    shard: int = knob(
        -1, "data-parallel ranks that shard parameters, gradients and optimizer state (FSDP2); -1: all that are left"
    )
    context: int = knob(1, "context-parallel degree: ranks that share a sequence; they shard parameters too", least=1)
    tensor: int = knob(1, "tensor-parallel degree: ranks that share every matrix product", least=1)
    strategy: Strategy = knob(
        Strategy.auto, "how attention crosses the context axis; auto: by its size, heads and machines"
    )
    ulysses: int = knob(
        0, "strategy=ulysses_ring: the Ulysses degree, a divisor of context; 0: the largest that a machine has", least=0
    )
    verify: bool = knob(True, "before the first step of a layout, compare it with attention on whole sequences")
    recompute: Recompute = knob(Recompute.none, "activation checkpointing: what the backward pass computes again")
    recompute_less_layers: int = knob(
        0,
        "so many layers, the last, recompute less: nothing with recompute=attention_saved, all but attention with "
        "recompute=full; -1: as many as fit nine tenths of what a run may use of the memory",
        least=AS_FITS,
    )
    tile: int = knob(
        0,
        "norms, projections and MLP run over so many tokens of a micro-batch at a time, forward and backward, and "
        "attention sees all: 16384 bounds what blocks hold and costs little; with recompute=attention_saved or full, "
        "without torch.compile; 0: all at once",
        least=0,
    )
    head_groups: int = knob(
        1,
        "headwise chunking: attention, and what is exchanged for it, for one of so many equal groups of heads after "
        "the other, a divisor of the key/value heads; with recompute=attention_saved or full, without torch.compile",
        least=1,
    )
    offload: int = knob(
        0,
        "activation offload: what the first so many layers keep is in host memory, and comes back one layer ahead; "
        "with recompute=attention_saved or full, without torch.compile; -1: as many layers as it takes to fit",
        least=AS_FITS,
    )
    offload_optimizer: bool = knob(
        False, "AdamW's moments stay in host memory and pass through the GPU in each update: 8 bytes a parameter less"
    )
    compile: bool = knob(False, "torch.compile each block, unless it is tiled, offloaded or has groups of heads")
    timeout_seconds: int = knob(600, "a collective that takes longer ends the run", least=1)
    stop_seconds: int = knob(
        20,
        "a step that would take longer after a signal to stop is abandoned, and the state before it saved; torchrun "
        "kills its ranks 30 seconds after a signal of its own (--shutdown-timeout), and the save needs time too",
        least=1,
    )
    check_memory: bool = knob(True, "refuse at start what cannot fit the memory there is")

    @property
    def is_tiled(self) -> bool:
        """Whether blocks run as one autograd function each, see `longctx.parallel.tiled_block`."""
        return bool(self.tile or self.offload or self.head_groups > 1)


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Optimizer = knob(Optimizer.adamw, "adamw, or muon for the weight matrices of the blocks")
    steps: int = knob(100, "optimizer steps of the whole run", least=1)
    lr: float = knob(3e-4, "learning rate of AdamW at the top of the schedule", least=0)
    muon_lr: float = knob(0.02, "learning rate of Muon, scaled by matrix shape", least=0)
    muon_momentum: float = knob(0.95, "momentum of Muon", least=0, below=1)
    beta1: float = knob(0.9, "AdamW's decay of the gradient's mean", least=0, below=1)
    beta2: float = knob(0.95, "AdamW's decay of the squared gradient's mean", least=0, below=1)
    eps: float = knob(1e-8, "AdamW's addition to the denominator", above=0)
    weight_decay: float = knob(0.1, "of matrices; vectors have none", least=0)
    clip_norm: float = knob(1.0, "gradient clipping by the global norm (max_grad_norm); 0: none", least=0)
    schedule: Schedule = knob(Schedule.cosine, "of the learning rate after warm-up")
    warmup_steps: int | None = knob(None, "null: a twentieth of the steps, at most 100", least=0)
    decay_fraction: float = knob(0.2, "wsd: the share of the steps in which the rate falls", least=0, most=1)
    final_lr_fraction: float = knob(0.1, "of lr, to which it falls by the end", least=0, most=1)
    max_skipped_steps: int = knob(10, "so many non-finite steps in a row end the run", least=1)


@dataclass
class PrecisionConfig:
    """Number formats (mixed precision). Master weights, their gradients and the optimizer's state are float32."""

    compute: ComputeDtype = knob(ComputeDtype.bfloat16, "dtype of activations and of gathered parameters")
    tf32: bool = knob(True, "float32 matrix products may run in TF32 on NVIDIA GPUs")


@dataclass
class ValidationConfig:
    """How the model is looked at, now and then and at the end."""

    every_steps: int = knob(100, "steps between validations; 0: only at the end", least=0)
    sequences: int = knob(16, "held-out sequences of each validation; 0: none", least=0)
    recall_sequences: int = knob(
        4, "synthetic sequences that ask over which distances the model recalls; 0: none", least=0
    )
    sample_prompts: list[str] = knob(
        help="texts that the model continues at the end",
        factory=lambda: ["import", "class Tensor", "def __init__(self"],
    )
    sample_tokens: int = knob(64, "tokens generated after each prompt; 0: none", least=0)


@dataclass
class CheckpointConfig:
    """When the run is saved, and from what it starts."""

    every_steps: int = knob(500, "steps between checkpoints; 0: none in between", least=0)
    asynchronous: bool = knob(True, "written by a thread while training goes on, from a copy in host memory")
    at_end: bool = knob(True, "after the last step, and when a signal stops the run")
    keep: int = knob(2, "newest committed checkpoints that stay", least=1)
    resume: str = knob(
        "auto",
        "auto: the newest committed one of this run, if any; never: none, and a folder that has some is refused; or "
        "the path of a step folder, from which this run branches off (and goes on with its own newer ones when "
        "restarted)",
    )
    on_usr1: OnUsr1 = knob(OnUsr1.save, "what SIGUSR1 asks for, which batch systems send ahead of a limit")

    @property
    def branches_from(self) -> str:
        """The step folder that `resume` names; empty: none."""
        return "" if self.resume in ("auto", "never") else os.path.expanduser(self.resume)


@dataclass
class LoggingConfig:
    """What is shown, how often."""

    every_steps: int = knob(1, "steps between lines of metrics", least=1)
    wandb: WandbMode = knob(WandbMode.auto, "auto: as WANDB_MODE says; without it online with an API key, else offline")
    wandb_project: str = knob("", "empty: as WANDB_PROJECT says; without it longctx")
    wandb_entity: str = knob("", "user or team of W&B; empty: as WANDB_ENTITY says")
    wandb_group: str = knob("", "runs that belong together; empty: as WANDB_RUN_GROUP says")
    wandb_tags: list[str] = knob(help="empty: as WANDB_TAGS says", factory=list)
    wandb_notes: str = knob("", "what the run is for; empty: as WANDB_NOTES says")
    wandb_job_type: str = knob("", "such as pretrain; empty: as WANDB_JOB_TYPE says")
    wandb_system_metrics: bool = knob(True, "utilisation, power and temperature, by W&B itself, of rank 0's machine")
    alerts: bool = knob(
        False, "W&B tells those who follow the run that it has failed, was not finite, has a slow rank or became slow"
    )
    alert_below: float = knob(0.7, "share of the run's median tokens/s that is slow for `alerts`", above=0, most=1)
    wandb_timeout_seconds: int = knob(20, "a server that has not answered by then is left alone", least=1)
    peak_tflops: float | None = knob(None, "of one device, for MFU; null: known for common GPUs", above=0)
    trace_step: int = knob(0, "number of a step whose timeline rank 0 writes into the run's folder; 0: none", least=0)


@dataclass
class Config:
    """One run."""

    name: str = knob("run", "of the run; its files are in folder/name")
    folder: str = knob("runs", "where runs have their folders")
    seed: int = knob(0, "of initial weights and of the order of data", least=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_folder(self) -> Path:
        return Path(os.path.expanduser(self.folder)) / self.name


class Key(NamedTuple):
    """One key of a configuration."""

    path: str  # dotted, as on the command line
    value: Any
    help: str
    limits: Limits


def keys(config: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration or of a group of it, with what stands at its field."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{one.name}.")
        else:
            yield Key(f"{prefix}{one.name}", value, one.metadata["help"], one.metadata["limits"])


# what follows from it ------------------------------------------------------------------------------------------------


def resolve_shard(parallel: ParallelConfig, world_size: int) -> int:
    """`parallel.shard`, with -1 as the ranks that the other axes leave (0 if they do not divide the ranks)."""
    if parallel.shard != -1:
        return parallel.shard
    others = parallel.replicate * parallel.context * parallel.tensor
    return world_size // others if world_size % others == 0 else 0


def warmup_steps(optim: OptimConfig) -> int:
    """Steps of the warm-up: `optim.warmup_steps`, with null as a twentieth of the steps, at most 100."""
    return min(100, optim.steps // 20) if optim.warmup_steps is None else optim.warmup_steps


def attention_span(config: Config, step: int) -> int | None:
    """Every so many tokens attention is cut in `step` (from 0 on), by the curriculum; None: nowhere."""
    begun = {
        round(first * config.optim.steps, 6) if first < 1 else first: tokens
        for first, tokens in config.data.curriculum.items()
    }
    return next((begun[first] or None for first in sorted(begun, reverse=True) if first <= step), None)


def attended_heads(config: Config) -> tuple[int, int]:
    """Query heads and key/value heads of a tensor-parallel rank that one call of attention has."""
    shares = config.parallel.tensor * config.parallel.head_groups
    return config.model.heads // shares, config.model.kv_heads // shares


def configured_ulysses_degree(parallel: ParallelConfig) -> int:
    """Ranks that trade tokens for heads; 1 where none do, or the number is chosen later (ulysses_ring, ulysses=0)."""
    if parallel.strategy == Strategy.ulysses:
        return parallel.context
    return max(1, parallel.ulysses) if parallel.strategy == Strategy.ulysses_ring else 1


def ulysses_groups(heads: int, kv_heads: int, size: int, most: int) -> int:
    """Into how many equal groups, at most so many, the query heads of one of `size` ranks are cut, each with whole
    key/value heads or a part of one."""
    of_rank, kv_of_rank = heads // size, max(1, kv_heads // size)
    fitting = [n for n in range(1, most + 1) if of_rank % n == 0]
    return max(n for n in fitting if kv_of_rank % n == 0 or n % kv_of_rank == 0)


def layer_windows(model: ModelConfig) -> list[int]:
    """Keys a row of each layer sees; 0: all."""
    every = model.full_attention_every
    return [0 if every and (layer + 1) % every == 0 else model.window for layer in range(model.layers)]


def layers_with_rotary(model: ModelConfig) -> list[bool]:
    """Whether each layer turns its queries and keys by their positions."""
    every, is_rotary = model.no_rotary_every, model.positions == Positions.rotary
    return [is_rotary and not (every and (layer + 1) % every == 0) for layer in range(model.layers)]


def recompute_by_layer(config: Config) -> list[Recompute]:
    """The policy of activation checkpointing of each layer."""
    policy, layers = config.parallel.recompute, config.parallel.recompute_less_layers
    assert layers >= 0, "see `remedies.with_layers_chosen`"
    return [policy] * (config.model.layers - layers) + [less_recompute(policy)] * layers


def less_recompute(policy: Recompute) -> Recompute:
    """The policy of activation checkpointing before `policy`, which keeps more."""
    policies = list(Recompute)
    return policies[max(0, policies.index(policy) - 1)]


def micro_batch(data: DataConfig, readers: int) -> int:
    """Sequences of a micro-batch on each of `readers` data-parallel ranks, which share a step's evenly."""
    share = data.sequences_per_step // readers
    return next(size for size in range(min(share, data.sequences_per_micro_batch), 0, -1) if share % size == 0)


def shares_heads(heads: int, kv_heads: int, size: int) -> bool:
    """Whether `size` ranks can trade tokens for heads."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
