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
    table = found.key_averages().table(sort_by=column, row_limit=40, max_name_column_width=100)
    file = folder / f"trace_step_{step}"
    try:
        found.export_chrome_trace(f"{file}.json.gz")
        file.with_suffix(".txt").write_text(table)
    except OSError as error:  # a run does not end for it
        print(f"{file}: not written: {error}", flush=True)
