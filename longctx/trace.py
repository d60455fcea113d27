"""The timeline of a step: what ran when on rank 0's device, for Perfetto or chrome://tracing, and a table of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def traced(folder: Path, step: int, device: torch.device, say: Callable[[str], None]) -> Iterator[None]:
    """Writes `trace_step_<step>.json.gz`, and what took longest as `trace_step_<step>.txt`, of what runs within.

    Where they are is said with `say`.
    """
    is_gpu = device.type == "cuda"
    activity, column = (
        (ProfilerActivity.CUDA, "self_device_time_total") if is_gpu else (ProfilerActivity.CPU, "self_cpu_time_total")
    )
    with profile(activities=[activity]) as found:
        yield
    table = found.key_averages().table(sort_by=column, row_limit=40, max_name_column_width=100)
    file = folder / f"trace_step_{step}"
    try:
        found.export_chrome_trace(f"{file}.json.gz")
        file.with_suffix(".txt").write_text(table)
        say(f"timeline of step {step}: {file}.json.gz (for Perfetto), what took longest: {file}.txt")
    except OSError as error:  # a run does not end for it
        say(f"{file}: not written: {error}")
