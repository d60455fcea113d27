"""What goes wrong in a run, and what it does then: docs/faults.md, line by line."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from longctx import runtime, straggler, validation
from longctx import trainer as trainer_module
from longctx.checkpoint import BEST_BY, Checkpoints, ShardWriter, list_checkpoints, verify_files
from longctx.checkpoint_room import more_at_once
from longctx.config import ModelConfig, Optimizer, ParallelConfig
from longctx.errors import ConfigError, DataError, UserError
from longctx.metrics_file import read_metrics
from longctx.trainer import Trainer
from ranks import run_on_ranks
from runs import ROOT, TORCHRUN, small_config, train, trainer_of


def poison_one_step(_rank, config):
    """On rank 1 the second step's loss is NaN: returns metrics of three steps and whether step two changed anything."""
    with trainer_of(config) as trainer:
        first = trainer.train_step()[0]
        before = [p.detach().clone() for p in trainer.model.parameters()]
        head = trainer.model.head
        hook = head.register_forward_hook(lambda _m, _i, out: out * (math.nan if trainer.runtime.rank == 1 else 1))
        second = trainer.train_step()[0]
        hook.remove()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        third = trainer.train_step()[0]
        losses = [x["loss/train"] for x in (first, second, third)]
        return losses, unchanged, third["optim/skipped_steps"], trainer.saving.facts()["updates"]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path, corpus):
    config = small_config(tmp_path, corpus, parallel=ParallelConfig(context=2))
    for losses, unchanged, skipped, updates in run_on_ranks(2, poison_one_step, config):
        assert math.isfinite(losses[0])
        assert math.isnan(losses[1])
        assert math.isfinite(losses[2])
        assert unchanged
        assert (skipped, updates) == (1, 2)  # which Adam's bias correction goes by when the run is resumed


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_a_disk_without_room_for_the_checkpoints_is_refused_at_start(tmp_path, corpus, monkeypatch, optimizer):
    config = small_config(tmp_path, corpus, checkpoint__every_steps=3, optim__optimizer=optimizer)
    with trainer_of(config) as trainer:
        size = sum(tensor.numel() * tensor.element_size() for tensor in trainer.saving.state().values())
    disk = mock.Mock(total=9 * size, free=3 * size)
    monkeypatch.setattr("longctx.checkpoint_room.shutil.disk_usage", lambda _: disk)
    leftover = config.run_folder / "checkpoints" / "step_3.tmp-0"
    leftover.mkdir()
    with trainer_of(config):  # steps 3, 6 and 8: the newest two, and one while it is written
        assert not leftover.exists()
    disk.free -= 1
    needed = r"10\.\d MB free, 10\.\d MB needed for 3 more" if optimizer == Optimizer.adamw else "for 3 more"
    with pytest.raises(UserError, match=rf"{needed} checkpoints of .*keep=2, .*make room, or set a smaller"):
        trainer_of(config).__enter__()
    disk.total = 0
    with trainer_of(config):
        pass


@pytest.mark.parametrize(("sequences", "every_steps", "keeps_best"), [(4, 4, True), (4, 3, False), (0, 4, False)])
def test_the_best_checkpoint_is_counted_where_steps_that_are_saved_are_validated(
    tmp_path, corpus, monkeypatch, sequences, every_steps, keeps_best
):
    config = small_config(tmp_path, corpus, checkpoint__every_steps=2, checkpoint__at_end=False)
    config.validation.sequences, config.validation.every_steps, config.optim.steps = sequences, every_steps, 6
    asked = mock.Mock()
    monkeypatch.setattr(Checkpoints, "check_room", asked)
    with trainer_of(config):
        start, to_come, _size, counts_best = asked.call_args[0]
    assert (start, to_come, counts_best) == (0, [2, 4], keeps_best)


def saved_at_once(folder: Path, there: list[int], to_come: list[int], keep: int, undecayed_until: int | None) -> int:
    """How many a folder holds at most beyond `there`; the first one is the best."""
    checkpoints = Checkpoints(folder, 9, runtime.start(60), undecayed_until)
    for step in there:
        checkpoints.save(step, {}, {BEST_BY: step})
    checkpoints.keep, most = keep, len(there)
    for step in to_come:
        most = max(most, len(list_checkpoints(folder)) + 1)
        checkpoints.save(step, {}, {BEST_BY: step})
    return most - len(there)


@pytest.mark.parametrize(
    ("keep", "undecayed_until", "there", "to_come", "at_once"),
    [
        (2, None, [], [1, 2, 3, 4, 5, 6], 4),
        (1, None, [], [1, 2, 3, 4], 3),
        (2, 3, [], [1, 2, 3, 4, 5, 6, 7], 5),
        (2, 3, [], [1, 2, 3, 4], 4),
        (2, None, [1, 2, 3], [4], 1),
        (1, None, [1, 2, 3, 4, 5], [6, 7], 1),
        (9, None, [1, 2], [3, 4], 2),
        (1, None, [1], [], 0),
    ],
)
def test_as_many_checkpoints_as_are_there_at_once(tmp_path, keep, undecayed_until, there, to_come, at_once):
    assert more_at_once(there, to_come, keep, undecayed_until, True) == at_once
    assert saved_at_once(tmp_path, there, to_come, keep, undecayed_until) == at_once


def test_the_best_checkpoint_of_before_is_counted(tmp_path, monkeypatch):
    """Of a run that is not validated any more."""
    asked = mock.Mock()
    monkeypatch.setattr("longctx.checkpoint.check_room", asked)
    checkpoints = Checkpoints(tmp_path, 2, runtime.start(60), None)
    for facts, has_best in (({}, False), ({BEST_BY: 1.0}, True)):
        checkpoints.save(1 + has_best, {}, facts)
        checkpoints.check_room(2, [3, 4], 10, False)
        assert asked.call_args[0][-1] is has_best


def test_without_validation_no_best_checkpoint_stays():
    assert more_at_once([], [1, 2, 3, 4], 2, None, False) == 3
    assert more_at_once([1, 2], [3, 4], 2, None, False) == 1
    assert more_at_once([], [1, 2, 3, 4, 5, 6], 2, 1, False) == 4


def steps_while_saving(rank, config, fails):
    """Saves that take a second, or fail on rank 1: the last step, the message, seconds stalled, checkpoints."""
    write_data = ShardWriter.write_data

    def slowly(*arguments):
        time.sleep(1)
        if fails and rank == 1:
            raise OSError(28, "No space left on device")
        return write_data(*arguments)

    with trainer_of(config) as trainer:
        trainer.train_step()  # its buffers are made
        ShardWriter.write_data = slowly
        message = ""
        try:
            trainer.run()
        except UserError as error:
            message = str(error)
        rows = read_metrics(config.run_folder / "metrics.jsonl") if rank == 0 else []
        stalls = [row["time/checkpoint_stall_s"] for row in rows if "time/checkpoint_stall_s" in row]
        return trainer.step, message, stalls, sorted(p.name for p in (config.run_folder / "checkpoints").iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, corpus, fails):
    config = small_config(
        tmp_path, corpus, optim__steps=100_000 if fails else 8, parallel=ParallelConfig(context=2),
        checkpoint__every_steps=2, checkpoint__at_end=False,
    )  # fmt: skip
    if not fails:
        config.checkpoint.every_steps = 5
    results = run_on_ranks(2, steps_while_saving, config, fails)
    (step, message, stalls, names), (other_step, other_message, _, _) = results
    assert step == other_step
    assert message == other_message
    if fails:
        assert 2 < step < 100_000
        assert re.search(r"failed on rank 1: .*No space left on device", message)
        assert names == []
    else:
        assert step == 8
        assert max(stalls) < 0.9  # a blocking save takes the second
        assert names == ["latest", "step_5"]


def test_an_error_lets_the_save_under_way_end(tmp_path, corpus, capsys, monkeypatch):
    hash_files = Checkpoints._hash_files
    monkeypatch.setattr(Checkpoints, "_hash_files", lambda *words: time.sleep(0.5) or hash_files(*words))

    def stop_in_the_middle():
        with trainer_of(small_config(tmp_path, corpus)) as trainer:
            trainer.train_step()
            trainer.save(in_background=True)
            raise UserError("some reason")

    with pytest.raises(UserError, match="some reason"):
        stop_in_the_middle()
    assert f"saved {tmp_path}/test/checkpoints/step_1" in capsys.readouterr().out
    assert verify_files(tmp_path / "test" / "checkpoints" / "step_1")["step"] == 1


def test_many_such_steps_end_the_run(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__max_skipped_steps=3)
    with trainer_of(config) as trainer:
        trainer.model.head.register_forward_hook(lambda _m, _i, out: out * math.inf)
        with pytest.raises(UserError, match="3 steps in a row were not finite"):
            trainer.run()


def interrupted(rank, config, moment):
    """SIGTERM to rank 1 at a moment of its third step, or before the first: whether the run ended, and in how long."""

    def with_signal(function, condition=lambda *_: True):
        def wrapped(*arguments, **keywords):
            if rank == 1 and not sent and condition(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
                sent.append(time.monotonic())
            return function(*arguments, **keywords)

        return wrapped

    sent: list[float] = []
    if moment == "warm-up":
        trainer_module.parallelize = with_signal(trainer_module.parallelize)
    elif moment == "step":
        Trainer.train_step = with_signal(Trainer.train_step, lambda trainer: trainer.step == 3)
    elif moment == "validation":
        validation.validate = with_signal(validation.validate)
    elif moment == "save":
        Checkpoints.save = with_signal(Checkpoints.save)
    elif moment == "any":
        threading.Timer(0.5, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM)).start()
    is_complete = train(config).is_complete
    return is_complete, time.monotonic() - sent[0] if sent else 0.0


@pytest.mark.parametrize(
    "moment", ["warm-up", "step", *(pytest.param(m, marks=pytest.mark.slow) for m in ("validation", "save", "any"))]
)
def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path, corpus, moment):
    config = small_config(
        tmp_path, corpus, optim__steps=100_000, parallel=ParallelConfig(context=2), checkpoint__every_steps=4,
        validation__every_steps=5,
    )  # fmt: skip
    results = run_on_ranks(2, interrupted, config, moment)
    assert [is_complete for is_complete, _ in results] == [False, False]
    assert results[1][1] < 25
    rows = read_metrics(tmp_path / "test" / "metrics.jsonl")
    step = int(max(row["step"] for row in rows))
    expected = {"warm-up": [1], "step": [4], "validation": [5], "save": [4, 5, 6]}.get(moment, range(1, 100_000))
    assert step in expected
    assert moment != "validation" or not any("loss/val" in row for row in rows)  # it was left
    assert verify_files(tmp_path / "test" / "checkpoints" / f"step_{step}")["facts"]["consumed"] == 4 * step


def test_a_folder_that_cannot_be_written(tmp_path, corpus):
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    with pytest.raises(UserError, match=r"run's folder .*file/test cannot be written: Not a directory; give folder="):
        train(small_config(tmp_path / "file", corpus))


def test_ids_outside_the_vocabulary(tmp_path, corpus):
    with pytest.raises(UserError, match="its tokenizer has 8192 ids, model.vocab_size is 4000"):
        train(small_config(tmp_path, corpus, model=ModelConfig(vocab_size=4000)))


def test_wrong_ranks(tmp_path, corpus):
    with pytest.raises(ConfigError, match="parallel.context=2 does not divide the 1 ranks"):
        train(small_config(tmp_path, corpus, parallel__context=2))


def test_too_little_text(tmp_path, corpus):
    with pytest.raises(DataError, match="a sequence needs 1000001"):
        train(small_config(tmp_path, corpus, data__sequence_length=1_000_000))


def test_never_resume_refuses_a_folder_with_checkpoints(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=1))
    with pytest.raises(UserError, match="has checkpoints and checkpoint.resume=never; give the run another name"):
        train(small_config(tmp_path, corpus, checkpoint__resume="never"))


def test_a_damaged_shard_on_one_rank_ends_all(tmp_path, corpus):
    messages = run_on_ranks(2, open_damaged, small_config(tmp_path, corpus))
    assert messages == ["rank 1: bad shard"] * 2


def open_damaged(rank, _config):
    from longctx import runtime

    def check():
        if rank == 1:
            raise DataError("bad shard")

    try:
        runtime.start(60).run_on_all_ranks(check)
    except UserError as error:
        return str(error)


@pytest.mark.slow  # what the watchdog decides is tested by a clock of its own
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_no_longer_runs_ends_the_job(tmp_path, corpus, how):
    """In the middle of a ring: within the timeout and ten seconds, by name."""
    timeout_seconds = 15
    words = [
        "recipe=gpt_tiny", f"folder={tmp_path}", "name=a", "data=prepared", f"data.folder={corpus}",
        "logging=no_wandb", "data.sequence_length=64", "optim.steps=1000000", "validation.sample_tokens=0",
        "model.width=32", "logging.every_steps=1", "parallel.context=2", "parallel.strategy=ring",
        f"parallel.timeout_seconds={timeout_seconds}",
    ]  # fmt: skip
    job = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", "train.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("step 5/"):
            break
    process = next(pid for pid in _children(job.pid) if _environment(pid).get("RANK") == "1")
    os.kill(process, how)
    started = time.monotonic()
    output, _ = job.communicate(timeout=timeout_seconds + 30)
    assert job.returncode != 0
    assert time.monotonic() - started < timeout_seconds + 10
    if how == signal.SIGSTOP:
        assert f"rank 1 (process {process} on {socket.gethostname()}) has given no sign of life for" in output
    assert re.search(rf"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9 \(pid: {process}\)", output)


HANGS = """
import signal
import time
from longctx.trainer import Trainer

original = Trainer.train_step

def hangs(trainer):
    if trainer.runtime.rank == 2 and trainer.step == 3:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun gives it 30 s to end
        time.sleep(1000)
    return original(trainer)

Trainer.train_step = hangs
import runpy
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path, corpus):
    """It runs, and gives signs of life, but comes to no collective."""
    (tmp_path / "hangs.py").write_text(HANGS)
    words = [
        "recipe=gpt_tiny", f"folder={tmp_path}", "name=a", "data=prepared", f"data.folder={corpus}",
        "logging=no_wandb", "data.sequence_length=64", "data.sequences_per_step=3", "parallel.context=1",
        "data.sequences_per_micro_batch=1", "model.width=32", "parallel.timeout_seconds=10", "parallel.shard=-1",
    ]  # fmt: skip
    started = time.monotonic()
    result = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "3", str(tmp_path / "hangs.py"), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode != 0
    assert time.monotonic() - started < 60
    assert "(parallel.timeout_seconds=10)\nthe others seem to wait for rank 2\nrank 2:\n" in result.stderr
    stacks = result.stderr.split("rank 2:\n")[1]
    assert "time.sleep(1000)" in stacks.split("ranks 0, 1:\n")[0]
    assert "dist.all_reduce(" in stacks.split("ranks 0, 1:\n")[1]


def refused_machines(rank):
    """What is said of three ranks on one machine and one on another."""
    machine = "node1/" if rank < 3 else "node2/"
    changed = {"LOCAL_WORLD_SIZE": "3" if rank < 3 else "1"}
    here = runtime.start(60)
    runtime.check_machines(here)  # all on one: nothing
    with (
        mock.patch.object(runtime, "this_machine", return_value=machine),
        mock.patch.dict(os.environ, changed),
        pytest.raises(UserError) as caught,
    ):
        runtime.check_machines(here)
    return str(caught.value)


def test_machines_with_different_numbers_of_ranks_are_refused():
    """By a strategy of its own on each they would wait for ever."""
    for said in run_on_ranks(4, refused_machines):
        assert "different numbers of processes (3 on node1, 1 on node2)" in said
        assert "torchrun --nproc-per-node" in said


def compared_ranks(rank):
    assert straggler.compare_ranks(runtime.start(60))[0]["run/slowest_over_median"] >= 1  # as timed
    straggler.own_ms = lambda _device: 13.0 if rank == 1 else 10.0
    on_one_machine = straggler.compare_ranks(runtime.start(60))
    straggler.this_machine = lambda: f"machine{rank}/"
    here = runtime.start(60)
    told = straggler.compare_ranks(here)
    straggler.own_ms = lambda _device: 11.0 if rank == 1 else 10.0
    usual = straggler.compare_ranks(here)
    moments = iter([10.0, 10.0, 13.0])  # at one moment of three
    straggler.own_ms = lambda _device: 23.0 - next(moments) if rank == 1 else 10.0
    return told, usual, on_one_machine, straggler.compare_ranks(here)


def test_a_rank_that_computes_slowly_is_named():
    for slow, usual, on_one_machine, at_moments in run_on_ranks(3, compared_ranks):
        assert slow[0] == {"run/slowest_rank": 1.0, "run/slowest_over_median": pytest.approx(1.3)}
        assert "rank 1 on machine1 computes slowly" in slow[1]
        assert "13.00 ms for what takes the median rank 10.00 ms" in slow[1]
        assert usual == ({"run/slowest_rank": 1.0, "run/slowest_over_median": pytest.approx(1.1)}, None)
        # two processes on two cores differ by whatever else runs there
        assert on_one_machine == ({"run/slowest_rank": 1.0, "run/slowest_over_median": pytest.approx(1.3)}, None)
        assert at_moments[1] is None


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill(tmp_path, corpus):
    """The run goes on from its newest checkpoint by itself, and its losses are those of an undisturbed one."""

    def start(name: str) -> subprocess.Popen:
        words = [
            "recipe=gpt_tiny", f"folder={tmp_path}", f"name={name}", "data=prepared", f"data.folder={corpus}",
            "logging=no_wandb", "data.sequence_length=64", "optim.steps=40", "validation.sample_tokens=0",
            "model.width=32", "logging.every_steps=1", "parallel.context=2", "checkpoint.every_steps=10",
        ]  # fmt: skip
        return subprocess.Popen(
            [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "train.py", *words],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def losses(name: str) -> dict[int, float]:
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return {int(r["step"]): r["loss/train"] for r in rows if "loss/train" in r}

    assert start("whole").communicate(timeout=120) is not None
    job = start("killed")
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("step 25/"):
            break
    os.kill(next(pid for pid in _children(job.pid) if _environment(pid).get("RANK") == "1"), signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert re.search(r"resumed from .*step_(10|20|30): step (10|20|30), ", output)
    assert sorted(losses("whole")) == list(range(1, 41))
    assert losses("killed") == losses("whole")
    last = read_metrics(tmp_path / "killed" / "metrics.jsonl")[-2]
    assert last["run/restarts"] == 1
    assert 1 <= last["run/lost_steps"] <= 30


def _children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found]


def _environment(process: int) -> dict[str, str]:
    pairs = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
