"""The command-line tools, as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from unittest import mock

import pytest
import torch

from in_process import run_script
from longctx import plan, remedies
from longctx.config_checks import check
from longctx.data.tokens import TokenFolder
from longctx.strategy import strategy_for
from runs import ROOT, composed


def run_tool(name: str, *words: str) -> CompletedProcess[str]:
    return run_script(ROOT / "tools" / f"{name}.py", *words, folder=ROOT)


def load_tool(name: str) -> ModuleType:
    """A tool as a module, to call it in this process; it finds the other tools as when it is started."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]):
        spec.loader.exec_module(module)
    return module


def test_a_tool_belongs_to_the_checkout_that_it_is_in(tmp_path):
    """Not to the one that is installed: figures of two checkouts are compared."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "longctx").mkdir()
    (tmp_path / "longctx" / "__init__.py").write_text("import sys\nsys.exit('the other checkout')\n")
    sources = {path: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    programs = [path for path, text in sources.items() if "__main__" in text and "from longctx" in text]
    assert len(programs) == 15
    for path in programs:  # without the packages of others, which take seconds
        lines = sources[path].split("\n")
        kept = [line for line in lines if not re.match(r"(from|import) (torch|hydra|omegaconf|tokenizers)", line)]
        (tmp_path / "tools" / path.name).write_text("\n".join(kept))
        command = [sys.executable, tmp_path / "tools" / path.name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.stderr == "the other checkout\n", path


def test_prepare_data(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("def f():\n    pass\n" * 20)
    lines = [json.dumps({"body": f"class C{i}:\n    x = {i}\n"}) for i in range(50)]
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(lines))
    words = ["prepare_data", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    result = run_tool(*words)
    assert result.returncode == 1
    assert "b.jsonl:1: no field 'text'; name it with --text-field" in result.stderr
    assert not (tmp_path / "out").exists()

    result = run_tool(*words, "--text-field", "body", "--validation-fraction", "0.2")
    assert result.returncode == 0, result.stderr
    tokens = TokenFolder(tmp_path / "out", 8192, check_hashes=True)
    counts = {split: sum(s.documents for s in shards) for split, shards in tokens.manifest.splits.items()}
    assert sum(counts.values()) == 51
    assert 3 <= counts["validation"] <= 20
    assert f"train: {counts['train']} documents" in result.stdout

    assert "no document was held out" not in result.stdout
    few = run_tool("prepare_data", str(tmp_path / "in" / "a.txt"), "--output", str(tmp_path / "few"))
    assert "no document was held out, so a run has no validation: give a larger --validation-fraction" in few.stdout

    again = run_tool(*words, "--text-field", "body")
    assert again.returncode == 1
    assert "exists already; remove it or give another folder" in again.stderr


def test_prepare_data_names_a_missing_input(tmp_path):
    result = run_tool("prepare_data", str(tmp_path / "no"), "--output", str(tmp_path / "out"))
    assert result.returncode == 1
    assert f"{tmp_path}/no: no such file or folder" in result.stderr


@pytest.mark.slow
@pytest.mark.interpreter
def test_bench_attention(tmp_path):
    """Errors to float64, times of what can run, reasons of what cannot, in table, JSON and plot."""
    words = ["--cases", "documents 16k", "--divide", "4096", "--contenders", "triton,sdpa,cudnn", "--rounds", "2"]
    result = run_tool("bench_attention", *words, "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = {row["contender"]: row for row in json.loads((tmp_path / "attention.json").read_text())["rows"]}
    for name in ("triton", "sdpa"):
        assert rows[name]["error_to_float64"] < 2e-6
        assert rows[name]["forward_tflops"] > 0
        assert rows[name]["backward_ms"] > 0
    assert rows["cudnn"]["error"] == "knows full and causal masks"
    assert (tmp_path / "attention.png").stat().st_size > 5000
    assert "| 128k documents 16k d128 32/8 | triton |" in result.stdout


def test_bench_attention_names_what_there_is(tmp_path):
    result = run_tool("bench_attention", "--contenders", "fa5", "--output", str(tmp_path))
    assert result.returncode == 1
    assert "contenders fa5: must be of hopper, hopper-deterministic, hopper-into, triton," in result.stderr


def test_contenders_of_a_benchmark_take_turns(tmp_path):
    """Three rounds, of which the median counts; who cannot run is asked once."""
    benchmarking = load_tool("benchmarking")
    asked = []

    def measure(name, case, _device, _dtype):
        asked.append((case.name, name))
        if name == "absent":
            return {"error": "not installed"}
        return {"ms": float({1: 7, 2: 9, 3: 2}[asked.count((case.name, name))]), "peak_gib": None}

    case = benchmarking.Report("small", [], [], "")  # anything with a name
    words = ["bench_turns", "--divide", "2", "--output", str(tmp_path)]
    with mock.patch.object(sys, "argv", words):
        report = benchmarking.Report("turns", ["ms"], ["ms"], "")
        benchmarking.run("", [case], ["ours", "absent", "theirs"], lambda case, _: case, measure, report)
    assert asked == [("small", name) for name in ("ours", "absent", "theirs", "ours", "theirs", "ours", "theirs")]
    rows = json.loads((tmp_path / "turns.json").read_text())["rows"]
    assert rows == [
        {"case": "small", "contender": "ours", "ms": 7.0, "peak_gib": None},
        {"case": "small", "contender": "absent", "error": "not installed"},
        {"case": "small", "contender": "theirs", "ms": 7.0, "peak_gib": None},
    ]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("bench_ops", "bench_ops: measures GPUs, and there is none here; to try the tool make the cases small"),
        ("bench_attention", "bench_attention: measures GPUs, and there is none here"),
        ("bench_context_parallel", "bench_context_parallel: needs GPUs that share a sequence, started by torchrun"),
        ("tune_attention", "tune_attention: needs a GPU of compute capability 9.0, there is none here"),
    ],
)
def test_tools_for_gpus_say_so(tool, message):
    result = run_tool(tool)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.slow
@pytest.mark.interpreter
def test_bench_ops(tmp_path):
    """Ours and torch's in every case; a loss is timed whole; peers that are absent are named."""
    words = ["--divide", "2048", "--contenders", "triton,eager,liger", "--rounds", "1"]
    result = run_tool("bench_ops", *words, "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert len({row["case"] for row in rows}) >= 11
    for row in rows:
        if row["contender"] == "liger":
            assert "liger_kernel" in row["error"]
            continue
        assert row["step_ms"] > 0, row
        assert row.get("error_to_float64", 0) < 1e-6, row
        assert ("forward_ms" in row) == ("entropy" not in row["case"]), row


def test_plan_of_a_recipe_for_one_sequence_has_mixed_layouts_too():
    """Of eight sequences a step on two machines two GPUs may share each, and nothing of attention leaves a machine."""
    result = run_tool("plan", "recipe=extend_qwen3_0_6b_128k", "gpus=16", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {plan["context"] for plan in found["plans"] if plan["fits"]} == {2, 4, 8, 16}
    assert found["plans"][0]["context"] == 2
    assert "parallel.shard=-1" in found["command"]


def test_plan():
    """The fastest that fits is first, and its command is one that train.py takes."""
    result = run_tool("plan", "recipe=llama3_8b_1m", "gpus=8", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["usable_gib"] == pytest.approx(134.1, abs=0.05)
    first = found["plans"][0]
    assert first["fits"]
    assert sum(first["memory"]["terms"].values()) / 2**30 == pytest.approx(117.4, abs=0.1)
    assert first["longest"] == 1228800
    said = "parallel.strategy=ring parallel.recompute=attention_saved parallel.recompute_less_layers=2"
    assert found["command"].endswith(f"parallel.context=8 {said}")
    fitting = [p["fits"] for p in found["plans"]]
    assert fitting == sorted(fitting, reverse=True)
    assert {p["words"][2] for p in found["plans"] if not p["fits"]} == {"parallel.recompute=none"}
    seconds = [p["seconds"] for p in found["plans"] if p["fits"]]
    assert seconds == sorted(seconds)


def test_plan_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "tools/plan.py", "recipe=gpt_32k", "gpus=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "longctx.plan" in imported
    assert "torch" not in imported


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml")))
def test_the_command_of_each_recipe_is_one_that_can_be_started(recipe, monkeypatch, capsys):
    """Whatever the recipe says of tiles and offload itself, and with host memory or without."""
    tool = load_tool("plan")
    for words in (["gpus=8"], ["gpus=8", "host_gib=1024"]):
        monkeypatch.setattr(sys, "argv", ["plan.py", f"recipe={recipe}", *words, "data.sequences_per_step=8", "--json"])
        if recipe == "gpt_tiny":  # in float32
            with pytest.raises(SystemExit):
                tool.main()
            continue
        tool.main()
        found = json.loads(capsys.readouterr().out)
        overrides = shlex.split(found["command"])
        overrides = [word for word in overrides[overrides.index(f"recipe={recipe}") :] if "=" in word]
        config = composed(*overrides)
        check(config, 8)
        needed = plan.memory(config, 8, strategy_for(8)(config)).total
        assert needed == sum(found["plans"][0]["memory"]["terms"].values())
        assert all(("host" in p["kept"]) <= (len(words) > 1) for p in found["plans"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=gpt_32k"], "plan: gpus=: give a whole number from 1 on"),
        (["recipe=gpt_32k", "gpus=0"], "plan: gpus=0: give a whole number from 1 on"),
        (["recipe=gpt_32k", "gpus=2", "per_machine=0"], "plan: per_machine=0: give a whole number from 1 on"),
        (["recipe=gpt_32k", "gpus=2", "gpu=b300"], "plan: gpu=b300: no rates of it; there are h200"),
        (["recipe=gpt_33k", "gpus=2"], "Could not find 'recipe/gpt_33k'"),
        (["recipe=gpt_32k", "gpus=2", "gpus=4"], "plan: gpus= is given 2 times; give it once"),
        (["recipe=gpt_32k", "gpus=12"], "plan: gpus=12 are no whole machines of 8"),
        (["recipe=gpt_32k", "gpus=3"], "data.sequences_per_step=2 is no multiple of the 3 ranks"),
        (["recipe=gpt_32k", "gpus=1", "parallel.shard=0"], "parallel.shard=0: give 1 or more"),
        (["recipe=gpt_32k", "gpus=2", "+foo=3"], "foo is no key of the configuration"),
        (["recipe=gpt_32k", "gpus=2", "precision.compute=float32"], "16 bits (precision=bf16), head dims"),
        (["recipe=llama3_8b_1m", "gpus=3"], "data.sequence_length=1048576 is no multiple of 6"),
        (
            ["recipe=llama3_8b_1m", "gpus=8", "data.sequence_length=0"],
            "1 problem in this run's configuration:\n  - data.sequence_length=0",
        ),
    ],
    ids=str,
)
def test_plan_says_what_it_lacks(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    with pytest.raises(SystemExit) as caught:
        load_tool("plan").main()
    assert said in str(caught.value)


def test_a_plan_that_a_run_would_refuse_for_its_host_memory_does_not_fit():
    """A run may take 92 % of what is there."""
    words = [
        "recipe=llama3_8b_128k", "parallel.context=8", "parallel.offload_optimizer=true",
        "checkpoint.asynchronous=false",
    ]  # fmt: skip
    config, tool = composed(*words), load_tool("plan")
    needed = sum(plan.host_memory(config, 8).values()) * 8 / plan.GIB
    rates, fits = tool.step_time.rates("h200"), []
    least = math.ceil(needed / 0.92)
    for host_gib in (least, least - 1):
        found = tool.plans(config, words, tool.Machines(8, 8, "h200", host_gib), rates, 130 * plan.GIB)
        fits.append(any(one.fits for one in found if one.kept == "attention_saved, optimizer on host"))
    assert fits == [True, False]


def test_plan_of_what_cannot_fit():
    result = run_tool("plan", "recipe=llama3_8b_1m", "gpus=1", "parallel.recompute=full")
    assert result.returncode == 0
    [row] = [line for line in result.stdout.splitlines() if "does not fit" in line]
    assert row.split()[:4] == ["1", "-", "full", "542.9"]
    assert "nothing fits: more GPUs, a shorter sequence (see longest), or a smaller model" in result.stdout


def test_a_plan_says_how_much_host_memory_would_do():
    """Offloading needs 118 GiB of it: with as much the plan has a command, with 1 less it says so."""
    words = ["recipe=llama3_8b_256k_1gpu", "gpus=1", "data.sequence_length=524288"]
    for said in ([], ["host_gib=117"]):
        result = run_tool("plan", *words, *said)
        assert "nothing fits: say host_gib=118 or more, if a machine has as much host memory" in result.stdout
    result = run_tool("plan", "recipe=llama3_8b_128k", "gpus=8", "host_gib=90")
    assert "nothing fits: say checkpoint.asynchronous=false, for there is no room for its copies" in result.stdout
    facts = json.loads(run_tool("plan", *words, "host_gib=118", "--json").stdout)
    assert "parallel.offload=12" in facts["command"]
    assert facts["plans"][0]["host_gib"] == 118


def test_a_plan_for_gpus_of_80_gb():
    """As an H200 computes, and with less memory: what the run itself would refuse does not fit."""
    facts = [
        json.loads(run_tool("plan", "recipe=llama3_8b_128k", f"gpus={gpus}", "gpu_gib=79", "--json").stdout)
        for gpus in (1, 8)
    ]
    assert [f["usable_gib"] for f in facts] == [pytest.approx(remedies.usable(79 * plan.GIB) / plan.GIB)] * 2
    assert facts[0]["command"] is None
    assert "gpu_gib" not in facts[1]["command"]
    fitting = [p for p in facts[1]["plans"] if p["fits"]]
    assert all(sum(p["memory"]["terms"].values()) <= facts[1]["usable_gib"] * plan.GIB for p in fitting)
    assert fitting


def test_the_command_of_a_plan():
    """What was typed stays as it was, quoted, and is not said twice; two machines are started as two."""
    words = ["recipe=gpt_32k", "gpus=16", "name=x-parallel.recompute-y", "data.folder=/d/a(b)=c", "data=prepared",
             "++parallel.context=8", "data.curriculum={0: 2048, 10: 0}"]  # fmt: skip
    result = run_tool("plan", *words, "--json")
    assert result.returncode == 0, result.stderr
    typed = shlex.split(json.loads(result.stdout)["command"])
    assert Path(typed[0]).absolute() == Path(sys.executable).parent / "torchrun"
    assert typed[1:9] == ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500",
                          "--nproc-per-node", "8"]  # fmt: skip
    assert [word for word in words if not word.startswith("gpus=")] == typed[10:16]
    assert {word.partition("=")[0] for word in typed[16:]} == {"parallel.strategy", "parallel.recompute"}
    assert "parallel.recompute=none" in typed  # all choices wait for launches, and this is the plainest


def test_a_plan_of_a_recipe_of_ones_own(tmp_path):
    folder = tmp_path / "of mine"
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe" / "small.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: gpt_124m]\ndata: {sequence_length: 8192}\n"
    )
    result = run_tool("plan", "recipe=small", "gpus=1", "--config-dir", str(folder))
    assert result.returncode == 0, result.stderr
    assert "sequences of 8,192 tokens a step on 1 x NVIDIA H200" in result.stdout
    assert f"train.py --config-dir '{folder}' recipe=small " in result.stdout


def test_rates_are_fitted_to_steps():
    """Steps made by known rates give these rates, also where one is off by a few per cent."""
    tool = load_tool("bench_rates")
    true = dict(zip(tool.FITTED, (0.9, 0.2, 60.0), strict=True))
    steps = [
        tool.Step("long", 0, 0.2, (0.4, 0.13, 0.0005)),
        tool.Step("shorter", 0, 0.02, (0.1, 0.033, 0.0005)),
        tool.Step("narrow", 0, 0.4, (0.05, 0.15, 0.00002)),
        tool.Step("narrow and shorter", 0, 0.02, (0.012, 0.037, 0.00002)),
    ]
    steps = [step._replace(seconds=step.expected(true)) for step in steps]
    assert len(tool.STEPS) > len(tool.FITTED)
    assert tool.fit(steps) == pytest.approx(true)
    assert tool.unlikely(steps, true) is None
    assert tool.unlikely(steps, true | {tool.FITTED[0]: 1.2}) == "the fit gives share_of_product_tflops 1.2"
    slower = [*steps[:3], steps[3]._replace(seconds=1.25 * steps[3].seconds)]
    assert tool.unlikely(slower, true) == "narrow and shorter is off by -20%"
    found = tool.fit([steps[0]._replace(seconds=1.02 * steps[0].seconds), *steps[1:]])
    assert all(step.expected(found) == pytest.approx(step.seconds, rel=0.03) for step in steps)


def test_rates_need_a_gpu(monkeypatch):
    tool = load_tool("bench_rates")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_rates.py"])
    with pytest.raises(SystemExit, match="measures a GPU, and there is none here"):
        tool.main()


def test_idle_time_of_a_timeline():
    """Kernels that overlap, gaps between them, and copies that fill a part of these."""
    tool = load_tool("bench_memory")
    idle = tool.gaps([(30.0, 40.0), (0.0, 10.0), (5.0, 12.0), (6.0, 7.0), (20.0, 25.0)])
    assert idle == [(12.0, 20.0), (25.0, 30.0)]
    assert tool.total(idle) == 13
    assert tool.without(idle, [(0.0, 14.0), (13.0, 15.0), (18.0, 26.0)]) == [(15.0, 18.0), (26.0, 30.0)]
    assert tool.without(idle, []) == idle
    assert tool.gaps([]) == []


@pytest.mark.parametrize("name", ["best", "latest", "step_lr"])
def test_a_run_of_the_name_of_a_checkpoint_is_a_run(tmp_path, name):
    """What is there decides; a checkpoint without a manifest is still refused as one."""
    for step in (1, 2):
        folder = tmp_path / name / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    find = load_tool("checkpoint").find
    assert [path.name for path in find(tmp_path / name)] == ["step_1", "step_2"]
    assert find(folder) == [folder]
    assert find(tmp_path / "step_3") == [tmp_path / "step_3"]
