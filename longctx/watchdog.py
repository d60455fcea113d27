"""Watchdog: each rank writes a heartbeat to the store of the job, and checks that of the rank after it.

The thread of a rank beats every few seconds. A rank without a heartbeat for as long as a collective may take (its
process was stopped, its machine is gone) is named, and the job ends. Where all beat and none makes progress, each shows
where it stands in the program before its collectives give up: the rank that stands where no other does is the one that
the others wait for. A rank that the store itself has not answered for so long (the link to its machine is cut) ends,
and with it its launcher, which would wait for the store for ever.
"""

from __future__ import annotations

import datetime
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from torch.distributed import DistError, PrefixStore, TCPStore

from longctx.machine import this_machine
from longctx.stopping import end_stuck_launcher, leave

LEFT = "left"
PATIENCE_S = 8.0  # with a launcher that cannot reach the store, until it is killed
ENDED = "ended"  # the job, by a rank that has said why


class Clock(Protocol):
    """What time it is in seconds, and how to wait."""

    def __call__(self) -> float: ...

    def wait(self, seconds: float, ended: threading.Event) -> bool:
        """Waits for so many seconds, or until the event; returns whether that has come."""
        ...


class RealClock:
    """Time as it passes."""

    def __call__(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float, ended: threading.Event) -> bool:
        return ended.wait(seconds)


EXPECTED_TIMES = 3  # what a step is expected to take, before it is missed: the first is expected by its products alone


class Watchdog:
    """Watches the rank after this one until `stop`."""

    def __init__(
        self, rank: int, size: int, timeout_seconds: float, name: str, clock: Clock | None = None
    ) -> None:  # fmt: skip
        """Under torchrun, which tells where its store is; a process that is alone has nobody to watch.

        `name` is the same on all ranks and was used for no watchdog before: the store outlives restarts.
        """
        self.clock = clock or RealClock()
        self.heartbeat: Callable[[], tuple[int, ...]] = tuple  # numbers that change as long as the main thread gets on
        self.expected_s: Callable[[], float] = float  # seconds that a step may well take without such a change
        self.last_beat: tuple[int, ...] = ()
        self.rank, self.other, self.timeout_seconds = rank, (rank + 1) % size, timeout_seconds
        self.period_s = min(5.0, timeout_seconds / 10)
        # it is noticed up to two periods late, and no collective must give up before
        self.silence_s = timeout_seconds - 4 * self.period_s
        self.ended = threading.Event()
        self.size, self.beats = size, 0
        self.progress_at = self.seen_at = self.clock()
        self.answered_at = self.clock()  # when the store has last answered all that was asked; inf: it is gone
        self.shown_at = 0.0  # when this rank has shown where it stands; 0: not since it last got on
        self.seen = ""  # the last heartbeat of the other rank
        self.store = None
        if size > 1 and "MASTER_PORT" in os.environ:
            store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                timeout=datetime.timedelta(seconds=timeout_seconds),
            )  # fmt: skip
            self.store = PrefixStore(f"longctx/alive/{name}", store)
            self._beat(0)  # at once: a rank that stops before its first period is missed as well
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
            threading.Thread(target=self._guard, daemon=True).start()

    def stop(self) -> None:
        """This rank is done: from now on nobody misses it.

        Where the store no longer answers, as over a link that was cut, its thread is left behind.
        """
        if self.store is None:
            return
        self.ended.set()
        self.thread.join(self.period_s)

    def look(self) -> None:
        """What the thread does once a period: beats, and looks for progress here and for the other's heartbeat."""
        assert self.store is not None
        if self.store.check([ENDED]):
            leave(1)
        self._look_for_progress()
        self.beats += 1
        self._beat(self.beats)
        now = self.clock()
        if now - self.answered_at > 3 * self.period_s:  # this process stood still, or the store: the other may have too
            self.seen_at = now
        if self.shown_at and self.progress_at > self.shown_at:
            self.shown_at = 0.0
            self.store.delete_key(f"stack/{self.rank}")
        elif not self.shown_at and self.progress_at < now - max(self.silence_s, EXPECTED_TIMES * self.expected_s()):
            self.shown_at = now
            self._show_where_ranks_stand()
        found = self.store.get(str(self.other)).decode() if self.store.check([str(self.other)]) else ""
        if found != self.seen or found in ("", LEFT):
            self.seen, self.seen_at = found, self.clock()
        elif self.clock() - self.seen_at > self.silence_s:
            self._end(self.seen, self.clock() - self.seen_at)
        self.answered_at = self.clock()

    def look_for_answers(self) -> None:
        """What another thread does once a period: the one that looks may stand still where no packet comes back."""
        silent_s = self.clock() - self.answered_at
        if silent_s > self.silence_s:
            self._end_alone(silent_s)

    def _run(self) -> None:
        assert self.store is not None
        try:
            while not self.clock.wait(self.period_s, self.ended):
                self.look()
            self.store.set(str(self.rank), LEFT)
        except (DistError, RuntimeError):  # the store is gone, and with it the job
            self.answered_at = math.inf

    def _guard(self) -> None:
        woke_at = self.clock()
        while not self.clock.wait(self.period_s, self.ended):
            if self.clock() - woke_at > 3 * self.period_s:  # this process stood still, with all its threads
                self.answered_at = max(self.answered_at, self.clock())
            woke_at = self.clock()
            self.look_for_answers()

    def _look_for_progress(self) -> None:
        if (beat := self.heartbeat()) != self.last_beat:
            self.last_beat, self.progress_at = beat, self.clock()

    def _beat(self, number: int) -> None:
        assert self.store is not None
        self.store.set(str(self.rank), f"{number} {this_machine()} {os.getpid()}")

    def _show_where_ranks_stand(self) -> None:
        assert self.store is not None
        noticed_at = self.clock()
        self.store.set(f"stack/{self.rank}", main_stack())
        if self.rank:
            return
        self.clock.wait(1.5 * self.period_s, self.ended)  # others may notice a period later
        self._look_for_progress()
        if self.progress_at > noticed_at:
            return
        keys = {rank: f"stack/{rank}" for rank in range(self.size)}
        stacks = {rank: self.store.get(key).decode() if self.store.check([key]) else "" for rank, key in keys.items()}
        seconds, expected = self.clock() - self.progress_at, self.expected_s()
        is_long = EXPECTED_TIMES * expected > self.silence_s
        took = f", and one was expected to take {expected:.0f} s" if is_long else ""
        print(
            f"no step for {seconds:.0f} s (parallel.timeout_seconds={self.timeout_seconds:g}){took}\n"
            + comparison(stacks),
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def _end(self, sign: str, silent_s: float) -> None:
        assert self.store is not None
        _, machine, process = sign.split()
        print(
            f"rank {self.other} (process {process} on {machine.split('/')[0]}) has given no sign of life for "
            f"{silent_s:.0f} s (parallel.timeout_seconds={self.timeout_seconds:g}): the job ends; start it again to "
            f"resume",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        try:
            if machine == this_machine():  # a stopped process would not end by itself
                os.kill(int(process), signal.SIGKILL)
            self.store.set(ENDED, "")  # the others end at their next look, and not in a collective of their own
        finally:
            leave(1)

    def _end_alone(self, silent_s: float) -> None:
        print(
            f"rank {self.rank}: the job's store on {os.environ['MASTER_ADDR']} has not answered for {silent_s:.0f} s "
            f"(parallel.timeout_seconds={self.timeout_seconds:g}): that machine or the link to it is gone; the job "
            f"ends; start it again, on all machines, to resume",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        end_stuck_launcher(PATIENCE_S)
        leave(1)


def main_stack() -> str:
    """Where this process's main thread stands, the innermost call last."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame))


def comparison(stacks: dict[int, str]) -> str:
    """Says which ranks stand where, those that are alone first. "": that rank gets on, or did not answer."""
    together: dict[str, list[int]] = {}
    for rank, stack in stacks.items():
        together.setdefault(stack, []).append(rank)
    groups = sorted(together.items(), key=lambda group: len(group[1]))
    text = [f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}:\n{s or '  no answer'}" for s, r in groups]
    if len(groups) > 1 and len(groups[0][1]) < len(groups[1][1]):
        text.insert(0, f"the others seem to wait for rank {', '.join(map(str, groups[0][1]))}")
    return "\n".join(text)
