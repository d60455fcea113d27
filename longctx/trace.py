"""The timeline of a step: what ran when on rank 0's device, for Perfetto or chrome://tracing, and a table of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def traced(folder: Path, step: int, device: torch.device) -> Iterator[None]:
    """Writes `trace_step_<step>.json.gz`, and what took longest as `trace_step_<step>.txt`, of what runs within."""
    is_gpu = device.type == "cuda"
    activity, column = (
        (ProfilerActivity.CUDA, "self_device_time_total") if is_gpu else (ProfilerActivity.CPU, "self_cpu_time_total")
    )
    with profile(activities=[activity]) as found:
        yield
    file = folder / f"trace_step_{step}.json.gz"
    found.export_chrome_trace(str(file))
    table = found.key_averages().table(sort_by=column, row_limit=40, max_name_column_width=100)
    file.with_name(f"trace_step_{step}.txt").write_text(table)
