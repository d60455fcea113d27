"""Host memory that a GPU reads and writes beside its computing."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 26  # bytes that a thread touches at a time
THREADS = 8


def host_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros in page-locked memory of exactly its size, for copies to and from `device`.

    torch.empty(pin_memory=True) takes the next power of two. Pages are touched by several threads: the first touch is
    what takes long, about half a second a GiB and thread. Raises `MemoryError` where pages cannot be locked.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(size, 1))  # whole pages of its own, which nothing else can have locked
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not on every system
            memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(Tensor.zero_, flat.split(PIECE)))
        runtime: Any = torch.cuda.cudart()
        address = flat.data_ptr()
        if error := int(runtime.cudaHostRegister(address, flat.numel(), 0)):
            raise MemoryError(
                f"{size / 2**30:.1f} GiB of host memory cannot be locked (CUDA error {error}): `ulimit -l` and the "
                "container's memory limit must allow it; offload less"
            )
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return flat[:size].view(dtype).view(*shape)


class HostCopies:
    """Copies between a device and host memory, on a stream for each direction. On a CPU they are done at once."""

    def __init__(self, device: torch.device) -> None:
        self.is_async = device.type == "cuda"
        self.streams = [torch.cuda.Stream(device) if self.is_async else None for _ in range(2)]

    def to_host(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Begins a copy of what is computed so far; `source` must stay until the event has been waited for."""
        return self._copy(self.streams[0], source, target, None)

    def to_device(
        self, source: Tensor, target: Tensor, after: torch.cuda.Event | None = None
    ) -> torch.cuda.Event | None:  # fmt: skip
        """Begins a copy once the device has come here, and `after` has happened."""
        return self._copy(self.streams[1], source, target, after)

    def _copy(
        self, stream: torch.cuda.Stream | None, source: Tensor, target: Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:  # fmt: skip
        if stream is None:
            target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream())
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """What is computed from here on comes after a copy."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
