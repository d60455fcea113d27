"""What starts a run on several machines: the variables of SLURM, and what is in `launch`.

The batch script is run in tests/run/test_machines.py.
"""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from longctx import slurm
from longctx.errors import ConfigError
from runs import ROOT, composed

TASKS = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu-[03-04]", "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_tasks_of_srun_are_ranks():
    environment = dict(TASKS)
    slurm.join(environment)
    joined = {key: value for key, value in environment.items() if key not in TASKS}
    port = joined.pop("MASTER_PORT")
    assert joined == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu-03",
    }  # fmt: skip
    assert port == str(slurm.port_of("17.0"))
    assert 20000 <= int(port) < 30000
    for alone in ({**TASKS, "RANK": "0"}, {**TASKS, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "4"}):
        before = dict(alone)
        slurm.join(alone)
        assert alone == before


@pytest.mark.parametrize("changed", [{"SLURM_STEP_TASKS_PER_NODE": "3,1"}, {"SLURM_NODEID": "0"}])
def test_tasks_that_are_dealt_out_otherwise_are_refused(changed):
    with pytest.raises(ConfigError, match=r"srun has dealt out 4 tasks as .*--ntasks-per-node=N --distribution=block"):
        slurm.join(TASKS | changed)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu-[03-06,9],login", "gpu-03"),
        ("n[7,9]", "n7"),
        ("r1n[01-02]-ib,x", "r1n01-ib"),
        ("r[1-2]n[01-04]", "r1n01"),
    ],
)
def test_the_first_of_slurms_list_of_nodes(nodes, first):
    assert slurm.first_of(nodes) == first


def test_the_manifest_of_kubernetes_is_valid():
    """By the schema of the API, and its command is one of a run."""
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    for part in (service, job):
        kubernetes_validate.validate(part, "1.37", strict=True)
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    place = container["args"].index("longctx.train")
    launcher, words = container["args"][: place + 1], container["args"][place + 1 :]
    assert container["command"] == ["torchrun"]
    parsed = get_args_parser().parse_args([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in launcher])
    assert (parsed.training_script, parsed.node_rank, parsed.master_addr) == ("longctx.train", 1, "longctx-0.longctx")
    assert parsed.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    composed(*words)
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == 2
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"]
