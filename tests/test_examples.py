"""Each example runs as its first line says, and finds what it checks."""

from __future__ import annotations

import re
import subprocess

import pytest

from in_process import output_of
from runs import ROOT, TORCHRUN


def found(form: str, out: str) -> list[float]:
    """The numbers at the groups of `form` in what was printed."""
    match = re.search(form, out)
    assert match, out
    return [float(number) for number in match.groups()]


def test_every_example_is_run_here():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == {"kernels_alone.py", "transformers_attention.py", "ring_attention.py", "transformers_ring.py"}


def test_kernels_alone():
    out = output_of(ROOT / "examples" / "kernels_alone.py")
    loss, norm = found(r"^loss (\S+), gradient norm (\S+)\n$", out)
    assert 10 < loss < 60
    assert norm > 0


def test_attention_of_transformers():
    out = output_of(ROOT / "examples" / "transformers_attention.py")
    form = r"^two documents: logits differ by (\S+), gradients by (\S+) of their norm\n$"
    logits, gradients = found(form, out)
    assert logits < 1e-5
    assert gradients < 1e-4


@pytest.mark.parametrize(
    ("example", "ranks"),
    [("ring_attention", 2), pytest.param("ring_attention", 1, marks=pytest.mark.slow), ("transformers_ring", 2)],
)
def test_ring_attention(example, ranks):
    command = *TORCHRUN, "--nproc-per-node", str(ranks), f"examples/{example}.py"
    form = rf"loss of {ranks} processes (\S+), of one (\S+); gradients differ by (\S+)"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    split, whole, error = found(form, done.stdout)
    assert abs(split - whole) < 1e-5
    assert error < 1e-5
