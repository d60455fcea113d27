"""One process of the run: its device, its place among the others, and how they agree on an error."""

from __future__ import annotations

import datetime
import gc
import ipaddress
import math
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from longctx import machine, plan, remedies
from longctx.config import Config
from longctx.console import say
from longctx.errors import UserError
from longctx.files import gigabytes
from longctx.machine import this_machine
from longctx.stopping import end_with_parent
from longctx.strategy import Choice

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """This process among all."""

    rank: int
    local_rank: int  # on this machine
    world_size: int
    device: torch.device
    timeout: datetime.timedelta  # of a collective
    group: dist.ProcessGroup | None = None  # of all ranks, for the methods below; None: the default one

    def in_background(self) -> Runtime:
        """The same with a gloo group of its own, for a thread beside the training step. To be called by all ranks."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=self.timeout))

    @property
    def ranks_of_a_machine(self) -> int:
        return machine.ranks_of_a_machine(self.world_size)

    @property
    def device_name(self) -> str:
        """As its maker calls it; `CPU` for that."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @property
    def device_bytes(self) -> int:
        """Memory of the GPU; 0 on a CPU."""
        is_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).total_memory if is_gpu else 0

    def free_device_bytes(self) -> int:
        """Memory of the GPU that a run can have."""
        gc.collect()  # of an earlier job of this process
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info(self.device)[0] + kept

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, message: str) -> None:
        """Prints on rank 0."""
        if self.is_main:
            say(message)

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; if it fails on one, all raise `UserError` with that rank's message.

        So a full disk or a damaged file on one machine ends the run cleanly everywhere instead of hanging the others.
        """
        result, problem = None, None
        try:
            result = action()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = _explain(error)
        if self.any(problem is not None):
            _raise_first(self.gather((problem, socket.gethostname())))
        return result  # pyright: ignore[reportReturnType]  only None if that is what `action` returned

    def any(self, mine: bool) -> bool:
        """Whether it is so on some rank, on every rank."""
        return self.least(-int(mine)) < 0

    def least(self, mine: float) -> float:
        """The least of the numbers that the ranks give, on every rank."""
        found = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return float(found)

    def gather(self, mine: T) -> list[T]:
        """What each rank gives, on every rank: bytes that grow with the square of the ranks, so not at every start."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def gather_on_rank_0(self, mine: T) -> list[T]:
        """What each rank gives, on rank 0; nothing on the others."""
        found: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(mine, found, dst=0, group=self.group)
        return found or []

    def run_on_rank_0(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and hands its result to all; if it fails, all raise `UserError`."""
        box: list = [None, None]  # result, problem
        if self.is_main:
            try:
                box[0] = action()
            except Exception as error:  # whatever it is, the other ranks must hear of it
                box[1] = _explain(error)
        dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]


def raise_together(problem: UserError | None) -> NoReturn:
    """Raises on all ranks what has stopped one of them or several. To be called by all, once all know of it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (None if problem is None else str(problem), socket.gethostname()))
    _raise_first(found)
    raise AssertionError("no rank has a problem")


def _raise_first(found: list[tuple[str | None, str]]) -> None:
    """Raises what has stopped a rank, if any: of each rank what has, and its machine. Says which, if not all alike."""
    problems, machines = zip(*found, strict=True)
    for rank, (message, machine_name) in enumerate(found):
        if message is None:
            continue
        where = f"rank {rank}" + (f" on {machine_name}" if len(set(machines)) > 1 else "")
        raise UserError(message if all(problem == message for problem in problems) else f"{where}: {message}")


def _explain(error: Exception) -> str:
    """The message of an error; of one that nobody foresaw, its type too, after its trace."""
    if isinstance(error, (UserError, OSError)):
        return str(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"


def world_size() -> int:
    """Ranks that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(timeout_seconds: int) -> Runtime:
    """Joins the process group, once a process: NCCL on GPUs, gloo on CPUs. Raises `UserError` on too few GPUs."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_ranks > gpus:
            raise UserError(
                f"{local_ranks} ranks on a machine with {gpus} GPUs: each rank needs one; start {gpus} "
                f"(torchrun --nproc-per-node {gpus}), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read when memory is first taken
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's last collectives are kept,
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # and written down when one times out
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        if world_size() == 1 and "RANK" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(_name_of_this_start(store, rank, size, timeout), store)
            if size > machine.ranks_of_a_machine(size):
                _check_addresses(store, rank, size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return Runtime(rank, local_rank, world_size(), device, timeout)


def store(prefix: str) -> dist.Store:
    """The job's store, for one thread beside the main one; under `prefix` there must be nothing yet."""
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(datetime.timedelta(seconds=5))  # whoever uses it must not stand still for long
    return dist.PrefixStore(prefix, store)  # pyright: ignore[reportAttributeAccessIssue]


def check_machines(runtime: Runtime) -> None:
    """Raises `UserError` on all ranks if machines have different numbers of them. Collective.

    Strategies are chosen by how many ranks a machine has; if each rank went by its own number, they would wait for
    each other for ever.
    """
    ranks_here = runtime.ranks_of_a_machine
    if runtime.any(ranks_here != runtime.least(ranks_here)):
        found = sorted(set(runtime.gather((this_machine(), ranks_here))))
        counts = ", ".join(f"{ranks} on {name.split('/')[0]}" for name, ranks in found)
        raise UserError(
            f"machines run different numbers of processes ({counts}), but a layout gives each machine the same share: "
            "start as many on each (torchrun --nproc-per-node)"
        )


def check_memory(
    config: Config, runtime: Runtime, choose: Callable[[Config], Choice], is_foreseen: bool
) -> None:  # fmt: skip
    """Raises `UserError` if a step needs more than a GPU has, if its ranks put more into this machine's memory than
    there is, or on CPUs if parameters, gradients and optimizer alone are more than that.

    `choose` gives the strategy of the context axis for a configuration. Unless the run's memory `is_foreseen`, see
    `plan`, a GPU too is only asked for parameters, gradients and optimizer.
    """
    needed = plan.state_bytes(config, runtime.world_size)
    if runtime.device.type == "cuda":
        free, where = runtime.free_device_bytes(), "are free on a GPU"
        of_host, ranks = machine.available_host_bytes() or math.inf, runtime.ranks_of_a_machine
        if problem := remedies.host_refusal(config, runtime.world_size, ranks, of_host, choose, free):
            raise UserError(problem)
        if is_foreseen:
            if problem := remedies.refusal(config, runtime.world_size, choose, free, of_host / ranks):
                raise UserError(problem)
            return
    else:
        needed *= runtime.ranks_of_a_machine
        free, where = (
            machine.available_host_bytes(),
            f"can be had on this machine of {runtime.ranks_of_a_machine} ranks",
        )
    if free is None or needed <= free:
        return
    count = sum(plan.parameters(config.model))
    raise UserError(
        f"{gigabytes(needed)} are needed at least, for {count / 1e6:,.1f}M parameters, their gradients and the "
        f"optimizer's state, and {gigabytes(free)} {where}: start more ranks that share them (parallel.shard, "
        f"parallel.context, parallel.tensor), or a smaller model; parallel.check_memory=false tries all the same"
    )


def _name_of_this_start(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> str:
    """A name that all ranks of this start share and no earlier one had.

    torchrun keeps its store over restarts, and ranks would connect to what killed ones have left in it (pytorch issue
    135712); machines may count restarts differently. So each rank asks with a word just drawn, and rank 0 answers it.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"longctx/asked/{rank}", mine)
        answer = f"longctx/answer/{rank}/{mine}"
        store.wait([answer], timeout)
        name = store.get(answer).decode()
        store.add(f"longctx/heard/{name}", 1)
        return name
    end = time.monotonic() + timeout.total_seconds()
    answered: dict[int, bytes] = {}
    while store.add(f"longctx/heard/{mine}", 0) < size - 1:
        for other in range(1, size):
            key = f"longctx/asked/{other}"
            word = store.get(key) if store.check([key]) else None
            if word is not None and answered.get(other) != word:
                store.set(f"longctx/answer/{other}/{word.decode()}", mine)
                answered[other] = word
        if time.monotonic() > end:
            missing = sorted(set(range(1, size)) - set(answered))
            raise UserError(f"ranks {missing or 'that have asked'} did not join within {timeout.total_seconds():g} s")
        time.sleep(0.01)
    return mine


def _check_addresses(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
    """Raises `UserError` on all ranks if the name of a machine leads, there, to an address that others cannot reach.

    gloo goes by it unless `GLOO_SOCKET_IFNAME` names an interface; it would say "connection refused" after a minute.
    """
    if rank == 0:
        store.set("longctx/machine", this_machine())
    elif store.get("longctx/machine").decode() != this_machine():
        store.set("longctx/is_of_several_machines", "")
    if "GLOO_SOCKET_IFNAME" not in os.environ and (problem := _own_address_problem()):
        store.set(
            "longctx/address",
            f"{problem}; give its real address in /etc/hosts, or set GLOO_SOCKET_IFNAME to the network interface that "
            "joins the machines (`ip address` lists them; such as eth0)",
        )
    if store.add("longctx/looked", 1) == size:
        store.set("longctx/all_looked", "")
    store.wait(["longctx/all_looked"], timeout)
    is_refused = store.check(["longctx/is_of_several_machines"]) and store.check(["longctx/address"])
    message = store.get("longctx/address").decode() if is_refused else ""
    store.add("longctx/told", 1)
    end = time.monotonic() + timeout.total_seconds()
    while rank == 0 and is_refused and store.add("longctx/told", 0) < size and time.monotonic() < end:
        time.sleep(0.01)  # it may be this process that has the store
    if is_refused:
        raise UserError(message)


def _own_address_problem() -> str:
    """What is wrong with the address that the name of this machine leads to, for other machines; empty: nothing."""
    name = socket.gethostname()
    try:
        found = sorted({str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(name, None)})
    except OSError:
        return f"the name {name} leads to no address on that machine"
    if all(ipaddress.ip_address(address).is_loopback for address in found):
        return f"the name {name} leads to {', '.join(found)} on that machine, which the others cannot reach"
    return ""


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
