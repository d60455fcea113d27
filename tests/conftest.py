"""Tests marked `gpu(n)` run where there are n GPUs; elsewhere their CPU twins alone are collected.

Without a GPU, Triton kernels run in the interpreter; tests marked `interpreter` are about that and run there alone.
Tests marked `hopper` are about kernels that run on such GPUs alone; elsewhere those are compiled.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of what a shell script starts with `&`; runs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():  # before anything imports a kernel
    os.environ["TRITON_INTERPRET"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers and ranks share the cores: threads of theirs would wait in turns
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)

import interpreter  # noqa: F401  makes Triton's interpreter faster
from corpora import make_corpus


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of token shards that nobody changes."""
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


SEVERAL_PROCESSES = ("run_on_ranks", "run_on_new_ranks", "started_ranks", "TORCHRUN")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    for item in items:  # where several workers run, tests of many ranks stay on one or the other: they share processes
        if any(hasattr(item.module, name) for name in SEVERAL_PROCESSES):
            which = "parallel" if item.path.parent.name == "parallel" else "others"
            item.add_marker(pytest.mark.xdist_group(f"ranks, {which}"))
        elif "machine_code" in item.path.parts or item.path.name == "test_package.py":  # compiled, or built, once
            item.add_marker(pytest.mark.xdist_group(item.path.name))

    def lacks_gpus(item) -> bool:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            return False
        least = marker.kwargs.get("gib", 0) * 2**30
        sizes = [torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())]
        return sum(size >= least for size in sizes) < marker.args[0]

    def is_elsewhere(item) -> bool:
        return item.get_closest_marker("interpreter") is not None and torch.cuda.is_available()

    def lacks_hopper(item) -> bool:
        is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
        return item.get_closest_marker("hopper") is not None and not is_hopper

    left_out = [item for item in items if lacks_gpus(item) or is_elsewhere(item) or lacks_hopper(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
