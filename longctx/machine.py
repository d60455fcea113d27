"""Which machine this process runs on, and what memory it has."""

from __future__ import annotations

import os
import socket
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def this_machine() -> str:
    """Identifier of this host, its boot and PID namespace, without spaces.

    Two processes with the same one can address each other by PID and share GPU memory. Host names alone do not tell:
    containers of different machines may have the same.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}/{namespace}"


def ranks_of_a_machine(world_size: int) -> int:
    """Ranks that this machine's launcher has started, of `world_size`: all, unless it says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


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
