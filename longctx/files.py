"""Files that must be whole: hashed, flushed to the disk, and manifests that know their own hash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
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


def replace_file(path: Path, content: bytes) -> None:
    """Gives a file another content, at once or not at all."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(content)
    beside.replace(path)


def outside(folder: Path, name: str) -> str | None:
    """Why `name`, as a manifest gives it, is no file of `folder` itself; None: it is one, or is missing."""
    if Path(name).name != name or name in ("", ".", ".."):
        return f"{folder}: its manifest names {name!r}, which is no file of this folder, and is not opened"
    if (folder / name).is_symlink() and (folder / name).resolve().parent != folder.resolve():
        return f"{folder / name}: is a link out of its folder, and is not read; put the file itself there"
    return None


def disk_problem(error: OSError, folder: Path, needed: int) -> str:
    """What a file system has refused, with the file, and where bytes are lacking how many are free and needed."""
    what = f"{error.filename or folder}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return what
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{what}: {gigabytes(shutil.disk_usage(existing).free)} free, about {gigabytes(needed)} needed"


def gigabytes(size: float) -> str:
    """`size` bytes for people: `12.3 GB`, `0.4 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def write_manifest(path: Path, fields: dict[str, Any], beside: Path | None = None) -> None:
    """Writes `fields` as JSON with the hash of itself, first to `beside`, so that it appears whole."""
    beside = beside or path.with_name(f"{path.name}.tmp")
    beside.write_bytes(_manifest_text(fields))
    sync(beside)
    beside.replace(path)


def read_manifest(path: Path, *forms: str) -> dict[str, Any]:
    """The fields that `write_manifest` wrote. Raises ValueError if a byte is another, or `format` none of `forms`."""
    content = path.read_bytes()
    try:
        fields = json.loads(content)
    except RecursionError:
        raise ValueError("brackets inside brackets without end: no manifest") from None
    found = fields.get("format") if isinstance(fields, dict) else None
    if found not in forms:
        raise ValueError(f"format {found!r}, this version reads {' and '.join(map(repr, forms))}")
    fields.pop("sha256", None)
    if content != _manifest_text(fields):
        raise ValueError("its sha256 is not its own: the file was changed")
    return fields


def _manifest_text(fields: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(fields, indent=2).encode()).hexdigest()
    return json.dumps({**fields, "sha256": digest}, indent=2).encode() + b"\n"
