"""What a run says. A console that takes no more (a closed pipe, a full disk under a log) does not end it."""

from __future__ import annotations

import os
import sys


def say(message: str) -> None:
    """Prints a line at once."""
    try:
        print(message, flush=True)
    except (OSError, ValueError):  # ValueError: closed
        silence()


def silence() -> None:
    """From now on what is printed goes nowhere, what is still in the buffer too: nobody would read it."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
    except (OSError, ValueError, AttributeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
