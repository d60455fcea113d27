"""Ranks that no longer run: a process that was stopped, or whose machine is gone, would leave the others waiting.

Each rank gives a sign of life in the store of the job every few seconds, from a thread of its own, and looks for that
of the rank after it. A rank without one for as long as a collective may take is named, and the job ends.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import threading
import time

from torch.distributed import DistError, PrefixStore, TCPStore

from longctx.machine import this_machine

LEFT = "left"


class Watch:
    """Watches the rank after this one, from `start` to `stop`."""

    def __init__(self, rank: int, size: int, timeout_seconds: float, name: str) -> None:
        """Under torchrun, which tells where its store is; a process that is alone has nobody to watch.

        `name` is the same on all ranks and was used for no watch before: the store outlives restarts.
        """
        self.rank, self.other, self.timeout_seconds = rank, (rank + 1) % size, timeout_seconds
        self.period_s = min(5.0, timeout_seconds / 10)
        # it is noticed up to two periods late, and no collective must give up before
        self.silence_s = timeout_seconds - 4 * self.period_s
        self.ended = threading.Event()
        self.store = None
        if size > 1 and "MASTER_PORT" in os.environ:
            store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                timeout=datetime.timedelta(seconds=timeout_seconds),
            )  # fmt: skip
            self.store = PrefixStore(f"longctx/alive/{name}", store)
            self._give_sign(0)  # at once: a rank that stops before its first period is missed as well
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """This rank is done: from now on nobody misses it."""
        if self.store is None:
            return
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        assert self.store is not None
        sign, seen_at, number = "", time.monotonic(), 0
        try:
            while not self.ended.wait(self.period_s):
                number += 1
                self._give_sign(number)
                found = self.store.get(str(self.other)).decode() if self.store.check([str(self.other)]) else ""
                if found != sign or found in ("", LEFT):
                    sign, seen_at = found, time.monotonic()
                elif time.monotonic() - seen_at > self.silence_s:
                    self._end(sign, time.monotonic() - seen_at)
            self.store.set(str(self.rank), LEFT)
        except (DistError, RuntimeError):  # the store is gone, and with it the job
            pass

    def _give_sign(self, number: int) -> None:
        assert self.store is not None
        self.store.set(str(self.rank), f"{number} {this_machine()} {os.getpid()}")

    def _end(self, sign: str, silent_s: float) -> None:
        _, machine, process = sign.split()
        print(
            f"rank {self.other} (process {process} on {machine.split('/')[0]}) has given no sign of life for "
            f"{silent_s:.0f} s (parallel.timeout_seconds={self.timeout_seconds:g}): the job ends; start it again to "
            f"resume",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if machine == this_machine():  # a stopped process would not end by itself
            os.kill(int(process), signal.SIGKILL)
        os._exit(1)
