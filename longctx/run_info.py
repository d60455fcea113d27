"""What a run was started with."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from longctx.config import Config


@dataclass(frozen=True)
class RunInfo:
    """The configuration of a run, its text, and the words that asked for it."""

    config: Config
    config_yaml: str  # as composed, interpolations unresolved
    overrides: list[str]  # of the command line
    started_at: float = field(default_factory=time.time)  # seconds since 1970

    @property
    def folder(self) -> Path:
        """Where the files of the run are."""
        return self.config.run_folder

    @property
    def metrics_file(self) -> Path:
        """A line of numbers for each step."""
        return self.folder / "metrics.jsonl"


class Ending(NamedTuple):
    """How a run ended."""

    exit_code: int  # 0: complete, 1: failed, 128 + n: stopped by signal n, as shells tell it
    words: str

    @staticmethod
    def by_signal(number: int) -> Ending:
        """It was asked to stop, and can go on from what it has saved."""
        return Ending(128 + number, f"stopped by {signal.Signals(number).name}")

    @staticmethod
    def by_error(error: BaseException) -> Ending:
        """It has failed."""
        lines = str(error).strip().splitlines()
        return Ending(1, f"failed: {type(error).__name__}: {lines[0] if lines else ''}")

    @property
    def is_by_signal(self) -> bool:
        """Whether it was stopped."""
        return self.exit_code > 128


COMPLETE = Ending(0, "complete")
