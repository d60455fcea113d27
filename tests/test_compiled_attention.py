"""What the compiler makes of the attention kernels: registers, spills and shared memory, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    script = Path(__file__).with_name("compile_attention.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_everything_was_compiled(kernels):
    names = [kernel["kernel"] for kernel in kernels]
    assert [names.count(name) for name in ("_forward_kernel", "_delta_kernel", "_backward_kernel")] == [21, 21, 21]


def test_programs_fit(kernels):
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["architecture"]], kernel


def test_the_forward_pass_spills_nothing(kernels):
    for kernel in kernels:
        if kernel["kernel"] == "_forward_kernel" and "dropout" not in kernel["options"]:
            assert kernel["spills"] == 0, kernel


def test_the_backward_pass_spills_little(kernels):
    """dK and dV of 128 keys take half of the registers; bytes as of triton 3.7.1, with room for 3.6.0."""
    most = {64: 256, 128: 1024, 256: 2048}
    for kernel in kernels:
        if (
            kernel["kernel"] == "_backward_kernel"
            and kernel["architecture"].startswith("sm_")
            and not kernel["options"]
        ):
            assert kernel["spills"] <= most[kernel["head_dim"]], kernel


def test_hopper_uses_its_matrix_units_and_vector_atomics(kernels):
    for kernel in kernels:
        is_hopper = kernel["architecture"] == "sm_90" and kernel["dtype"] == "torch.bfloat16"
        # the matrix units take 64 rows or more: block-sparse has tiles of 32 keys at head_dim 256
        if is_hopper and kernel["mask"] == "KeyIntervals" and kernel["kernel"] != "_delta_kernel":
            assert kernel["wgmma"] > 0, kernel
            assert kernel["kernel"] == "_forward_kernel" or kernel["vector_atomics"] > 0, kernel
