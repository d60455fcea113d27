"""Which machine this process runs on."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_machine() -> str:
    """Equal in two processes only if they run on one machine and see each other's numbers: without spaces.

    Names alone do not tell: containers of different machines may have the same.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}/{namespace}"
