"""Seconds that the parts of a step take on this rank's device, and what it waits for others in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PASSES = ("forward", "backward")
WAITS = ("context_exposed", "fsdp_exposed")  # within the passes
PARTS = (*PASSES, "optimizer", *WAITS)


class StepClock:
    """On a GPU by events in the stream of the step, which nobody waits for; on a CPU by its clock."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Begins a step: what was counted before belongs to none."""
        self.spans: list[tuple[str, Any, Any]] = []  # events, or seconds, that are not in `summed` yet
        self.summed: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs within to `name`, one of `PARTS`."""
        begun = self._now()
        yield
        self.spans.append((name, begun, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the start of the step; the device must have finished them."""
        for name, begun, ended in self.spans:
            self.summed[name] += begun.elapsed_time(ended) / 1e3 if self.is_gpu else ended - begun
        self.spans.clear()
        return dict(self.summed)

    def busy_s(self) -> float:
        """Seconds of the passes so far without what they waited for others."""
        seconds = self.seconds()
        return sum(seconds[part] for part in PASSES) - sum(seconds[wait] for wait in WAITS)

    def _now(self) -> Any:
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
