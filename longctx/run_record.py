"""`run.json` in a run's folder: its configuration, what is known of it, and how it ended."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from longctx import resume
from longctx.files import replace_file
from longctx.run_info import COMPLETE, RunInfo

FILE, CONFIG = "run.json", "config.yaml"


def shown_configuration(run: RunInfo) -> dict[str, Any]:
    """The configuration, nested and resolved; text that comes from the environment stands as it was written.

    So text from `${oc.env:KEY}` shows no secret, wherever it is referred to.
    """
    written = yaml.safe_load(run.config_yaml)

    def find(path: str) -> object:
        found: Any = written
        for part in path.replace("[", ".").replace("]", "").split("."):
            if isinstance(found, list):
                found = found[int(part)] if part.isdigit() and int(part) < len(found) else None
            else:
                found = found.get(part) if isinstance(found, dict) else None
        return found

    def reads_environment(text: object) -> bool:
        if not isinstance(text, str) or "${" not in text:
            return False
        if "oc.env" in text or "${." in text:  # what a relative reference finds is not looked up
            return True
        return any(reads_environment(find(part.partition("}")[0])) for part in text.split("${")[1:])

    def shown(value: Any, text: Any) -> Any:
        if isinstance(value, Enum):  # a choice of few holds no secret
            return value
        if isinstance(text, str) and isinstance(value, str | list | dict) and reads_environment(text):
            return text
        if isinstance(value, dict):
            inner = text if isinstance(text, dict) else {}
            return {str(key): shown(one, inner.get(key)) for key, one in value.items()}
        if isinstance(value, list) and isinstance(text, list):
            return [shown(one, word) for one, word in zip(value, text, strict=True)]
        return value

    return shown(asdict(run.config), written)


class RunRecord:
    """`run.json`: the configuration and the facts of a run's last start, and how it ended. On rank 0.

    `config.yaml` and `overrides.yaml` beside it are what Hydra has composed, and the words that asked for it.
    """

    def __init__(self, run: RunInfo, facts: dict[str, Any]) -> None:
        self.path = run.folder / FILE
        self.record = {
            "name": run.config.name, "started_at": run.started_at, "ended": "not yet",
            "configuration": shown_configuration(run), "facts": facts,
        }  # fmt: skip
        self.run, self.has_begun, self.has_steps = run, False, True

    def is_changed(self) -> bool:
        """Whether the last start of the run had a configuration that trains otherwise."""
        before = read_record(self.run.folder).get("configuration", {})
        changed = resume.changes(before, self.record["configuration"])
        by_memory = {"parallel.recompute_less_layers", "parallel.offload"}  # as -1 was chosen
        others = ("logging.", "checkpoint.", "validation.")
        return any(not key.startswith(others) for key in changed if key not in by_memory)

    def is_same_branch(self) -> bool:
        """Whether the last start of the run began at the checkpoint of another run that this one begins at."""
        path = self.run.folder / CONFIG
        return path.exists() and resume.of_same_branch(path.read_text(encoding="utf-8"), self.run.config_yaml)

    def was_complete(self) -> bool:
        """Whether the last start of the run ended with its last step."""
        return read_record(self.run.folder).get("ended") == COMPLETE.words

    def go_on(self) -> None:
        """A start without steps to take: the record stays that of the start that trained, but for how it ends."""
        self.has_steps, before = False, read_record(self.run.folder)
        if before and before["ended"] != COMPLETE.words:
            self.record, self.has_begun = before, True

    def begin(self) -> None:
        """Writes what is known before the first step."""
        self.has_begun = True
        replace_file(self.run.folder / CONFIG, self.run.config_yaml.encode())
        replace_file(self.run.folder / "overrides.yaml", yaml.safe_dump(self.run.overrides).encode())
        self.write()

    def end(self, how: str, more: dict[str, Any]) -> None:
        """How the run has ended, and what else is known by then."""
        when = {"ended_at": time.time()} if self.has_steps else {}
        self.record |= {"ended": how, **when, **more}
        if self.has_begun:
            self.write()

    def write(self) -> None:
        """At once or not at all."""
        replace_file(self.path, json.dumps(self.record, indent=1).encode() + b"\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The `run.json` of a run's folder; {} if there is none that can be read."""
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
