"""Checkpoints: safetensors and a JSON manifest, no pickle; whole or not there at all.

A checkpoint is written into `step_N.tmp-<id>`, each rank its own shards (torch's distributed checkpoint with the
safetensors storage), every file hashed and synced; then the manifest; then the folder is renamed to `step_N`. A folder
without a valid manifest does not exist. All of that may run in a thread, from a copy in host memory. Nothing random is
kept: initial values, data order and samples are pure functions of the seed and of the counts in the manifest.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint import _hf_utils as hf
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from longctx import files
from longctx.checkpoint_room import check_room, staying
from longctx.errors import UserError
from longctx.files import sha256, sync
from longctx.host_memory import host_tensor
from longctx.local_part import local_of, local_part, with_local
from longctx.runtime import Runtime

FORMAT = "longctx-checkpoint-2"
MANIFEST = "manifest.json"
HEAD, HEAD_BEFORE = "head.weight", "output_weight"  # what a head's own weight is called, and until 2026-11-29
BEST_BY, VALIDATED_ON = "loss/val", "validation_sequences"  # facts of a checkpoint
DTYPES = {  # of safetensors
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SECONDS_TO_APPEAR = 5  # of another machine's files


class CheckpointError(UserError):
    """A checkpoint that cannot be used: the message names the file and what is wrong with it."""


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, keep: int, runtime: Runtime, undecayed_until: int | None = None) -> None:
        """To be called by all ranks. Beside the newest `keep`, the last one up to step `undecayed_until` stays."""
        self.folder, self.keep, self.undecayed_until = folder, keep, undecayed_until
        if runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        self.runtime = runtime.in_background()
        has_gpu = runtime.device.type == "cuda"
        self.places: dict[str, Tensor] = {}  # in host memory, for copies of what is on a GPU: kept from save to save
        # a thread's device is not that of the one that starts it
        device = {"initializer": torch.cuda.set_device, "initargs": (runtime.device,)} if has_gpu else {}
        self.has_gpu = has_gpu
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", **device)
        self.pending: Future[Path | None] | None = None
        self.speed: dict[str, float] = {}  # of the last save, as metrics

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Makes room in host memory for what `save_in_background` will copy, in the background.

        Touching and locking it takes about a second for 2 GB, which the first save would have to wait for.
        """

        def make_room() -> None:
            self.runtime.run_on_all_ranks(lambda: self._copy(tensors))

        if self.has_gpu:
            self.pending = self.thread.submit(make_room)

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of `tensors`, in host memory, where nothing changes it until the next copy."""
        copies = {}
        for name, tensor in tensors.items():
            local = local_of(tensor).detach()
            if name not in self.places:
                self.places[name] = host_tensor(local.shape, local.dtype, self.runtime.device)
            self.places[name].copy_(local, non_blocking=True)
            copies[name] = with_local(tensor, self.places[name])
        if self.has_gpu:
            torch.cuda.synchronize()
        return copies

    def save_in_background(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """As `save`, from a copy in host memory: returns once that is made, and the save before has ended.

        All ranks call it. `wait` tells what came of it.
        """
        self.wait()
        copy = self.runtime.run_on_all_ranks(lambda: self._copy(tensors))
        self.pending = self.thread.submit(self.save, step, copy, facts)

    def save_beside(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
        """As `save`, after what runs in the background has ended, while the main thread is in the middle of a step.

        On a GPU the tensors are read on a stream of its own, so that it does not wait for the step's kernels.
        """

        def save() -> Path:
            with torch.cuda.stream(torch.cuda.Stream() if self.has_gpu else None):
                return self.save(step, tensors, facts)

        return self.thread.submit(save).result()

    def finish_beside(self) -> None:
        """Returns when all ranks are here and nothing runs in the background any more."""
        self.thread.submit(lambda: self.runtime.gather(None)).result()

    def wait(self) -> Path | None:
        """Lets what runs in the background end: the checkpoint, if it was a save. Raises `UserError` if it failed."""
        pending, self.pending = self.pending, None
        return pending.result() if pending else None

    def close(self) -> None:
        """Lets a save in the background end, when nothing else will wait for it; says what came of it."""
        if self.pending is not None:
            try:
                if path := self.wait():
                    self.runtime.say(f"saved {path}")
            except Exception as error:  # the error that ends the run is another, and must be seen
                self.runtime.say(f"the checkpoint being written came to nothing: {error}")
        self.thread.shutdown()

    @property
    def has_ended(self) -> bool:
        """Whether something in the background has ended that nobody has waited for."""
        return self.pending is not None and self.pending.done()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended badly; the other ranks may learn of it a moment later."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
        """Writes `tensors` (DTensors or replicated ones) and `facts` (JSON) as `step_<step>`; all ranks call it.

        On any failure every rank raises `UserError`, and earlier checkpoints are as they were.
        """
        began = time.perf_counter()
        target = self.folder / f"step_{step}"
        work = Path(self.runtime.run_on_rank_0(lambda: str(self._make_work_folder(target))))
        try:
            written = self.runtime.run_on_all_ranks(lambda: _write(tensors, work, self.runtime.group))
            hashes = self._hash_files(work, [name for names in self.runtime.gather(written) for name in names])
            kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
            manifest = {"format": FORMAT, "step": step, "facts": facts, "tensors": kinds, "files": hashes}
            self.runtime.run_on_rank_0(lambda: self._commit(work, target, manifest))
        finally:
            if self.runtime.is_main and work.exists():
                shutil.rmtree(work, ignore_errors=True)
        seconds, size = time.perf_counter() - began, sum(file["bytes"] for file in hashes.values())
        self.speed = {"checkpoint/save_s": seconds, "checkpoint/gib_per_s": size / 2.0**30 / seconds}
        return target

    def record(self, path: Path, facts: dict[str, Any]) -> None:
        """Adds what became known of a committed checkpoint to its facts. Its manifest is whole at any moment."""

        def write() -> None:
            manifest = read_manifest(path)
            manifest["facts"] |= facts
            there = path.resolve()  # which a link may have on another disk
            files.write_manifest(there / MANIFEST, manifest, there.with_name(f"{path.name}.tmp-manifest"))
            self._point_to_best()

        self.runtime.run_on_rank_0(write)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The last committed checkpoint that passes `verify`, with its manifest; a damaged one is named, and passed.

        Raises `CheckpointError` if there are some and none can be used: a run must not begin anew beside them unasked.
        """
        committed = self.committed()
        for path in reversed(committed):
            try:
                return path, self.verify(path)
            except UserError as error:
                self.runtime.say(f"checkpoint refused: {error}")
        if committed:
            raise CheckpointError(
                f"{self.folder}: none of its {len(committed)} checkpoints can be used, the newest is refused above; "
                "restore one, or give the run another name"
            )
        return None

    def committed(self) -> list[Path]:
        """Folders with a manifest, by step; the same list on every rank."""
        return [
            Path(path)
            for path in self.runtime.run_on_rank_0(lambda: [str(path) for path in list_checkpoints(self.folder)])
        ]

    def check_room(self, start: int, to_come: list[int], size: int, keeps_best: bool) -> None:
        """See `checkpoint_room.check_room`, for a run that goes on from step `start`. Collective."""

        def check() -> None:
            self._remove_leftovers()
            there = [path for path in list_checkpoints(self.folder) if _step(path) <= start]
            has_best = keeps_best or best_of(there) is not None
            check_room(self.folder, [*map(_step, there)], to_come, size, self.keep, self.undecayed_until, has_best)

        self.runtime.run_on_rank_0(check)

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps: a run that goes on from `step` must not come back to them."""

        def rename() -> None:
            for path in list_checkpoints(self.folder):
                if _step(path) > step:
                    _set_aside(path)
            self._point_to_best()

        self.runtime.run_on_rank_0(rename)

    def verify(self, path: Path) -> dict[str, Any]:
        """The manifest of a checkpoint, after comparing size and sha256 of every file. Raises `UserError`."""
        return self.runtime.run_on_all_ranks(lambda: verify_files(path, self.runtime.rank, self.runtime.world_size))

    def load(self, path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Fills `tensors` in place from a checkpoint and its verified manifest, whatever layout wrote it."""
        saved = manifest["tensors"]
        tensors = {name_in(saved, name): tensor for name, tensor in tensors.items()}
        problems = [f"{name} is in only one of them" for name in sorted(set(tensors) ^ set(saved))]
        problems += [
            f"{name} is {saved[name]}, the run's is {_kind(tensor)}"
            for name, tensor in tensors.items()
            if name in saved and saved[name] != _kind(tensor)
        ]
        if problems:
            raise CheckpointError(
                f"{path}: not a checkpoint of this model and optimizer: {problems[0]}; give the configuration of the "
                "checkpoint, or begin anew: with another name, and without checkpoint.resume"
            )
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), planner=PartLoader())
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{path}: cannot be read: {_first_cause(error)}") from None

    def _make_work_folder(self, target: Path) -> Path:
        work = self.folder / f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"
        work.mkdir()  # not its parents: a run whose folder is gone must not go on in another one
        return work

    def _hash_files(self, work: Path, written: list[str]) -> dict[str, dict[str, Any]]:
        """Name -> size and sha256 of every file that a rank has written; each rank syncs and hashes a part of them.

        Raises `CheckpointError` if rank 0 does not see one: its folder is not the one of that rank.
        """

        def see_all() -> list[str]:
            missing = list(written)
            for _ in range(SECONDS_TO_APPEAR):
                missing = sorted(set(written) - {path.name for path in work.glob("*.safetensors")})
                if not missing:
                    return sorted(written)
                time.sleep(1)  # network file systems show a folder some seconds late
            raise CheckpointError(
                f"{work}: {missing[0]} was written by another rank and is not seen by rank 0 ({len(missing)} are "
                "not); the run's folder must be one that all machines share"
            )

        names = self.runtime.run_on_rank_0(see_all)

        def hash_mine() -> dict[str, dict[str, Any]]:
            mine = names[self.runtime.rank :: self.runtime.world_size]
            return {n: {"bytes": sync(work / n).stat().st_size, "sha256": sha256(work / n)} for n in mine}

        parts = self.runtime.gather(self.runtime.run_on_all_ranks(hash_mine))
        return {name: facts for part in parts for name, facts in part.items()}

    def _commit(self, work: Path, target: Path, manifest: dict[str, Any]) -> None:
        files.write_manifest(work / MANIFEST, manifest)
        sync(work)
        if target.is_symlink() or target.exists():  # one that was refused as damaged
            _set_aside(target)
        work.rename(target)
        sync(self.folder)
        self._tidy_up(target)

    def _tidy_up(self, newest: Path) -> None:
        """What follows a commit: links to it, and old ones removed. What fails is told, and the run goes on."""
        self._point("latest", newest)
        best, committed = self._point_to_best(), list_checkpoints(self.folder)
        stay = staying([_step(path) for path in committed], self.keep, self.undecayed_until)
        for old in committed:
            if _step(old) not in stay and old not in (newest, best):
                self._remove(old)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Of saves that did not end, and of checkpoints that were being removed."""
        for leftover in self.folder.glob("step_*.tmp-*"):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)
            else:
                shutil.rmtree(leftover, ignore_errors=True)

    def _remove(self, old: Path) -> None:
        try:
            if old.is_symlink():
                raise OSError(None, "it is a link to another place")
            # to a name that no longer is a checkpoint's first: half of one must not be taken for one
            leftover = old.with_name(f"{old.name}.tmp-{uuid.uuid4().hex[:8]}")
            old.rename(leftover)
            shutil.rmtree(leftover)
        except OSError as error:
            self.runtime.say(f"the old checkpoint {old} is not removed: {error.strerror}; remove it by hand")

    def undecayed(self) -> Path | None:
        """The last checkpoint before the learning rate began to fall, if there is one."""
        if self.undecayed_until is None:
            return None
        return next((p for p in reversed(list_checkpoints(self.folder)) if _step(p) <= self.undecayed_until), None)

    def _point_to_best(self) -> Path | None:
        best = best_of(list_checkpoints(self.folder))
        if best:
            self._point("best", best)
        else:
            with contextlib.suppress(OSError):
                (self.folder / "best").unlink()
        return best

    def _point(self, name: str, target: Path) -> None:
        link = self.folder / f"{name}.{uuid.uuid4().hex[:8]}"
        try:
            link.symlink_to(target.name)
            link.replace(self.folder / name)
        except OSError as error:  # file systems without links; every checkpoint is found without them
            self.runtime.say(f"{self.folder / name} does not point to {target.name}: {error.strerror}")


def name_in(saved: dict[str, str], name: str) -> str:
    """What a tensor is called in a checkpoint, which may be from before a head's weight got its name."""
    before = name.replace(HEAD, HEAD_BEFORE)
    return before if before in saved and name not in saved else name


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises `CheckpointError` if there is none, or it was changed."""
    file = path / MANIFEST
    try:
        return files.read_manifest(file, FORMAT)
    except FileNotFoundError:
        why = f"no {MANIFEST} in it, so it is no checkpoint" if path.is_dir() else "there is no such folder"
        latest = path / "checkpoints" / "latest"
        instead = latest if latest.exists() else "a step_N folder"
        raise CheckpointError(f"{path}: {why}; name {instead}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def verify_files(path: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing the files with it: no other, sizes, and sha256 of a rank's part.

    The parts that files hold of each tensor must make it whole. Raises `CheckpointError` naming the file or the tensor.
    """
    manifest = read_manifest(path)
    for name in sorted(manifest["files"]):
        if problem := files.outside(path, name):
            raise CheckpointError(problem)
    for name in sorted({file.name for file in path.iterdir()} - set(manifest["files"]) - {MANIFEST}):
        raise CheckpointError(f"{path / name}: is not in the manifest; it does not belong there")
    for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {expected['bytes']}")
        if number % ranks == rank and sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: its sha256 is not the manifest's: the file was changed")
    if rank == 0:
        _check_tensors_are_whole(path, manifest)
    return manifest


def _check_tensors_are_whole(path: Path, manifest: dict[str, Any]) -> None:
    """Counts what the files hold of each tensor, by their headers: shards of a machine may never have got there."""
    found: dict[str, int] = {}
    for name in (name for name in manifest["files"] if name.endswith(".safetensors")):
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no dict
                    found[key] = found.get(key, 0) + math.prod(file.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / name}: no whole safetensors file ({error})") from None
    for key, kind in manifest["tensors"].items():
        if found.get(key, 0) != math.prod(shape_of(kind)):
            raise CheckpointError(
                f"{path}: its files hold {found.get(key, 0)} of the {math.prod(shape_of(kind))} numbers of {key}: a "
                "part was not saved here, and no layout can load it"
            )


def shape_of(kind: str) -> list[int]:
    """The shape in the description of a tensor, as `_kind` gives it."""
    return [int(n) for n in kind.split("[")[1].rstrip("]").split(",") if n.strip()]


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders `step_N` with a manifest in the checkpoint folder of a run, by step."""
    steps = {p: re.fullmatch(r"step_(\d+)", p.name) for p in folder.glob("step_*") if _has_manifest(p)}
    return sorted((path for path, match in steps.items() if match), key=_step)


def _has_manifest(path: Path) -> bool:
    try:
        return (path / MANIFEST).is_file()
    except OSError:  # what cannot be looked at is there; reading it will say why it cannot be used
        return True


class Part:
    """A distributed tensor as plans of torch's checkpoints see it, by what this rank really holds of it."""

    def __init__(self, tensor: DTensor) -> None:
        self.tensor, self.local = tensor, tensor.to_local()
        shape, offset = local_part(tensor)
        self.chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))

    def size(self) -> torch.Size:
        return self.tensor.size()

    def __create_write_items__(self, name: str, _part: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(chunk=self.chunk, properties=properties, size=self.size())
        return [WriteItem(MetadataIndex(name, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.chunk]


class PartSaver(DefaultSavePlanner):
    """Plans what is saved by what ranks hold."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = _parts(self.state_dict)

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.local if isinstance(found, Part) else super().lookup_object(index)


class PartLoader(DefaultLoadPlanner):
    """Plans what is loaded by what ranks hold."""

    def set_up_planner(self, *arguments: Any, **words: Any) -> None:
        super().set_up_planner(*arguments, **words)
        self.state_dict = _parts(self.state_dict)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found: Any = self.state_dict[index.fqn]
        return found.local if isinstance(found, Part) else super().lookup_tensor(index)


def _parts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: Part(tensor) if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


class ShardWriter(HuggingFaceStorageWriter):
    """One file a rank, written tensor by tensor while other threads run.

    The parent's makes the file in memory twice, and no other thread runs until that is done: training stood still.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.names: list[str] = []  # of the files that this rank has written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        tensors, places = {}, {}
        for item in plan.items:
            name, place = item.index.fqn, item.tensor_data
            assert place is not None, f"{name}: a checkpoint holds tensors only"
            tensors[name] = planner.resolve_data(item)
            places[name] = {hf.SAVED_OFFSETS_KEY: place.chunk.offsets}
        if tensors:
            facts = {hf.CUSTOM_METADATA_KEY: json.dumps(places), hf.DCP_VERSION_KEY: str(hf.HF_DCP_VERSION)}
            file = Path(self.path) / hf._gen_file_name(1, 1, plan.storage_data["shard_index"])
            write_safetensors(file, tensors, facts | {hf.FORMAT_KEY: hf.FORMAT_VALUE})
            self.names.append(file.name)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([])  # where each tensor lies is read from the files
        return done


def write_safetensors(file: Path, tensors: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """A file in safetensors' format: the length of the header, the header, and one tensor's bytes after the other's.

    The library writes what is in host memory as a whole, and there need not be room for a copy of a shard.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            out.write(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))


def best_of(paths: list[Path]) -> Path | None:
    """The one of the lowest validation loss, of those that were validated on as many sequences as the last that was.

    None if none was: losses of other held-out sequences do not compare.
    """
    losses, sequences = {}, {}
    for path in paths:
        try:
            facts = read_manifest(path)["facts"]
        except CheckpointError:  # which is for those to say who want to read it
            continue
        if facts.get(BEST_BY, math.inf) < math.inf:
            losses[path], sequences[path] = facts[BEST_BY], facts.get(VALIDATED_ON)
    last = next((sequences[path] for path in reversed(losses) if sequences[path]), None)
    alike = [path for path in losses if sequences[path] in (None, last)]  # None: of an earlier version
    return min(alike, key=losses.__getitem__, default=None)


def _write(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> list[str]:
    """Returns the names of the files that this rank has written."""
    writer = ShardWriter(folder)
    try:
        dcp.save(tensors, storage_writer=writer, planner=PartSaver(), process_group=group)
    except dcp.CheckpointException as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = f"{files.gigabytes(shutil.disk_usage(folder).free)} free, " if folder.exists() else ""
        raise CheckpointError(
            f"saving to {folder} failed {_first_cause(error)} ({free}{files.gigabytes(needed)} needed by all ranks)"
        ) from None
    return writer.names


def _first_cause(error: dcp.CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"on rank {rank}: {cause}"


def _set_aside(path: Path) -> None:
    """Under another name it is no checkpoint of the run any more; it stays for the user to look at."""
    path.rename(path.with_name(f"abandoned_{path.name}_{uuid.uuid4().hex[:8]}"))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _kind(tensor: Tensor) -> str:
    """What must be equal to load one tensor into another: `float32 [8192, 128]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def state_tensors(parameters: Mapping[str, Tensor], optimizer_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: `model.<parameter>` and `optimizer.<state>.<parameter>`."""
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    return tensors | {f"optimizer.{name}": tensor for name, tensor in optimizer_state.items()}
