"""Ranks that srun has started without torchrun: SLURM's variables say of each what torchrun would."""

from __future__ import annotations

import re
import zlib
from collections.abc import MutableMapping

from longctx.errors import ConfigError

FIRST_PORT, PORTS = 20000, 10000


def port_of(job: str) -> int:
    """Where the ranks of a job meet: the same on all of its machines, and seldom that of another job."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def join(environment: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a step of several tasks.

    Nothing where torchrun has set them, or where srun has started one task alone. Raises `ConfigError` if tasks are
    not dealt out machine by machine, as many on each: a rank's neighbours must be the nearest.
    """
    ranks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or ranks == "1":
        return
    rank, local_rank, node = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ranks))
    counts = _counts(tasks)
    if len(set(counts)) > 1 or rank != node * counts[0] + local_rank:
        raise ConfigError(
            [
                f"srun has dealt out {ranks} tasks as {tasks}, of which number {rank} is number {local_rank} on "
                f"machine {node}: neighbouring ranks must be on one machine, as many on each; give srun "
                "--ntasks-per-node=N --distribution=block"
            ]
        )
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
    environment.update(
        RANK=str(rank), WORLD_SIZE=ranks, LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(counts[0]),
        MASTER_ADDR=first_of(nodes), MASTER_PORT=str(port_of(job)),
    )  # fmt: skip


def _counts(tasks: str) -> list[int]:
    """Of `4(x2),3`: 4, 4, 3."""
    counts = []
    for part in tasks.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def first_of(nodes: str) -> str:
    """The first name of a list as SLURM writes it: `gpu-[03-06,9],login` -> `gpu-03`."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    assert first is not None  # it matches anything
    return re.sub(r"\[([^\-,\]]*)[^\]]*\]", r"\1", first[0])
