"""What a run tells of its steps: lines of the console, what is counted over starts, what is kept of earlier steps."""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from longctx import metrics, run
from longctx.metrics import History, Metrics
from longctx.metrics_file import read_metrics
from longctx.saving import Progress
from longctx.trainer import Trainer
from runs import small_config, train, trainer_of

STEP = {"loss/train": 2.0, "optim/grad_norm": 1.0, "optim/lr": 1e-3, "time/left_s": 0.0}


def test_a_line_has_the_mean_speed_and_mfu_since_the_line_before(tmp_path, corpus, capsys):
    """Over time: 3 steps of 1 s with 400 tokens and one of 7 s with as many."""
    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        for step, (seconds, mfu) in enumerate([(1.0, 0.4)] * 3 + [(7.0, 0.057)], start=1):
            values = STEP | {"perf/tokens_per_s": 400 / seconds, "perf/step_s": seconds, "perf/mfu": mfu}
            trainer.metrics.log_step(step, values, is_due=step == 4)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "160 tokens/s  MFU 16.0 %" in line


def test_a_start_that_logged_nothing_was_a_start(tmp_path):
    first = History(tmp_path / "history.json", None, 0, True, 0.0)
    again = History(tmp_path / "history.json", None, 4, True, 0.0)
    assert (first.restarts, again.restarts, again.lost_steps) == (0, 1, 0)
    assert again.started_at == first.started_at


def test_a_run_that_begins_anew_under_an_old_name_has_a_clock_of_its_own(tmp_path, corpus):
    """As runs without checkpoints do, for measurements; one that ended in between is the same, started again."""
    config = small_config(tmp_path, corpus, optim__steps=2, checkpoint__at_end=False)
    path = config.run_folder / "history.json"
    assert train(config).is_complete
    first = json.loads(path.read_bytes())
    for lr in (3e-3, 1e-3):
        config.optim.lr = lr
        assert train(config).is_complete
        found = json.loads(path.read_bytes())
        assert (found["restarts"], found["lost_steps"]) == (0, 0)
        assert found["started_at"] > first["started_at"]
    assert len(list(config.run_folder.glob("history.*.json"))) == 2
    (config.run_folder / "run.json").write_text('{"ended": "stopped by SIGTERM"}')
    assert train(config).is_complete
    found = json.loads(path.read_bytes())
    assert (found["restarts"], found["lost_steps"]) == (1, 2)


def test_steps_that_no_line_was_logged_of_are_lost_too(tmp_path, corpus, monkeypatch):
    config = small_config(tmp_path, corpus, optim__steps=6, logging__every_steps=10, checkpoint__every_steps=2)
    with monkeypatch.context() as patch:
        step = Trainer.train_step
        patch.setattr(Trainer, "train_step", lambda self: step(self) if self.step < 3 else 1 / 0)
        patch.setattr(Metrics, "log_last_step", lambda _self: None)  # as of a process that was killed
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert train(config).is_complete
    last = [row for row in read_metrics(config.run_folder / "metrics.jsonl") if "loss/train" in row][-1]
    assert (last["run/lost_steps"], last["run/start_step"]) == (1, 2)
    assert json.loads((config.run_folder / "history.json").read_bytes())["logged"] == 0  # of these W&B has seen none


def test_steps_of_a_process_that_was_killed_are_counted_as_lost(tmp_path, monkeypatch):
    """To the last time that the count was written, not to the last line."""
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    killed = History(tmp_path / "history.json", None, 0, True, 0.0)
    for step in range(1, 39):  # of 4 seconds: every third is written
        now[0] += 4.0
        killed.take(step)
    again = History(tmp_path / "history.json", 20, 30, True, 0.0)
    assert again.lost_steps == 6


def test_skipped_steps_cost_and_count_not_as_trained():
    progress, values = Progress(), {"perf/step_s": 2.0, "perf/tflops_per_gpu": 500.0}
    progress.add_costs(values, ranks=4)
    progress.skipped_in_row = 1
    progress.add_costs(values, ranks=4)
    assert (progress.trained_s, progress.device_s, progress.pflop) == (2.0, 16.0, 8.0)


def test_the_time_of_a_start_begins_before_it_is_set_up(tmp_path, corpus, monkeypatch):
    entered = []
    set_up = Trainer._set_up
    monkeypatch.setattr(Trainer, "_set_up", lambda *call: entered.append(time.time()) or set_up(*call))
    train(small_config(tmp_path, corpus, optim__steps=2))
    record = json.loads((tmp_path / "test" / "run.json").read_text())
    history = json.loads((tmp_path / "test" / "history.json").read_text())
    assert record["started_at"] == history["started_at"] <= entered[0]


@pytest.mark.parametrize("where", ["train_step", "validate"])
def test_a_run_that_is_stopped_logs_its_last_step(tmp_path, corpus, monkeypatch, where):
    """Of no line, as of a line between two; the report has it too."""
    config = small_config(tmp_path, corpus, logging__every_steps=5, validation__every_steps=2)
    stopped = getattr(Trainer, where)

    def with_a_signal(trainer):
        if trainer.step >= 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return stopped(trainer)

    monkeypatch.setattr(Trainer, where, with_a_signal)
    train(config)
    assert [row["step"] for row in read_metrics(tmp_path / "test" / "metrics.jsonl")] == [2]
    assert "tokens/s" in (tmp_path / "test" / "report.html").read_text()


def test_what_is_taken_otherwise_is_kept_aside(tmp_path, corpus):
    """Lines and timelines of a run that goes back with another learning rate; files of others stay."""
    train(small_config(tmp_path, corpus, optim__steps=4, checkpoint__every_steps=2))
    folder = tmp_path / "test"
    for step in (2, 3):
        for kind in ("json.gz", "txt"):
            (folder / f"trace_step_{step}.{kind}").touch()
    (folder / "trace_step_5 (copy).json.gz").touch()
    there = str(folder / "checkpoints" / "step_2")
    again = small_config(tmp_path, corpus, optim__steps=4, optim__lr=1e-3, checkpoint__resume=there)
    train(again)
    [before] = folder.glob("metrics.*.jsonl")
    steps = [
        [row["step"] for row in read_metrics(path) if "loss/train" in row]
        for path in (before, again.run_folder / "metrics.jsonl")
    ]
    assert steps == [[1, 2, 3, 4]] * 2
    assert len(list(folder.glob("trace_step_2.*"))) == 2
    assert not (folder / "trace_step_3.json.gz").exists()
    assert not (folder / "trace_step_3.txt").exists()
    assert len(list(folder.glob("trace_step_3.*"))) == 2
    assert (folder / "trace_step_5 (copy).json.gz").exists()


def test_memory_of_an_earlier_job_of_a_multirun_is_forgotten(tmp_path, monkeypatch):
    """As Linux is asked to, where it can be."""
    for file, content in ((tmp_path / "clear_refs", "5"), (tmp_path / "absent" / "clear_refs", None)):
        monkeypatch.setattr(run, "PEAKS_OF_MEMORY", file)
        run.forget_earlier_runs(torch.device("cpu"))
        assert (file.read_text() if file.exists() else None) == content
