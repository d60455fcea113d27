"""The wheel: built, installed where there is no checkout, and used from there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from email.parser import Parser
from zipfile import ZipFile

import pytest

import longctx
from runs import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with longctx alone."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
    assert subprocess.run(command, timeout=300).returncode == 0
    return folder


def started(installed, cwd, *words: str) -> subprocess.CompletedProcess[str]:
    """In a folder that holds nothing, where longctx is found as installed."""
    environment = os.environ | {"PYTHONPATH": str(installed), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_what_it_holds_and_needs(wheel):
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    tree = {
        f"longctx/{there}/{path.relative_to(ROOT / here).as_posix()}"
        for here, there, kind in (
            ("kernels", "kernels", "py"), ("kernels", "kernels", "json"), ("configs", "configs", "yaml"),
            ("recipes", "configs/recipe", "yaml"), ("tools", "tools", "py"),
        )
        for path in (ROOT / here).rglob(f"*.{kind}")
    }  # fmt: skip
    assert tree - names == set()
    assert {"longctx/py.typed", "longctx/data/builtin_tokenizer.json", "longctx/train.py"} <= names
    assert {name.split("/")[0] for name in names} == {"longctx", f"longctx-{longctx.__version__}.dist-info"}
    assert metadata["Version"] == longctx.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = metadata.get_all("Requires-Dist")
    assert {re.split(r"\W", need)[0] for need in needed if "extra ==" not in need} == {"torch", "triton", "numpy"}
    assert set(metadata.get_all("Provides-Extra")) == {"train", "wandb", "dev"}


def test_kernels_and_parallelism_need_little(installed, tmp_path):
    code = (
        "import sys\n"
        "others = 'hydra', 'omegaconf', 'wandb', 'pyarrow', 'tokenizers', 'safetensors', 'matplotlib', 'tqdm'\n"
        "sys.modules.update(dict.fromkeys((*others, 'pynvml')))\n"  # none of them can be imported
        "import torch\n"
        "from longctx import ops\n"
        "q = torch.ones(1, 4, 2, 8)\n"
        "print(ops.attention(q, q, q, ops.KeyIntervals.causal(4))[0].sum().item(), len(ops.__all__), ops.__file__)\n"
        "print(*(name for name in sys.modules if name.startswith('longctx.') and '.kernels' not in name))\n"
        "import longctx.parallel\n"
    )
    done = started(installed, tmp_path, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["64.0", "24", str(installed / "longctx" / "ops.py"), "longctx.ops"]


def test_tools_of_it(installed, tmp_path):
    """Text is prepared, and a plan made of it whose command starts the installed trainer."""
    (tmp_path / "a.txt").write_text("def f():\n    pass\n" * 20)
    python = sys.executable, "-m"
    prepared = started(installed, tmp_path, *python, "longctx.tools.prepare_data", "a.txt", "--output", "made")
    assert prepared.returncode == 0, prepared.stderr
    assert json.loads((tmp_path / "made" / "manifest.json").read_text())["splits"]
    planned = started(installed, tmp_path, *python, "longctx.tools.plan", "recipe=gpt_32k", "gpus=1")
    assert planned.returncode == 0, planned.stderr
    assert "torchrun --nproc-per-node 1 -m longctx.train recipe=gpt_32k" in planned.stdout
    names = ", ".join(path.stem for path in (ROOT / "tools").glob("*.py"))
    imported = started(installed, tmp_path, sys.executable, "-c", f"from longctx.tools import {names}")
    assert imported.returncode == 0, imported.stderr


def test_a_run_started_from_it(installed, tmp_path, corpus):
    words = ["recipe=gpt_tiny", "name=there", "optim.steps=2", "optim.warmup_steps=0", "data.sequence_length=64"]
    words += ["validation.sequences=2", "validation.sample_tokens=0", "model.layers=1"]
    words += ["data=prepared", f"data.folder={corpus}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = started(installed, tmp_path, *torchrun, "-m", "longctx.train", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert "torchrun --nproc-per-node 2 -m longctx.train recipe=gpt_tiny" in done.stdout  # how to go on
    assert (tmp_path / "runs" / "there" / "report.html").exists()


def test_the_command_without_what_trains(installed, tmp_path):
    code = "import sys; sys.modules['hydra'] = None; from longctx.train import start"
    done = started(installed, tmp_path, sys.executable, "-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("longctx: hydra is not installed; to train, in a checkout of longctx: make train"), (
        done.stderr
    )


def test_the_command(installed, tmp_path):
    shown = started(installed, tmp_path, str(installed / "bin" / "longctx"), "recipe=gpt_32k", "--cfg", "job")
    assert "sequence_length: 32768" in shown.stdout, shown.stderr
    refused = started(installed, tmp_path, str(installed / "bin" / "longctx"), "recipe=gpt_tiny", "optim.lr=-1")
    assert refused.returncode == 1
    assert refused.stderr.startswith("longctx: "), refused.stderr
