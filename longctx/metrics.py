"""What a run shows: the console, `metrics.jsonl`, wandb; and the units of work (MFU).

wandb is fed from a thread of its own: a server that does not answer can neither stop nor slow the run, and
`metrics.jsonl` has every number anyway.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import math
import netrc
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from tqdm import tqdm

from longctx.config import LoggingConfig, WandbMode
from longctx.console import say
from longctx.run_info import RunInfo

SILENCE_S = 60  # inside a step, after which its progress is printed

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

    def __init__(self, run: RunInfo, start: int, is_main: bool) -> None:
        """`start`: the step from which the run goes on."""
        logging, steps = run.config.logging, run.config.optim.steps
        self.is_main, self.steps = is_main, steps
        if not is_main:
            return
        self.path = run.metrics_file
        self.history = History(run.folder / "history.json", self._last_step(), start)
        self._forget_steps_after(start)
        self.file = self.path.open("a")
        self.shown_at = time.monotonic()
        self.wandb = None
        mode = wandb_mode(logging)
        if mode != "disabled":
            self.wandb = WandbThread(logging, mode, run.folder, run.config.name, run.config_yaml)
        is_seen = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, unit="step", leave=False) if is_seen else None

    def _last_step(self) -> int | None:
        """The last step that an earlier start of the run has logged; lines that cannot be read are set aside."""
        if not self.path.exists():
            return None
        rows = [(line, _row(line)) for line in self.path.read_bytes().split(b"\n") if line]
        if unread := [line for line, row in rows if row is None]:
            beside = _aside(self.path)
            beside.write_bytes(b"\n".join(unread) + b"\n")
            _replace(self.path, b"".join(line + b"\n" for line, row in rows if row is not None))
            say(f"{self.path}: {len(unread)} lines cannot be read; they are in {beside} now")
        return max((int(row["step"]) for _, row in rows if row is not None), default=None)

    def _forget_steps_after(self, start: int) -> None:
        """Drops lines of steps that a resumed run will take again; a file of a run that starts anew is kept aside."""
        if not self.path.exists():
            return
        if start == 0:
            self.path.rename(self.path.with_suffix(f".{time.time_ns()}.jsonl"))
            return
        lines = self.path.read_bytes().split(b"\n")
        kept = [line for line in lines if (row := _row(line)) is not None and row["step"] <= start]
        _replace(self.path, b"".join(line + b"\n" for line in kept))

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

    def show(self, step: int, values: dict[str, float]) -> None:
        """The console line of a step."""
        if not self.is_main:
            return
        self.say(console_line(step, self.steps, values))
        if self.bar:
            self.bar.update(step - self.bar.n)

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

    def close(self, exit_code: int = 0, seconds: float | None = None) -> None:
        """`exit_code`: what wandb is told, 1 for a run that has failed; `seconds`: the most that is waited for it."""
        if not self.is_main:
            return
        if self.bar:
            self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.close(exit_code, seconds)


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
        facts = {"started_at": self.started_at, "restarts": self.restarts, "lost_steps": self.lost_steps}
        _replace(path, json.dumps(facts).encode() + b"\n")

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
    """What the file holds; one that holds something else is set aside."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and all(_is_number(value) for value in found.values()):
        return found
    beside = _aside(path)
    path.rename(beside)
    say(f"{path}: holds no history of a run; it is {beside} now, and restarts are counted anew")
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _aside(path: Path) -> Path:
    """A name for what cannot be read of a file."""
    return path.with_name(f"{path.stem}.unreadable-{time.time_ns()}{path.suffix}")


def _replace(path: Path, content: bytes) -> None:
    """Gives a file another content, at once or not at all."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(content)
    beside.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, with NaN for what is not a number; lines that cannot be read are left out."""
    rows = (_row(line) for line in path.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not _is_number(row.get("step")):
        return None
    return {key: math.nan if value is None else value for key, value in row.items()}


def is_validated(path: Path, step: int) -> bool:
    """Whether a `metrics.jsonl` has the validation after `step`."""
    rows = read_metrics(path) if path.exists() else []
    return any(row["step"] == step and "loss/val" in row for row in rows)


def last_validation_loss(path: Path) -> float:
    """Of the last validation that a `metrics.jsonl` has; NaN if it has none."""
    rows = read_metrics(path) if path.exists() else []
    return next((row["loss/val"] for row in reversed(rows) if "loss/val" in row), math.nan)


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

    def __init__(self, logging: LoggingConfig, mode: str, folder: Path, name: str, config_yaml: str) -> None:
        self.timeout_seconds, self.folder, self.exit_code = logging.wandb_timeout_seconds, folder, 0
        self.mode: Any = mode
        self.queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self.problem: str | None = None
        project = logging.wandb_project or os.environ.get("WANDB_PROJECT") or "longctx"
        # wandb keeps an offline run a folder; of two with one id the server keeps the steps of the last, so it has all
        earlier = read_metrics(folder / "metrics.jsonl") if mode == "offline" else []
        arguments = (project, folder, name, config_yaml, earlier)
        self.thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self.thread.start()

    def _run(self, project: str, folder: Path, name: str, config_yaml: str, earlier: list[dict[str, Any]]) -> None:
        try:
            import wandb

            settings = wandb.Settings(
                init_timeout=self.timeout_seconds, silent=True, console="off", x_disable_stats=True
            )
            run: Any = wandb.init(
                project=project, name=name, id=_run_id(folder), resume="allow", dir=str(folder), mode=self.mode,
                settings=settings,
            )  # fmt: skip
            run.config.update({"configuration": config_yaml}, allow_val_change=True)
            for row in earlier:
                run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))
            while (item := self.queue.get()) is not None:
                run.log(item[1], step=item[0])
            run.finish(exit_code=self.exit_code)
        except Exception as error:  # whatever happens to wandb must not happen to the run
            self.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"

    def log(self, step: int, values: dict[str, float]) -> None:
        self.queue.put((step, values))

    def close(self, exit_code: int = 0, seconds: float | None = None) -> None:
        """Waits for wandb for a bounded time and says so if it did not finish."""
        self.exit_code = exit_code
        self.queue.put(None)
        seconds = self.timeout_seconds if seconds is None else seconds
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.problem = f"no answer within {seconds} s"
        if self.problem:
            say(f"wandb ({self.mode}): {self.problem}; every number is in {self.folder / 'metrics.jsonl'}")


def _run_id(folder: Path) -> str:
    """One wandb run for a run folder, however often it resumes."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(f"{time.time_ns():x}")
    return path.read_text()


def wandb_mode(logging: LoggingConfig) -> str:
    """`online`, `offline` or `disabled`: as configured, else as wandb's own variables say, else by the key."""
    if logging.wandb != WandbMode.auto:
        return str(logging.wandb)
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on", "t", "y"):
        return "disabled"
    asked = {"run": "online", "dryrun": "offline"}.get(mode := os.environ.get("WANDB_MODE", "").lower(), mode)
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Whether wandb would find an API key: in the environment, or in the netrc file for its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        found = netrc.netrc(path).authenticators(urlparse(_wandb_server()).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None


def _wandb_server() -> str:
    """The server that wandb talks to: of its variable, of the settings that `wandb login --host` writes, or its own."""
    if given := os.environ.get("WANDB_BASE_URL"):
        return given
    settings = configparser.ConfigParser()
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    with contextlib.suppress(configparser.Error):
        settings.read(Path(folder).expanduser() / "settings")
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")
