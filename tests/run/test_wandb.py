"""What arrives on W&B, read back from the file that wandb keeps; and servers that do not answer."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest

from longctx import trainer as trainer_module
from longctx.config import Config, LoggingConfig, WandbMode
from longctx.errors import UserError
from longctx.metrics import Metrics
from longctx.metrics_file import read_metrics
from longctx.run_record import read_record, shown_configuration
from longctx.wandb_log import has_wandb_key, wandb_mode
from runs import ROOT, run_info, small_config, train
from wandb_records import axes, configuration, exit_code, history, is_preempted, records, summary_values
from wandb_server import WandbServer

# what arrives --------------------------------------------------------------------------------------------------------


def offline(folder, corpus, **changes) -> Config:
    return small_config(
        folder, corpus, logging__wandb=WandbMode.offline, logging__wandb_system_metrics=False, **changes
    )


def test_an_offline_run_has_configuration_axes_and_summaries(tmp_path, corpus, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = offline(tmp_path, corpus, validation__every_steps=3, logging__wandb_tags=["long", "small"])
    train(config)
    found = records(config.run_folder)
    shown = configuration(found)
    assert shown["optim"]["lr"] == config.optim.lr
    assert shown["parallel"]["context"] == 1
    assert shown["run"]["ranks"] == shown["run"]["machines"] == 1
    assert shown["run"]["parameters"] == 8192 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert shown["run"]["tokens_per_step"] == 256
    assert shown["run"]["attention"] == "sdpa"
    assert re.fullmatch(r"[0-9a-f]{7,12}(-dirty)?", shown["run"]["commit"])
    assert set(shown["run"]["versions"]) == {"python", "torch", "triton", "cuda"}
    [started] = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert list(started.tags) == ["long", "small"]

    assert axes(found)["loss/val"] == axes(found)["loss/train"] == "data/tokens"
    assert axes(found)["perf/step_s"] == axes(found)["mem/host_gib"] == "step"
    lines = read_metrics(config.run_folder / "metrics.jsonl")
    logged = history(found)
    for line in lines:
        [row] = [row for row in logged if row["_step"] == line["step"]]
        scalars = [key for key in line if not key.startswith(("loss/pos/", "recall/"))]
        assert {key: row[key] for key in scalars} == {key: line[key] for key in scalars}
    validations = [line for line in lines if "loss/val" in line]
    assert [line["step"] for line in validations] == [3, 6, 8]
    curves = [row for row in logged if "curves/loss_by_position_table.nrows" in row]
    assert [row["_step"] for row in curves] == [3, 6, 8]
    assert not any(key.startswith("loss/pos/") for row in logged for key in row)
    best = min(validations, key=lambda line: line["loss/val"])
    figures = summary_values(found)
    assert figures["best/loss_val"] == figures["loss/val"]["min"] == best["loss/val"]
    assert figures["best/step"] == best["step"]
    steady = [line for line in lines if "perf/step_s" in line and line["step"] > 3]
    seconds = sum(line["perf/step_s"] for line in steady)
    assert figures["mean/tokens_per_s"] == pytest.approx(256 * len(steady) / seconds)
    assert figures["peak/tokens_per_s"] == max(line["perf/tokens_per_s"] for line in steady)
    assert "report.path" in logged[-1] or "report.path" in logged[-2]
    assert exit_code(found) == 0
    assert not is_preempted(found)
    assert read_record(config.run_folder)["wandb"].startswith("offline; to send it: ")


@pytest.mark.parametrize(
    ("changes", "ended", "files"), [({}, "", 1), ({"validation__sequences": 0}, "", 1), ({}, "failed: X", 2)]
)
def test_a_complete_run_that_is_started_again_has_no_second_file(tmp_path, corpus, changes, ended, files):
    """Of two with one id the server keeps the steps of the last, which would have no report. One that failed after its
    last step is told again."""
    config = offline(tmp_path, corpus, optim__steps=2, **changes)
    train(config)
    if ended:
        record = config.run_folder / "run.json"
        record.write_text(record.read_text().replace('"complete"', f'"{ended}"'))
    train(config)
    assert len(list((config.run_folder / "wandb").glob("offline-run-*"))) == files


def test_a_run_that_a_signal_stops_is_preempted(tmp_path, corpus, monkeypatch):
    train_step = trainer_module.Trainer.train_step

    def with_signal(trainer):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", with_signal)
    config = offline(tmp_path, corpus)
    assert not train(config).is_complete
    found = records(config.run_folder)
    assert exit_code(found) == 128 + signal.SIGTERM
    assert is_preempted(found)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", train_step)
    train(config)  # goes on as the same run, and a sync keeps the last folder of one: it has all steps
    resumed = records(config.run_folder)
    assert [row["step"] for row in history(resumed) if "loss/train" in row] == list(range(1, 9))
    assert exit_code(resumed) == 0
    ids = {record.run.run_id for record in found + resumed if record.WhichOneof("record_type") == "run"}
    assert len(ids) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(5,), (5, 3)])
def test_steps_that_are_taken_again_otherwise_are_another_run(tmp_path, corpus, monkeypatch, ends):
    """W&B keeps the first value of a step, so a lower rate after a divergence would not be seen there.

    Also if another start came between, which logged nothing; the new run is given the steps that stay.
    """
    train_step = trainer_module.Trainer.train_step

    def ending_at(step):
        def with_error(trainer):
            if trainer.step == step:
                raise UserError("lost")
            return train_step(trainer)

        return with_error

    config, ids = offline(tmp_path, corpus, checkpoint__every_steps=3), []
    config.logging.wandb = WandbMode.online
    with WandbServer("well") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        for step in ends:  # behind the checkpoint of step 3, and at it
            monkeypatch.setattr(trainer_module.Trainer, "train_step", ending_at(step))
            with pytest.raises(UserError, match="lost"):
                train(config)
            ids.append((config.run_folder / "wandb_id").read_text())
        monkeypatch.setattr(trainer_module.Trainer, "train_step", train_step)
        config.optim.lr /= 2
        before = len(server.logged)
        train(config)
        ids.append((config.run_folder / "wandb_id").read_text())
        steps = [row["step"] for row in server.logged[before:] if "loss/train" in row]
    assert set(ids[:-1]) == {ids[0]} != {ids[-1]}
    assert steps == list(range(1, 9))


def test_a_run_that_fails_has_failed_and_alerts(tmp_path, corpus, monkeypatch):
    build = trainer_module.parallelize

    def broken(*arguments):
        model, context_parallel = build(*arguments)
        model.head.register_forward_hook(lambda _m, _i, out: out * float("nan"))
        return model, context_parallel

    monkeypatch.setattr(trainer_module, "parallelize", broken)
    config = offline(tmp_path, corpus, optim__max_skipped_steps=1, logging__alerts=True)
    with pytest.raises(UserError, match="1 steps in a row were not finite"):
        train(config)
    found = records(config.run_folder)
    assert exit_code(found) == 1
    alerts = [record.alert for record in found if record.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in alerts] == ["not finite", "failed"]
    assert alerts[0].text.startswith("step 1 skipped on all ranks: loss nan")
    assert (config.run_folder / "report.html").exists()
    assert any("report.path" in row for row in history(found))
    [line] = read_metrics(config.run_folder / "metrics.jsonl")
    assert line["loss/train"] != line["loss/train"]  # NaN
    assert line["optim/skipped_steps"] == 1


def test_a_run_that_becomes_slow_alerts_once(tmp_path, monkeypatch):
    config = Config(name="a", folder=str(tmp_path), logging=LoggingConfig(wandb=WandbMode.disabled, alerts=True))
    config.run_folder.mkdir()
    metrics = Metrics(run_info(config), {"device": "CPU", "ranks": 1}, 0, True)
    told = []
    monkeypatch.setattr(metrics, "alert", lambda title, text: told.append((title, text)))
    for step, speed in enumerate([100.0] * 9 + [60.0] * 2 + [100.0] + [60.0] * 5, 1):
        metrics.log_step(step, {"perf/tokens_per_s": speed, "perf/step_s": 1.0}, is_due=False)
    assert told == [("slow", "60 tokens/s at step 15, where the median is 100")]
    metrics.close()


def test_secrets_of_the_environment_are_not_shown(monkeypatch):
    """Neither where they stand nor where they are referred to; what is computed from other keys is."""
    config = Config(name="a", folder="/data/secret")
    config.logging.wandb_notes, config.data.folder = "secret", "/data/secret/text"
    written = {
        "name": "a", "folder": "/data/${oc.env:KEY}", "logging": {"wandb_notes": "${oc.env:KEY}"},
        "data": {"folder": "${folder}/text"}, "optim": {"lr": 1e-3},
    }  # fmt: skip
    import yaml

    shown = shown_configuration(dataclasses.replace(run_info(config), config_yaml=yaml.safe_dump(written)))
    assert shown["folder"] == "/data/${oc.env:KEY}"
    assert shown["logging"]["wandb_notes"] == "${oc.env:KEY}"
    assert shown["data"]["folder"] == "${folder}/text"
    assert "secret" not in str(shown)
    assert shown["model"]["layers"] == config.model.layers


# servers -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mood", ["silent", "500", "dies", "well"])
def test_a_server_that_does_not_answer_costs_nothing(tmp_path, corpus, mood, monkeypatch):
    """It accepts and never answers from the start, or in the middle answers 500 or is gone; or it is well."""
    steps = 500 if mood in ("500", "dies") else 50  # that last longer than until the server is asked again
    words = [
        "recipe=gpt_tiny", "parallel=auto", "name=a", f"folder={tmp_path}", "data=prepared", f"data.folder={corpus}",
        "data.sequence_length=64", "model.width=32", f"optim.steps={steps}", "logging.every_steps=1",
        "logging.wandb_timeout_seconds=2", "validation.sample_tokens=0", "validation.every_steps=0",
        "checkpoint.at_end=false",
    ]  # fmt: skip
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of wandb in this process
    with WandbServer("silent" if mood == "silent" else "well") as server:
        job = subprocess.Popen(
            [sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | server.environment() | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        said, last_step_at = [], 0.0
        assert job.stdout is not None
        for line in job.stdout:
            said.append(line)
            is_there = line.startswith(f"wandb: {server.url}/somebody")
            if is_there and mood == "500":
                server.mood = "500"
            if is_there and mood == "dies":
                server.die()
            if line.startswith(f"step {steps}/"):
                last_step_at = time.monotonic()
        assert job.wait() == 0
    assert time.monotonic() - last_step_at < 30  # the timeout, and what a run does after its last step
    output = "".join(said)
    folder = tmp_path / "a"
    told = {
        "silent": "the run goes on offline",
        "500": f"{server.url} answers with status 500; the run goes on, and what is not taken is kept: ",
        "dies": f"{server.url} does not answer: [Errno 111] Connection refused; the run goes on",
        "well": f"wandb: {server.url}/somebody/longctx/runs/",
    }[mood]
    assert told in output
    if mood != "silent":
        assert f"wandb: {server.url}/somebody/longctx/runs/" in output
    assert (f"wandb sync {folder / 'wandb'}" in output) == (mood != "well")
    if mood == "well":
        assert [row["step"] for row in server.logged if "loss/train" in row] == list(range(1, steps + 1))
    assert [row["step"] for row in history(records(folder)) if "loss/train" in row] == list(range(1, steps + 1))
    seconds = [row["perf/step_s"] for row in read_metrics(folder / "metrics.jsonl") if "perf/step_s" in row]
    assert len(seconds) == steps
    assert max(seconds[1:]) < statistics.median(seconds) + 1.5  # none has waited for a timeout of two seconds


# which server, and whether -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_API_KEY": "k"}, "online"),
        ({}, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_API_KEY": "k"}, "disabled"),
    ],
    ids=str,
)
def test_wandbs_own_variables_decide(tmp_path, monkeypatch, variables, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(LoggingConfig()) == mode
    assert wandb_mode(LoggingConfig(wandb=WandbMode.online)) == "online"  # the configuration, where it says something


def test_a_key_of_another_server_counts(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "netrc").write_text("machine wandb.company.com login user password " + "0" * 40 + "\n")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.company.com")
    assert has_wandb_key()
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.company.com\n")
    assert has_wandb_key()
