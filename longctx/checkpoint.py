"""Checkpoints: safetensors and a JSON manifest, no pickle; whole or not there at all.

A checkpoint is written into `step_N.tmp-<id>`, each rank its own shards (torch's distributed checkpoint with the
safetensors storage), every file hashed and synced; then the manifest; then the folder is renamed to `step_N`. A folder
without a valid manifest does not exist. Nothing random is kept: initial values, data order and samples are pure
functions of the seed and of the counts in the manifest.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from longctx.config import UserError
from longctx.data.tokens import sha256
from longctx.runtime import Runtime

FORMAT = "longctx-checkpoint-1"
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be used: the message names the file and what is wrong with it."""


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, keep: int, runtime: Runtime) -> None:
        self.folder, self.keep, self.runtime = folder, keep, runtime

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
        """Writes `tensors` (DTensors or replicated ones) and `facts` (JSON) as `step_<step>`; all ranks call it.

        On any failure every rank raises `UserError`, and earlier checkpoints are as they were.
        """
        target = self.folder / f"step_{step}"
        work = Path(self.runtime.on_main(lambda: str(self._make_work_folder(target))))
        try:
            self.runtime.together(lambda: _write(tensors, work))
            hashes = self._hash_files(work)
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            manifest = {"format": FORMAT, "step": step, "facts": facts, "tensors": shapes, "files": hashes}
            self.runtime.on_main(lambda: self._commit(work, target, manifest))
        finally:
            if self.runtime.is_main and work.exists():
                shutil.rmtree(work, ignore_errors=True)
        return target

    def newest(self) -> Path | None:
        """The last committed checkpoint that passes `verify`; a damaged one is named and passed over."""
        for path in reversed(self.committed()):
            try:
                self.verify(path)
                return path
            except UserError as error:
                self.runtime.say(f"checkpoint refused: {error}")
        return None

    def committed(self) -> list[Path]:
        """Folders with a manifest, by step."""
        folders = [
            path for path in self.folder.glob("step_*") if (path / MANIFEST).is_file() and ".tmp-" not in path.name
        ]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))

    def verify(self, path: Path) -> dict[str, Any]:
        """The manifest of a checkpoint, after comparing size and sha256 of every file. Raises `UserError`."""
        return self.runtime.together(lambda: self._verify(path))

    def _verify(self, path: Path) -> dict[str, Any]:
        manifest = read_manifest(path)
        for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {expected['bytes']}")
            if number % self.runtime.world_size == self.runtime.rank and sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file}: its sha256 is not the manifest's: the file was changed")
        return manifest

    def load(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fills `tensors` in place from a verified checkpoint, whatever layout wrote it; returns its facts."""
        manifest = self.verify(path)
        saved = manifest["tensors"]
        problems = [f"{name} is in only one of them" for name in sorted(set(tensors) ^ set(saved))]
        problems += [
            f"{name} is {saved[name]}, the run's is {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in saved and saved[name] != list(tensor.shape)
        ]
        if problems:
            raise CheckpointError(
                f"{path}: not a checkpoint of this model and optimizer: {problems[0]}; give the run another name, or "
                "the configuration of the checkpoint"
            )
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
        return manifest["facts"]

    def _make_work_folder(self, target: Path) -> Path:
        work = self.folder / f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"
        work.mkdir(parents=True)
        return work

    def _hash_files(self, work: Path) -> dict[str, dict[str, Any]]:
        """Name -> size and sha256 of every file; each rank syncs and hashes a part of them."""
        files = sorted(work.glob("*.safetensors"))

        def hash_mine() -> dict[str, dict[str, Any]]:
            mine = files[self.runtime.rank :: self.runtime.world_size]
            return {f.name: {"bytes": _sync(f).stat().st_size, "sha256": sha256(f)} for f in mine}

        parts: list[Any] = [None] * self.runtime.world_size
        dist.all_gather_object(parts, self.runtime.together(hash_mine))
        return {name: facts for part in parts for name, facts in part.items()}

    def _commit(self, work: Path, target: Path, manifest: dict[str, Any]) -> None:
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _sync(work / MANIFEST)
        _sync(work)
        if target.exists():  # the same step, written by a run that was resumed from before it
            replaced = target.with_name(f"{target.name}.tmp-replaced")
            target.rename(replaced)
            work.rename(target)
            shutil.rmtree(replaced)
        else:
            work.rename(target)
        _sync(self.folder)
        self._point_latest_to(target)
        for old in self.committed()[: -self.keep]:
            shutil.rmtree(old)
        for leftover in self.folder.glob("step_*.tmp-*"):
            if leftover != work:
                shutil.rmtree(leftover, ignore_errors=True)

    def _point_latest_to(self, target: Path) -> None:
        link = self.folder / f"latest.{uuid.uuid4().hex[:8]}"
        link.symlink_to(target.name)
        link.replace(self.folder / "latest")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises `CheckpointError` if there is none of this format."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST} in it, so it is no checkpoint; name a step_N folder") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not of the format {FORMAT}")
    return manifest


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"saving to {folder} failed on rank {rank}: {cause}") from None


def _sync(path: Path) -> Path:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def state_tensors(model: torch.nn.Module, optimizer_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: `model.<parameter>` and `optimizer.<state>.<parameter>`."""
    tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    return tensors | {f"optimizer.{name}": tensor for name, tensor in optimizer_state.items()}
