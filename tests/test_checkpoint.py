"""Checkpoints are whole or not there, hold no pickle, and load on any layout."""

from __future__ import annotations

import pytest
import torch
from distributed import run_on_ranks
from helpers import TINY

from longctx import runtime
from longctx.checkpoint import CheckpointError, Checkpoints, read_manifest, state_tensors
from longctx.config import Config, OptimConfig, Optimizer, ParallelConfig, UserError
from longctx.kernels.attention.mask import KeyIntervals
from longctx.optim import Optimizers
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.parallel.strategy import choose_strategy


def make_state(parallel: ParallelConfig, seed: int):
    mesh = make_mesh(parallel, torch.distributed.get_world_size(), "cpu")
    config = Config(model=TINY, parallel=parallel, seed=seed, optim=OptimConfig(optimizer=Optimizer.muon))
    config.precision.compute = config.precision.compute.float32
    model = parallelize(config, mesh, choose_strategy(config, 1), torch.device("cpu"))
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
    (ParallelConfig(tensor=2), 4),
    (ParallelConfig(), 1),
    (ParallelConfig(), 3),
]


@pytest.mark.parametrize(
    ("parallel", "ranks"), [(ParallelConfig(), 2), (ParallelConfig(tensor=2), 4)], ids=["shard 2", "shard 2 x tensor 2"]
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


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte, "its sha256 is not the manifest's"),
        (truncate, r"\d+ bytes, the manifest says"),
        (lambda f: f.unlink(), "missing"),
    ],
)
def test_damage_is_named_and_the_previous_commit_is_used(tmp_path, capsys, damage, message):
    run_on_ranks(2, save, tmp_path, ParallelConfig(), [1, 2])
    file = sorted((tmp_path / "step_2").glob("*.safetensors"))[-1]
    damage(file)
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    with pytest.raises(UserError, match=f"{file}.*{message}"):
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


def test_another_model_is_refused(tmp_path):
    run_on_ranks(1, save, tmp_path, ParallelConfig(), [1])
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    path, manifest = tmp_path / "step_1", checkpoints.verify(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="in only one of them"):
        checkpoints.load(path, manifest, {"model.embedding.weight": torch.zeros(8192, 32)})
    other = {name: torch.zeros(3, 3, dtype=torch.bfloat16) for name in manifest["tensors"]}
    with pytest.raises(CheckpointError, match=r"is float32 \[.*\], the run's is bfloat16 \[3, 3\]; give the run"):
        checkpoints.load(path, manifest, other)


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


def test_failed_save_leaves_the_previous_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60))
    checkpoints.save(1, {"a": torch.ones(4)}, {})

    def full_disk(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longctx.checkpoint._write", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoints.save(2, {"a": torch.ones(4)}, {})
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[0].name == "step_1"
    assert not list(tmp_path.glob("*.tmp-*"))
