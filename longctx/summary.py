"""The figures of a run that count, of the lines of its `metrics.jsonl`: for W&B, the report and comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable

WARM_UP_STEPS = 3  # of each start, left out of mean speeds: kernels are compiled there, and caches are empty
SPEEDS = ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "mfu_palm")
PEAKS = ("alloc_gib", "reserved_gib", "of_device")
LAST = (
    "data/tokens", "run/device_s", "run/pflop", "run/ettr", "run/restarts", "run/lost_steps", "optim/skipped_steps",
)  # fmt: skip


class Mean:
    """Over time of a value, with its peak."""

    def __init__(self) -> None:
        self.sum, self.seconds, self.peak = 0.0, 0.0, -math.inf

    def add(self, value: float, seconds: float) -> None:
        self.sum, self.seconds, self.peak = self.sum + value * seconds, self.seconds + seconds, max(self.peak, value)

    @property
    def value(self) -> float:
        return self.sum / self.seconds


class Figures:
    """Takes the lines of a run one after the other; what was never logged has no figure.

    Means are over time: the mean of tokens/s is tokens over seconds, of the lines that were logged.
    """

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.all: dict[str, Mean] = {}
        self.steady: dict[str, Mean] = {}  # without the first steps of each start
        self.steps = {"all": 0, "steady": 0}
        self.restarts, self.start, self.last_step = 0.0, 0.0, 0.0

    def add(self, row: dict[str, float]) -> None:
        """A line of a step or of a validation."""
        is_validation, is_step = "loss/val" in row, "loss/train" in row
        row = {key: value for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
        if is_validation:
            self._add_validation(row)
        if "perf/step_s" in row:
            self._add_step(row)
        if is_step:
            self.found["last/loss_train"] = row.get("loss/train", math.nan)  # a skipped step's was not finite

    def values(self) -> dict[str, float]:
        """The figures by name, see docs/metrics.md."""
        means, kind = (self.steady, "steady") if self.steps["steady"] else (self.all, "all")
        speeds = {f"mean/{key}": mean.value for key, mean in means.items()}
        speeds |= {f"peak/{key}": mean.peak for key, mean in means.items() if key != "step_s"}
        if "mean/step_s" in speeds:
            speeds["mean/step_s"] = means["step_s"].seconds / self.steps[kind]
        return self.found | speeds

    def _add_validation(self, row: dict[str, float]) -> None:
        if "loss/val" not in row:  # it was not finite
            lasts = {"last/loss_val", *({"last/bits_per_byte"} & self.found.keys())}
            self.found |= dict.fromkeys(lasts, math.nan)
            return
        self.found["last/loss_val"] = row["loss/val"]
        is_best = row["loss/val"] < self.found.get("best/loss_val", math.inf)
        if is_best:
            self.found |= {"best/loss_val": row["loss/val"], "best/step": row["step"]}
        if "loss/val_bits_per_byte" in row:
            self.found["last/bits_per_byte"] = row["loss/val_bits_per_byte"]
            if is_best:
                self.found["best/bits_per_byte"] = row["loss/val_bits_per_byte"]

    def _add_step(self, row: dict[str, float]) -> None:
        if not self.steps["all"]:
            self.start = row["step"] - 1  # a branch begins at a later step
        if row.get("run/restarts", 0.0) != self.restarts:
            self.restarts, self.start = row.get("run/restarts", 0.0), self.last_step
        self.last_step = row["step"]
        start = row.get("run/start_step", self.start)  # which lines of earlier versions do not have
        is_steady = row["step"] > start + WARM_UP_STEPS
        for kind, means in (("all", self.all), *([("steady", self.steady)] if is_steady else [])):
            self.steps[kind] += 1
            for key in ("step_s", *SPEEDS):
                if f"perf/{key}" in row:
                    means.setdefault(key, Mean()).add(row[f"perf/{key}"], row["perf/step_s"])
        for key in PEAKS:
            if f"mem/peak_{key}" in row:
                name = f"peak/mem_{key}"
                self.found[name] = max(self.found.get(name, 0.0), row[f"mem/peak_{key}"])
        for key in LAST:
            if key in row:
                self.found[f"last/{key.rpartition('/')[2]}"] = row[key]


def summary(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The figures of all lines."""
    figures = Figures()
    for row in rows:
        figures.add(row)
    return figures.values()
