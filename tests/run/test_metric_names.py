"""Every metric is known by name: in the page that explains it, and on the dashboard."""

from __future__ import annotations

import json
import time
from statistics import median

import pytest

from in_process import run_script
from longctx.config import Optimizer
from longctx.metric_names import METRICS, metric_of, table
from longctx.metrics_file import read_metrics
from longctx.summary import summary
from longctx.throughput import Pace, peak_tflops
from longctx.wandb_log import CURVES
from runs import ROOT, small_config, train

ON_GPUS = {
    "perf/mfu", "perf/mfu_palm", "mem/peak_reserved_gib", "mem/peak_of_device", "perf/joules_per_token",
    "mem/predicted_gib", "time/predicted_s",
}  # fmt: skip
ON_RANKS = {"mem/alloc_retries", "mem/transport_gib", "run/slowest_rank", "run/slowest_over_median"}
DASHBOARD = ROOT / "tools" / "wandb_dashboard.py"
OF_LONG_CONTEXT = {"loss/last_octave_minus_1k"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory, corpus):
    """Of a run that logs as much as one process on a CPU can."""
    config = small_config(
        tmp_path_factory.mktemp("run"), corpus, optim__optimizer=Optimizer.muon, data__curriculum={0: 32},
        checkpoint__every_steps=2, optim__steps=4, checkpoint__asynchronous=False,
    )  # fmt: skip
    train(config)
    return read_metrics(config.run_folder / "metrics.jsonl")


def test_what_a_run_logs_is_known(lines):
    logged = {key for line in lines for key in line if key != "step"}
    assert [key for key in logged if metric_of(key) is None] == []
    known = {name for name in METRICS if "<" not in name}
    assert known - logged == ON_GPUS | ON_RANKS | OF_LONG_CONTEXT


def test_the_parts_of_a_step_are_its_time(lines):
    shares = []
    for line in (line for line in lines if "perf/step_s" in line):
        parts = sum(line[f"time/{part}_s"] for part in ("data", "forward", "backward", "optimizer"))
        shares.append(parts / line["perf/step_s"])
        assert line["perf/step_s_p95"] >= line["perf/step_s"] * 0.2
    assert max(shares) <= 1
    assert median(shares) > 0.8  # of steps of milliseconds, some of which wait for others on the machine
    assert lines[-2]["checkpoint/gib_per_s"] > 0
    assert lines[-2]["mem/host_gib"] == lines[-2]["mem/peak_alloc_gib"] > 0.1
    assert lines[0]["data/span"] == 32


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs" / "metrics.md").read_text()


def test_the_dashboard_names_what_runs_log(tmp_path, lines):
    result = run_script(DASHBOARD, "somebody/longctx", "--output", str(tmp_path / "made.json"))
    assert result.returncode == 0, result.stderr
    made = json.loads((tmp_path / "made.json").read_text())
    assert (made["entity"], made["project"]) == ("somebody", "longctx")
    sections = made["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Head", "Throughput", "Where a step goes", "Balance", "Memory", "System", "Goodput", "Learning", "Long context",
    ]  # fmt: skip
    figures = set(summary(lines)) | {f"mean/{key}" for key in ("mfu", "mfu_palm")}
    for section in sections:
        for panel in section["panels"]:
            config = panel["config"]
            if panel["viewType"] == "Vega2":
                tables = json.dumps(config["userQuery"])
                assert any(f'"{name}_table"' in tables for name, *_ in CURVES.values())
                continue
            for name in config["metrics"]:
                if panel["viewType"] == "Scalar Chart":
                    assert name.removeprefix("summary_metrics.") in figures
                else:
                    assert name in METRICS or name.startswith("system/gpu.0.")
            assert config.get("xAxis", "step") in ("step", "data/tokens", "_runtime", "run/device_s", "run/pflop")


def test_a_project_is_named_in_full():
    result = run_script(DASHBOARD, "longctx")
    assert result.returncode == 2
    assert "longctx: is not ENTITY/PROJECT; give both, as in https://wandb.ai/ENTITY/PROJECT" in result.stderr


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5), ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA GB200", 2500.0), ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 311.9), ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", 1307.4), ("CPU", None),
    ],
)  # fmt: skip
def test_mfu_is_of_the_very_device(device, tflops):
    assert peak_tflops(device, None) == tflops
    assert peak_tflops(device, 100.0) == 100.0


def test_the_time_left_forgets_the_steps_that_compile(monkeypatch):
    ends_of_steps = (100.0, 180.0, 181.0, 182.0, 185.0)
    seconds = iter((0.0, *ends_of_steps))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    pace = Pace()
    assert [pace.of_steps() for _ in ends_of_steps] == [100.0, 90.0, pytest.approx(181 / 3), 1.0, 2.0]
