"""wandb, fed from a thread of its own: a server that does not answer can neither stop nor slow the run.

`metrics.jsonl` has every number anyway. wandb writes all that it is given to a file of its own, too, so what a server
has not taken can be sent later by `wandb sync`.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import math
import netrc
import os
import queue
import shlex
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from longctx.config import LoggingConfig, WandbMode
from longctx.errors import UserError
from longctx.files import replace_file
from longctx.metric_names import BY_OCTAVE, METRICS, octaves
from longctx.metrics_file import read_metrics
from longctx.run_info import COMPLETE, Ending, RunInfo
from longctx.summary import Figures

FINISH_S = 5.0  # what a run may take to end beside waiting for the server
RUN_ID = "wandb_id"  # file in a run's folder
PROBE_S = 5.0  # how long a server may take to answer, when it is asked whether it is there
Action = Callable[[Any], None]  # what is done with wandb's run
CURVES = {  # of a validation, by the prefix of their scalars: title, and what the axes are
    "loss/pos/": ("curves/loss_by_position", "Validation loss by position", "log2 of tokens before the target", "nats"),
    "recall/": ("curves/recall_by_distance", "Recall by distance", "log2 of tokens back", "share recalled"),
}


class WandbThread:
    """Starts wandb and hands it what a run shows, all in a background thread."""

    def __init__(self, run: RunInfo, mode: str, shown: dict[str, Any], say: Callable[[str], None]) -> None:
        """`shown`: what wandb is to know as configuration."""
        self.run, self.logging, self.mode, self.shown, self.say = run, run.config.logging, mode, shown, say
        self.ending = COMPLETE
        # wandb keeps an offline run a folder; of two with one id the server keeps the steps of the last, so it has all
        self.earlier = read_metrics(run.metrics_file)
        self.figures = Figures()
        self.queue: queue.Queue[Action | None] = queue.Queue()
        self.where, self.sync = "", ""  # the run's page, or how to send it there; how to do so in any case
        self.is_left = False  # whether the run has ended without waiting any longer
        self.is_dead = False  # whether wandb has failed, so that nothing is handed to it any more
        self.problem: str | None = None  # that the server has at present, or that wandb has had
        self.asked_at = time.monotonic()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    # called by the run: returns at once -----------------------------------------------------------------------------

    def log(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a step; those by octave become curves."""

        def action(wandb_run: Any) -> None:
            wandb_run.log(_shown(values | {"step": step}), step=_not_before(wandb_run, step))
            self.figures.add(values | {"step": step})
            if "loss/val" in values:
                self._summarize(wandb_run)

        self._put(action)

    def alert(self, title: str, text: str) -> None:
        """A message to those who follow the run."""
        self._put(lambda wandb_run: wandb_run.alert(title=title, text=text))

    def attach(self, step: int, report: Path | None, samples: list[tuple[str, str]], traces: list[Path]) -> None:
        """What there is to be seen beside numbers: the report's page, samples (prompt, text) and timelines."""

        def action(wandb_run: Any) -> None:
            import wandb

            media: dict[str, Any] = {} if report is None else {"report": wandb.Html(str(report), inject=False)}
            if samples:
                media["samples"] = wandb.Table(columns=["prompt", "text"], data=[list(pair) for pair in samples])
            wandb_run.log(media, step=_not_before(wandb_run, step))
            for trace in traces:
                wandb_run.log_artifact(str(trace), name=f"trace-{wandb_run.id}", type="trace")

        self._put(action)

    def _put(self, action: Action) -> None:
        if not self.is_dead:
            self.queue.put(action)

    def how_to_see_it(self) -> str:
        """The page of the run, or how to send it there."""
        if not self.sync:
            return self.problem or "not there yet"
        return self.where if self.mode == "online" else f"offline; to send it: {self.sync}"

    def close(self, ending: Ending, seconds: float | None = None) -> None:
        """Waits for wandb for a bounded time and says so if it did not finish."""
        self.ending = ending
        self.queue.put(None)
        seconds = self.logging.wandb_timeout_seconds + FINISH_S if seconds is None else seconds
        self.thread.join(seconds)
        self.is_left = True
        if self.thread.is_alive() and not self.problem:
            self.problem = f"no answer within {seconds:g} s"
        if self.problem:
            how = f"; to send what it has not taken: {self.sync}" if self.sync else ""
            self.say(f"wandb ({self.mode}): {self.problem}; every number is in {self.run.metrics_file}{how}")

    # the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wandb_run: Any = None
        try:
            wandb_run = self._start()
            while (action := self._next(wandb_run)) is not None:
                self._do(action, wandb_run)
            self._do(self._summarize, wandb_run)
            if self.ending.is_by_signal:
                wandb_run.mark_preempting()
            wandb_run.finish(exit_code=self.ending.exit_code)
            self.problem = None  # all has arrived
        except Exception as error:  # whatever happens to wandb must not happen to the run
            self.is_dead, self.problem = True, self.problem or _in_a_line(error)
            self._tell(f"{_in_a_line(error)}; the run goes on without it")
            self.queue = queue.Queue()
            if wandb_run is not None:
                with contextlib.suppress(Exception):  # else a later run of this process would be taken for it
                    wandb_run.finish(exit_code=1)

    def _do(self, action: Action, wandb_run: Any) -> None:
        """What cannot be done is told, and what comes after it is done all the same."""
        try:
            action(wandb_run)
        except Exception as error:
            self._tell(f"{_in_a_line(error)}; the rest goes on")

    def _tell(self, message: str) -> None:
        """Until the run has ended: what comes later nobody expects."""
        if not self.is_left:
            self.say(f"wandb: {message}")

    def _summarize(self, wandb_run: Any) -> None:
        """The figures of the whole run that count."""
        wandb_run.summary.update(self.figures.values())

    def _start(self) -> Any:
        """wandb's run: offline, if its server does not answer."""
        import wandb

        with contextlib.suppress(ImportError, AttributeError):
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            opentelemetry_proxy.disable()  # its reports on itself, which wait for a silent server when the process ends
        logging, folder = self.logging, self.run.folder
        is_new = not (folder / RUN_ID).exists()
        settings = wandb.Settings(
            init_timeout=logging.wandb_timeout_seconds, finish_timeout=logging.wandb_timeout_seconds,
            finish_timeout_raises=True, silent=True, console="off", x_disable_stats=not logging.wandb_system_metrics,
            reinit="create_new",
        )  # fmt: skip
        words: dict[str, Any] = {
            "project": logging.wandb_project or os.environ.get("WANDB_PROJECT") or "longctx",
            "entity": logging.wandb_entity or None, "group": logging.wandb_group or None,
            "tags": logging.wandb_tags or None, "notes": logging.wandb_notes or None,
            "job_type": logging.wandb_job_type or None, "name": self.run.config.name, "id": _run_id(folder),
            "resume": "allow", "dir": str(folder), "settings": settings, "config": self.shown,
        }  # fmt: skip
        if self.mode == "online" and not has_wandb_key():  # wandb would ask for one at the terminal
            self._tell("no API key (`wandb login` stores one), so the run goes on offline")
            self.mode = "offline"
        try:
            wandb_run = wandb.init(mode=self.mode, **words)  # pyright: ignore[reportArgumentType]: one of its words
        except wandb.errors.Error as error:
            if self.mode != "online":
                raise
            self._tell(f"{_in_a_line(error)}; the run goes on offline")
            self.mode = "offline"
            wandb.teardown()  # its service holds the run's id
            wandb_run = wandb.init(mode="offline", **words)
        wandb_run.config.update(self.shown, allow_val_change=True)  # of a run that goes on
        for name, metric in METRICS.items():
            if "<" not in name:
                x = "data/tokens" if metric.is_learning else "step"
                kept = f"{metric.summary},last" if metric.summary else None
                wandb_run.define_metric(name, step_metric=x, summary=kept)
        self.sync = shlex.join([str(Path(sys.executable).parent / "wandb"), "sync", str(Path(wandb_run.dir).parent)])
        self.where = str(wandb_run.url) if self.mode == "online" else self.sync
        self._tell(self.how_to_see_it())
        for row in self.earlier:
            self.figures.add(row)
            if self.mode == "offline" or is_new:
                wandb_run.log(_shown(row), step=int(row["step"]))
        self.earlier = []
        return wandb_run

    def _next(self, wandb_run: Any) -> Action | None:
        """The next thing to do, None: nothing more; now and then the server is asked whether it is there."""
        while True:
            if self.mode == "online" and time.monotonic() - self.asked_at > self.logging.wandb_timeout_seconds:
                self._look_after_server(wandb_run)
                self.asked_at = time.monotonic()
            with contextlib.suppress(queue.Empty):
                return self.queue.get(timeout=1)

    def _look_after_server(self, wandb_run: Any) -> None:
        """wandb itself tries again and again without a word."""
        server, page = wandb_run.settings.base_url, str(wandb_run.url)
        problem = silence_of(server, PROBE_S)
        if problem and not self.problem:
            self._tell(f"{problem}; the run goes on, and what is not taken is kept: {self.sync}")
        if self.problem and not problem:
            self._tell(f"{server} answers again")
        self.problem, self.where = problem, self.sync if problem else page


def silence_of(server: str, seconds: float) -> str | None:
    """What is wrong with a server, None: it answers. What it answers to a question without a login does not matter."""
    try:
        with urllib.request.urlopen(server, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        return f"{server} answers with status {error.code}" if error.code >= 500 else None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # it is there; whom wandb trusts is wandb's own affair
            return None
        return f"{server} does not answer: {reason}"


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _shown(values: dict[str, float]) -> dict[str, Any]:
    """The scalars that are finite, as wandb's minima need them, and a validation's values by octave as lines."""
    import wandb

    values = {key: value for key, value in values.items() if math.isfinite(value)}
    found: dict[str, Any] = {key: value for key, value in values.items() if not key.startswith(BY_OCTAVE)}
    for prefix, (name, title, x, y) in CURVES.items():
        if by_octave := octaves(values, prefix):
            points = [[octave.bit_length() - 1, by_octave[octave]] for octave in sorted(by_octave)]
            found[name] = wandb.plot.line(wandb.Table(columns=[x, y], data=points), x, y, title=title)
    return found


def _not_before(wandb_run: Any, step: int) -> int:
    """The step that W&B counts: it drops what is logged at an earlier one than it has, as a resumed run may have it."""
    return max(step, wandb_run.step)


def forget_run_id(folder: Path) -> None:
    """The next start is another run on W&B, which is given all that this one has logged: W&B changes no step again."""
    (folder / RUN_ID).unlink(missing_ok=True)


def _run_id(folder: Path) -> str:
    """One wandb run for a run folder, until `forget_run_id`; of a trial of a sweep the one that its agent gives."""
    path = folder / RUN_ID
    if not path.exists():
        of_trial = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        replace_file(path, (of_trial or f"{time.time_ns():x}").encode())
    return path.read_text()


def wandb_mode(logging: LoggingConfig) -> str:
    """`online`, `offline` or `disabled`: as configured, else as wandb's own variables say, else by the key.

    Raises `UserError` if wandb is asked for and not installed; left to itself, a run then goes without.
    """
    is_installed = importlib.util.find_spec("wandb") is not None
    if logging.wandb != WandbMode.auto:
        if logging.wandb != WandbMode.disabled and not is_installed:
            raise UserError(
                f"logging.wandb={logging.wandb} needs wandb: pip install '.[wandb]' in a checkout of longctx, or "
                "logging.wandb=disabled"
            )
        return str(logging.wandb)
    if not is_installed:
        return "disabled"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on", "t", "y"):
        return "disabled"
    asked = {"run": "online", "dryrun": "offline"}.get(mode := os.environ.get("WANDB_MODE", "").lower(), mode)
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Whether wandb would find an API key: in the environment, or in the netrc file for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
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
