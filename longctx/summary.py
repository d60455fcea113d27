"""The figures of a run that count, of the lines of its `metrics.jsonl`: for W&B, the report and comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

WARM_UP_STEPS = 3  # of each start, left out of mean speeds: kernels are compiled there, and caches are empty


def summary(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Best and last validation loss, mean and peak speed, MFU, memory, time; what was never logged is left out.

    Means are over time: the mean of tokens/s is tokens over seconds, of the lines that were logged.
    """
    rows = list(rows)
    steps = [row for row in rows if math.isfinite(row.get("perf/step_s", math.nan))]
    steady = _steady(steps)
    validations = [row for row in rows if math.isfinite(row.get("loss/val", math.nan))]
    found: dict[str, float] = {}
    if validations:
        best, last = min(validations, key=lambda row: row["loss/val"]), validations[-1]
        found |= {"best/loss_val": best["loss/val"], "best/step": best["step"], "last/loss_val": last["loss/val"]}
        if "loss/val_bits_per_byte" in best:
            found["best/bits_per_byte"] = best["loss/val_bits_per_byte"]
            found["last/bits_per_byte"] = last.get("loss/val_bits_per_byte", math.nan)
    if trained := _finite(steps, "loss/train"):
        found["last/loss_train"] = trained[-1]
    for key in ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "mfu_palm", "step_s"):
        if values := _finite(steady, f"perf/{key}"):
            seconds = [row["perf/step_s"] for row in steady if math.isfinite(row.get(f"perf/{key}", math.nan))]
            weights = [1.0] * len(seconds) if key == "step_s" else seconds
            found[f"mean/{key}"] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
            if key != "step_s":
                found[f"peak/{key}"] = max(values)
    for key in ("alloc_gib", "reserved_gib", "of_device"):
        if values := _finite(steps, f"mem/peak_{key}"):
            found[f"peak/mem_{key}"] = max(values)
    for key in ("data/tokens", "run/ettr", "run/restarts", "run/lost_steps", "optim/skipped_steps"):
        if values := _finite(steps, key):
            found[f"last/{key.rpartition('/')[2]}"] = values[-1]
    return found


def _steady(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the first steps of each start; all, if nothing else is left."""
    steady, start = [], 0.0
    for _, of_start in groupby(steps, key=lambda row: row.get("run/restarts", 0.0)):
        rows = list(of_start)
        steady += [row for row in rows if row["step"] > start + WARM_UP_STEPS]
        start = rows[-1]["step"]
    return steady or steps


def _finite(rows: list[dict[str, float]], key: str) -> list[float]:
    return [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
