"""What somebody may have meant who has typed a key that does not exist."""

from __future__ import annotations

import dataclasses
import difflib

from longctx.config import Config


def all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration, dotted: `optim.lr`."""
    keys = []
    for f in dataclasses.fields(cls):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.default_factory):
            keys += all_keys(f.default_factory, f"{prefix}{f.name}.")  # pyright: ignore[reportArgumentType]
    return keys


def text_keys() -> list[str]:
    """The keys whose values are text, or lists of it."""
    return [key for key in all_keys() if _type_of(key) in ("str", "str | None", "list[str]", "list[str] | None")]


def _type_of(key: str) -> str:
    cls: type = Config
    *groups, name = key.split(".")
    for group in groups:
        factory = next(f.default_factory for f in dataclasses.fields(cls) if f.name == group)
        assert isinstance(factory, type)
        cls = factory
    return str(next(f.type for f in dataclasses.fields(cls) if f.name == name))


# what others call a key
ALIASES = {
    "parallel.context": ("cp", "context_parallel", "context_parallel_size", "cp_size"),
    "parallel.tensor": ("tp", "tensor_parallel", "tensor_parallel_size", "tp_size"),
    "parallel.shard": ("fsdp", "dp", "data_parallel", "dp_shard"),
    "parallel.replicate": ("hsdp", "ddp", "dp_replicate"),
    "parallel.recompute_less_layers": ("attention_saved_layers",),
    "parallel.recompute": ("activation_checkpointing", "gradient_checkpointing", "ac", "remat"),
    "optim.lr": ("learning_rate", "max_lr", "peak_lr"),
    "optim.steps": ("max_steps", "train_steps", "training_steps", "num_steps", "total_steps", "iters", "max_iters"),
    "optim.warmup_steps": ("warmup", "warmup_iters", "num_warmup_steps"),
    "optim.clip_norm": ("max_grad_norm", "grad_clip", "gradient_clipping", "clip_grad_norm"),
    "optim.final_lr_fraction": ("min_lr", "lr_min_ratio", "min_lr_ratio"),
    "data.sequences_per_step": ("batch_size", "global_batch_size", "gradient_accumulation_steps", "grad_accum"),
    "data.sequences_per_micro_batch": ("micro_batch_size", "per_device_train_batch_size", "local_batch_size"),
    "data.sequence_length": ("seq_len", "max_seq_len", "block_size", "context_length", "max_length"),
    "data.separate_documents": ("intra_document_masking", "reset_attention_mask"),
    "model.width": ("hidden_size", "d_model", "n_embd", "dim"),
    "model.layers": ("num_layers", "n_layer", "n_layers", "num_hidden_layers"),
    "model.heads": ("num_heads", "n_head", "n_heads", "num_attention_heads"),
    "model.kv_heads": ("num_key_value_heads", "n_kv_heads", "num_query_groups"),
    "model.mlp_width": ("intermediate_size", "ffn_hidden_size", "d_ff"),
    "model.rotary.theta": ("rope_theta", "rotary_base"),
    "precision.compute": ("dtype", "bf16", "fp16", "mixed_precision", "amp"),
    "checkpoint.every_steps": ("save_steps", "save_interval", "checkpoint_interval"),
    "logging.every_steps": ("log_interval", "logging_steps", "log_every"),
    "validation.every_steps": ("eval_interval", "eval_steps", "val_interval", "validate_every_steps"),
    "validation.sequences": ("validation_sequences", "eval_iters", "val_batches"),
    "validation.recall_sequences": ("recall_sequences",),
    "validation.sample_prompts": ("sample_prompts",),
    "validation.sample_tokens": ("sample_tokens", "max_new_tokens"),
    "logging.wandb": ("use_wandb", "report_to"),
}  # fmt: skip


def explain_unknown_key(key: str) -> str:
    """Why `key` (dotted) is refused, and the keys its writer may have meant."""
    last = key.rsplit(".", 1)[-1]
    if meant := [ours for ours, names in ALIASES.items() if last in names]:
        return f"{key} is no key of the configuration; here it is {' and '.join(meant)}"
    keys = [k for k in all_keys() if not any(other.startswith(f"{k}.") for other in all_keys())]  # without the groups
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.75)
    near += [k for k in keys if k not in near and difflib.get_close_matches(last, [k.rsplit(".", 1)[-1]], cutoff=0.75)]
    hint = (
        f"did you mean {' or '.join(near[:4])}?" if near else "`python train.py --cfg job recipe=...` lists all keys."
    )
    return f"{key} is no key of the configuration; {hint}"
