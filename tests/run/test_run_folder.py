"""The files of a run: one writer, one folder for all machines, and nothing in them that ends a run without need."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from torch.distributed.tensor import Shard, distribute_tensor

from longctx import checkpoint, resume, runtime
from longctx import run as run_module
from longctx import run_folder as run_folder_module
from longctx.checkpoint import (
    BEST_BY,
    VALIDATED_ON,
    CheckpointError,
    Checkpoints,
    list_checkpoints,
    read_manifest,
    verify_files,
)
from longctx.config import Config, FusedImplementation, LoggingConfig, Schedule, WandbMode
from longctx.errors import UserError
from longctx.files import write_manifest
from longctx.hugging_face.export import model_of
from longctx.local_part import local_of
from longctx.metrics import Metrics
from longctx.metrics_file import read_metrics
from longctx.run_folder import RunFolder
from longctx.saving import Saving
from ranks import run_on_ranks
from runs import ROOT, run_info, small_config, train, trainer_of


def go(config: Config):
    return train(config)


# one writer, one folder ----------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from longctx import runtime
from longctx.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]), runtime.start(60))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_of_one_name_are_noticed(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__steps=3)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config.run_folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        UserError, match=f"another run writes it: process {holder.pid} on .*; wait for it, end it, or give"
    ):
        go(config)
    holder.kill()
    holder.wait()
    assert go(config).is_complete  # a killed one's lock is taken over


def folders_of_two_machines(rank, folder):
    """Rank 1 sees another folder under the same path."""
    if rank == 1:
        (folder / "of machine 1" / "checkpoints").mkdir(parents=True)
        run_folder_module._find_word, find = (
            lambda path, *rest: find(folder / "of machine 1", *rest),
            (run_folder_module._find_word),
        )
    try:
        RunFolder(folder / "run", runtime.start(60))
    except UserError as error:
        return str(error)


def test_folders_that_machines_do_not_share_are_refused_at_start(tmp_path):
    for message in run_on_ranks(2, folders_of_two_machines, tmp_path):
        assert "is not the one that rank 0 writes, so each machine would keep a part of every checkpoint" in message
    assert not list((tmp_path / "run").glob(".word*"))


def save_where_rank_1_writes_elsewhere(rank, folder):
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    checkpoints = Checkpoints(folder / "run", 2, runtime.start(60))
    tensors = {"a": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])}
    if rank == 1:
        write = checkpoint._write

        def elsewhere(tensors, work, group):
            names = write(tensors, work, group)
            (folder / "elsewhere").mkdir()
            for name in names:
                shutil.move(work / name, folder / "elsewhere" / name)
            return names

        checkpoint._write = elsewhere
    try:
        checkpoints.save(1, tensors, {})
    except UserError as error:
        return str(error)


def test_a_save_that_one_machine_does_not_see_is_no_checkpoint(tmp_path):
    for message in run_on_ranks(2, save_where_rank_1_writes_elsewhere, tmp_path):
        assert "was written by another rank and is not seen by rank 0 (1 are not)" in message
    assert list_checkpoints(tmp_path / "run") == []


def saved(folder: Path, steps: int = 1, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep, runtime.start(60))
    for step in range(1, steps + 1):
        checkpoints.save(step, {"a": torch.arange(6.0), "b": torch.ones(2, 3)}, {"step": step})
    return checkpoints


def test_half_of_the_shards_are_not_every_byte(tmp_path):
    """What an earlier version has committed on machines that shared no folder: all that is named is there."""
    saved(tmp_path)
    manifest = read_manifest(tmp_path / "step_1")
    write_manifest(tmp_path / "step_1" / "manifest.json", manifest | {"tensors": {"a": "float32 [12]"}})
    with pytest.raises(CheckpointError, match="its files hold 6 of the 12 numbers of a: a part was not saved here"):
        verify_files(tmp_path / "step_1")


@pytest.mark.parametrize("name", ["../../x", "/abs/x"])
def test_a_checkpoint_that_names_files_elsewhere_is_refused(tmp_path, name):
    saved(tmp_path)
    manifest = read_manifest(tmp_path / "step_1")
    [facts] = manifest["files"].values()
    write_manifest(tmp_path / "step_1" / "manifest.json", manifest | {"files": {name: facts}})
    with pytest.raises(CheckpointError, match=f"its manifest names '{name}', which is no file of this folder"):
        verify_files(tmp_path / "step_1")


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path):
    saved(tmp_path)
    [shard] = (tmp_path / "step_1").glob("*.safetensors")
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link out of its folder, and is not read"):
        verify_files(tmp_path / "step_1")


# what is in the way --------------------------------------------------------------------------------------------------


def test_old_checkpoints_that_cannot_be_removed_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    checkpoints = saved(tmp_path, steps=2, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_2"]
    shutil.move(tmp_path / "step_2", tmp_path / "other disk")
    (tmp_path / "step_2").symlink_to(tmp_path / "other disk")
    checkpoints.save(3, {"a": torch.ones(1)}, {})
    assert (
        f"the old checkpoint {tmp_path}/step_2 is not removed: it is a link to another place" in capsys.readouterr().out
    )
    (tmp_path / "step_2").unlink()

    def refuses(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuses)
    checkpoints.save(4, {"a": torch.ones(1)}, {})
    assert f"the old checkpoint {tmp_path}/step_3 is not removed: Permission denied" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_4"]


def test_a_file_system_without_links(tmp_path, monkeypatch, capsys):
    def refuses(*_arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuses)
    checkpoints = saved(tmp_path, steps=2)
    assert "latest does not point to step_2: Operation not permitted" in capsys.readouterr().out
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[0].name == "step_2"


@pytest.mark.parametrize(
    "damage", [b"[" * 200_000, b"null", b"\xff\xfe", b""], ids=["brackets", "null", "bytes", "empty"]
)
def test_a_manifest_that_cannot_be_read_is_passed_over(tmp_path, damage, capsys):
    checkpoints = saved(tmp_path, steps=2)
    (tmp_path / "step_1" / "manifest.json").write_bytes(damage)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[0].name == "step_2"
    (tmp_path / "step_2" / "manifest.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be used"):
        checkpoints.newest()
    assert f"checkpoint refused: {tmp_path}/step_1/manifest.json: " in capsys.readouterr().out
    checkpoints.save(3, {"a": torch.ones(1)}, {})
    assert checkpoints.newest()[0].name == "step_3"  # pyright: ignore[reportOptionalSubscript]


def test_the_last_checkpoint_before_the_rate_falls_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, runtime.start(60), undecayed_until=3)
    for step in range(1, 7):
        checkpoints.save(step, {"a": torch.ones(1)}, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_3", "step_6"]


@pytest.mark.parametrize("history", [b"null", b"[]", b'{"restarts": "two"}', b"\xff", b'{"started_at": 1e400}'])
def test_files_of_a_run_that_cannot_be_read_are_set_aside(tmp_path, corpus, history, capsys):
    config = small_config(tmp_path, corpus, optim__steps=4)
    with trainer_of(config) as trainer:
        trainer.metrics.log(1, trainer.train_step()[0])
        trainer.save()
    folder = config.run_folder
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": "x"}\n{"step": 2')
    (folder / "history.json").write_bytes(history)
    assert go(config).is_complete
    said = capsys.readouterr().out
    assert "metrics.jsonl: 3 lines cannot be read; they are in " in said
    [aside] = folder.glob("metrics.unreadable-*.jsonl")
    assert aside.read_bytes() == b'\xff\xfe\n{"step": "x"}\n{"step": 2\n'
    assert [int(r["step"]) for r in read_metrics(folder / "metrics.jsonl") if "loss/train" in r] == [1, 2, 3, 4]
    assert "history.json: holds no history of a run; it is " in said
    assert [path.read_bytes() for path in folder.glob("history.unreadable-*.json")] == [history]


def test_a_complete_run_that_is_started_once_more_was_not_restarted(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__steps=2)
    restarts = []
    for steps in (2, 2, 3):
        config.optim.steps = steps
        assert go(config).is_complete
        restarts.append(json.loads((config.run_folder / "history.json").read_bytes())["restarts"])
    assert restarts == [0, 0, 1]


# consoles and disks that take no more --------------------------------------------------------------------------------


def in_shell(corpus: Path, folder: Path, command: str) -> subprocess.CompletedProcess:
    words = (
        f"recipe=gpt_tiny name=a data=prepared data.folder={corpus} model.width=32 model.layers=1 logging=no_wandb "
        "data.sequence_length=64 validation.sample_tokens=0 logging.every_steps=1 optim.steps=3"
    )
    command = command.replace("TRAIN", f"{sys.executable} {ROOT / 'train.py'} {words}")
    return subprocess.run(["/bin/bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("TRAIN | head -1", id="closed pipe"),
        pytest.param("TRAIN 2>&-", id="no stderr", marks=pytest.mark.slow),
        pytest.param("TRAIN >&-", id="no stdout", marks=pytest.mark.slow),
        pytest.param("TRAIN > /dev/full", id="full disk under the log", marks=pytest.mark.slow),
    ],
)
def test_a_console_that_takes_no_more_does_not_end_a_run(tmp_path, corpus, command):
    result = in_shell(corpus, tmp_path, command)
    assert "Traceback" not in result.stderr
    assert "Error" not in result.stderr
    rows = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss/train" in r] == [1, 2, 3]
    assert verify_files(tmp_path / "runs" / "a" / "checkpoints" / "step_3")["step"] == 3


def test_a_disk_that_is_full_at_the_report_ends_nothing(tmp_path, corpus, monkeypatch, capsys):
    def full(path, *_arguments, **_words):
        raise OSError(28, "No space left on device", str(path))

    config = small_config(tmp_path, corpus, optim__steps=3)
    monkeypatch.setattr(Path, "write_text", full)
    assert go(config).is_complete
    said = capsys.readouterr().out
    assert f"no report: {config.run_folder}/report.html: No space left on device" in said
    assert f"{config.run_folder}/tokenizer.json: not written, so exports have to name a tokenizer" in said


def test_a_disk_that_is_full_at_the_last_lines_ends_nothing(tmp_path, capsys):
    """What could not be written is tried again when the file is closed; W&B and the folder are closed all the same."""
    config = Config(name="a", folder=str(tmp_path), logging=LoggingConfig(wandb=WandbMode.disabled))
    config.run_folder.mkdir()
    metrics = Metrics(run_info(config), {"device": "CPU", "ranks": 1}, 0, True)
    metrics.file.close()
    metrics.file = open("/dev/full", "w")  # noqa: SIM115
    metrics.log(1, {"loss/train": 1.0})
    metrics.close()
    assert "metrics.jsonl: step 1 not written: [Errno 28] No space left on device" in capsys.readouterr().out
    assert json.loads((config.run_folder / "run.json").read_text())["ended"] == "complete"


def test_a_folder_that_is_renamed_ends_a_run_with_a_message(tmp_path, corpus):
    config = small_config(tmp_path, corpus, checkpoint__every_steps=2)

    def rename_and_train():
        with trainer_of(config) as trainer:
            trainer.train_step()
            config.run_folder.rename(tmp_path / "renamed")
            trainer.run()

    with pytest.raises(UserError, match="No such file or directory"):
        rename_and_train()


def test_a_checkpoint_on_another_disk_is_still_of_the_run(tmp_path, corpus):
    """A link in its place: the run goes on from it, and no checkpoint is set aside."""
    config = small_config(tmp_path / "runs", corpus, optim__steps=4, checkpoint__every_steps=2)
    train(config)
    folder, disk = config.run_folder / "checkpoints", tmp_path / "disk"
    disk.mkdir()
    (folder / "step_4").rename(disk / "step_4")
    (folder / "step_4").symlink_to(disk / "step_4")
    config.optim.steps = 6
    with trainer_of(config) as trainer:
        assert (trainer.step, trainer.saving.saved_step, trainer.saving.is_branching) == (4, 4, False)
        assert trainer.progress.trained_s > 0
        trainer.saving.record_loss(1.5)
    assert [path.name for path in list_checkpoints(folder)] == ["step_2", "step_4"]
    assert read_manifest(disk / "step_4")["facts"][BEST_BY] == 1.5
    assert [path.name for path in disk.iterdir()] == ["step_4"]
    config.seed = 7
    with pytest.raises(UserError, match="was trained on another order of sequences: seed was 0, is 7"):
        train(config)


def test_a_run_goes_back_as_often_as_it_is_told_and_goes_on_where_it_was(tmp_path, corpus, capsys):
    config = small_config(tmp_path, corpus, optim__steps=4, checkpoint__every_steps=2, checkpoint__keep=5)
    train(config)
    config.checkpoint.resume = str(config.run_folder / "checkpoints" / "step_2")
    for lr in (1e-3, 2e-3):  # the first attempt was none, so once more from there
        config.optim.lr = lr
        with trainer_of(config) as trainer:
            assert trainer.step == 2
        train(config)
    config.checkpoint.keep = 4
    config.model.fused_ops, config.data.sequences_per_micro_batch = FusedImplementation.reference, 1
    with trainer_of(config) as trainer:  # the same again, as a queue may give it, and in what it learns by
        assert trainer.step == 4
    config.checkpoint.resume = "auto"
    with trainer_of(config) as trainer:
        assert (trainer.step, trainer.saving.origin) == (4, None)


def test_a_run_that_went_back_before_goes_on_where_it_was(tmp_path, corpus, monkeypatch):
    """Earlier versions kept where it went back to as where it began."""
    config = small_config(tmp_path, corpus, optim__steps=4, checkpoint__every_steps=2)
    train(config)
    config.checkpoint.resume = str(config.run_folder / "checkpoints" / "step_2")
    facts = Saving.facts
    before = {"resumed_from": config.checkpoint.resume, "went_back_to": None}
    monkeypatch.setattr(Saving, "facts", lambda self: facts(self) | before)
    train(config)
    with trainer_of(config) as trainer:
        assert (trainer.step, trainer.saving.origin) == (4, None)


def goes_back(rank: int, config: Config) -> int:
    """The step that a run is at on ranks whose corpora have paths of their own."""
    config.data.folder = f"{config.data.folder}{rank}"
    with trainer_of(config) as trainer:
        step = trainer.step
        if step == 2:
            trainer.train_step()
            trainer.save()
        return step


def test_ranks_go_back_together(tmp_path, corpus):
    for rank in range(2):
        (tmp_path / f"corpus{rank}").symlink_to(corpus)
    config = small_config(tmp_path, corpus, optim__steps=3, checkpoint__every_steps=2)
    train(config)
    config.data.folder, config.optim.steps = str(tmp_path / "corpus"), 6
    config.checkpoint.resume = str(config.run_folder / "checkpoints" / "step_2")
    assert run_on_ranks(2, goes_back, config) == [2, 2]
    assert run_on_ranks(2, goes_back, config) == [3, 3]


def test_a_branch_that_has_gone_back_is_still_one(tmp_path, corpus):
    """And starts again with its first command."""
    train(small_config(tmp_path, corpus, name="origin", optim__steps=2))
    start = str(tmp_path / "origin" / "checkpoints" / "step_2")
    branch = small_config(tmp_path, corpus, name="branch", optim__steps=4, checkpoint__resume=start)
    branch.checkpoint.every_steps, branch.checkpoint.keep = 1, 5
    train(branch)
    branch.checkpoint.resume = str(branch.run_folder / "checkpoints" / "step_3")
    train(branch)
    branch.checkpoint.resume = start
    with trainer_of(branch) as trainer:
        assert (trainer.step, trainer.saving.origin) == (4, start)


def test_the_best_checkpoint_is_of_those_validated_alike(tmp_path):
    """A loss of fewer held-out sequences says nothing beside one of more."""
    checkpoints = Checkpoints(tmp_path, 9, runtime.start(60), None)
    for step, loss, sequences in ((1, 1.0, 1), (2, 3.0, 32), (3, 2.0, 32), (4, 2.5, 32)):
        checkpoints.save(step, {}, {BEST_BY: loss, VALIDATED_ON: sequences})
    assert (tmp_path / "best").resolve().name == "step_3"
    checkpoints.save(5, {}, {})  # not validated
    assert (tmp_path / "best").resolve().name == "step_3"


def test_values_from_the_environment_are_compared_and_exported(tmp_path, corpus, monkeypatch):
    """A checkpoint holds what they were, not where they came from."""
    config = small_config(tmp_path, corpus, optim__steps=2)
    written = yaml.safe_load(run_info(config).config_yaml)
    written["model"]["rotary"]["theta"] = "${oc.env:THETA}"
    config.model.rotary.theta = 5e5
    info = dataclasses.replace(run_info(config), config_yaml=yaml.safe_dump(written))
    run_module.train(info)
    manifest = read_manifest(config.run_folder / "checkpoints" / "latest")
    assert model_of(manifest)[0].rotary.theta == 5e5
    config.model.rotary.theta, config.optim.steps = 1e4, 4
    with pytest.raises(UserError, match=r"with model.rotary.theta 500000.0 -> 10000.0 this would be another run"):
        run_module.train(dataclasses.replace(info, config=config))
    earlier = {"model": {"rotary": {"theta": "${oc.env:THETA}"}}}  # as versions before kept it
    assert resume.changes(yaml.safe_dump(earlier), {"model": {"rotary": {"theta": 1e4}}}) == {}
    texts = {"logging": {"wandb_notes": "${b"}, "validation": {"sample_prompts": ["cost ${5"]}}
    assert resume.changes(resume.as_yaml(texts), texts) == {}
    spans = {"data": {"curriculum": {0: 64, 0.5: 0}}}
    assert resume.changes(spans, {"data": {"curriculum": {"0": 64, "0.5": 0}}}) == {}


def saved_embedding(folder: Path) -> torch.Tensor:
    """Of a run of one process."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor("model.embedding.weight")


def test_a_branch_from_the_latest_of_a_run_that_goes_on_is_of_one_step(tmp_path, corpus, monkeypatch):
    """`latest` moves between the check of the files and the reading of the tensors."""
    config = small_config(tmp_path, corpus, optim__steps=4, checkpoint__every_steps=2)
    train(config)
    latest = config.run_folder / "checkpoints" / "latest"
    verify = Checkpoints.verify
    latest.unlink()
    latest.symlink_to("step_2")

    def moved(self, path):
        manifest = verify(self, path)
        latest.unlink()
        latest.symlink_to("step_4")
        return manifest

    monkeypatch.setattr(Checkpoints, "verify", moved)
    branch = small_config(tmp_path, corpus, name="branch", optim__steps=6, checkpoint__resume=str(latest))
    with trainer_of(branch) as trainer:
        assert (trainer.step, trainer.saving.origin) == (2, str(latest))
        now = local_of(trainer.saving.state()["model.embedding.weight"])
        assert now.equal(saved_embedding(latest.parent / "step_2"))
        assert not now.equal(saved_embedding(latest.parent / "step_4"))


def test_a_branch_takes_no_metrics_of_an_unsaved_run_of_its_name(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=3))
    start = str(tmp_path / "test" / "checkpoints" / "step_3")
    mistaken = small_config(tmp_path, corpus, name="branch", checkpoint__at_end=False)
    with trainer_of(mistaken) as trainer:
        for _ in range(2):
            trainer.metrics.log(trainer.step + 1, {"loss/train": trainer.train_step()[0]["loss/train"]})
    train(small_config(tmp_path, corpus, name="branch", optim__steps=5, checkpoint__resume=start))
    rows = read_metrics(tmp_path / "branch" / "metrics.jsonl")
    assert sorted({row["step"] for row in rows}) == [4, 5]
    assert len(list((tmp_path / "branch").glob("metrics.*.jsonl"))) == 1
    assert rows[0]["run/restarts"] == 0


def test_a_branch_that_starts_again_before_its_first_checkpoint_is_the_same_run(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=3))
    start = tmp_path / "test" / "checkpoints" / "step_3"
    branch = small_config(tmp_path, corpus, name="branch", optim__steps=6, checkpoint__resume=str(start))
    branch.checkpoint.at_end = False
    with trainer_of(branch) as trainer:
        for _ in range(2):
            trainer.metrics.log(trainer.step + 1, {"loss/train": trainer.train_step()[0]["loss/train"]})
    (branch.run_folder / "wandb_id").write_text("abc")
    branch.checkpoint.resume = os.path.relpath(start)
    with trainer_of(branch) as trainer:
        assert (trainer.step, trainer.saving.is_branching) == (3, True)
        history = trainer.metrics.history
        assert (history.restarts, history.lost_steps) == (1, 2)
    assert (branch.run_folder / "wandb_id").read_text() == "abc"
    assert list(branch.run_folder.glob("metrics.*.jsonl")) == []


def test_a_branch_without_a_step_of_its_own_is_refused(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=3))
    start = str(tmp_path / "test" / "checkpoints" / "step_3")
    branch = small_config(tmp_path, corpus, name="branch", optim__steps=2, checkpoint__resume=start)
    with pytest.raises(
        UserError, match=r"is of step 3, .*optim.steps=2 leaves it no step; give optim.steps=5 for 2 more"
    ):
        train(branch)
    assert not (tmp_path / "branch" / "run.json").exists()


def test_a_validation_that_a_signal_prevented_is_made_up_for(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__steps=6, validation__every_steps=2)
    with trainer_of(config) as trainer:
        step = trainer.train_step

        def stopped_in_step_4():
            if trainer.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step()

        trainer.train_step = stopped_in_step_4
        trainer.run()
        assert trainer.step == 4
    train(config)
    rows = read_metrics(config.run_folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss/val" in row] == [2, 4, 6]
    saved = read_manifest(config.run_folder / "checkpoints" / "step_4")["facts"]
    assert saved[BEST_BY] == next(row["loss/val"] for row in rows if row["step"] == 4 and "loss/val" in row)


def test_a_home_folder_is_meant_by_its_sign(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = small_config(Path("~/runs"), corpus, checkpoint__resume="~/runs/a")
    assert config.run_folder == tmp_path / "runs" / "test"
    assert config.checkpoint.branches_from == str(tmp_path / "runs" / "a")


def test_the_last_checkpoint_before_the_rate_fell_is_of_the_whole_run(tmp_path, corpus, capsys):
    """Not only of the schedule of today: what an earlier end had let fall is no place to branch off from."""
    config = small_config(tmp_path, corpus, checkpoint__every_steps=3, checkpoint__keep=1, validation__sequences=0)
    config.optim.schedule, config.optim.decay_fraction = Schedule.wsd, 0.5
    for steps in (6, 12):
        config.optim.steps = steps
        assert go(config).is_complete
        assert "or branch off from before it fell" in capsys.readouterr().out.replace("\n", " ")
        assert sorted(path.name for path in (config.run_folder / "checkpoints").glob("step_*")) == sorted(
            ["step_3", f"step_{steps}"]
        )
