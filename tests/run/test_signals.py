"""Signals to a run, and to the launcher of one: answered at once, in time for who sends them, nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longctx import stopping, straggler, throughput, validation
from longctx import trainer as trainer_module
from longctx.checkpoint import list_checkpoints, verify_files
from longctx.config import OnUsr1, ParallelConfig
from longctx.metrics import Metrics
from longctx.stopping import StopSignals
from ranks import run_on_ranks
from runs import ROOT, TORCHRUN, run_info, small_config, train, trainer_of

# each forward pass from the third step on takes long, and Python is not asked meanwhile
SLOW = """
import os, runpy, sys, time
from longctx import trainer

forward_backward, calls = trainer.forward_backward, []

def slow(*words):
    calls.append(1)
    if len(calls) > 2:
        print("slow", flush=True)
        time.sleep(int(os.environ["SECONDS"]))
    return forward_backward(*words)

trainer.forward_backward = slow
runpy.run_path("train.py", run_name="__main__")
"""


class Job:
    """A run of 100 steps whose third takes `seconds`, as it is started by a user."""

    def __init__(self, folder: Path, corpus: Path, ranks: int, *words: str, seconds: int = 60) -> None:
        self.folder = folder / "a"
        (folder / "slow.py").write_text(SLOW)
        launcher = [sys.executable] if ranks == 1 else [*TORCHRUN, "--nproc-per-node", str(ranks)]
        self.process = subprocess.Popen(
            [
                *launcher, str(folder / "slow.py"), "recipe=gpt_tiny", f"folder={folder}", "name=a", "data=prepared",
                f"data.folder={corpus}", "logging=no_wandb", "data.sequence_length=64", "optim.steps=100",
                "logging.every_steps=1", "model.width=32", "model.layers=1", "validation.sample_tokens=0", *words,
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "SECONDS": str(seconds)},
        )  # fmt: skip
        self.seen = ""

    def until(self, words: str) -> None:
        """Reads on to a line that begins with `words`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen += line
            if line.startswith(words):
                return
        raise AssertionError(self.seen)

    def end(self, seconds: float) -> list[str]:
        """Its last lines; within `seconds`."""
        output, _ = self.process.communicate(timeout=seconds)
        self.seen += output
        return output.splitlines()

    def saved(self) -> list[int]:
        """Steps that every byte was saved of."""
        return [verify_files(path)["step"] for path in list_checkpoints(self.folder / "checkpoints")]


def test_a_long_step_is_left_and_the_state_before_it_saved(tmp_path, corpus):
    job = Job(tmp_path, corpus, 1, "parallel.stop_seconds=2")
    job.until("slow")
    sent = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    job.until("SIGTERM: stopping after this step; once more leaves now")
    assert time.monotonic() - sent < 5
    lines = job.end(15)
    assert job.process.returncode == 0
    assert "step 3 would outlast parallel.stop_seconds=2, so it is left" in job.seen
    assert job.saved() == [2]
    assert lines[-1].startswith(f"resume: cd {ROOT} && ")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_torchrun_itself(tmp_path, corpus, number):
    """It passes the signal on, and kills what is there after 30 seconds; the last line is the resume command."""
    job = Job(tmp_path, corpus, 2, "parallel.context=2", "parallel.stop_seconds=2")
    job.until("slow")
    job.process.send_signal(number)
    lines = job.end(28)
    assert "step 3 would outlast parallel.stop_seconds=2, so it is left" in job.seen
    assert job.saved() == [2]
    assert "SignalException" in job.seen  # torchrun's trace
    assert lines[-1].startswith(f"resume: cd {ROOT} && ")
    assert lines[-1].endswith("name=a optim.steps=100")


def test_a_second_signal_leaves_at_once(tmp_path, corpus):
    job = Job(tmp_path, corpus, 1, "checkpoint.every_steps=1", "checkpoint.asynchronous=false")
    job.until("slow")
    job.process.send_signal(signal.SIGINT)
    time.sleep(2)
    job.process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    job.end(5)
    assert time.monotonic() - sent < 4
    assert job.process.returncode == 128 + signal.SIGINT
    assert "SIGINT again: leaving now; the last checkpoint is as it was saved" in job.seen
    assert job.saved() == [1, 2]


@pytest.mark.slow
def test_ranks_whose_launcher_is_gone_save_and_end(tmp_path, corpus):
    """torchrun -9: nobody watches the ranks or ends them."""
    job = Job(tmp_path, corpus, 2, "parallel.context=2", seconds=8)
    job.until("step 1/")
    job.process.kill()
    lines = job.end(60)  # the step they are in is a long one, and nobody is there to end it before
    assert "SIGTERM: stopping after this step" in job.seen
    assert job.saved()[-1] in (1, 2, 3)
    assert any(line.startswith("resume: ") for line in lines)


def asked_on_one_rank(rank, config, number):
    """A signal to rank 1 in its second step: the outcome, and the steps that were saved."""
    train_step = trainer_module.Trainer.train_step

    def with_signal(trainer):
        if rank == 1 and trainer.step == 1:
            os.kill(os.getpid(), number)
        return train_step(trainer)

    trainer_module.Trainer.train_step = with_signal
    try:
        is_complete = train(config).is_complete
    finally:
        trainer_module.Trainer.train_step = train_step
    return is_complete, [verify_files(p)["step"] for p in list_checkpoints(config.run_folder / "checkpoints")]


@pytest.mark.parametrize(
    ("number", "on_usr1", "expected"),
    [
        (signal.SIGUSR1, OnUsr1.save, (True, [2, 6])),
        (signal.SIGUSR1, OnUsr1.stop, (False, [2])),
        (signal.SIGHUP, OnUsr1.save, (False, [2])),
    ],
)
def test_what_batch_systems_send(tmp_path, corpus, number, on_usr1, expected):
    """SIGUSR1 to one rank saves on all after the step it is in, and goes on or stops; SIGHUP is like SIGTERM."""
    config = small_config(
        tmp_path, corpus, optim__steps=6, parallel=ParallelConfig(context=2), checkpoint__on_usr1=on_usr1,
        checkpoint__every_steps=0,
    )  # fmt: skip
    assert run_on_ranks(2, asked_on_one_rank, config, number) == [expected] * 2


def test_a_long_step_is_told_before_it_begins(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "product_tflops", lambda *_: 1e-6)
    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        # 6 FLOPs a matrix parameter and token, 12 a head, dimension and pair of a query and a key, in 2 layers
        flops = 4 * (6 * 280_576 * 64 + 12 * 4 * 8 * 2 * (64 * 65 // 2))
        assert trainer.expected_s == pytest.approx(flops / 1e6)
    assert "about 7 min a step on this CPU" in capsys.readouterr().out
    assert straggler.product_tflops(trainer.runtime.device, torch.float32) > 1e-4  # as measured


def test_progress_inside_a_step_is_printed(tmp_path, corpus, capsys):
    config = small_config(tmp_path, corpus)
    config.run_folder.mkdir()
    metrics = Metrics(run_info(config), {"device": "CPU", "ranks": 1}, 0, True)
    metrics.show_progress(3, 1, 4)
    assert capsys.readouterr().out == ""
    metrics.shown_at -= 61
    metrics.show_progress(3, 2, 4)
    metrics.show_progress(3, 3, 4)
    assert capsys.readouterr().out == "step 3: micro-batch 2 of 4 done\n"
    metrics.close()


def test_what_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)  # is heard
            wait_for(lambda: stop.save_asked)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_launcher_that_passes_a_signal_on_is_one_signal(monkeypatch):
    """Of the terminal and of torchrun, a moment later: the second is none that leaves."""
    left = []
    monkeypatch.setattr(stopping, "leave", left.append)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stop.number == signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        assert left == []
        stop._asked_at -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: left == [128 + signal.SIGTERM])


def stopped_in_the_last_validation(config, monkeypatch):
    with monkeypatch.context() as patch:
        original = validation.validate

        def with_signal(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: current[0].stop.number)
            return original(*arguments)

        current = []
        init = trainer_module.Trainer.__init__
        patch.setattr(
            trainer_module.Trainer, "__init__", lambda self, *rest: (current.append(self), init(self, *rest))[1]
        )
        patch.setattr(validation, "validate", with_signal)
        return go(config)


def go(config):
    return train(config)


def test_a_run_stopped_in_its_last_validation_is_not_complete(tmp_path, corpus, monkeypatch, capsys):
    """All steps are saved, and a report is there; the validation is made when it is started again."""
    config = small_config(tmp_path, corpus, optim__steps=3)
    assert not stopped_in_the_last_validation(config, monkeypatch).is_complete
    assert re.search(r"resume: .* optim.steps=3$", capsys.readouterr().out, re.MULTILINE)
    record = json.loads((config.run_folder / "run.json").read_bytes())
    assert record["ended"] == "stopped by SIGTERM"
    outcome = go(config)
    completed = json.loads((config.run_folder / "run.json").read_bytes())
    assert completed == record | {"ended": "complete"}
    assert outcome.is_complete
    assert "validation after step 3" in capsys.readouterr().out
    assert outcome.loss > 0
    assert go(config) == outcome
    assert "validation after step 3" not in capsys.readouterr().out
