"""Checkpoints are whole or not there, hold no pickle, and load on any layout."""

from __future__ import annotations

import errno
import math
import os
import pickle  # noqa: TID251  to show that none is read
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor

from longctx import runtime
from longctx.checkpoint import (
    BEST_BY,
    FORMAT,
    CheckpointError,
    Checkpoints,
    ShardWriter,
    read_manifest,
    state_tensors,
    verify_files,
    write_safetensors,
)
from longctx.config import Config, OptimConfig, Optimizer, ParallelConfig
from longctx.errors import UserError
from longctx.files import sha256, write_manifest
from longctx.hugging_face.export import export_weights
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.optim import Optimizers
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.saving import Progress
from ranks import run_on_ranks, started_ranks
from runs import ROOT, TINY, small_config, trainer_of


def make_state(parallel: ParallelConfig, seed: int):
    mesh = make_mesh(parallel, torch.distributed.get_world_size(), "cpu")
    config = Config(model=TINY, parallel=parallel, seed=seed, optim=OptimConfig(optimizer=Optimizer.muon))
    config.precision.compute = config.precision.compute.float32
    model, _ = parallelize(config, mesh, 1, torch.device("cpu"))
    optimizer = Optimizers(model, config.optim)
    tokens = torch.arange(64).reshape(2, 32)
    model(tokens, tokens % 32, KeyIntervals.causal(32), tokens).sum().backward()
    optimizer.step(20)
    optimizer.zero_grad()
    return state_tensors(dict(model.named_parameters()), optimizer.state())


def whole(tensors):
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in tensors.items()}


def save(_rank, folder, parallel, steps):
    tensors = make_state(parallel, seed=1)
    checkpoints = Checkpoints(folder, 2, runtime.start(60))
    for step in steps:
        checkpoints.save(step, tensors, {"consumed": step})
    return whole(tensors)


def load(_rank, folder, parallel):
    tensors = make_state(parallel, seed=2)
    checkpoints = Checkpoints(folder, 2, runtime.start(60))
    newest = checkpoints.newest()
    assert newest is not None
    path, manifest = newest
    checkpoints.load(path, manifest, tensors)
    return whole(tensors), manifest["facts"], path.name


LAYOUTS = [
    (ParallelConfig(), 4),
    (ParallelConfig(tensor=2), 2),
    (ParallelConfig(), 1),
    (ParallelConfig(), 3),
]


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        pytest.param(ParallelConfig(), 2, id="shard 2", marks=pytest.mark.slow),
        pytest.param(ParallelConfig(tensor=2), 4, id="shard 2 x tensor 2"),
    ],
)
def test_loads_bitwise_on_any_layout(tmp_path, parallel, ranks):
    saved = run_on_ranks(ranks, save, tmp_path, parallel, [3])[0]
    assert any(n.startswith("optimizer.momentum_buffer") for n in saved)
    for other, other_ranks in LAYOUTS:
        loaded, facts, name = run_on_ranks(other_ranks, load, tmp_path, other)[0]
        assert (facts, name) == ({"consumed": 3}, "step_3")
        assert all(torch.equal(loaded[n], t) for n, t in saved.items())


def test_keeps_the_newest_and_holds_no_pickle(tmp_path):
    run_on_ranks(2, save, tmp_path, ParallelConfig(), [1, 2, 10])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_10", "step_2"]
    assert (tmp_path / "latest").resolve().name == "step_10"
    files = {p.name for p in (tmp_path / "step_10").iterdir()}
    assert {f.rsplit(".", 1)[1] for f in files} == {"safetensors", "json"}
    assert set(read_manifest(tmp_path / "step_10")["files"]) == files - {"manifest.json"}


def flips(folder):
    """One bit of a byte of every file: at both ends, in the middle, and at 20 drawn places. Restores the file."""
    draw = random.Random(0)
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        content = file.read_bytes()
        places = {0, len(content) // 2, len(content) - 1} | {draw.randrange(len(content)) for _ in range(20)}
        for place in sorted(places):
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            yield file, place
        file.write_bytes(content)


def cuts(folder):
    """Every file cut off, made longer, and gone. Restores the file."""
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        content = file.read_bytes()
        for other in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
            file.write_bytes(other)
            yield file, len(other)
        file.unlink()
        yield file, None
        file.write_bytes(content)


def test_every_damage_to_every_file_is_named(tmp_path):
    run_on_ranks(2, save, tmp_path, ParallelConfig(), [1])
    path = tmp_path / "step_1"
    verify_files(path)
    number = 0
    for file, place in chain(flips(path), cuts(path)):
        named = path if place is None and file.name == "manifest.json" else file
        with pytest.raises(CheckpointError, match=re.escape(str(named))):
            verify_files(path)
        number += 1
    assert number >= 3 * 23
    verify_files(path)


def test_swapped_and_foreign_files_are_named(tmp_path):
    run_on_ranks(2, save, tmp_path, ParallelConfig(), [1, 2])
    path = tmp_path / "step_2"
    one, other = sorted(path.glob("*.safetensors"))[:2]
    contents = one.read_bytes(), other.read_bytes()
    assert contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    with pytest.raises(CheckpointError, match=f"{one.name}|{other.name}"):
        verify_files(path)
    one.write_bytes(contents[0])
    other.write_bytes(contents[1])
    (path / ".metadata").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r".metadata: is not in the manifest"):
        verify_files(path)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_is_never_executed(tmp_path):
    """Under the name of any file of a checkpoint, with a manifest that vouches for it."""
    checkpoints, proof = Checkpoints(tmp_path / "run", 2, runtime.start(60)), tmp_path / "executed"
    path = checkpoints.save(1, {"a": torch.ones(4)}, {})
    content = pickle.dumps(Malicious(f"touch {proof}"))
    pickle.loads(content)
    assert proof.exists()  # it would
    proof.unlink()

    manifest, kept = read_manifest(path), {file.name: file.read_bytes() for file in path.iterdir()}
    assert len(manifest["files"]) >= 1
    for name in [*manifest["files"], ".metadata"]:
        (path / name).write_bytes(content)
        facts = {"bytes": len(content), "sha256": sha256(path / name)}
        write_manifest(path / "manifest.json", manifest | {"files": manifest["files"] | {name: facts}})
        loaded = {"a": torch.zeros(4)}
        if name.endswith(".safetensors") and name in kept:
            with pytest.raises(UserError, match=r"no whole safetensors file \(.*header too large"):
                checkpoints.verify(path)
            with pytest.raises(CheckpointError, match=r"cannot be read: on rank 0: .*header too large"):
                checkpoints.load(path, read_manifest(path), loaded)
        else:
            newest = checkpoints.newest()
            assert newest is not None  # the manifest vouches
            checkpoints.load(*newest, loaded)
            assert torch.equal(loaded["a"], torch.ones(4))
        assert not proof.exists()
        (path / name).unlink()
        for file, before in kept.items():
            (path / file).write_bytes(before)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        checkpoints.newest()
    assert not proof.exists()


def test_damage_is_passed_over_and_the_previous_commit_is_used(tmp_path, capsys):
    run_on_ranks(2, save, tmp_path, ParallelConfig(), [1, 2])
    file = sorted((tmp_path / "step_2").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    with pytest.raises(UserError, match=rf"{file}: \d+ bytes, the manifest says"):
        checkpoints.verify(tmp_path / "step_2")
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[0].name == "step_1"
    assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{}", '{"format": "other"}'])
def test_a_folder_without_a_valid_manifest_does_not_exist(tmp_path, content):
    run_on_ranks(1, save, tmp_path, ParallelConfig(), [1, 2])
    (tmp_path / "step_2" / "manifest.json").write_text(content)
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_8.tmp-1234").mkdir()
    newest = Checkpoints(tmp_path, 2, runtime.start(60)).newest()
    assert newest is not None
    assert newest[0].name == "step_1"
    with pytest.raises(CheckpointError, match="so it is no checkpoint"):
        read_manifest(tmp_path / "step_7")


def test_what_was_just_saved_stays(tmp_path):
    """Beside later ones that are refused."""
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    for step in (500, 1000, 100):
        saved = checkpoints.save(step, {"a": torch.ones(4)}, {})
        for file in saved.glob("*.safetensors"):
            file.write_bytes(b"") if step > 100 else None
    assert verify_files(tmp_path / "step_100")["step"] == 100
    assert (tmp_path / "latest").resolve().name == "step_100"


def test_another_model_is_refused(tmp_path):
    run_on_ranks(1, save, tmp_path, ParallelConfig(), [1])
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    path, manifest = tmp_path / "step_1", checkpoints.verify(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="in only one of them"):
        checkpoints.load(path, manifest, {"model.embedding.weight": torch.zeros(8192, 32)})
    other = {name: torch.zeros(3, 3, dtype=torch.bfloat16) for name in manifest["tensors"]}
    with pytest.raises(CheckpointError, match=r"is float32 \[.*\], the run's is bfloat16 \[3, 3\]; give the conf"):
        checkpoints.load(path, manifest, other)


def test_a_heads_weight_by_its_name_of_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    before = {"model.output_weight": torch.arange(6.0), "optimizer.exp_avg.output_weight": torch.arange(6.0) + 9}
    path = checkpoints.save(1, before, {})
    loaded = {name.replace("output_weight", "head.weight"): torch.zeros(6) for name in before}
    checkpoints.load(path, checkpoints.verify(path), loaded)
    assert [x.tolist() for x in loaded.values()] == [x.tolist() for x in before.values()]
    [file] = export_weights(path, tmp_path / "out", torch.float32)
    [(name, exported)] = load_file(file).items()
    assert (name, exported.tolist()) == ("head.weight", before["model.output_weight"].tolist())


def test_steps_after_the_one_resumed_from_are_set_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, runtime.start(60))
    checkpoints.save(200, {"a": torch.ones(4)}, {})
    (tmp_path / "step_200_backup").mkdir()
    (tmp_path / "step_200_backup" / "manifest.json").write_text("{}")  # no step of this run, and no trouble
    checkpoints.set_aside_after(100)
    checkpoints.save(150, {"a": torch.zeros(4)}, {})
    assert [p.name for p in checkpoints.committed()] == ["step_150"]
    assert (tmp_path / "latest").resolve().name == "step_150"
    assert len(list(tmp_path.glob("abandoned_step_200_*"))) == 1


def test_safetensors_are_what_the_library_reads(tmp_path):
    tensors = {
        "whole": torch.randn(3, 5), "of half the bits": torch.randn(7).bfloat16(), "a number": torch.tensor(2.5),
        "turned": torch.randn(4, 6).T, "empty": torch.empty(0, 3), "double": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    assert load_file(tmp_path / "a.safetensors").keys() == tensors.keys()
    assert all(torch.equal(load_file(tmp_path / "a.safetensors")[name], value) for name, value in tensors.items())
    assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failed_save_leaves_the_previous_one(tmp_path, monkeypatch, code):
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    checkpoints.save(1, {"a": torch.ones(4)}, {})

    def fails(*_arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("longctx.checkpoint.write_safetensors", fails)
    with pytest.raises(UserError, match=os.strerror(code)):
        checkpoints.save(2, {"a": torch.ones(4)}, {})
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[0].name == "step_1"
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_failed_export_says_what_the_disk_refuses(tmp_path, monkeypatch, code):
    path = Checkpoints(tmp_path, 1, runtime.start(60)).save(1, {"model.a": torch.ones(500_000)}, {})

    def fails(*_arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("longctx.hugging_face.export.write_safetensors", fails)
    needed = ".* free, about 1.0 MB needed" if code == errno.ENOSPC else "$"
    with pytest.raises(CheckpointError, match=f"out: {os.strerror(code)}{needed}"):
        export_weights(path, tmp_path / "out", torch.bfloat16)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_the_tool(tmp_path):
    """list, verify and export, as a user runs them."""
    whole = run_on_ranks(2, save, tmp_path / "checkpoints", ParallelConfig(), [3, 4])[0]
    root = ROOT

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/checkpoint.py", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(root)})

    assert [line.split(":")[0] for line in run("list", str(tmp_path)).stdout.splitlines()] == ["step_3", "step_4"]
    good = run("verify", str(tmp_path))
    assert good.returncode == 0
    assert good.stdout.count("every byte as written") == 2
    result = run("export", str(tmp_path / "checkpoints" / "latest"), "--output", str(tmp_path / "weights"))
    assert result.returncode == 0, result.stderr
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    assert {f"model.{name}" for name in weights} == {name for name in whole if name.startswith("model.")}
    assert all(torch.equal(weights[name], whole[f"model.{name}"]) for name in weights)

    file = sorted((tmp_path / "checkpoints" / "step_4").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    bad = run("verify", str(tmp_path))
    assert bad.returncode == 1
    assert f"step_4: REFUSED: {file}: " in bad.stdout
    assert "step_3: " in bad.stdout
    nothing = run("list", str(tmp_path / "weights"))
    assert nothing.returncode == 1
    assert "no checkpoints in it" in nothing.stderr


# kills ---------------------------------------------------------------------------------------------------------------

POINTS = ["after a shard", "before the manifest", "before the rename", "before latest", "before the purge"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def saves_until_killed(rank, folder, is_asynchronous, victim, point, at_step):
    """State of step s is all s. At `point` of the save of `at_step` the victim (a rank, or 2 for all) is killed."""
    from longctx import checkpoint, files

    checkpoints = Checkpoints(folder, 2, runtime.start(60))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    now = 0

    def deadly(function, name):
        def wrapped(*arguments, **keywords):
            if point == name and now == at_step and victim in (rank, 2):
                die()
            return function(*arguments, **keywords)

        return wrapped

    checkpoints._hash_files = deadly(checkpoints._hash_files, "after a shard")
    files.write_manifest = deadly(files.write_manifest, "before the manifest")
    Path.rename = deadly(Path.rename, "before the rename")
    checkpoints._point = deadly(checkpoints._point, "before latest")
    checkpoint.list_checkpoints = deadly(checkpoint.list_checkpoints, "before the purge")
    for step in range(1, 1000):
        state = {
            "model.a": distribute_tensor(torch.full((64, 32), float(step)), mesh, [Shard(0)]),
            "model.b": torch.full((1000,), float(step)),
        }
        now = step
        (folder.parent / f"begun_{rank}").write_text(str(step))
        if is_asynchronous:
            checkpoints.save_in_background(step, state, {"consumed": step})
            checkpoints.wait()
        else:
            checkpoints.save(step, state, {"consumed": step})


def load_after_a_kill(_rank, folder):
    checkpoints = Checkpoints(folder, 2, runtime.start(60))
    newest = checkpoints.newest()
    if newest is None:
        return 0
    state = {"model.a": torch.zeros(64, 32), "model.b": torch.zeros(1000)}
    checkpoints.load(*newest, state)
    step = newest[1]["step"]
    assert all((tensor == step).all() for tensor in state.values())
    assert newest[1]["facts"] == {"consumed": step}
    latest = folder / "latest"
    assert not latest.is_symlink() or latest.exists()
    return step


def kill_during_saves(folder: Path, is_asynchronous: bool, victim: int, point: str, after_s: float) -> None:
    """Kills ranks at a named point of the third save, or all of them some time after the first; the newest loads."""
    folder = folder / "checkpoints"
    folder.mkdir(parents=True)
    arguments = saves_until_killed, folder, is_asynchronous, victim, point, 3
    with started_ranks(2, *arguments) as (ranks, _):
        if point in POINTS:
            ranks[0 if victim == 2 else victim].join(60)
            assert ranks[0 if victim == 2 else victim].exitcode == -signal.SIGKILL
        else:
            while not (folder / "step_1").exists():
                assert all(process.is_alive() for process in ranks)
                time.sleep(0.01)
            time.sleep(after_s)
    begun = max(int((folder.parent / f"begun_{rank}").read_text() or 0) for rank in range(2))  # killed while it wrote
    assert load_after_a_kill(0, folder) >= max(1, begun - 1)


@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["blocking", "in background"])
@pytest.mark.parametrize("point", [*POINTS, "anywhere"])
def test_killed_while_saving(tmp_path, is_asynchronous, point):
    """One checkpoint is lost at most. LONGCTX_KILLS=200 makes as many in each case, of all ranks or of one."""
    draw = random.Random(point)
    for number in range(int(os.environ.get("LONGCTX_KILLS", "1"))):
        # rank 0 writes manifests and renames
        victim = draw.choice([0, 1, 2]) if point == "after a shard" else draw.choice([0, 2])
        kill_during_saves(tmp_path / str(number), is_asynchronous, victim, point, draw.uniform(0, 0.3))


def saves_of_which_one_fails(rank, folder):
    """The disk of rank 1 is full in the second: both ranks' messages, and the newest checkpoint's value."""
    checkpoints = Checkpoints(folder, 2, runtime.start(60))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    state = {"a": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}
    checkpoints.save_in_background(1, state, {})
    state["a"].to_local().fill_(7)  # the copy is what counts
    assert checkpoints.wait() == folder / "step_1"
    if rank == 1:
        ShardWriter.write_data = full_disk
    checkpoints.save_in_background(2, state, {})
    with pytest.raises(UserError) as caught:
        checkpoints.wait()
    newest = checkpoints.newest()
    assert newest is not None
    loaded = {"a": torch.zeros(4)}
    checkpoints.load(*newest, loaded)
    return str(caught.value), loaded["a"], sorted(path.name for path in folder.iterdir())


def save_with_losses(_rank, folder):
    checkpoints = Checkpoints(folder, 1, runtime.start(60))
    links = []
    for step, loss in enumerate((None, 3.0, 2.0, 4.0, None, 1.5)):
        checkpoints.save(step, {"a": torch.ones(4)}, {} if loss is None else {"loss/val": loss})
        links.append((folder / "best").resolve().name if (folder / "best").exists() else None)
    names = sorted(path.name for path in folder.iterdir())
    mode = next((folder / "step_5").glob("*.safetensors")).stat().st_mode
    checkpoints.save(6, {"a": torch.ones(4)}, {})
    checkpoints.record(folder / "step_6", {"loss/val": 1.0})
    checkpoints.verify(folder / "step_6")
    links.append((folder / "best").resolve().name)
    checkpoints.set_aside_after(5)
    links.append((folder / "best").resolve().name)
    checkpoints.set_aside_after(-1)
    return links, names, mode & 0o777, (folder / "best").is_symlink()


def test_the_best_stays(tmp_path):
    """Of one that keeps a single checkpoint, the newest and the best; what is set aside is neither."""
    links, names, mode, is_left = run_on_ranks(1, save_with_losses, tmp_path)[0]
    assert links == [None, "step_1", "step_2", "step_2", "step_2", "step_5", "step_6", "step_5"]
    assert names == ["best", "latest", "step_5"]
    (tmp_path / "usual").touch()
    assert mode == (tmp_path / "usual").stat().st_mode & 0o777
    assert not is_left


def save_large(_rank, folder):
    """Bytes of Python objects at the peak of a save of 32 MB, and what is read back."""
    checkpoints = Checkpoints(folder, 2, runtime.start(60))
    state = {"a": torch.arange(1 << 22, dtype=torch.float32), "b": torch.ones(1 << 22)}
    tracemalloc.start()
    path = checkpoints.save(1, state, {})
    _, peak = tracemalloc.get_traced_memory()
    loaded = {name: torch.zeros(1 << 22) for name in state}
    checkpoints.load(path, checkpoints.verify(path), loaded)
    return peak, all(bool((loaded[name] == state[name]).all()) for name in state)


def test_files_are_written_from_the_tensors_memory(tmp_path):
    """As bytes of Python they would be made twice, and training would stand still meanwhile."""
    peak, is_equal = run_on_ranks(1, save_large, tmp_path)[0]
    assert peak < 4e6
    assert is_equal


def full_disk(*_arguments):
    raise OSError(28, "No space left on device")


def test_a_background_save_that_fails_on_one_rank_fails_on_all(tmp_path):
    for message, value, names in run_on_ranks(2, saves_of_which_one_fails, tmp_path):
        assert re.search(r"saving to .*step_2.tmp-.* failed on rank 1: .*No space left on device", message)
        assert torch.equal(value, torch.ones(4))
        assert names == ["latest", "step_1"]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, 9, runtime.start(60))
    for step, loss in ((1, math.nan), (2, 3.0), (3, 2.0)):
        checkpoints.save(step, {}, {BEST_BY: loss})
    assert (tmp_path / "best").resolve().name == "step_3"


def test_an_old_validation_loss_is_not_of_a_later_checkpoint(tmp_path, corpus):
    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        trainer.progress.validated, trainer.progress.step = (1, 2.0), 2
        assert BEST_BY not in trainer.saving.facts()
        trainer.progress.validated = (2, 2.0)
        assert trainer.saving.facts()[BEST_BY] == 2.0


def test_each_file_is_read_by_one_rank(tmp_path):
    """Whichever is damaged, one of four finds it."""
    folder = tmp_path / "step_1"
    folder.mkdir()
    names = [f"part_{number}.bin" for number in range(4)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    files = {name: {"bytes": len(name), "sha256": sha256(folder / name)} for name in names}
    write_manifest(folder / "manifest.json", {"format": FORMAT, "step": 1, "files": files, "tensors": {}, "facts": {}})
    for number, name in enumerate(names):
        (folder / name).write_bytes(name.encode()[::-1])
        for rank in set(range(4)) - {number}:
            verify_files(folder, rank, 4)
        with pytest.raises(CheckpointError, match=f"{name}: its sha256 is not the manifest's"):
            verify_files(folder, number, 4)
        (folder / name).write_bytes(name.encode())


def test_a_step_costs_what_all_ranks_take():
    progress = Progress()
    progress.add_costs({"perf/step_s": 2.0, "perf/tflops_per_gpu": 500.0}, 4)
    assert (progress.trained_s, progress.costs()) == (2.0, {"run/device_s": 8.0, "run/pflop": 4.0})
