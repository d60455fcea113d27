"""Reads `metrics.jsonl`: a line of JSON for each step, and for each validation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, with NaN for what is not a number; lines that cannot be read are left out."""
    rows = (read_row(line) for line in path.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None]


def read_row(line: bytes) -> dict[str, Any] | None:
    """One line; None: it cannot be read."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not is_number(row.get("step")):
        return None
    if not all(value is None or isinstance(value, int | float) for value in row.values()):
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


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
