"""Runs a function on several ranks of one machine: `run_on_ranks(4, function, *arguments)`."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

SECONDS = 120
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "longctx.trainer"])


@contextlib.contextmanager
def started_ranks(
    world_size: int, function: Callable, *arguments: Any, device: str = "cpu"
) -> Iterator[tuple[list[Any], Any]]:
    """The processes of ranks that call `function(rank, *arguments)`, and the queue of their results; killed at the end.

    Function, arguments and results travel by pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = _server.Queue()
        store = f"file://{Path(folder) / 'store'}"
        ranks = [
            _server.Process(
                target=_run_rank, args=(rank, world_size, device, store, results, function, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            yield ranks, results
        finally:
            for process in ranks:
                process.kill()
                process.join()


def run_on_ranks(world_size: int, function: Callable, *arguments: Any, device: str = "cpu") -> list[Any]:
    """Calls `function(rank, *arguments)` on `world_size` ranks joined by gloo, or on `device="cuda"` by NCCL.

    Returns each rank's result. Raises AssertionError with the trace of a failed rank.
    """
    with started_ranks(world_size, function, *arguments, device=device) as (ranks, results):
        collected = _collect(results, world_size)
        for process in ranks:
            process.join(timeout=10)
        return collected


def _collect(results: Any, world_size: int) -> list[Any]:
    by_rank: dict[int, Any] = {}
    while len(by_rank) < world_size:
        try:
            rank, result, failure = results.get(timeout=SECONDS)
        except Empty:
            missing = sorted(set(range(world_size)) - set(by_rank))
            raise AssertionError(f"ranks {missing} gave no result within {SECONDS} s") from None
        assert failure is None, f"rank {rank} of {world_size} failed:\n{failure}"
        by_rank[rank] = result
    return [tree_map_only(np.ndarray, torch.from_numpy, by_rank[rank]) for rank in range(world_size)]


def _run_rank(
    rank: int, world_size: int, device: str, store: str, results: Any, function: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    timeout = datetime.timedelta(seconds=SECONDS)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        result = function(rank, *arguments)
        # as arrays: tensors would travel as shared memory that is gone when this process ends
        results.put((rank, tree_map_only(torch.Tensor, lambda x: x.detach().cpu().numpy(), result), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
