"""The folder of a run's files: one that all machines share, and that one run at a time writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from pathlib import Path
from typing import IO

from longctx.console import say
from longctx.errors import UserError
from longctx.runtime import Runtime


class RunFolder:
    """`folder`, made and locked by rank 0, seen by all. To be made by all ranks; closed when the run ends."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Raises `UserError` on all ranks: it cannot be written, another run writes it, or a machine has its own."""
        self.file: IO[str] | None = None  # the lock, on rank 0
        word = runtime.run_on_rank_0(lambda: self._take(folder))
        try:
            runtime.run_on_all_ranks(lambda: _find_word(folder, word, runtime))
        finally:
            if runtime.is_main:
                (folder / word).unlink(missing_ok=True)

    def _take(self, folder: Path) -> str:
        """Makes and locks the folder; returns the name of a new file in it, for the others to find."""
        word = f".word-{uuid.uuid4().hex}"
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.file = (folder / "lock").open("a+")
            is_locked = lock(self.file, folder)
            (folder / word).touch()
        except OSError as error:
            raise UserError(
                f"the run's folder {folder} cannot be written: {error.strerror}; give folder=ANOTHER"
            ) from None
        if not is_locked:
            say(f"{folder}: its file system has no locks, so a second run of the same name would not be noticed")
        return word

    def close(self) -> None:
        """Another process may write the folder from now on; a killed one's lock is gone with it."""
        if self.file:
            self.file.close()


def lock(file: IO[str], folder: Path) -> bool:
    """Locks an open file for this process until it is closed, and writes into it who has it.

    Returns whether the file system can lock. Raises `UserError` if another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another run writes it{_owner(file)}; wait for it, end it, or give this one another name"
        ) from None
    except OSError:
        return False
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        file.flush()
    return True


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f": process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _find_word(folder: Path, word: str, runtime: Runtime) -> None:
    os.listdir(folder) if folder.is_dir() else None  # network file systems look again at a folder that is listed
    if not (folder / word).exists():
        raise UserError(
            f"the run's folder {folder.resolve()} on {socket.gethostname()} is not the one that rank 0 writes, so each "
            f"machine would keep a part of every checkpoint; give folder=ONE THAT ALL MACHINES SHARE"
        )
