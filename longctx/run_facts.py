"""What is known of a run beside its configuration: model, machines, layout, implementations, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from longctx import plan, step_time
from longctx.config import Config, micro_batch
from longctx.data.mixture import Mixture
from longctx.machine import this_machine
from longctx.model.transformer import training_flops
from longctx.parallel.context_parallel import ContextParallel
from longctx.parallel.mesh import AXES, Mesh
from longctx.parallel.traffic import between_machines, link_rate
from longctx.runtime import Runtime


def collect(
    config: Config, runtime: Runtime, mesh: Mesh, parameters: dict[str, torch.nn.Parameter],
    context_parallel: ContextParallel, implementations: dict[str, str], tokens: Mixture | None,
) -> dict[str, Any]:  # fmt: skip
    """Facts by name; collective. `implementations`: of attention and of the other fused ops."""
    data, machines = config.data, runtime.gather_on_rank_0(this_machine())
    whole_sequence = torch.arange(data.sequence_length).unsqueeze(0)
    return {
        "ranks": runtime.world_size,
        "machines": runtime.run_on_rank_0(lambda: len(set(machines))),
        "device": runtime.device_name,
        "device_gib": runtime.device_bytes / 2.0**30,
        "parameters": sum(p.numel() for p in parameters.values()),
        "flops_per_token": training_flops(config.model, whole_sequence) / data.sequence_length,
        "tokens_per_step": data.sequences_per_step * data.sequence_length,
        "layout": {axis: mesh.size(axis) for axis in AXES},
        "strategy": str(context_parallel.choice.strategy) if mesh.size("context") > 1 else "none",
        "transport": context_parallel.transport or "none",
        **implementations,
        **_traffic(config, runtime, mesh, context_parallel),
        **_expected(config, runtime, context_parallel, plan.is_foreseen(**implementations)),
        "data": f"{tokens} ({tokens.fingerprint()})" if tokens else "synthetic recall",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": _version_of("triton"),
            "cuda": torch.version.cuda or torch.version.hip or "none",
        },
        "commit": runtime.run_on_rank_0(commit),
    }  # fmt: skip


def _traffic(
    config: Config, runtime: Runtime, mesh: Mesh, context_parallel: ContextParallel
) -> dict[str, float]:  # fmt: skip
    """What attention sends between machines, if they share sequences, how fast they are joined, and what it can hide
    behind. Collective."""
    ranks, of_reader = runtime.ranks_of_a_machine, mesh.ranks_of_a_reader
    shares_whole_machines = of_reader % ranks == ranks % mesh.size("tensor") == 0
    if of_reader <= ranks or mesh.size("context") == 1 or not shares_whole_machines:
        return {}
    choice, sequences = context_parallel.choice, micro_batch(config.data, mesh.readers)
    traffic = between_machines(config, choice.strategy, choice.ulysses_size, ranks, sequences)
    rate = link_rate(mesh.group("context"), ranks // mesh.size("tensor"), runtime.device) * mesh.size("tensor")
    slowest = runtime.least(rate)
    rates = step_time.rates_of_device(runtime.device_name) if step_time.is_timed(config) else None
    forward, backward = step_time.attention_of_a_layer(config, runtime.world_size, rates) if rates else (0.0, 0.0)
    return {
        "between_machines_mb_forward": traffic.forward / 1e6,
        "between_machines_mb_backward": traffic.backward / 1e6,
        "between_machines_gb_per_s": slowest / 1e9,
        **({"attention_s_forward": forward, "attention_s_backward": backward} if rates else {}),
    }


def _version_of(package: str) -> str:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return "none"


def commit() -> str:
    """Of the checkout that runs, with `-dirty` if it was changed; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _expected(
    config: Config, runtime: Runtime, context_parallel: ContextParallel, is_foreseen: bool
) -> dict[str, Any]:  # fmt: skip
    """What `plan` says of a step on these GPUs, as far as it can."""
    if runtime.device.type != "cuda" or not is_foreseen:
        return {}
    memory = plan.memory(config, runtime.world_size, context_parallel.choice)
    rates = step_time.rates_of_device(runtime.device_name) if step_time.is_timed(config) else None
    time = {"predicted_s": sum(step_time.seconds(config, runtime.world_size, rates).values())} if rates else {}
    return {
        "predicted_gib": memory.total / plan.GIB,
        "predicted_at": memory.point,
        "predicted_terms": memory.in_words(),
        **time,
    }
