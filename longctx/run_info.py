"""What a run was started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longctx.config import Config


@dataclass(frozen=True)
class RunInfo:
    """The configuration of a run, its text, and the words that asked for it."""

    config: Config
    config_yaml: str  # as composed, interpolations unresolved: logged, and stored in checkpoints
    overrides: list[str]  # of the command line

    @property
    def folder(self) -> Path:
        """Where the files of the run are."""
        return self.config.run_folder

    @property
    def metrics_file(self) -> Path:
        """A line of numbers for each step."""
        return self.folder / "metrics.jsonl"
