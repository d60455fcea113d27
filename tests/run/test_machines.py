"""Runs over two machines, which are namespaces of this one: what they compute, what is refused, what each fault does.

Those that a newcomer's `make test` leaves to `make test-all` are marked slow: each takes a start of two torchruns.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpora import make_corpus
from longctx.metrics_file import read_metrics
from machines import Job, Network, why_not
from runs import ROOT, composed, train
from thorough import IS_THOROUGH

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

MODEL = [
    "recipe=gpt_tiny", "model.layers=2", "model.width=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=16",
    "data.sequence_length=128", "data.sequences_per_step=4", "precision.compute=float32", "optim.lr=1e-3",
    "optim.muon_lr=1e-3", "logging.wandb=disabled", "logging.every_steps=1", "validation.sequences=0",
    "validation.recall_sequences=0",
]  # fmt: skip
TIMEOUT_S = 10
KILL_RANKS = "pkill -KILL -f 'python.* -u .*[t]rain.py'"  # the pattern does not match this command
ENDLESS = [
    "data=recall", "parallel.context=4", "optim.steps=100000", "checkpoint.every_steps=20",
    f"parallel.timeout_seconds={TIMEOUT_S}",
]  # fmt: skip
LAYOUTS = {
    "context": ["parallel.context=4"],
    "replicas": ["parallel.replicate=2", "parallel.shard=2", "parallel.context=1"],
    "tensor": ["parallel.tensor=2", "parallel.context=2"],
}
if not IS_THOROUGH:  # the others go between machines by the same collectives
    LAYOUTS = {"context": LAYOUTS["context"]}


@pytest.fixture
def network(tmp_path) -> Iterator[Network]:
    with Network(tmp_path, 2) as made:
        yield made


def losses(folder: Path) -> list[float]:
    return [row["loss/train"] for row in read_metrics(folder / "metrics.jsonl") if "loss/train" in row]


@pytest.mark.slow
def test_two_machines(network):
    """They train as one process does in each layout, refuse a run folder and a corpus that one has and the other has
    not, and end when the link is cut, each saying which machine it no longer hears of. All in one start, which takes
    longest."""
    one, two = network.machines
    make_corpus(one.folder / "corpus")
    shared, own = f"folder={network.shared}", f"folder={network.disk}"
    data = ["data=recall", "optim.steps=4"]
    jobs = [[*MODEL, *data, *layout, shared, f"name={name}"] for name, layout in LAYOUTS.items()]
    jobs.append([*MODEL, *data, own, "name=folder"])
    jobs.append([*MODEL, "data=prepared", f"data.folder={network.disk / 'corpus'}", shared, "name=corpus"])
    jobs.append([*MODEL, *ENDLESS, shared, "name=endless"])
    words = [str(ROOT / "tests" / "support" / "jobs.py"), *" / ".join(" ".join(job) for job in jobs).split()]
    started = [machine.torchrun(2, words) for machine in (one, two)]
    started[0].wait_for("step 2/100000", seconds=120)
    two.cut()
    assert max(seconds_to_end(started)) < TIMEOUT_S + 10
    assert [job.process.returncode for job in started] == [1, -signal.SIGKILL]  # torchrun there would wait for ever
    said = started[0].text
    assert re.search(r"rank 2 \(process \d+ on machine2\) has given no sign of life for \d+ s", said)
    assert re.search(r"rank [23]: the job's store on machine1 has not answered for \d+ s", started[1].text)
    assert re.search(
        rf"refused folder: rank 2 on machine2: the run's folder {network.disk}/folder on machine2 is", said
    )
    assert re.search(r"refused corpus: rank 2 on machine2: .*/corpus: no such folder", said)
    assert "context: ulysses_ring (2 ranks of a machine trade heads, keys go between these)" in said
    assert re.search(r"between machines, a layer and micro-batch: 0.0655 MB forward, .* at the .* GB/s measured", said)
    assert "resume, on each of 2 machines: " in said
    assert "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint machine1:29500 --nproc-per-node 2 " in said
    config = composed(*MODEL, *data, f"folder={network.folder / 'alone'}")
    train(config)
    alone = losses(config.run_folder)
    assert len(alone) == 4
    assert alone[3] < alone[0] - 0.01
    for name in LAYOUTS:
        assert losses(network.shared / name) == pytest.approx(alone, rel=1e-6), name


def command(network: Network, *words: str) -> list[str]:
    """Of a run in the folder that the machines share."""
    return [str(ROOT / "train.py"), *MODEL, f"folder={network.shared}", "name=run", *words]


def training(network: Network, *words: str, options: tuple[str, ...] = ()) -> list[Job]:
    """A run without an end, in its steps; `options` of torchrun."""
    endless = command(network, *ENDLESS, *words)
    jobs = [machine.torchrun(2, endless, *options) for machine in network.machines]
    jobs[0].wait_for("saved ")
    return jobs


def seconds_to_end(jobs: list[Job]) -> list[float]:
    began, seconds = time.monotonic(), []
    for job in jobs:
        job.wait(60)
        seconds.append(time.monotonic() - began)
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_machine_that_is_lost_ends_the_other(network, number):
    """Also the first one, whose torchrun has the store that all meet at."""
    jobs = training(network)
    network.machines[number - 1].switch_off()
    (left,) = [job for job in jobs if job is not jobs[number - 1]]
    assert seconds_to_end([left])[0] < TIMEOUT_S + 10
    said = {
        1: r"rank \d: the job's store on machine1 has not answered for \d+ s",
        2: r"rank 2 \(process \d+ on machine2\) has given no sign of life for \d+ s",
    }
    assert re.search(said[number], left.text)


@pytest.mark.slow
def test_a_link_that_is_cut_for_five_seconds_keeps_the_run(network):
    jobs = training(network, "parallel.timeout_seconds=60")
    network.machines[1].cut()
    time.sleep(5)
    network.machines[1].mend()
    step = last_step(jobs[0])
    jobs[0].wait_for(f"step {step + 20}/")
    for job in jobs:
        job.signal(signal.SIGTERM)
    seconds_to_end(jobs)
    assert "stopping after step" in jobs[0].text


@pytest.mark.slow
def test_a_slow_link_slows_the_run(network):
    """A step sends some 8 MB a machine; at 20 Mbit/s it takes seconds."""
    jobs = training(network, "parallel.timeout_seconds=60")
    network.machines[1].slow("20mbit")
    began, step = time.monotonic(), last_step(jobs[0])
    jobs[0].wait_for(f"step {step + 4}/")
    assert time.monotonic() - began > 4


def last_step(job: Job) -> int:
    return int(re.findall(r"^step (\d+)/", job.text, re.MULTILINE)[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "what"), [(2, "ranks"), (2, "torchrun"), (1, "torchrun")])
def test_what_is_killed_on_one_machine_ends_both(network, number, what):
    """The first machine's torchrun has the store that all meet at."""
    jobs = training(network)
    if what == "ranks":
        network.machines[number - 1].do(KILL_RANKS)
    else:
        jobs[number - 1].signal(signal.SIGKILL)
    assert max(seconds_to_end(jobs)) < TIMEOUT_S + 10


@pytest.mark.slow
def test_sigterm_to_one_torchrun_saves_and_ends_both(network):
    jobs = training(network)
    jobs[1].signal(signal.SIGTERM)
    assert max(seconds_to_end(jobs)) < TIMEOUT_S + 10
    assert "stopping after step" in jobs[0].text


@pytest.mark.slow
def test_sigterm_in_a_step_that_lasts_too_long_ends_both(network):
    """The step is left, what was before it is saved, and the other machine's torchrun does not wait."""
    jobs = training(network, "parallel.timeout_seconds=60", "parallel.stop_seconds=1")
    network.machines[1].slow("20mbit")
    step = last_step(jobs[0])
    jobs[0].wait_for(f"step {step + 1}/")
    jobs[1].signal(signal.SIGTERM)
    assert max(seconds_to_end(jobs)) < 40
    assert "would outlast parallel.stop_seconds=1, so it is left" in jobs[0].text


@pytest.mark.slow
def test_restarts_resume_on_both_machines(network):
    jobs = training(network, options=("--max-restarts", "2"))
    network.machines[1].do(KILL_RANKS)
    jobs[0].wait_for("resumed from ")
    step = last_step(jobs[0])
    jobs[0].wait_for(f"step {step + 20}/")


@pytest.mark.slow
def test_different_numbers_of_processes_are_refused(network):
    endless = command(network, *ENDLESS)
    jobs = [machine.torchrun(ranks, endless) for machine, ranks in zip(network.machines, (3, 1), strict=True)]
    assert [job.wait() for job in jobs] == [1, 1]
    assert all("different numbers of processes (3 on machine1, 1 on machine2)" in job.text for job in jobs)


@pytest.mark.slow
def test_a_name_that_leads_to_the_machine_itself_is_refused_with_the_fix(network):
    """As Debian writes it; gloo would offer others an address that they cannot reach."""
    for machine in network.machines:
        others = [f"{other.address} {other.name}" for other in network.machines if other is not machine]
        (machine.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {machine.name}", *others]))
    short = command(network, "data=recall", "parallel.context=4", "optim.steps=2")
    jobs = [machine.torchrun(2, short) for machine in network.machines]
    assert [job.wait() for job in jobs] == [1, 1]
    for job in jobs:
        assert re.search(r"the name machine\d leads to 127.0.1.1 on that machine.*set GLOO_SOCKET_IFNAME", job.text)
    jobs = [machine.torchrun(2, short, GLOO_SOCKET_IFNAME="eth0") for machine in network.machines]
    assert [job.wait() for job in jobs] == [0, 0]


SRUN = """#!{python}
import os, signal, subprocess, sys
machines, words, ranks = {machines}, sys.argv[1:], 1
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    ranks = int(value) if name == "--ntasks-per-node" else ranks
steps = []
for rank in range(ranks * len(machines)):
    node, local = divmod(rank, ranks)
    said = dict(
        SLURM_STEP_NUM_TASKS=ranks * len(machines), SLURM_PROCID=rank, SLURM_LOCALID=local, SLURM_NODEID=node,
        SLURM_STEP_TASKS_PER_NODE=f"{{ranks}}(x{{len(machines)}})", SLURM_STEP_NODELIST="machine[1-2]", SLURM_STEP_ID=0,
    )
    environment = [f"{{key}}={{value}}" for key, value in said.items()]
    steps.append(subprocess.Popen([*machines[node], "env", *environment, *words]))

def hand_on(number, _):
    for step in steps:
        for child in open(f"/proc/{{step.pid}}/task/{{step.pid}}/children").read().split():
            os.kill(int(child), number)

signal.signal(signal.SIGTERM, hand_on)
sys.exit(max(abs(step.wait()) for step in steps))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'machine1\\nmachine2\\n'; else echo "$@" >> requeued; fi
"""


@pytest.fixture
def slurm(network, monkeypatch) -> dict[str, str]:
    """A job of SLURM over both machines, as far as a script sees it, in the folder that they share: its variables."""
    folder = network.folder / "bin"
    folder.mkdir()
    srun = SRUN.format(python=sys.executable, machines=[machine.enter for machine in network.machines])
    for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name, target in {".venv": Path(sys.prefix), "train.py": ROOT / "train.py"}.items():
        (network.shared / name).symlink_to(target)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(network.shared), "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "machine[1-2]", "RANKS_PER_MACHINE": "2", "OMP_NUM_THREADS": "1",
        "HOME": str(network.disk / "home"),
    }  # fmt: skip


def batch(slurm: dict[str, str], network: Network, command: list[str], number: int) -> Job:
    output = network.folder / f"batch-{number}.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, env=slurm, cwd=network.shared, stdout=file, stderr=subprocess.STDOUT)
    return Job(process, output)


@pytest.mark.slow
def test_a_job_of_slurm_saves_before_its_time_is_over_and_goes_on(network, slurm):
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *MODEL, *ENDLESS, "name=run"]
    job = batch(slurm, network, script, 1)
    job.wait_for("saved ")
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 1  # torchrun's, which a signal ended
    assert "stopping after step" in job.text
    assert (network.shared / "requeued").read_text() == "requeue 17\n"
    again = batch(slurm, network, script, 2)
    again.wait_for("resumed from ")
    again.process.kill()


@pytest.mark.slow
def test_srun_alone_starts_ranks_that_know_each_other(network, slurm):
    words = ["optim.steps=4", *MODEL, "data=recall", "parallel.context=4", "name=run"]
    job = batch(slurm, network, ["srun", "--ntasks-per-node=2", sys.executable, "train.py", *words], 1)
    assert job.wait() == 0, job.text
    assert "4 x CPU, replicate 1 x shard 1 x context 4 x tensor 1" in job.text
    assert "context: ulysses_ring (2 ranks of a machine trade heads" in job.text
    assert len(losses(network.shared / "runs" / "run")) == 4
