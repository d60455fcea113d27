"""Signals: answered at once, obeyed after the step, or before its end where that would take too long.

Python looks at signals between two of its own instructions, and a step on a long sequence may spend minutes inside one
product. So a thread hears of them through a pipe. The first SIGTERM, SIGINT or SIGHUP asks the run to stop after the
step it is in; another one leaves at once. A step that would outlast `stop_seconds` (torchrun kills its ranks 30 seconds
after it was asked to end) is abandoned: parameters and optimizer are as they were before it until its update, and that
is what gets saved.

All ranks must abandon the same step. Each passes a `gate` before certain collectives, in the same order, and none can
be past the collective behind a gate before all have passed that gate. So a rank that closes a gate before itself holds
every rank where it is, with its state unchanged; the others hear which gate it was through the job's store.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from torch.distributed import DistError, Store

from longctx.console import say

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PERIOD_S = 0.25
SAME_S = 1.0  # a launcher passes on what the terminal has sent already: within this time it is one signal
PR_SET_PDEATHSIG = 1
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # torchrun's process, when this one began


class StopSignals:
    """While entered, signals end nothing by themselves. The main thread passes `gate` and looks at what was asked."""

    def __init__(self, stop_seconds: float = 20, usr1_stops: bool = False) -> None:
        """`usr1_stops`: SIGUSR1 asks to stop, like SIGTERM; else it asks for a checkpoint and the run goes on."""
        self.stop_seconds, self.usr1_stops = stop_seconds, usr1_stops
        self.number = 0  # of the signal that asks to stop; 0: none
        self.save_asked = False
        self.say: Callable[[str], None] = say if os.environ.get("RANK", "0") == "0" else lambda _: None
        self.left_s: Callable[[], float] = lambda: 0.0  # how long the step in progress may still take
        self.abandon: Callable[[], None] | None = None  # saves what was before the step, and leaves
        self.is_abandoning = False
        self.came_here = False  # to this process, rather than to another rank
        self.is_orphan = False  # its launcher is gone
        self.is_elsewhere = False  # another machine's launcher is ending by a signal, and not this one's
        self._is_handed_on = False  # so that what comes now comes from here
        self._machine = int(os.environ.get("GROUP_RANK", "0"))
        self._machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        self._asked_at = 0.0
        self._store: Store | None = None
        self._parent, self._has_launcher = os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ
        self._gate = threading.Lock()
        self.gates_passed, self._is_open, self._is_closed = 0, False, False
        self._ended = threading.Event()

    def __enter__(self) -> StopSignals:
        # what is ignored stays so: by nohup SIGHUP, by a shell's script SIGINT of what it starts in the background
        numbers = [n for n in (*ASKING, signal.SIGUSR1) if signal.getsignal(n) is not signal.SIG_IGN]
        self._ear, self._mouth = socket.socketpair()
        self._ear.settimeout(PERIOD_S)
        self._mouth.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join(4 * PERIOD_S)  # longer only where the store does not answer, as over a link that was cut
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._ear.close()
        self._mouth.close()

    def share(self, store: Store) -> None:
        """From now on what one rank hears all do. `store` is used by this thread alone; it has no keys yet."""
        self._store = store

    def take_save_asked(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self.save_asked = self.save_asked, False
        return asked

    def gate(self, is_open: bool) -> None:
        """To be followed by a collective of all ranks, waited for before the state changes or a checkpoint is written.

        From there to the next gate the step may be abandoned, if `is_open`. Does not return if it is being abandoned.
        """
        with self._gate:
            if not self._is_closed:
                self.gates_passed, self._is_open = self.gates_passed + 1, is_open
                return
        self.wait_for_the_end()

    @staticmethod
    def wait_for_the_end() -> None:
        """Another thread saves, and ends this process."""
        while True:
            time.sleep(1)

    def ask(self, number: int) -> None:
        """As if the signal had come."""
        self.number = number
        self.say(f"{signal.Signals(number).name}: stopping after this step; once more leaves now")
        self._tell("stop", str(number))
        self._asked_at = time.monotonic()  # last: what has come meanwhile is the same signal

    def end_launcher_too(self) -> None:
        """Of a run that a signal has stopped: where another machine's launcher ends by that, ends this one's as well.

        That one ends without a word, and this one would wait for it for five minutes.
        """
        if self._machines > 1:
            time.sleep(2 * PERIOD_S)  # the thread hears of it meanwhile
            self._hand_on()

    def _hand_on(self) -> None:
        if self.is_elsewhere and self._has_launcher and os.environ.get("LOCAL_RANK") == "0":
            self._is_handed_on = True
            os.kill(self._parent, signal.SIGTERM)

    # in the thread ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                for number in self._ear.recv(64):
                    self._hear(number)
            except TimeoutError:
                pass
            self._look_at_others()
            if self._ended.is_set():  # long ago, if the store was slow to answer
                return
            if not self.number or self.is_abandoning:
                continue
            if self.abandon is None and time.monotonic() - self._asked_at > self.stop_seconds:
                self.say("leaving while the run still starts; it has nothing to save")
                self._hand_on()
                leave(0)
            if self.abandon and self._is_too_long():
                self._close_gate()

    def _hear(self, number: int) -> None:
        if self._is_handed_on:
            return
        if number == signal.SIGUSR1 and not self.usr1_stops:
            self.save_asked = True
            self.say("SIGUSR1: saving after this step")
        elif number in (*ASKING, signal.SIGUSR1):
            if not self.came_here:
                self.came_here = True
                self._tell_of_launcher(number)
            if not self.number:
                self.ask(number)
            elif time.monotonic() - self._asked_at > SAME_S:
                self.say(f"{signal.Signals(number).name} again: leaving now; the last checkpoint is as it was saved")
                leave(128 + number)

    def _look_at_others(self) -> None:
        if self._has_launcher and os.getppid() != self._parent:  # gone, and with it the store
            self._has_launcher, self.is_orphan = False, True
            self._tell(f"launcher/{self._machine}", "")
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):  # it was this launcher's store
                self._store = None
            if not self.number:
                self.ask(signal.SIGTERM)
        if self._store is None:
            return
        try:
            if not self.number and self._store.check(["stop"]):
                self.ask(int(self._store.get("stop")))
            if self.number:
                ending = [n for n in range(self._machines) if self._store.check([f"launcher/{n}"])]
                self.is_elsewhere = bool(ending) and self._machine not in ending
            if self.abandon and not self.is_abandoning and self._store.check(["abandon"]):
                self._follow(int(self._store.get("abandon")))
        except (DistError, RuntimeError):  # the store's machine is gone
            self._store = None

    def _tell_of_launcher(self, number: int) -> None:
        """A signal that has come to all ranks of a machine has come to its launcher; SIGUSR1 comes to ranks alone."""
        if self._store is None or number not in ASKING:
            return
        try:
            if self._store.add(f"heard/{self._machine}", 1) == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
                self._store.set(f"launcher/{self._machine}", "")
        except (DistError, RuntimeError):
            self._store = None

    def _is_too_long(self) -> bool:
        if self._store is None or self.is_orphan:  # the others may not hear of it, and no launcher ends this process
            return False
        since = time.monotonic() - self._asked_at
        return since > self.stop_seconds or self.left_s() > self.stop_seconds - since

    def _close_gate(self) -> None:
        with self._gate:
            if not self._is_open:
                return
            self._is_closed = True
        self._tell("abandon", str(self.gates_passed))
        self._abandon()

    def _follow(self, gate: int) -> None:
        """Another rank has closed the gate behind number `gate`, which this rank will pass if it has not."""
        with self._gate:
            if self.gates_passed < gate:
                return  # to be looked at again
            self._is_closed = True
        self._abandon()

    def _abandon(self) -> None:
        assert self.abandon is not None
        self.is_abandoning = True
        threading.Thread(target=self.abandon, name="abandon", daemon=True).start()  # signals are heard meanwhile

    def _tell(self, key: str, value: str) -> None:
        if self._store is None:
            return
        try:
            self._store.set(key, value)
        except (DistError, RuntimeError):
            self._store = None


def leave(code: int) -> None:
    """Ends this process now, whatever its threads are doing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def say_after_launcher(message: str) -> None:
    """Prints a line once the launcher of this process has ended: torchrun prints a long trace when a signal ends it."""
    _after_launcher(60, 'printf "%s\\n" "$1"', message)


def end_stuck_launcher(seconds: float) -> None:
    """Kills the torchrun of this process unless it ends within so many seconds, or has started ranks again.

    What it waits for, a store that does not answer, keeps it from hearing signals.
    """
    has_ranks = (
        'for rank in $(cat "/proc/$0/task/$0/children"); do grep -qs "^State:.*Z" "/proc/$rank/status" || exit; done'
    )
    if LAUNCHER > 1 and os.getppid() == LAUNCHER:
        _after_launcher(seconds, f'{has_ranks}; kill -9 "$0" 2>/dev/null', "")


def _after_launcher(seconds: float, command: str, word: str) -> None:
    """A shell's command once the launcher has ended, which is process $0, or after so many seconds; `word` is $1."""
    is_there = 'kill -0 "$0" 2>/dev/null && ! grep -qs "^State:.*Z" "/proc/$0/status"'  # nor a zombie
    wait = f"n=0; while {is_there} && [ $n -lt {10 * seconds:.0f} ]; do sleep 0.1; n=$((n+1)); done; {command}"
    with contextlib.suppress(OSError):
        subprocess.Popen(["/bin/sh", "-c", wait, str(os.getppid()), word], start_new_session=True)


def end_with_parent() -> None:
    """Asks the kernel for SIGTERM when the launcher of this process ends: a rank without torchrun is unwatched."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):  # not Linux
        return
    if os.getppid() != parent:  # it has ended before
        os.kill(os.getpid(), signal.SIGTERM)
