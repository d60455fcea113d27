"""Runs a function on several ranks of one machine: `run_on_ranks(4, function, *arguments)`.

The processes of ranks are kept from one call to the next: what costs time is not their start but all that torch does
for the first time in a process. A process in which a call has left a function of longctx replaced is not used again.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

import interpreter  # noqa: F401  makes Triton's interpreter faster

SECONDS = 120
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch._dynamo", "longctx.run", "hypothesis", "pytest"])
_numbers = itertools.count()


class Job(NamedTuple):
    """What a rank is to do; everything travels by pickle."""

    number: int
    rank: int
    world_size: int
    device: str
    store: str  # a file that the ranks of the job meet in
    function: Callable
    arguments: tuple


class Result(NamedTuple):
    """What a rank has done."""

    number: int
    rank: int
    value: Any
    failure: str | None  # a trace
    is_clean: bool  # whether the process can be used again


def run_on_ranks(world_size: int, function: Callable, *arguments: Any, device: str = "cpu") -> list[Any]:
    """Calls `function(rank, *arguments)` on `world_size` ranks joined by gloo, or on `device="cuda"` by NCCL.

    Returns each rank's result. Raises AssertionError with the trace of a failed rank.
    """
    return _pool.run(world_size, function, arguments, device)


def run_on_new_ranks(world_size: int, function: Callable, *arguments: Any, device: str = "cpu") -> list[Any]:
    """As `run_on_ranks`, in processes that have computed nothing before: for functions that break something first."""
    _pool.end()
    return _pool.run(world_size, function, arguments, device)


@contextlib.contextmanager
def started_ranks(world_size: int, function: Callable, *arguments: Any) -> Iterator[tuple[list[Any], Any]]:
    """New processes of ranks that call `function(rank, *arguments)`, and the queue of their results; killed at the end.

    For tests that kill some of them themselves.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, store = _server.Queue(), f"file://{Path(folder) / 'store'}"
        jobs = [Job(0, rank, world_size, "cpu", store, function, arguments) for rank in range(world_size)]
        ranks = [_server.Process(target=_do, args=(job, results), daemon=True) for job in jobs]
        for process in ranks:
            process.start()
        try:
            yield ranks, results
        finally:
            for process in ranks:
                process.kill()
                process.join()


class _Pool:
    """As many processes as the largest call so far has needed, one a rank."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.jobs: list[Any] = []  # a queue for each
        self.results: Any = None

    def run(self, world_size: int, function: Callable, arguments: tuple, device: str) -> list[Any]:
        self._grow(world_size)
        with tempfile.TemporaryDirectory() as folder:
            number, store = next(_numbers), f"file://{Path(folder) / 'store'}"
            for rank, jobs in enumerate(self.jobs[:world_size]):
                jobs.put(Job(number, rank, world_size, device, store, function, arguments))
            try:
                results = self._collect(number, world_size)
            except AssertionError:
                self.end()
                raise
        if not all(result.is_clean for result in results):
            self.end()
        return [tree_map_only(np.ndarray, torch.from_numpy, result.value) for result in results]

    def _grow(self, world_size: int) -> None:
        self.results = self.results or _server.Queue()
        while len(self.processes) < world_size:
            self.jobs.append(_server.Queue())
            self.processes.append(_server.Process(target=_work, args=(self.jobs[-1], self.results), daemon=True))
            self.processes[-1].start()

    def _collect(self, number: int, world_size: int) -> list[Result]:
        by_rank: dict[int, Result] = {}
        end = time.monotonic() + SECONDS
        while len(by_rank) < world_size:
            try:
                result = self.results.get(timeout=0.5)
            except Empty:
                missing = sorted(set(range(world_size)) - set(by_rank))
                for rank in missing:
                    code = self.processes[rank].exitcode
                    assert code is None, f"rank {rank} of {world_size} ended with code {code}"
                assert time.monotonic() < end, f"ranks {missing} gave no result within {SECONDS} s"
                continue
            assert result.failure is None, f"rank {result.rank} of {world_size} failed:\n{result.failure}"
            if result.number == number:
                by_rank[result.rank] = result
        return [by_rank[rank] for rank in range(world_size)]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.jobs, self.results = [], [], None


_pool = _Pool()
atexit.register(_pool.end)


# in the processes -----------------------------------------------------------------------------------------------------


def _work(jobs: Any, results: Any) -> None:
    gc.freeze()  # what was imported is not looked at after each job
    while True:
        _do(jobs.get(), results)


def _do(job: Job, results: Any) -> None:
    torch.set_num_threads(1)
    environment, here = dict(os.environ), Path.cwd()
    rank, size = str(job.rank), str(job.world_size)
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
    if job.device == "cuda":
        torch.cuda.set_device(job.rank)
    before = _replaceable()
    result, failure = None, None
    try:
        backend = "gloo" if job.device == "cpu" else "cpu:gloo,cuda:nccl"
        timeout = datetime.timedelta(seconds=SECONDS)
        dist.init_process_group(
            backend, init_method=job.store, rank=job.rank, world_size=job.world_size, timeout=timeout
        )
        result = job.function(job.rank, *job.arguments)
        # as arrays: tensors would travel as shared memory that is gone when this process ends
        result = tree_map_only(torch.Tensor, lambda x: x.detach().cpu().numpy(), result)
    except BaseException:
        failure = traceback.format_exc()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(here)
    gc.collect()
    after = _replaceable()
    is_clean = all(after.get(name) is value for name, value in before.items())
    results.put(Result(job.number, job.rank, result, failure, is_clean))


def _replaceable() -> dict[tuple[str, ...], Any]:
    """The functions and classes of longctx, and the methods of these and of torch's modules.

    What the first optimizer of a class does to its `step`, which torch calls `hooked`, does not count.
    """
    found: dict[tuple[str, ...], Any] = {}
    modules = {name: module for name, module in sys.modules.items() if name.startswith("longctx")}
    for name, module in (*modules.items(), ("torch", torch.nn)):
        for attribute, value in list(vars(module).items()) if name != "torch" else [("Module", torch.nn.Module)]:
            if isinstance(value, type):
                found |= {
                    (name, attribute, key): member.__wrapped__ if getattr(member, "hooked", False) is True else member
                    for key, member in vars(value).items()
                    if callable(member)
                }
            if callable(value) or isinstance(value, (int, float, str, tuple)):
                found[name, attribute] = value
    return found
