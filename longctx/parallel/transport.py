"""How keys, values and their gradients travel between the ranks of a context axis.

Two forms of one object. `SymmetricMemory`: inside a machine whose GPUs reach each other's memory, each rank copies what
it needs out of its owner's, and kernels write gradients straight into the owner's; the copy engines do the work and no
multiprocessor is lost to it. `Messages`: pairs of sends and receives, over NCCL between machines and over gloo on CPUs.

A pass publishes its keys and values, fetches those of each step, gives back the gradients, and settles: after that the
gradients of this rank's own keys are in its `inbox`, one slot for each distance (see `exchange`).
"""

from __future__ import annotations

import contextlib
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from longctx.parallel.exchange import Move

Wait = Callable[[], None]  # returns, or lets the stream go on, once the data is there


class Transport(ABC):
    """What both forms share: the buffers, and how long the kernels have waited for them.

    Shards are (batch, tokens, 2, kv_heads, head_dim): keys and values of a token beside each other.
    """

    reaches_inboxes = False  # whether kernels can write where other ranks read
    inbox: Tensor

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.buffers: dict[str, Tensor] = {}
        self.generation = 0  # how often buffers have moved
        self.is_timed = False  # whether waits are measured
        self.waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.waited_s = 0.0

    @abstractmethod
    def publish(self, k: Tensor, v: Tensor) -> Tensor:
        """This rank's shard, which others may fetch from now on."""

    @abstractmethod
    def open_inbox(self, slots: int, shard: Tensor) -> None:
        """Makes `inbox` (slots, *shard.shape), like `shard` in dtype: where others put gradients of this rank's shard.
        What is in it is undefined."""

    @abstractmethod
    def fetch(self, moves: list[Move], shard: Tensor, into: Tensor) -> Wait:
        """Begins to copy what this rank reads in a step, of all ranks' `moves`, into (batch, tokens, ...)."""

    @abstractmethod
    def give(self, moves: list[Move], gradients: Tensor, slots: range) -> Wait:
        """Begins to copy this rank's gradients (batch, tokens, ...) of a step into the owners' inboxes, whose slots
        are for the distances `slots`."""

    @abstractmethod
    def meet(self) -> None:
        """The device goes on once all ranks are here, with all that they have written."""

    def addresses(self, moves: list[Move], slots: range) -> list[tuple[int, int]]:
        """For each move of this rank the address of its place in the owner's inbox, and its tokens: for kernels that
        write there. Only where `reaches_inboxes`."""
        raise TypeError(f"{type(self).__name__} reaches no inbox of another rank")

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that stays: the same for each call with a name, larger where it must be."""
        return self._grown(name, shape, dtype, lambda n: torch.empty(n, dtype=dtype, device=device))

    def _grown(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[int], Tensor]) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            self.buffers.pop(name, None)
            self.generation += 1
            with torch.inference_mode(False):  # what validation makes, training may use
                buffer = self.buffers[name] = make(size)
        return buffer[:size].view(shape)

    def bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures what the kernels after it wait for what is inside it, if `is_timed`."""
        if not self.is_timed:
            yield
        elif torch.cuda.is_available():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self.waits.append((before, after))
        else:
            started = time.perf_counter()
            yield
            self.waited_s += time.perf_counter() - started

    def take_waited_s(self) -> float:
        """Seconds that kernels have waited since the last call; the device must have finished."""
        seconds = self.waited_s + sum(before.elapsed_time(after) for before, after in self.waits) / 1e3
        self.waits, self.waited_s = [], 0.0
        return seconds


class SymmetricMemory(Transport):
    """One-sided copies between the GPUs of a machine."""

    reaches_inboxes = True

    def __init__(self, group: dist.ProcessGroup, timeout_ms: int = 0) -> None:
        super().__init__(group)
        self.timeout_ms = timeout_ms  # after which a rank that does not answer ends the run; 0: never
        self.side = torch.cuda.Stream()
        self.handles: dict[str, symmetric_memory._SymmetricMemory] = {}
        self.turn = 0

    def publish(self, k: Tensor, v: Tensor) -> Tensor:
        self.turn ^= 1  # of two buffers in turn: what was published last time may still be read
        batch, tokens, heads, width = k.shape
        shard = self._shared(f"shard {self.turn}", (batch, tokens, 2, heads, width), k.dtype)
        shard[:, :, 0].copy_(k)
        shard[:, :, 1].copy_(v)
        self.meet()
        return shard

    def open_inbox(self, slots: int, shard: Tensor) -> None:
        self.inbox = self._shared("inbox", (slots, *shard.shape), shard.dtype)

    def fetch(self, moves: list[Move], shard: Tensor, into: Tensor) -> Wait:
        handle = self.handles[f"shard {self.turn}"]

        def copy(move: Move) -> None:
            theirs = handle.get_buffer(move.owner, shard.shape, shard.dtype)
            _copy(theirs[:, move.place :], into[:, move.position :], move.length)

        return self._beside(copy, moves)

    def give(self, moves: list[Move], gradients: Tensor, slots: range) -> Wait:
        def copy(move: Move) -> None:
            theirs = self._slot_of(move, slots)
            _copy(gradients[:, move.position :], theirs[:, move.place :], move.length)

        return self._beside(copy, moves)

    def meet(self) -> None:
        with self.waiting():
            self.handles[f"shard {self.turn}"].barrier(channel=0, timeout_ms=self.timeout_ms)

    def addresses(self, moves: list[Move], slots: range) -> list[tuple[int, int]]:
        mine = [move for move in moves if move.reader == self.rank]
        return [(self._slot_of(move, slots)[:, move.place :].data_ptr(), move.length) for move in mine]

    def _slot_of(self, move: Move, slots: range) -> Tensor:
        """Where in the owner's inbox the gradients of a move go."""
        theirs = self.handles["inbox"].get_buffer(move.owner, self.inbox.shape, self.inbox.dtype)
        return theirs[slots.index(move.distance(self.size))]

    def _shared(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        def make(size: int) -> Tensor:
            buffer = symmetric_memory.empty(size, dtype=dtype, device=torch.device("cuda", torch.cuda.current_device()))
            self.handles[name] = symmetric_memory.rendezvous(buffer, self.group)
            return buffer

        return self._grown(name, shape, dtype, make)

    def _beside(self, copy: Callable[[Move], None], moves: list[Move]) -> Wait:
        """Does this rank's copies beside the kernels that follow."""
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            for move in moves:
                if move.reader == self.rank:
                    copy(move)
            done = torch.cuda.Event()
            done.record()

        def wait() -> None:
            with self.waiting():
                torch.cuda.current_stream().wait_event(done)

        return wait


def _copy(source: Tensor, destination: Tensor, length: int) -> None:
    for from_sequence, to_sequence in zip(source, destination, strict=True):  # contiguous: one order to a copy engine
        to_sequence[:length].copy_(from_sequence[:length], non_blocking=True)


class Messages(Transport):
    """Sends and receives in pairs."""

    def publish(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack((k, v), 2)

    def open_inbox(self, slots: int, shard: Tensor) -> None:
        self.inbox = self.scratch("inbox", (slots, *shard.shape), shard.dtype, shard.device)

    def fetch(self, moves: list[Move], shard: Tensor, into: Tensor) -> Wait:
        def send(move: Move) -> Tensor:
            return shard[:, move.place : move.place + move.length]

        def receive(move: Move) -> Tensor:
            return into[:, move.position : move.position + move.length]

        return self._exchange([(m.owner, m.reader, send, receive, m) for m in moves])

    def give(self, moves: list[Move], gradients: Tensor, slots: range) -> Wait:
        def send(move: Move) -> Tensor:
            return gradients[:, move.position : move.position + move.length]

        def receive(move: Move) -> Tensor:
            slot = self.inbox[slots.index(move.distance(self.size))]
            return slot[:, move.place : move.place + move.length]

        return self._exchange([(m.reader, m.owner, send, receive, m) for m in moves])

    def meet(self) -> None:
        """Whoever has received has all."""

    def _exchange(self, messages: list) -> Wait:
        """Each message (from, to, what to send, where to, move) of all ranks; those of a rank to itself are copies."""
        operations = []
        for number, (source, target, send, receive, move) in enumerate(messages):
            if source == target == self.rank:
                receive(move).copy_(send(move))
            elif source == self.rank:
                operations += [self._operation(dist.isend, x, target, number) for x in send(move)]
            elif target == self.rank:
                operations += [self._operation(dist.irecv, x, source, number) for x in receive(move)]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            with self.waiting():
                for work in works:
                    work.wait()

        return wait

    def _operation(self, kind: Callable, x: Tensor, peer: int, number: int) -> dist.P2POp:
        return dist.P2POp(kind, x, dist.get_global_rank(self.group, peer), self.group, number)


@lru_cache
def transport_of(group_name: str) -> Transport:
    """The transport of a process group, made at its first use, on all of its ranks."""
    group = _resolve_process_group(GroupName(group_name))
    return SymmetricMemory(group) if has_symmetric_memory(group) else Messages(group)


def has_symmetric_memory(group: dist.ProcessGroup) -> bool:
    """Whether all ranks of a group can reach each other's GPU memory. To be called by all of them."""
    hosts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(hosts, socket.gethostname() if torch.cuda.is_available() else None, group=group)
    if None in hosts or len(set(hosts)) > 1 or len(hosts) == 1:
        return False
    works = torch.ones(1, dtype=torch.int32, device="cuda")
    try:
        probe = symmetric_memory.empty(1, dtype=torch.float32, device=torch.device("cuda", torch.cuda.current_device()))
        symmetric_memory.rendezvous(probe, group)
    except RuntimeError:
        works.zero_()
    dist.all_reduce(works, op=dist.ReduceOp.MIN, group=group)
    return bool(works)
