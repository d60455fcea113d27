"""Host memory that a GPU reads and writes beside its computing."""

from __future__ import annotations

import contextlib
import ctypes
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

    torch.empty(pin_memory=True) takes the next power of two. Several threads touch the pages, since the first touch is
    what takes long. Raises `MemoryError` where pages cannot be had and locked.
    """
    size = math.prod(shape) * dtype.itemsize
    # whole pages of its own, which nothing else can have locked; private, or they could not be huge ones
    try:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(_refusal(size, str(error))) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not on every system
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = (ctypes.c_ubyte * len(memory)).from_buffer(memory)  # outlived by the pages, unlike the mmap object itself
    flat = torch.frombuffer(array, dtype=torch.uint8)
    if device.type == "cuda":
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(Tensor.zero_, flat.split(PIECE)))
        runtime: Any = torch.cuda.cudart()
        address = flat.data_ptr()
        if error := int(runtime.cudaHostRegister(address, flat.numel(), 0)):
            raise MemoryError(_refusal(size, f"CUDA error {error}"))
        weakref.finalize(array, runtime.cudaHostUnregister, address).atexit = False
    return flat[:size].view(dtype).view(*shape)


def _refusal(size: int, why: str) -> str:
    return (
        f"{size / 2**30:.1f} GiB of host memory cannot be had and locked ({why}): `ulimit -l` and the container's "
        "memory limit must allow it; set a smaller parallel.offload, parallel.offload_optimizer=false or "
        "checkpoint.asynchronous=false"
    )


class HostCopies:
    """Copies between a device and host memory, on a stream for each direction. On a CPU they are done at once."""

    def __init__(self, device: torch.device) -> None:
        self.is_async = device.type == "cuda"
        self.down, self.up = (torch.cuda.Stream(device) if self.is_async else None for _ in range(2))

    def to_host(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Begins a copy of what is computed so far; `source` must stay until the event has been waited for."""
        return self._copy(self.down, source, target, None)

    def to_device(
        self, source: Tensor, target: Tensor, after: torch.cuda.Event | None = None
    ) -> torch.cuda.Event | None:  # fmt: skip
        """Begins a copy once the device has come here, and `after` has happened."""
        return self._copy(self.up, source, target, after)

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
