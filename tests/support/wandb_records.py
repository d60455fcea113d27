"""Reads the file in which wandb keeps a run: records of wandb's own format in the frames of LevelDB's log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, FRAME_HEADER = 32768, 7, 7
FULL, LAST = 1, 4  # a record's only frame, its last one


def records(folder: Path) -> list[Record]:
    """Of the last run below the `wandb` folder of a run's folder: what went on offline has begun online."""
    file = max((folder / "wandb").glob("*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [Record.FromString(data) for data in _frames(file.read_bytes())]


def _frames(content: bytes) -> Iterator[bytes]:
    place, parts = FILE_HEADER, b""
    while place + FRAME_HEADER <= len(content):
        if (left := BLOCK - place % BLOCK) < FRAME_HEADER:
            place += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + FRAME_HEADER : place + FRAME_HEADER + length]
        place += FRAME_HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def _items(updates: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


def history(found: list[Record]) -> list[dict[str, Any]]:
    """What was logged, a dictionary a step."""
    return [_items(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]


def configuration(found: list[Record]) -> dict[str, Any]:
    """What the run was started with, later changes included."""
    values: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "run":
            values |= _items(record.run.config.update)
        if record.WhichOneof("record_type") == "config":
            values |= _items(record.config.update)
    return values


def summary_values(found: list[Record]) -> dict[str, Any]:
    """What was set in the summary."""
    values: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            values |= _items(record.summary.update)
    return values


def axes(found: list[Record]) -> dict[str, str]:
    """Each defined metric's step metric."""
    metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
    return {metric.name: metric.step_metric for metric in metrics}


def exit_code(found: list[Record]) -> int | None:
    """As wandb was told it; None: it was not."""
    codes = [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]
    return codes[-1] if codes else None


def is_preempted(found: list[Record]) -> bool:
    """Whether the run was marked so."""
    return any(record.WhichOneof("record_type") == "preempting" for record in found)
