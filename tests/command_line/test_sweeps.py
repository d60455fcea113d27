"""Sweeps of four learning rates, one of them diverging: by `-m`, by a sweeper under torchrun, by W&B's agent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf

from longctx import train as command
from longctx.metrics_file import last_validation_loss
from longctx.run_record import read_record
from runs import ROOT, TORCHRUN, composed
from wandb_records import configuration, exit_code, records
from wandb_server import WandbServer

RATES = ["1e-3", "1e-2", "3e-2", "1e30"]


def words(folder: Path, corpus: Path) -> list[str]:
    return [
        "recipe=gpt_tiny", "parallel=auto", f"folder={folder}", "data=prepared", f"data.folder={corpus}", "optim=adamw",
        "data.sequence_length=64", "model.width=32", "optim.steps=4", "optim.max_skipped_steps=2",
        "validation.sample_tokens=0", "validation.recall_sequences=0", "checkpoint.at_end=false",
    ]  # fmt: skip


def started(*line: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)


def losses(folder: Path) -> dict[str, float]:
    """Of the runs of a folder, by their name: of the last validation; of those that failed NaN."""
    runs = [path.parent for path in folder.glob("*/run.json")]
    return {run.name: last_validation_loss(run / "metrics.jsonl") for run in runs}


@pytest.mark.parametrize("rates", [RATES[1::2], pytest.param(RATES, marks=pytest.mark.slow)], ids=len)
def test_values_on_the_command_line(tmp_path, corpus, rates):
    line = [*words(tmp_path, corpus), "logging=no_wandb", f"optim.lr={','.join(rates)}"]
    result = started(sys.executable, "train.py", "-m", *line)
    assert result.returncode == 1
    failed = f"1 of {len(rates)} jobs ended with an error:\n  - gpt_tiny-lr_1e+30: 2 steps in a row were not finite"
    assert failed in result.stderr
    found = losses(tmp_path)
    assert set(found) == {f"gpt_tiny-lr_{float(rate)}" for rate in rates}
    assert math.isnan(found.pop("gpt_tiny-lr_1e+30"))
    assert all(4.8 < loss < 9 for loss in found.values()), found
    good, bad = tmp_path / "gpt_tiny-lr_0.01", tmp_path / "gpt_tiny-lr_1e+30"
    assert "optim.lr=0.01" in yaml.safe_load((good / "overrides.yaml").read_text())
    assert yaml.safe_load((good / "config.yaml").read_text())["optim"]["lr"] == 0.01
    assert read_record(good)["ended"] == "complete"
    assert read_record(bad)["ended"].startswith("failed: UserError: 2 steps in a row were not finite")


SWEEPER = """
import itertools, os
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper


class Drawing(Sweeper):
    '''Draws other values on each rank, one of them twice, and writes down what each came to.'''

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = __import__("hydra.core.plugins", fromlist=["Plugins"]).Plugins.instance().instantiate_launcher(
            config=config, task_function=task_function, hydra_context=hydra_context)
        self.folder = config.hydra.sweep.dir

    def sweep(self, arguments):
        rank = int(os.environ.get("RANK", "0"))
        results = []
        for number, rate in enumerate(["1e-2", "1e30", "1e-2"] if rank == 0 else ["5e-3", "6e-3", "7e-3"]):
            [job] = self.launcher.launch([[*arguments, f"optim.lr={rate}"]], initial_job_idx=number)
            results.append(job.return_value)
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, "results"), "w") as file:
            file.write(repr(results).replace("inf", "float('inf')"))


@dataclass
class DrawingConf:
    _target_: str = "hydra_plugins.drawing.Drawing"


ConfigStore.instance().store(group="hydra/sweeper", name="drawing", node=DrawingConf)
"""


@pytest.mark.slow
def test_the_sweeper_of_rank_0_decides(tmp_path, corpus):
    """All ranks run what it draws, and get the loss of that; a value that it draws twice is two runs."""
    (tmp_path / "plugins" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "plugins" / "hydra_plugins" / "drawing.py").write_text(SWEEPER)
    line = [
        *words(tmp_path / "runs", corpus), "logging=no_wandb", "hydra/sweeper=drawing", "parallel.context=2",
        "parallel.verify=false",
    ]  # fmt: skip
    started(
        *TORCHRUN, "--nproc-per-node", "2", "train.py", "-m", *line, PYTHONPATH=str(tmp_path / "plugins"),
        TMPDIR=str(tmp_path),
    )  # fmt: skip
    found = losses(tmp_path / "runs")
    assert set(found) == {"gpt_tiny-lr_1e-2", "gpt_tiny-lr_1e30", "gpt_tiny-lr_1e-2-2"}
    expected = [found["gpt_tiny-lr_1e-2"], math.inf, found["gpt_tiny-lr_1e-2-2"]]
    assert expected[0] == expected[2] < 9
    [elsewhere] = tmp_path.glob("longctx-sweep-*/results")  # of rank 1, out of the way
    for file in (tmp_path / "runs" / "results", elsewhere):
        assert eval(file.read_text()) == expected


@pytest.mark.slow
def test_an_agent_of_wandb(tmp_path, corpus, monkeypatch):
    """Each trial has a folder of its own and the id that the agent has given; the one that diverges has failed."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    line = [
        "${env}",
        "WANDB_MODE=offline",
        sys.executable,
        "${program}",
        *words(tmp_path, corpus),
        "${args_no_hyphens}",
    ]
    with WandbServer() as server:
        server.sweep = json.dumps({"program": "train.py", "method": "grid", "command": line})
        server.trials = [{"optim.lr": float(rate)} for rate in RATES]
        agent = started(
            str(Path(sys.executable).parent / "wandb"), "agent", "somebody/longctx/s", **server.environment()
        )
    assert agent.returncode == 0, agent.stderr
    found = losses(tmp_path)
    assert set(found) == {f"gpt_tiny-t{number}" for number in range(4)}
    of_trials = {name: records(tmp_path / name) for name in found}
    rates = {name: configuration(of_trial)["optim"]["lr"] for name, of_trial in of_trials.items()}
    assert sorted(rates.values()) == [1e-3, 1e-2, 3e-2, 1e30]
    for name, of_trial in of_trials.items():
        diverges = rates[name] == 1e30
        assert exit_code(of_trial) == diverges
        assert math.isnan(found[name]) == diverges
        [started_run] = [record.run for record in of_trial if record.WhichOneof("record_type") == "run"]
        assert started_run.run_id == name.removeprefix("gpt_tiny-")


@pytest.mark.slow
def test_a_job_of_submitit_starts_torchrun(tmp_path, corpus, monkeypatch):
    job = SimpleNamespace(num_nodes=1, node=0, job_id="7", hostnames=["here"])
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(JobEnvironment=lambda: job))
    config = OmegaConf.structured(composed("recipe=gpt_tiny"))
    config.folder, config.name = str(tmp_path), "it's a"
    line = [*words(tmp_path, corpus), "logging=no_wandb", "parallel.context=2"]
    loss = command.start_torchrun(config, line, OmegaConf.create({"gpus_per_node": 2}))
    assert read_record(tmp_path / "it's a")["facts"]["ranks"] == 2
    assert loss == losses(tmp_path)["it's a"] < 9
    with pytest.raises(RuntimeError, match="it's a failed; its output says why"):
        command.start_torchrun(config, [*line, "optim.steps=0"], OmegaConf.create({"gpus_per_node": None}))


def test_recipes_of_ones_own(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [gpt_tiny]\noptim: {lr: 0.125}\nname: of-mine\n"
    )
    result = started(sys.executable, "train.py", "--config-dir", str(tmp_path), "recipe=mine", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    shown = yaml.safe_load(result.stdout)
    assert shown["optim"]["lr"] == 0.125
    assert shown["model"]["layers"] == 4
    assert shown["name"] == "of-mine"


def test_what_an_optimizing_sweeper_is_told():
    """Optuna takes no NaN: a run that diverged is as bad as one that failed."""
    assert [command.to_lower(loss) for loss in (1.5, math.nan, -math.inf)] == [1.5, math.inf, math.inf]


def test_a_home_folder_is_one_for_hydra_too(monkeypatch):
    """Which would write its own files into a folder of the name ~."""
    monkeypatch.setenv("HOME", "/home/me")
    assert command.typed(["folder=~/runs", "folder=~", "seed=1"]) == [
        "folder=/home/me/runs",
        "folder=/home/me",
        "seed=1",
    ]
