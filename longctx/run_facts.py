"""What is known of a run beside its configuration: model, machines, layout, implementations, versions, commit."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from longctx.config import Config
from longctx.data.mixture import Mixture
from longctx.files import replace_file
from longctx.machine import this_machine
from longctx.model.transformer import training_flops
from longctx.parallel.context_parallel import ContextParallel
from longctx.parallel.mesh import AXES, Mesh
from longctx.run_info import RunInfo
from longctx.runtime import Runtime

FILE = "run.json"  # in the run's folder


def collect(
    config: Config, runtime: Runtime, mesh: Mesh, parameters: dict[str, torch.nn.Parameter],
    context_parallel: ContextParallel, implementations: dict[str, str], tokens: Mixture | None,
) -> dict[str, Any]:  # fmt: skip
    """Facts by name; collective. `implementations`: of attention and of the other fused ops."""
    data = config.data
    whole_sequence = torch.arange(data.sequence_length).unsqueeze(0)
    return {
        "ranks": runtime.world_size,
        "machines": len(set(runtime.gather(this_machine()))),
        "device": runtime.device_name,
        "parameters": sum(p.numel() for p in parameters.values()),
        "flops_per_token": training_flops(config.model, whole_sequence) / data.sequence_length,
        "tokens_per_step": data.sequences_per_step * data.sequence_length,
        "layout": {axis: mesh.size(axis) for axis in AXES},
        "strategy": str(context_parallel.choice.strategy) if mesh.size("context") > 1 else "none",
        "transport": ", ".join(sorted({transport.description for transport in context_parallel.transports})) or "none",
        **implementations,
        "data": f"{tokens} ({tokens.fingerprint()})" if tokens else "synthetic recall",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": _version_of("triton"),
            "cuda": torch.version.cuda or torch.version.hip or "none",
        },
        "commit": commit(),
    }  # fmt: skip


def _version_of(package: str) -> str:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return "none"


def commit() -> str:
    """Of the checkout that runs, with `-dirty` if it was changed; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def shown_configuration(run: RunInfo) -> dict[str, Any]:
    """The configuration, nested and resolved; text that comes from the environment stands as it was written.

    So `${oc.env:KEY}` shows no secret, wherever it is referred to.
    """
    written = yaml.safe_load(run.config_yaml)

    def find(path: str) -> object:
        found: Any = written
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def reads_environment(text: object) -> bool:
        if not isinstance(text, str) or "${" not in text:
            return False
        return "oc.env" in text or any(reads_environment(find(part.partition("}")[0])) for part in text.split("${")[1:])

    def shown(value: Any, text: Any) -> Any:
        if isinstance(value, dict):
            inner = text if isinstance(text, dict) else {}
            return {str(key): shown(one, inner.get(key)) for key, one in value.items()}
        if isinstance(value, list) and isinstance(text, list):
            return [shown(one, word) for one, word in zip(value, text, strict=True)]
        return text if isinstance(value, str) and reads_environment(text) else value

    return shown(asdict(run.config), written)


class RunRecord:
    """`run.json`: the configuration and the facts of a run's last start, and how it ended. On rank 0."""

    def __init__(self, run: RunInfo, facts: dict[str, Any]) -> None:
        self.path = run.folder / FILE
        self.record = {
            "name": run.config.name, "started_at": time.time(), "ended": "not yet",
            "configuration": shown_configuration(run), "facts": facts,
        }  # fmt: skip
        self.write()

    def end(self, how: str, more: dict[str, Any]) -> None:
        """How the run has ended, and what else is known by then."""
        self.record |= {"ended": how, "ended_at": time.time(), **more}
        self.write()

    def write(self) -> None:
        """At once or not at all."""
        replace_file(self.path, json.dumps(self.record, indent=1).encode() + b"\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The `run.json` of a run's folder; {} if there is none that can be read."""
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
