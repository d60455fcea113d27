"""Which machine this process runs on."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_machine() -> str:
    """Identifier of this host, its boot and PID namespace, without spaces.

    Two processes with the same one can address each other by PID and share GPU memory. Host names alone do not tell:
    containers of different machines may have the same.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}/{namespace}"
