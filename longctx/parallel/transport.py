"""How tokens of queries, keys and gradients travel between the ranks of a context axis.

Two forms of one object. `SymmetricMemory`: inside a machine whose GPUs reach each other's memory, each rank copies what
it needs out of its owner's, and kernels write gradients straight into the owner's; the GPU's DMA copy engines do the
work, and no streaming multiprocessor is lost to it. `Messages`: pairs of sends and receives, over NCCL between machines
and over gloo on CPUs.

What travels lies in buffers with names, the same on all ranks: (pieces, batch, tokens, ...), a piece for each other
rank, or for each group of heads, as its user likes. A rank fills one and lets the others `get` from it after a
`barrier`; or the others `put` into it, and after the next barrier it reads.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from longctx.machine import this_machine
from longctx.parallel.key_exchange import Move

Wait = Callable[[], None]  # returns, or lets the device's queue go on, once the data is there
PieceOf = Callable[[Move], int]
_generations = itertools.count()


class Transport(ABC):
    """What both forms share: the buffers, and what is entered where the device waits for others."""

    reaches_others = False  # whether kernels can write to other ranks' buffers
    description: str

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.buffers: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}  # by name, as its user has last asked for it
        self.turns: dict[str, int] = {}
        self.generation = next(_generations)  # another number whenever buffers have moved
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext  # around each wait for others

    @abstractmethod
    def share(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer `name` of this rank, which others can read and write: like `like`, what is in it undefined."""

    @abstractmethod
    def barrier(self) -> None:
        """Device-side barrier on the current stream: what ranks read and wrote before it is complete after it."""

    @abstractmethod
    def get(self, name: str, moves: list[Move], piece_of: PieceOf, into: Tensor) -> Wait:
        """Starts copying what this rank reads, of all ranks' `moves`, from owners' buffers into (batch, tokens, ...).

        Returns a function that waits until the data is there.
        """

    @abstractmethod
    def shared_bytes(self) -> int:
        """Bytes of the shared buffers that lie outside torch's caching allocator."""

    @abstractmethod
    def put(self, name: str, moves: list[Move], piece_of: PieceOf, source: Tensor) -> Wait:
        """Starts copying from `source` (batch, tokens, ...) into the owners' buffers: the opposite of `get`.

        Returns a function that waits until the copies are done; before that, `source` must not change.
        """

    def addresses(self, name: str, moves: list[Move], piece_of: PieceOf) -> list[tuple[int, int]]:
        """For each move of this rank the address where `put` would write, and the tokens. If it `reaches_others`."""
        raise TypeError(f"{type(self).__name__} reaches no buffer of another rank")

    def double_buffered(self, name: str) -> str:
        """Alternates between two names of buffers, so that the one before may still be read."""
        self.turns[name] = 1 - self.turns.get(name, 0)
        return f"{name} {self.turns[name]}"

    def scratch(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this rank alone that stays: the same for each call with a name, larger where it must be."""
        dtype = dtype or like.dtype
        return self._grown(name, shape, dtype, lambda size: torch.empty(size, dtype=dtype, device=like.device))

    def _grown(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[int], Tensor]) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            self.buffers.pop(name, None)
            self.generation = next(_generations)
            with torch.inference_mode(False):  # what validation makes, training may use
                buffer = self.buffers[name] = make(size)
        return buffer[:size].view(shape)


class SymmetricMemory(Transport):
    """One-sided copies between the GPUs of a machine."""

    reaches_others = True
    description = "one-sided copies out of symmetric memory"

    def __init__(self, group: dist.ProcessGroup, timeout_ms: int = 0) -> None:
        super().__init__(group)
        self.timeout_ms = timeout_ms  # after which a rank that does not come ends the run; 0: never
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.side = torch.cuda.Stream()
        self.handles: dict[str, symmetric_memory._SymmetricMemory] = {}
        self.begins: dict[str, list[int]] = {}  # addresses of all ranks' buffers
        self.door_buffer = symmetric_memory.empty(1, device=self.device)
        self.door = symmetric_memory.rendezvous(self.door_buffer, group)
        self.runtime = _cuda_runtime()
        self.kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def share(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or like.dtype

        def make(size: int) -> Tensor:
            torch.cuda.empty_cache()  # which it lies outside of: what torch keeps unused would be missing here
            buffer = symmetric_memory.empty(size, dtype=dtype, device=self.device)
            self.handles[name] = handle = symmetric_memory.rendezvous(buffer, self.group)
            self.begins[name] = [handle.get_buffer(r, (size,), dtype).data_ptr() for r in range(self.size)]
            return buffer

        self.shared[name] = self._grown(name, shape, dtype, make)
        return self.shared[name]

    def barrier(self) -> None:
        with self.waiting():
            self._stream().wait_stream(self.side)
            self.door.barrier(channel=0, timeout_ms=self.timeout_ms)

    def get(self, name: str, moves: list[Move], piece_of: PieceOf, into: Tensor) -> Wait:
        return self._beside(self._runs(name, moves, piece_of, into))

    def put(self, name: str, moves: list[Move], piece_of: PieceOf, source: Tensor) -> Wait:
        runs = self._runs(name, moves, piece_of, source)
        return self._beside((there, here, size, is_remote) for here, there, size, is_remote in runs)

    def addresses(self, name: str, moves: list[Move], piece_of: PieceOf) -> list[tuple[int, int]]:
        mine = [move for move in moves if move.reader == self.rank]
        return [(self._address(name, move, piece_of(move)), move.length) for move in mine]

    def shared_bytes(self) -> int:
        return sum(self.buffers[name].nbytes for name in self.handles)

    def _address(self, name: str, move: Move, piece: int, sequence: int = 0) -> int:
        """Of a move's first token in the owner's buffer."""
        _, batch, tokens, *_ = (shared := self.shared[name]).shape
        token = (piece * batch + sequence) * tokens + move.place
        return self.begins[name][move.owner] + token * shared.stride(2) * shared.element_size()

    def _runs(
        self, name: str, moves: list[Move], piece_of: PieceOf, here: Tensor
    ) -> Iterator[tuple[int, int, int, bool]]:
        """Of each move of this rank and each sequence: the address in `here`, that at the owner, bytes, whether that is
        another rank."""
        batch, tokens, *_ = here.shape
        begin, token_bytes = here.data_ptr(), here.stride(1) * here.element_size()
        assert here.is_contiguous()
        assert token_bytes == self.shared[name].stride(2) * self.shared[name].element_size()
        mine = [move for move in moves if move.reader == self.rank]
        for move in sorted(mine, key=lambda move: move.distance(self.size)):  # no two from or to one at a time
            for sequence in range(batch):
                place = begin + (sequence * tokens + move.position) * token_bytes
                there = self._address(name, move, piece_of(move), sequence)
                yield place, there, move.length * token_bytes, move.owner != self.rank

    def _beside(self, copies: Iterable[tuple[int, int, int, bool]]) -> Wait:
        """Copies (to, from, bytes, whether from or to another GPU) beside the kernels that follow, after those before.

        A copy within this GPU runs on multiprocessors: beside, it would wait for the kernel that runs, and the copies
        behind it with it. It goes before the kernels that follow instead.
        """
        here = self._stream()
        self.side.wait_stream(here)
        for to, of, size, is_remote in copies:
            stream = self.side if is_remote else here
            (error,) = self.runtime.cudaMemcpyAsync(to, of, size, self.kind, stream.cuda_stream)
            if error:
                raise RuntimeError(f"cudaMemcpyAsync of {size} bytes: {error.name}")
        done = self.side.record_event()

        def wait() -> None:
            with self.waiting():
                self._stream().wait_event(done)

        return wait

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)  # which is looked up at length where it is not named


class Messages(Transport):
    """Sends and receives in pairs."""

    def __init__(self, group: dist.ProcessGroup, reason: str = "as asked for") -> None:
        super().__init__(group)
        self.description = f"sends and receives ({reason})"
        dist.barrier(group)  # NCCL connects all ranks of a group at its first use, and a first exchange may be of some

    def share(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.shared[name] = self.scratch(name, shape, like, dtype)
        return self.shared[name]

    def barrier(self) -> None:
        """Whoever has received has all."""

    def get(self, name: str, moves: list[Move], piece_of: PieceOf, into: Tensor) -> Wait:
        return self._exchange(
            [
                (move.owner, move.reader, self._place(name, move, piece_of), _position(into, move))
                for move in moves
                if self.rank in (move.owner, move.reader)
            ]
        )

    def put(self, name: str, moves: list[Move], piece_of: PieceOf, source: Tensor) -> Wait:
        return self._exchange(
            [
                (move.reader, move.owner, _position(source, move), self._place(name, move, piece_of))
                for move in moves
                if self.rank in (move.owner, move.reader)
            ]
        )

    def shared_bytes(self) -> int:
        return 0

    def _place(self, name: str, move: Move, piece_of: PieceOf) -> Tensor:
        return self.shared[name][piece_of(move)][:, move.place : move.place + move.length]

    def _exchange(self, messages: list[tuple[int, int, Tensor, Tensor]]) -> Wait:
        """Messages (from, to, what is sent, where it is received) that this rank has part in, in an order in which
        every two ranks see theirs alike."""
        operations = []
        for source, target, sent, received in messages:
            if source == target:
                received.copy_(sent)
            elif source == self.rank:
                operations += [self._operation(dist.isend, x, target) for x in sent]
            else:
                operations += [self._operation(dist.irecv, x, source) for x in received]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            with self.waiting():
                for work in works:
                    work.wait()

        return wait

    def _operation(self, kind: Callable, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, x, dist.get_global_rank(self.group, peer), self.group)


def copy_rows(destination: Tensor, source: Tensor) -> None:
    """destination = source, of equal shape; of equal dtype 16 bytes at a time where rows of both are made of those."""
    to, of = _in_16_bytes(destination), _in_16_bytes(source)
    if to is None or of is None or destination.dtype != source.dtype:
        destination.copy_(source)
    else:
        to.copy_(of)


def _in_16_bytes(x: Tensor) -> Tensor | None:
    size = x.element_size()
    steps = [stride * size for stride in x.stride()[:-1]] + [x.shape[-1] * size, x.storage_offset() * size]
    return x.view(torch.complex128) if x.stride(-1) == 1 and not any(step % 16 for step in steps) else None


def _position(x: Tensor, move: Move) -> Tensor:
    return x[:, move.position : move.position + move.length]


# which form -----------------------------------------------------------------------------------------------------------


def make_transport(group: dist.ProcessGroup, timeout_ms: int = 0) -> Transport:
    """Symmetric memory where all ranks of a group have it. To be called by all of them."""
    reason = why_no_symmetric_memory(group)
    return Messages(group, f"no symmetric memory: {reason}") if reason else SymmetricMemory(group, timeout_ms)


def _cuda_runtime() -> Any:
    from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]: comes with torch for CUDA

    return runtime


def why_no_symmetric_memory(group: dist.ProcessGroup) -> str | None:
    """Why the ranks of a group cannot reach each other's GPU memory; None if they can. To be called by all of them."""
    machines: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(machines, this_machine() if torch.cuda.is_available() else None, group=group)
    if None in machines:
        return "not all ranks have a GPU"
    if len(set(machines)) > 1:
        return f"the ranks are on {len(set(machines))} machines"
    here, count = torch.cuda.current_device(), torch.cuda.device_count()
    problem = None
    if not all(torch.cuda.can_device_access_peer(here, other) for other in range(count) if other != here):
        problem = f"GPU {here} cannot reach the memory of all others"
    try:
        _cuda_runtime()
    except ImportError as error:
        problem = problem or f"no cuda-bindings: {error}"
    if found := _first_problem(problem, group):  # before the others wait for it in the rendezvous
        return found
    try:
        probe = symmetric_memory.empty(1, device=torch.device("cuda", here))
        symmetric_memory.rendezvous(probe, group)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    return _first_problem(problem, group)


def _first_problem(problem: str | None, group: dist.ProcessGroup) -> str | None:
    """What any of the ranks has found."""
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((f"rank {rank}: {found}" for rank, found in enumerate(problems) if found), None)
