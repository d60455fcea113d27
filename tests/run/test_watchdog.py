"""The watchdog by a clock that the test sets: no time passes."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from longctx import watchdog as module
from longctx.machine import this_machine
from longctx.watchdog import Watchdog


class Clock:
    """Stands until it is set; who waits for it waits for the end."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float, ended: threading.Event) -> bool:
        return ended.wait() if threading.current_thread() is not threading.main_thread() else False


class Store(TCPStore):
    """Has what was set when `set` returns: torch's does not wait, and may serve another client's question first."""

    def set(self, key: str, value: str) -> None:
        super().set(key, value)
        self.get(key)


@pytest.fixture
def store(monkeypatch):
    store = Store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


@pytest.fixture
def watchdog(store, monkeypatch):
    """Rank 0 of two, and what it was about to end the job for."""
    made = Watchdog(rank=0, size=2, timeout_seconds=600, name="a", clock=Clock())
    made.ends = []
    monkeypatch.setattr(made, "_end", lambda sign, silent_s: made.ends.append((sign, silent_s)))
    yield made
    made.stop()


def test_a_rank_beats_at_once(store):
    """So that one which stops before its first period is missed, and before the collectives of others time out."""
    made = Watchdog(rank=1, size=2, timeout_seconds=600, name="a", clock=Clock())
    assert made.store is not None
    assert store.get("longctx/alive/a/1").decode().split()[0::2] == ["0", str(os.getpid())]
    assert (made.period_s, made.silence_s) == (5, 580)
    made.stop()
    assert made.store.get("1") == b"left"


def test_a_store_that_no_longer_answers_keeps_nobody(store):
    """A link that is cut: the run that ends waits a period for its watchdog and no longer."""
    made = Watchdog(rank=0, size=2, timeout_seconds=2, name="a", clock=Clock())
    answer = threading.Event()
    made.store = SimpleNamespace(set=lambda *_: answer.wait())
    began = time.monotonic()
    made.stop()
    assert made.thread.is_alive()
    assert time.monotonic() - began < 5
    answer.set()
    made.thread.join(5)
    assert not made.thread.is_alive()


def test_a_rank_that_beats_is_not_missed(store, watchdog):
    for number in range(400):
        store.set("longctx/alive/a/1", f"{number} {this_machine()} 77")
        watchdog.heartbeat = lambda number=number: (number,)
        watchdog.clock.now += 5
        watchdog.look()
    assert watchdog.ends == []


def test_a_rank_that_no_longer_beats_ends_the_job(store, watchdog):
    sign = f"3 {this_machine()} 77"
    store.set("longctx/alive/a/1", sign)
    for number in range(117):
        watchdog.heartbeat = lambda number=number: (number,)
        watchdog.look()
        watchdog.clock.now += 5
        assert watchdog.ends == []
    watchdog.look()
    assert watchdog.ends == [(sign, 585.0)]


def test_a_store_that_does_not_answer_ends_the_rank(store, watchdog, monkeypatch):
    """The link to its machine is cut: `look` stands still in a call of the store, another thread notices."""
    ends = []
    monkeypatch.setattr(watchdog, "_end_alone", ends.append)
    watchdog.look()
    watchdog.clock.now += 580
    watchdog.look_for_answers()
    assert ends == []
    watchdog.clock.now += 5
    watchdog.look_for_answers()
    assert ends == [585]
    watchdog.look()
    watchdog.look_for_answers()
    assert ends == [585]


def test_a_job_that_another_rank_has_ended_is_left(store, watchdog, monkeypatch):
    left = []
    monkeypatch.setattr(module, "leave", left.append)
    watchdog.look()
    assert left == []
    store.set(f"longctx/alive/a/{module.ENDED}", "")
    watchdog.look()
    assert left == [1]


def test_a_rank_that_has_left_is_not_missed(store, watchdog):
    store.set("longctx/alive/a/1", module.LEFT)
    for number in range(300):
        watchdog.heartbeat = lambda number=number: (number,)
        watchdog.look()
        watchdog.clock.now += 5
    assert watchdog.ends == []


def test_a_step_may_take_as_long_as_it_is_expected_to(store, watchdog, capsys):
    """One of a million tokens takes longer than any collective may."""
    watchdog.heartbeat, watchdog.expected_s = lambda: (7,), lambda: 1100.0
    for number in range(661):
        store.set("longctx/alive/a/1", f"{number} {this_machine()} 77")
        watchdog.look()
        watchdog.clock.now += 5
    assert capsys.readouterr().err == ""
    store.set("longctx/alive/a/1", f"661 {this_machine()} 77")
    watchdog.look()
    said = "no step for 3305 s (parallel.timeout_seconds=600), and one was expected to take 1100 s\n"
    assert capsys.readouterr().err.startswith(said)


def test_ranks_that_beat_and_make_no_progress_show_where_they_stand(store, watchdog, capsys):
    store.set("longctx/alive/a/stack/1", "  in a loop of its own\n")
    watchdog.heartbeat = lambda: (7,)
    for number in range(117):
        store.set("longctx/alive/a/1", f"{number} {this_machine()} 77")
        watchdog.look()
        watchdog.clock.now += 5
    assert capsys.readouterr().err == ""
    watchdog.look()
    said = capsys.readouterr().err
    assert said.startswith("no step for 585 s (parallel.timeout_seconds=600)\n")
    assert "rank 1:\n  in a loop of its own" in said
    assert "test_watchdog.py" in said  # where this rank stands
    watchdog.heartbeat = lambda: (8,)
    watchdog.clock.now += 5
    watchdog.look()
    assert not store.check(["longctx/alive/a/stack/0"])  # it has got on
    assert watchdog.ends == []
