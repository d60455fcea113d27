"""Files that must be whole: hashed, flushed to the disk, and manifests that know their own hash."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> Path:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def write_manifest(path: Path, fields: dict[str, Any], beside: Path | None = None) -> None:
    """Writes `fields` as JSON with the hash of itself, first to `beside`, so that it appears whole."""
    beside = beside or path.with_name(f"{path.name}.tmp")
    beside.write_bytes(_manifest_text(fields))
    sync(beside)
    beside.replace(path)


def read_manifest(path: Path, form: str) -> dict[str, Any]:
    """The fields that `write_manifest` wrote. Raises ValueError if one byte is another, or `format` is not `form`."""
    content = path.read_bytes()
    fields = json.loads(content)
    found = fields.get("format") if isinstance(fields, dict) else None
    if found != form:
        raise ValueError(f"format {found!r}, this version reads {form!r}")
    fields.pop("sha256", None)
    if content != _manifest_text(fields):
        raise ValueError("its sha256 is not its own: the file was changed")
    return fields


def _manifest_text(fields: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(fields, indent=2).encode()).hexdigest()
    return json.dumps({**fields, "sha256": digest}, indent=2).encode() + b"\n"
