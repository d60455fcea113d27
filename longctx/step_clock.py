"""Seconds that the parts of a step take on this rank's device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """On a GPU by events in the stream of the step, which nobody waits for; on a CPU by its clock."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []  # events, or seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs within to `name`."""
        begun = self._now()
        yield
        self.spans.append((name, begun, self._now()))

    def take_seconds(self) -> dict[str, float]:
        """Seconds by name since the last call; the device must have finished."""
        seconds: dict[str, float] = {}
        for name, begun, ended in self.spans:
            span = begun.elapsed_time(ended) / 1e3 if self.is_gpu else ended - begun
            seconds[name] = seconds.get(name, 0.0) + span
        self.spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
