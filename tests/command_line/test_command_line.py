"""What is typed is what a run gets: names, sweeps, resumed runs, other launchers."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from longctx import machine, resume, train
from longctx.checkpoint import CheckpointError, read_manifest
from longctx.command_line import how_to_go_on, name_of_job, quoted, refuse_foreign_launchers, resume_command, split
from longctx.config import Config, ParallelConfig, Schedule, warmup_steps
from longctx.config_checks import check
from longctx.errors import ConfigError, UserError
from longctx.metrics import Metrics
from longctx.metrics_file import read_metrics
from longctx.plan import parameters, state_bytes
from longctx.run import unused
from longctx.step_time import in_words
from longctx.suggest import explain_unknown_key, text_keys
from runs import ROOT, TORCHRUN, composed, run_info, small_config
from runs import train as run

SMALL = [
    "recipe=gpt_tiny", "model.width=32", "model.layers=1", "data.sequence_length=64", "validation.sample_tokens=0",
    "logging=no_wandb", "logging.every_steps=1", "validation.sequences=2",
]  # fmt: skip


def started(folder: Path, corpus: Path, *words: str, launcher: list[str] | None = None, **variables: str):
    """A run from a folder that is not the repository's."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    flags, others = [word for word in words if word == "-m"], [word for word in words if word != "-m"]
    command = [
        *(launcher or [sys.executable]),
        str(ROOT / "train.py"),
        *flags,
        "data=prepared",
        f"data.folder={corpus}",
    ]
    return subprocess.run(
        [*command, *SMALL, *others], cwd=folder, env=clean | {"OMP_NUM_THREADS": "1"} | variables, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


# words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["1.1", "1.10", "12e4567", "83e2010", "1e3", "1_000", "007", "true", "nan", "a=b", "my run", "a:b", "{x}", "it's",
     "back\\", "a\\'b", "1.10,2"],
)  # fmt: skip
def test_text_is_taken_as_it_is_typed(text):
    """By Hydra, from the word that train.py makes of it; a comma is a sweep unless it is quoted."""
    word = f"name={quoted(text) if ',' in text else text}"
    if text in ("it's", "a\\'b", "back\\"):  # quotes and backslashes mean something to Hydra: they are quoted by hand
        word = f"name={quoted(text)}"
    assert train.typed(["recipe=gpt_tiny", word])[0] == "recipe=gpt_tiny"
    with_hydra = composed_with(train.typed(["recipe=gpt_tiny", word]))
    assert with_hydra.name == text


def composed_with(words: list[str]) -> Config:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_object(compose("train", overrides=words))  # pyright: ignore[reportReturnType]


def test_every_key_of_text_is_known():
    assert {
        "name", "folder", "data.folder", "data.tokenizer", "data.cache_folder", "model.init_from", "checkpoint.resume",
        "validation.sample_prompts", "logging.wandb_project", "logging.wandb_entity", "logging.wandb_group",
        "logging.wandb_tags", "logging.wandb_notes", "logging.wandb_job_type",
    } == set(text_keys())  # fmt: skip
    config = composed_with(
        train.typed(["recipe=gpt_tiny", "name=1", "folder=2", "validation.sample_prompts=[1.10,a b]"])
    )
    assert (config.folder, config.validation.sample_prompts) == ("2", ["1.10", "a b"])
    assert train.typed(["optim.lr=1e-3", "seed=007", "'name=x'"]) == ["optim.lr=1e-3", "seed=007", "'name=x'"]


def test_each_value_of_a_sweep_is_text():
    assert train.typed(["name=1.1,1.10,b"]) == ["name='1.1','1.10',b"]
    assert list(split("a,'b,c',[d,e],f(g,h)")) == ["a", "'b,c'", "[d,e]", "f(g,h)"]
    with pytest.raises(ConfigError, match=r"name=choice\(1.1,1.10\): name is text, and its numbers would be rewritten"):
        train.typed(["name=choice(1.1,1.10)"])


@pytest.mark.parametrize(
    ("overrides", "typed", "name"),
    [
        (["recipe=a", "optim.lr=0.001"], ["-m", "recipe=a", "optim.lr=1e-3,1e-2"], "a-lr_0.001"),
        (["optim=adamw", "seed=2"], ["-m", "optim=adamw,muon", "seed=1,2"], "a-optim_adamw-seed_2"),
        (["recipe=a"], ["-m", "recipe=a,b"], "a"),
        (["recipe=a", "name=a"], ["-m", "recipe=a", "name=a,b"], "a"),
        (["recipe=a", "name=${optim.optimizer}", "optim=muon"],
         ["-m", "recipe=a", "name=${optim.optimizer}", "optim=adamw,muon"], "a"),
        (["name=my\\ run", "optim.lr=0.001", "seed=2"], ["-m", "name=my run", "optim.lr=1e-3", "seed=1,2"], "a-seed_2"),
        (["optim.lr=0.003"], ["-m"], "a-lr_0.003"),  # added by a sweeper
        (["data.folder=/x/y z"], ["-m", "data.folder=/x/y z,/b"], "a-folder__x_y_z"),
    ],
)  # fmt: skip
def test_jobs_of_a_multirun_have_names_of_their_own(overrides, typed, name):
    assert name_of_job("a", overrides, typed, train.swept_keys(typed)) == name


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("parallel.cp", "parallel.context"),
        ("optim.learning_rate", "optim.lr"),
        ("data.batch_size", "data.sequences_per_step"),
        ("activation_checkpointing", "parallel.recompute"),
        ("optim.max_grad_norm", "optim.clip_norm"),
    ],
)
def test_the_fields_words_are_answered_with_ours(key, meant):
    assert explain_unknown_key(key) == f"{key} is no key of the configuration; here it is {meant}"


def test_a_switch_of_wandb_is_answered_with_what_it_can_be(tmp_path, corpus):
    result = started(tmp_path, corpus, "logging.wandb=false")
    assert "expected one of [auto, online, offline, disabled]" in result.stderr
    assert "logging.wandb=disabled turns it off" in result.stderr


def test_a_warm_up_that_never_ends_is_refused():
    config = composed("recipe=gpt_tiny", "optim.steps=20", "optim.warmup_steps=20")
    with pytest.raises(ConfigError, match=r"optim.warmup_steps=20 is not less than optim.steps=20"):
        check(config, 1)
    for steps, expected in ((6, 0), (100, 5), (300, 15), (2000, 100), (10**6, 100)):
        config.optim.steps, config.optim.warmup_steps = steps, None
        check(config, 1)
        assert warmup_steps(config.optim) == expected


# other launchers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_NTASKS": "2"}, "srun"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "1"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
    ],
)
def test_processes_that_know_nothing_of_each_other_are_refused(variables, launcher):
    count = next(iter(variables.values()))
    with pytest.raises(
        ConfigError, match=f"if {launcher} has started {count} processes.*torchrun --nproc-per-node {count}"
    ):
        refuse_foreign_launchers(variables)
    refuse_foreign_launchers(variables | {"RANK": "0"})  # torchrun inside
    refuse_foreign_launchers({"SLURM_NTASKS": "1"})


def test_srun_alone_does_not_train(tmp_path, corpus):
    result = started(tmp_path, corpus, "name=a", SLURM_NTASKS="2", SLURM_PROCID="1")
    assert result.returncode != 0
    assert (
        "SLURM_NTASKS=2 and no torchrun: if srun has started 2 processes, they know nothing of each other"
        in result.stderr
    )
    assert not (tmp_path / "runs").exists()


# going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_from_elsewhere_with_names_as_typed(tmp_path, corpus):
    """Two names that are one number, and a command that resumes in any folder."""
    for name in ("1.1", "1.10"):
        result = started(tmp_path, corpus, f"name={name}", "optim.steps=2")
        assert result.returncode == 0, result.stderr
        assert "resumed" not in result.stdout
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1.1", "1.10"]
    [command] = [line.removeprefix("resume: ") for line in result.stdout.splitlines() if line.startswith("resume: ")]
    again = subprocess.run(["/bin/sh", "-c", command], cwd="/", capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "resumed from runs/1.10/checkpoints/step_2: step 2" in again.stdout
    assert "optim.steps 2 -> 4" in again.stdout
    assert "step 4/4" in again.stdout


@pytest.mark.slow
def test_a_multirun_is_as_many_runs(tmp_path, corpus):
    """One that diverges does not end the others, and is told at the end; a finished one is complete."""
    words = [
        "-m",
        "optim.lr=1e-3,1e38",
        "optim.steps=4",
        "optim.max_skipped_steps=1",
        "optim.clip_norm=0",
        "optim=adamw",
    ]
    words += ["optim.schedule=constant", "seed=1,2"]
    result = started(tmp_path, corpus, *words)
    names = {f"gpt_tiny-lr_{lr}-seed_{seed}" for lr in ("0.001", "1e+38") for seed in (1, 2)}
    assert {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()} == names
    losses = {
        name: [
            row["loss/train"] for row in read_metrics(tmp_path / "runs" / name / "metrics.jsonl") if "loss/train" in row
        ]
        for name in names
    }
    good = [f"gpt_tiny-lr_0.001-seed_{seed}" for seed in (1, 2)]
    assert all(len(losses[name]) == 4 for name in good)
    assert losses[good[0]] != losses[good[1]]
    assert result.returncode == 1
    assert (
        "2 of 4 jobs ended with an error:\n  - gpt_tiny-lr_1e+38-seed_1: 1 steps in a row were not finite"
        in result.stderr
    )
    again = started(tmp_path, corpus, *words)
    assert again.stdout.count("complete: step 4 of 4; give optim.steps=8 to go on, or another name") >= 2


def test_the_loss_of_the_last_validation_is_returned(tmp_path, corpus):
    config = small_config(tmp_path, corpus)
    outcome = run(config)
    rows = read_metrics(tmp_path / "test" / "metrics.jsonl")
    assert outcome.is_complete
    assert outcome.loss == [row["loss/val"] for row in rows if "loss/val" in row][-1]
    again = run(config)
    assert again == outcome  # read from the file: nothing was left to do
    assert read_metrics(tmp_path / "test" / "metrics.jsonl") == rows


def go(config: Config):
    return run(config)


def test_what_has_changed_is_said_when_a_run_goes_on(tmp_path, corpus, capsys):
    go(small_config(tmp_path, corpus, optim__steps=3))
    go(small_config(tmp_path, corpus, optim__steps=4, optim__lr=1e-4, optim__schedule=Schedule.constant))
    said = capsys.readouterr().out
    assert "changed since " in said
    assert "optim.steps 3 -> 4, optim.lr 0.003 -> 0.0001, optim.schedule cosine -> constant" in said


def test_a_curriculum_is_compared_as_a_whole():
    before, now = "data: {curriculum: {}, sequence_length: 4}", "data: {curriculum: {0: 2}, sequence_length: 4, new: 1}"
    assert resume.changes(before, now) == {"data.curriculum": ({}, {0: 2})}
    assert resume.changes("name: a\noptim: {lr: 1}", "name: b\noptim: {lr: 2}") == {"optim.lr": (1, 2)}


@pytest.mark.parametrize("key", ["model__norm_eps", "model__rotary__theta"])
def test_what_would_be_another_model_is_refused(tmp_path, corpus, capsys, key):
    go(small_config(tmp_path, corpus, optim__steps=3))
    with pytest.raises(
        UserError, match=rf"with {key.replace('__', '.')} .* -> 5.* this would be another run .* checkpoint"
    ):
        go(small_config(tmp_path, corpus, optim__steps=4, **{key: 5}))
    branch = small_config(tmp_path, corpus, optim__steps=4, name="branch", **{key: 5})
    branch.checkpoint.resume = str(tmp_path / "test" / "checkpoints" / "step_3")  # told to
    assert go(branch).is_complete
    assert f"{key.replace('__', '.')} " in capsys.readouterr().out


def test_fewer_steps_than_were_taken_are_refused(tmp_path, corpus):
    go(small_config(tmp_path, corpus, optim__steps=5))
    with pytest.raises(UserError, match="the run is at step 5, after its last one, optim.steps=3; give optim.steps=5"):
        go(small_config(tmp_path, corpus, optim__steps=3))


def test_a_complete_run_tells_what_its_learning_rate_would_do(tmp_path):
    config = composed("recipe=gpt_tiny")
    undecayed = Path("runs/test/checkpoints/step_100")
    resume, rate, branch = how_to_go_on(config, ["recipe=gpt_tiny"], 2, 300, undecayed, True)
    assert resume.endswith("--nproc-per-node 2 train.py recipe=gpt_tiny name=test optim.steps=600")
    assert rate == "  the learning rate will go back up, from 0.00017 to 0.02 (optim.schedule=wsd)"
    assert branch.endswith("name=test-longer optim.steps=600 checkpoint.resume=runs/test/checkpoints/step_100")
    config.optim.schedule = Schedule.constant
    assert len(how_to_go_on(config, [], 2, 300, None, True)) == 1
    assert len(how_to_go_on(config, [], 2, 100, None, False)) == 1
    config.data.curriculum = {0: 256, 0.75: 0}
    _resume, span = how_to_go_on(config, [], 2, 300, None, True)
    assert span == "  attention will be cut every 256 tokens again, until data.curriculum lets it grow"


def test_names_with_signs_are_quoted_in_the_command(tmp_path, monkeypatch):
    config = composed("recipe=gpt_tiny")
    config.name = "lr=1, b"
    monkeypatch.chdir(tmp_path)
    words = shlex.split(resume_command(config, [], 1))
    assert words[:3] == ["cd", str(tmp_path), "&&"]
    assert (
        composed_with(train.typed(["recipe=gpt_tiny", *[w for w in words if w.startswith("name=")]])).name == "lr=1, b"
    )


@pytest.mark.parametrize("words", [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]])
def test_a_folder_of_own_presets_is_in_the_command(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "model=mine", "--cfg", "job"])
    resume = shlex.split(resume_command(composed("recipe=gpt_tiny"), ["model=mine"], 1))
    place = resume.index(words[0])
    assert resume[place : place + len(words) + 1] == [*words, "model=mine"]


# memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt_tiny", "gpt_91m", "gpt2_124m", "gpt_124m", "qwen3_0_6b", "llama3_8b"])
def test_parameters_are_counted_without_making_them(model):
    import torch

    from longctx.model.transformer import Transformer

    config = composed("recipe=gpt_tiny", f"model={model}")
    with torch.device("meta"):
        made = Transformer(config.model)
    assert sum(parameters(config.model)) == sum(p.numel() for p in made.parameters())
    config.parallel, config.optim.optimizer = ParallelConfig(context=2, tensor=2, shard=1), "adamw"
    assert state_bytes(config, 4) == 4 * sum(parameters(config.model))
    config.optim.optimizer = "muon"  # one momentum where AdamW has two
    matrices, rest = parameters(config.model)
    assert state_bytes(config, 4) == 4 * rest + 3 * matrices


def test_what_cannot_fit_is_refused_before_it_is_made(tmp_path, corpus):
    result = started(
        tmp_path, corpus, "recipe=llama3_8b_128k", "model.width=65536",
        launcher=[*TORCHRUN, "--nproc-per-node", "2"],
    )  # fmt: skip
    assert result.returncode != 0
    assert "are needed at least, for " in result.stderr
    assert "can be had on this machine of 2 ranks: start more ranks that share them" in result.stderr


def test_memory_that_holds_files_can_be_had(tmp_path, monkeypatch):
    """A container that has read a corpus is full of the cache of its file."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine.Path, "read_text", lambda path, read=Path.read_text: (
        "MemAvailable: 9000000 kB" if path == Path("/proc/meminfo") else read(path)))  # fmt: skip
    assert machine.available_host_bytes() == 9000000 * 1024
    for name, text in (
        ("memory.max", "4000"),
        ("memory.current", "3900"),
        ("memory.stat", "anon 900\nactive_file 2000\ninactive_file 1000"),
    ):
        (tmp_path / name).write_text(text)
    assert machine.available_host_bytes() == 3100


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (720, "12 min"), (14400, "4 h"), (3 * 86400, "3 days")])
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_metrics_have_no_nan(tmp_path, corpus):
    """NaN is no JSON: other programs cannot read a line with it."""
    config = small_config(tmp_path, corpus, optim__lr=1e38, optim__max_skipped_steps=2, optim__clip_norm=0.0)
    with pytest.raises(UserError, match="2 steps in a row were not finite"):
        go(config)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "test" / "metrics.jsonl").open()]
    assert [line["loss/train"] for line in lines][-1] is None
    assert (tmp_path / "test" / "report.html").exists()
    before = (tmp_path / "test" / "metrics.jsonl").read_bytes()
    metrics = Metrics(run_info(config), {"device": "CPU", "ranks": 1}, 3, True)
    metrics.close()
    assert (tmp_path / "test" / "metrics.jsonl").read_bytes() == before  # of a run that has resumed, too


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_run_begins(number):
    """While torch is imported, as when a word was mistyped."""
    main = "train.main = lambda: [print('there', flush=True), time.sleep(60)]"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time; from longctx import train; {main}; train.start()"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(number)
    said, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (128 + number, "")
    assert said == f"{number.name} while no run is in progress: nothing to save\n"


def test_words_that_do_nothing_are_said():
    words = ["model.rotary.factor=4", "optim.muon_lr=0.1", "optim.lr=1e-3"]
    assert unused(composed("recipe=gpt_tiny", "optim=adamw", *words), words) == (
        "model.rotary.factor does nothing without a model.rotary.scaling\n"
        "optim.muon_lr does nothing without optim.optimizer=muon\n"
    )
    yarn = ["model.rotary.factor=4", "model.rotary.scaling=yarn", "model.rotary.original_length=64"]
    assert unused(composed("recipe=gpt_tiny", "optim=muon", *yarn), [*yarn, "optim.muon_lr=0.1"]) == ""


def test_what_is_no_checkpoint_is_told_apart(tmp_path, corpus):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "latest").mkdir(parents=True)
    for path, message in (
        (tmp_path / "none", "none: there is no such folder; name a step_N folder"),
        (tmp_path, "no manifest.json in it, so it is no checkpoint; name a step_N folder"),
        (folder, f"no manifest.json in it, so it is no checkpoint; name {folder}/checkpoints/latest"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read_manifest(path)
    config = small_config(tmp_path, corpus, checkpoint__resume="none")
    with pytest.raises(UserError, match="checkpoint.resume=none: must be auto, never, or the folder of a checkpoint"):
        run(config)


def test_a_tokenizer_beside_tokens_that_have_their_own_is_refused(tmp_path, corpus):
    config = small_config(tmp_path, corpus, data__tokenizer="other.json")
    with pytest.raises(UserError, match=r"data.tokenizer=other.json: is for files of Megatron .*: leave it out"):
        run(config)
