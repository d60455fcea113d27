"""What a run shows: the console, `metrics.jsonl`, wandb; and the units of work (MFU).

wandb is fed from a thread of its own: a server that does not answer can neither stop nor slow the run, and
`metrics.jsonl` has every number anyway.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longctx.config import LoggingConfig, WandbMode

# dense bfloat16 TFLOP/s of one device without sparsity, by a part of its name, from the makers' data sheets
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "A100": 311.9, "L40S": 362.1,
    "RTX 4090": 165.2, "MI300X": 1307.4,
}  # fmt: skip


def peak_tflops(device: torch.device, given: float | None) -> float | None:
    """The rate MFU is a share of: the one given, else that of the device's data sheet, else None."""
    if given is not None or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class Metrics:
    """Collects the numbers of each step on rank 0; on the other ranks it does nothing."""

    def __init__(
        self, logging: LoggingConfig, folder: Path, name: str, as_written: str, start: int, steps: int, is_main: bool
    ) -> None:
        self.is_main, self.steps = is_main, steps
        if not is_main:
            return
        self.path = folder / "metrics.jsonl"
        self.history = History(folder / "history.json", self._last_step(), start)
        self._forget_steps_after(start)
        self.file = self.path.open("a")
        self.wandb = None
        if logging.wandb != WandbMode.disabled:
            self.wandb = WandbThread(logging, folder, name, as_written)
        self.bar = tqdm(total=steps, initial=start, unit="step", leave=False) if sys.stderr.isatty() else None

    def _last_step(self) -> int | None:
        """The last step that an earlier start of the run has logged."""
        rows = read_metrics(self.path) if self.path.exists() else []
        return max((int(row["step"]) for row in rows), default=None)

    def _forget_steps_after(self, start: int) -> None:
        """Drops lines of steps that a resumed run will take again; a file of a run that starts anew is kept aside."""
        if not self.path.exists():
            return
        if start == 0:
            self.path.rename(self.path.with_suffix(f".{time.time_ns()}.jsonl"))
            return
        lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= start]
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(line + "\n" for line in lines))
        beside.replace(self.path)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes the numbers of one step; `step` counts from 1. A disk that takes no more does not end the run."""
        if not self.is_main:
            return
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            self.say(f"{self.path}: step {step} not written: {error}")
        if self.wandb:
            self.wandb.log(step, values)

    def show(self, step: int, values: dict[str, float]) -> None:
        """The console line of a step."""
        if not self.is_main:
            return
        self.say(console_line(step, self.steps, values))
        if self.bar:
            self.bar.update(step - self.bar.n)

    def say(self, message: str) -> None:
        """Prints on rank 0 without disturbing the progress bar."""
        if self.is_main:
            tqdm.write(message) if self.bar else print(message, flush=True)

    def close(self) -> None:
        if not self.is_main:
            return
        if self.bar:
            self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.close()


class History:
    """How often a run was started, and what that cost; kept in a file beside its metrics."""

    def __init__(self, path: Path, last_step: int | None, start: int) -> None:
        """A start at step `start`, after one that had logged `last_step`; None: this is the first."""
        self.started_at, self.restarts, self.lost_steps = time.time(), 0, 0
        if last_step is not None:
            earlier = _read_history(path)
            self.started_at = earlier.get("started_at", self.started_at)
            self.restarts = int(earlier.get("restarts", 0)) + 1
            self.lost_steps = int(earlier.get("lost_steps", 0)) + max(0, last_step - start)
        beside = path.with_suffix(".tmp")
        facts = {"started_at": self.started_at, "restarts": self.restarts, "lost_steps": self.lost_steps}
        beside.write_text(json.dumps(facts) + "\n")
        beside.replace(path)

    def values(self, trained_s: float) -> dict[str, float]:
        """`trained_s`: seconds of all steps up to now that counted, those before a restart included.

        `run/ettr` (effective training time ratio, Kokolis et al. 2024): their share of the time since the first start.
        """
        since_start = max(time.time() - self.started_at, 1e-9)
        return {
            "run/ettr": min(1.0, trained_s / since_start),
            "run/restarts": self.restarts,
            "run/lost_steps": self.lost_steps,
        }


def _read_history(path: Path) -> dict[str, float]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < float("inf")]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def console_line(step: int, steps: int, values: dict[str, float]) -> str:
    """`step 12/200  loss 5.432  norm 0.81  12,345 tokens/s/GPU  MFU 41.2 %  3.1 GiB  0:42 left`"""
    parts = [f"step {step}/{steps}", f"loss {values['loss/train']:.4f}", f"norm {values['optim/grad_norm']:.3f}"]
    parts.append(f"{values['perf/tokens_per_s_per_gpu']:,.0f} tokens/s/GPU")
    if "perf/mfu" in values:
        parts.append(f"MFU {100 * values['perf/mfu']:.1f} %")
    if values.get("mem/peak_alloc_gib"):
        parts.append(f"{values['mem/peak_alloc_gib']:.1f} GiB")
    left = round(values["time/left_s"])
    parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    return "  ".join(parts)


class WandbThread:
    """Starts wandb and hands it the metrics, all in a background thread."""

    def __init__(self, logging: LoggingConfig, folder: Path, name: str, as_written: str) -> None:
        self.timeout_seconds, self.folder = logging.wandb_timeout_seconds, folder
        self.mode: Any = str(logging.wandb)
        if logging.wandb == WandbMode.auto:
            self.mode = "online" if has_wandb_key() else "offline"
        self.queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self.problem: str | None = None
        arguments = (logging.wandb_project, folder, name, as_written)
        self.thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self.thread.start()

    def _run(self, project: str, folder: Path, name: str, as_written: str) -> None:
        try:
            import wandb

            settings = wandb.Settings(
                init_timeout=self.timeout_seconds, silent=True, console="off", x_disable_stats=True
            )
            run: Any = wandb.init(
                project=project, name=name, id=_run_id(folder), resume="allow", dir=str(folder), mode=self.mode,
                settings=settings,
            )  # fmt: skip
            run.config.update({"configuration": as_written}, allow_val_change=True)
            while (item := self.queue.get()) is not None:
                run.log(item[1], step=item[0])
            run.finish()
        except Exception as error:  # whatever happens to wandb must not happen to the run
            self.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"

    def log(self, step: int, values: dict[str, float]) -> None:
        self.queue.put((step, values))

    def close(self) -> None:
        """Waits for wandb for a bounded time and says so if it did not finish."""
        self.queue.put(None)
        self.thread.join(self.timeout_seconds)
        if self.thread.is_alive():
            self.problem = f"no answer within {self.timeout_seconds} s"
        if self.problem:
            print(
                f"wandb ({self.mode}): {self.problem}; every number is in {self.folder / 'metrics.jsonl'}", flush=True
            )


def _run_id(folder: Path) -> str:
    """One wandb run for a run folder, however often it resumes."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(f"{time.time_ns():x}")
    return path.read_text()


def has_wandb_key() -> bool:
    """Whether wandb would find an API key: in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.exists() and "api.wandb.ai" in netrc.read_text(errors="ignore")
