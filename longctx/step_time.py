"""How long a training step takes, known before anything is made, by the rates of GPUs in `rates/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longctx.config import ComputeDtype, Config, Recompute, layer_windows, recompute_by_layer, resolve_shard
from longctx.plan import FLOAT32, matmul_parameters, micro_batches_of, padded_head_dim, parameters, tiles_of

RATES = Path(__file__).parent / "rates"


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
    windows = (min(w or length, length) for w in layer_windows(model))
    pairs = sum(w * length - w**2 / 2 for w in windows)  # the first w tokens see fewer than w keys
    attention = 4.0 * model.heads * model.head_dim * pairs * data.sequences_per_step
    return attention, 2.0 * matmul_parameters(model) * tokens


def seconds(config: Config, world_size: int, of: dict[str, Any]) -> dict[str, float]:
    """What a step takes with the `rates` of a GPU, by what it is for; communication is hidden.

    Rates are of 16 bits: see `is_timed`.
    """
    model, policies = config.model, recompute_by_layer(config)
    attention, products = (work / world_size for work in flops(config))
    width = str(padded_head_dim(model.head_dim))
    attention *= padded_head_dim(model.head_dim) / model.head_dim
    forward, backward = (of["attention_tflops"][width][name] * 1e12 for name in ("forward", "backward"))
    tokens = config.data.sequence_length * config.data.sequences_per_step / world_size
    matrices, rest = parameters(model)
    products_again = 1 - policies.count(Recompute.none) / model.layers
    attention_again = policies.count(Recompute.full) / model.layers
    again = products_again * (matrices - model.layers * model.width * model.mlp_width)
    ranks = resolve_shard(config.parallel, world_size) * config.parallel.context * config.parallel.tensor
    others = of["other_kernels_us_a_token_of_width_4096"]
    tiles = micro_batches = micro_batches_of(config, world_size)
    traffic = of["update_bytes_a_parameter"] * (matrices + rest) / ranks
    if config.parallel.is_tiled:  # queries, keys and values once more, and the sums of the weights' gradients
        projections = model.layers * model.width * model.head_dim * (model.heads + 2 * model.kv_heads)
        again += (1 + attention_again) * projections
        tiles *= tiles_of(config, world_size)
        traffic += 12 * matrices * (tiles - micro_batches)
    moments = 2 * FLOAT32 * (matrices + rest) / ranks if config.parallel.offload_optimizer else 0
    product_rate = of["product_tflops"] * 1e12 * of["share_of_product_tflops"]
    parts = {
        "attention": attention * ((1 + attention_again) / forward + 2.5 / backward),
        "products": (3 * products + 2 * again * tokens) / product_rate,
        "other kernels": others * 1e-6 * tokens * model.layers * model.width / 4096,
        "weights": traffic / (of["memory_tb_per_s"] * 1e12) + moments / (of["host_gb_per_s"] * 1e9),
    }
    launches = of["launches_ms_a_layer"] * 1e-3 * model.layers * micro_batches
    return parts | {"waiting for launches": max(0.0, launches - sum(parts.values()))}


def attention_of_a_layer(config: Config, world_size: int, of: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a layer's attention over a micro-batch whose sequences are one document each, forward and backward."""
    parts = config.model.layers * micro_batches_of(config, world_size) * world_size
    width = padded_head_dim(config.model.head_dim)
    work = flops(config)[0] * width / config.model.head_dim / parts
    forward, backward = (of["attention_tflops"][str(width)][name] * 1e12 for name in ("forward", "backward"))
    return work / forward, 2.5 * work / backward


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `4 h`, `3 days`."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
