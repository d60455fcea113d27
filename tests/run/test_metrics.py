"""What a run tells of its steps: lines of the console, what is counted over starts, what is kept of earlier steps."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time

import torch

from longctx import metrics
from longctx.metrics import History
from longctx.metrics_file import read_metrics
from longctx.run import forget_earlier_runs
from longctx.saving import Progress
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


def test_steps_of_a_process_that_was_killed_are_counted_as_lost(tmp_path, monkeypatch):
    """To the last time that the count was written, not to the last line."""
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(now)))
    killed = History(tmp_path / "history.json", None, 0, True)
    for step in range(1, 38):  # of 5 seconds
        killed.take(step)
    again = History(tmp_path / "history.json", 20, 30, True)
    assert again.lost_steps in (6, 7)


def test_skipped_steps_cost_and_count_not_as_trained():
    progress, values = Progress(), {"perf/step_s": 2.0, "perf/tflops_per_gpu": 500.0}
    progress.add_costs(values, ranks=4)
    progress.skipped_in_row = 1
    progress.add_costs(values, ranks=4)
    assert (progress.trained_s, progress.device_s, progress.pflop) == (2.0, 16.0, 8.0)


def test_the_time_of_a_start_begins_before_it_is_set_up(tmp_path, corpus):
    began = time.time()
    train(small_config(tmp_path, corpus, optim__steps=2))
    record = json.loads((tmp_path / "test" / "run.json").read_text())
    history = json.loads((tmp_path / "test" / "history.json").read_text())
    assert began <= record["started_at"] == history["started_at"] <= began + 1


def test_a_run_that_is_stopped_logs_its_last_step(tmp_path, corpus, monkeypatch):
    config = small_config(tmp_path, corpus, logging__every_steps=5)
    with trainer_of(config) as trainer:
        step = trainer.train_step

        def with_a_signal():
            if trainer.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step()

        monkeypatch.setattr(trainer, "train_step", with_a_signal)
        trainer.run()
        assert trainer.is_stopped
    assert [row["step"] for row in read_metrics(tmp_path / "test" / "metrics.jsonl")] == [2]


def test_what_is_taken_otherwise_is_kept_aside(tmp_path, corpus):
    """Lines and timelines of a run that goes back with another learning rate."""
    train(small_config(tmp_path, corpus, optim__steps=4, checkpoint__every_steps=2))
    folder = tmp_path / "test"
    for step in (2, 3):
        (folder / f"trace_step_{step}.json.gz").touch()
    there = str(folder / "checkpoints" / "step_2")
    again = small_config(tmp_path, corpus, optim__steps=4, optim__lr=1e-3, checkpoint__resume=there)
    train(again)
    [before] = folder.glob("metrics.*.jsonl")
    steps = [
        [row["step"] for row in read_metrics(path) if "loss/train" in row]
        for path in (before, again.run_folder / "metrics.jsonl")
    ]
    assert steps == [[1, 2, 3, 4]] * 2
    assert [path.name for path in folder.glob("trace_step_*.json.gz")] == ["trace_step_2.json.gz"]
    report = (folder / "report.html").read_text()
    assert re.findall(r"timeline of step_(\d)", report) == ["2"]


def test_memory_of_an_earlier_job_of_a_multirun_is_forgotten():
    held = bytearray(b"x" * (300 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del held
    forget_earlier_runs(torch.device("cpu"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before - (200 << 10)  # KiB
