"""What a run shows: the console, `metrics.jsonl`, and W&B."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tqdm import tqdm

from longctx.console import say
from longctx.files import replace_file
from longctx.metrics_file import is_number, read_row
from longctx.run_info import COMPLETE, Ending, RunInfo
from longctx.run_record import RunRecord
from longctx.summary import Mean
from longctx.wandb_log import WandbThread, forget_run_id, wandb_mode

SILENCE_S = 60  # inside a step, after which its progress is printed
STEPS_OF_P95, STEPS_OF_MEDIAN = 100, 500
SLOW_STEPS = 3  # in a row, of which an alert tells
MEANS_OF_A_LINE = {"perf/tokens_per_s", "perf/mfu"}
KEPT_S = 10  # after which the count of steps is written again


class Metrics:
    """Collects the numbers of each step on rank 0; on the other ranks it does nothing."""

    def __init__(
        self, run: RunInfo, facts: dict[str, Any], start: int, is_main: bool, is_branching: bool = False
    ) -> None:
        """`facts`: see `run_facts.collect`; `start`: the step from which the run goes on; `is_branching`: from a
        checkpoint of another run."""
        steps = run.config.optim.steps
        self.is_main, self.steps, self.logging = is_main, steps, run.config.logging
        self.wandb: WandbThread | None = None
        if not is_main:
            return
        is_on_gpus = facts["device"] != "CPU"  # ranks on CPUs share one machine, whose speed is that of all
        self.devices, self.unit = (facts["ranks"], "tokens/s/GPU") if is_on_gpus else (1, "tokens/s")
        self.path = run.metrics_file
        has_steps = start < run.config.optim.steps
        self.record = RunRecord(run, facts)
        was_complete, is_changed = self.record.was_complete(), self.record.is_changed()
        is_anew = start == 0 or (is_branching and not self.record.is_same_branch())
        last_step, is_another = self._last_step(), is_anew and (was_complete or is_changed)
        if is_another:  # of the same name
            _set_aside(run.folder / "history.json")
            last_step = None
        self.history = History(run.folder / "history.json", last_step, start, has_steps, run.started_at)
        self._forget_steps_after(start, is_anew, is_changed)
        self.file = self.path.open("a")
        self.shown_at = time.monotonic()
        self.unwritten: tuple[int, dict[str, float]] | None = None  # the last step
        self.since_line: dict[str, Mean] = {}  # over the steps since the last line of the console
        self.step_seconds: deque[float] = deque(maxlen=STEPS_OF_P95)
        self.speeds: deque[float] = deque(maxlen=STEPS_OF_MEDIAN)
        self.slow_steps = 0  # in a row
        self.span: float | None = None  # of attention, by the curriculum
        is_seen = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, unit="step", leave=False) if is_seen else None
        if is_another or (is_branching and is_anew) or (self.history.logged > start and is_changed):
            forget_run_id(run.folder)  # else W&B would show the steps to come as they were before
            self.history.forget_steps_after(start)
        if start < steps:
            self.record.begin()
        else:
            self.record.go_on()
        mode = wandb_mode(self.logging)
        if mode != "disabled" and (has_steps or not was_complete):  # one that is started again has told all
            shown = self.record.record["configuration"] | {"run": facts}
            self.wandb = WandbThread(run, mode, shown, self.say)

    def _last_step(self) -> int | None:
        """The last step that an earlier start of the run has logged; lines that cannot be read are set aside."""
        if not self.path.exists():
            return None
        rows = [(line, read_row(line)) for line in self.path.read_bytes().split(b"\n") if line]
        if unread := [line for line, row in rows if row is None]:
            beside = _aside(self.path)
            beside.write_bytes(b"\n".join(unread) + b"\n")
            replace_file(self.path, b"".join(line + b"\n" for line, row in rows if row is not None))
            say(f"{self.path}: {len(unread)} lines cannot be read; they are in {beside} now")
        return max((int(row["step"]) for _, row in rows if row is not None), default=None)

    def _forget_steps_after(self, start: int, is_anew: bool, is_changed: bool) -> None:
        """Drops lines of steps that a resumed run will take again.

        Those of a run that starts anew, or trains otherwise from here on, are kept aside, and so are its timelines.
        """
        for trace in self.path.parent.glob("trace_step_*"):
            step = re.fullmatch(r"trace_step_(\d+)\.(json\.gz|txt)", trace.name)
            if step and (is_anew or (is_changed and int(step[1]) > start)):
                _set_aside(trace)
        if not self.path.exists():
            return
        if is_anew:
            _set_aside(self.path)
            return
        content = self.path.read_bytes()
        lines = [line for line in content.split(b"\n") if line]
        kept = [line for line in lines if (row := read_row(line)) is not None and row["step"] <= start]
        if is_changed and len(kept) < len(lines):
            _beside(self.path).write_bytes(content)
        replace_file(self.path, b"".join(line + b"\n" for line in kept))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes the numbers of one step; `step` counts from 1. A disk that takes no more does not end the run.

        What is not finite is written as null: NaN is no JSON.
        """
        if not self.is_main:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        try:
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()
        except OSError as error:
            self.say(f"{self.path}: step {step} not written: {error}")
        if self.wandb:
            self.wandb.log(step, values)

    def log_step(self, step: int, values: dict[str, float], is_due: bool) -> None:
        """The numbers of every step; those that are due are written, and shown as a line of the console.

        Speed and MFU of a line of the console are the means since the line before.
        """
        if not self.is_main:
            return
        self.history.take(step)
        speed, seconds = values["perf/tokens_per_s"], values["perf/step_s"]
        for key in MEANS_OF_A_LINE & values.keys():
            self.since_line.setdefault(key, Mean()).add(values[key], seconds)
        self.step_seconds.append(seconds)
        self._look_at_speed(step, speed, values.get("data/span"))
        if self.bar:
            self.bar.set_postfix_str("", refresh=False)
            self.bar.update(step - self.bar.n)
        self.unwritten = step, values
        if not is_due:
            return
        self.log_last_step()
        means = {key: mean.value for key, mean in self.since_line.items()}
        self.since_line = {}
        speed = means["perf/tokens_per_s"] / self.devices
        self.say(console_line(step, self.steps, values | means, speed, self.unit))

    def log_last_step(self) -> None:
        """Writes the numbers of the last step, unless they are written: it is due, or the run ends. On rank 0."""
        if self.unwritten:
            step, values = self.unwritten
            self.log(step, values | {"perf/step_s_p95": percentile_95(self.step_seconds)})
            self.unwritten = None

    def _look_at_speed(self, step: int, speed: float, span: float | None) -> None:
        """Alerts, once, of a run that has become slow: below a share of its own median several steps in a row.

        Where the span of attention changes, speeds of before are no measure.
        """
        if span != self.span:
            self.span = span
            self.speeds.clear()
        self.speeds.append(speed)
        if not self.logging.alerts:
            return
        usual = median(self.speeds)
        self.slow_steps = self.slow_steps + 1 if speed < self.logging.alert_below * usual else 0
        if self.slow_steps == SLOW_STEPS:
            self.alert("slow", f"{speed:,.0f} tokens/s at step {step}, where the median is {usual:,.0f}")

    def alert(self, title: str, text: str) -> None:
        """A message of W&B to those who follow the run, if `logging.alerts` asks for them."""
        if self.wandb and self.logging.alerts:
            self.wandb.alert(title, text)

    def show_progress(self, step: int, done: int, parts: int) -> None:
        """Inside a step: its micro-batches, in the bar, or as a line if nothing was printed for a while."""
        if not self.is_main or done == parts:
            return
        if self.bar:
            self.bar.set_postfix_str(f"step {step}: micro-batch {done} of {parts}")
        elif time.monotonic() - self.shown_at > SILENCE_S:
            self.say(f"step {step}: micro-batch {done} of {parts} done")

    def say(self, message: str) -> None:
        """Prints on rank 0 without disturbing the progress bar."""
        if not self.is_main:
            return
        self.shown_at = time.monotonic()
        if not self.bar:
            say(message)
            return
        with self.bar.external_write_mode():
            say(message)

    def attach(self, step: int, report: Path | None, samples: list[tuple[str, str]]) -> None:
        """Hands W&B what there is to be seen beside numbers after a step, and says where it is. On rank 0."""
        if self.wandb:
            self.wandb.attach(step, report, samples, sorted(self.path.parent.glob("trace_step_*.json.gz")))
            self.say(f"wandb: {self.wandb.how_to_see_it()}")

    def record_end(self, ending: Ending) -> None:
        """Writes into `run.json` how the run ends. On rank 0."""
        where = {"wandb": self.wandb.how_to_see_it()} if self.wandb else {}
        try:
            self.record.end(ending.words, where)
        except OSError as error:
            self.say(f"{self.record.path}: not written: {error}")

    def close(self, ending: Ending = COMPLETE, seconds: float | None = None) -> None:
        """`seconds`: the most that is waited for W&B; None: `logging.wandb_timeout_seconds`."""
        if not self.is_main:
            return
        if self.bar:
            self.bar.close()
        self.log_last_step()
        try:
            self.file.close()
        except OSError as error:  # what could not be written before
            say(f"{self.path}: {error}")
        try:
            self.history.write()
        except OSError as error:
            say(f"{self.history.path}: not written: {error}")
        self.record_end(ending)
        if ending.exit_code == 1:
            self.alert("failed", ending.words)
        if self.wandb:
            where = self.wandb.how_to_see_it()
            self.wandb.close(ending, seconds)
            if self.wandb.how_to_see_it() != where:  # of a short run it was not there yet
                self.record_end(ending)


class History:
    """How often a run was started, and what that cost; kept in a file beside its metrics."""

    def __init__(self, path: Path, last_step: int | None, start: int, has_steps: bool, started_at: float) -> None:
        """A start at step `start`, after one that had logged `last_step`; None: there was none, or it logged nothing.

        `has_steps`: there are some to take; a complete run that is started once more was not started again.
        """
        self.path, self.started_at, self.restarts, self.lost_steps = path, started_at, 0, 0
        self.start = self.taken = start  # the last step taken, also where no line was logged of it
        self.logged = 0  # the last step that W&B has seen
        earlier = _read_history(path)
        if earlier or last_step is not None:
            last_step = last_step or 0
            taken = max(last_step, int(earlier.get("taken", 0)))
            self.started_at = earlier.get("started_at", self.started_at)
            self.restarts = int(earlier.get("restarts", 0)) + has_steps
            self.lost_steps = int(earlier.get("lost_steps", 0)) + max(0, taken - start)
            self.logged = max(last_step, int(earlier.get("logged", 0)))
        self.write()

    def take(self, step: int) -> None:
        """Counts a step; a process that is killed loses the count of the last seconds alone."""
        self.taken = step
        if time.monotonic() - self.written_at > KEPT_S:
            with suppress(OSError):  # said when the run ends
                self.write()

    def write(self) -> None:
        """Keeps what the next start has to know."""
        self.written_at = time.monotonic()
        names = "started_at", "restarts", "lost_steps", "logged", "taken"
        replace_file(self.path, json.dumps({name: getattr(self, name) for name in names}).encode() + b"\n")

    def forget_steps_after(self, start: int) -> None:
        """What is logged from here on goes to another run of W&B, which has seen nothing later than `start`."""
        self.logged = start
        self.write()

    def values(self, trained_s: float) -> dict[str, float]:
        """`trained_s`: seconds of all steps up to now that counted, those before a restart included.

        `run/ettr` (effective training time ratio, Kokolis et al. 2024): their share of the time since the first start.
        """
        since_start = max(time.time() - self.started_at, 1e-9)
        return {
            "run/ettr": min(1.0, trained_s / since_start),
            "run/restarts": self.restarts,
            "run/lost_steps": self.lost_steps,
            "run/start_step": self.start,
        }


def _read_history(path: Path) -> dict[str, float]:
    """What the file holds; one that holds something else is set aside."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and all(is_number(value) for value in found.values()):
        return found
    beside = _aside(path)
    path.rename(beside)
    say(f"{path}: holds no history of a run; it is {beside} now, and restarts are counted anew")
    return {}


def _set_aside(path: Path) -> None:
    """Keeps a file of an earlier run of the same name under another one."""
    if path.exists():
        path.rename(_beside(path))


def _beside(path: Path) -> Path:
    """A name for what a file of this name held before."""
    return path.with_suffix(f".{time.time_ns()}{path.suffix}")


def _aside(path: Path) -> Path:
    """A name for what cannot be read of a file."""
    return path.with_name(f"{path.stem}.unreadable-{time.time_ns()}{path.suffix}")


def percentile_95(values: Sequence[float]) -> float:
    """The value that 95 % are at most, interpolated; of a single one itself."""
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def console_line(step: int, steps: int, values: dict[str, float], speed: float, unit: str) -> str:
    """`step 12/200  loss 5.432  norm 0.81  lr 3.0e-04  12,345 tokens/s/GPU  MFU 41.2 %  3.1 GiB  0:42 left`

    `speed` in `unit`: tokens/s a GPU.
    """
    parts = [f"step {step}/{steps}", f"loss {values['loss/train']:.4f}", f"norm {values['optim/grad_norm']:.3f}"]
    parts += [f"lr {values['optim/lr']:.1e}", f"{speed:,.0f} {unit}"]
    if "perf/mfu" in values:
        parts.append(f"MFU {100 * values['perf/mfu']:.1f} %")
    if values.get("mem/peak_alloc_gib"):
        parts.append(f"{values['mem/peak_alloc_gib']:.1f} GiB")
    left = round(values["time/left_s"])
    parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    return "  ".join(parts)
