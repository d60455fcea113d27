"""What a device can do, and whether Triton kernels run on it.

Plain functions of a device: block sizes stand beside their kernels. `triton.autotune` needs a GPU to choose on, tunes
again in every process, and picks differently on the ranks of one run.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run in numpy, on the CPU


def unsupported(x: Tensor) -> str | None:
    """Why Triton kernels cannot run on tensors like `x`, or None if they can."""
    if x.dtype == torch.float64:
        return "Triton kernels take float16, bfloat16 and float32, not torch.float64"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrong; use float16 or float32"
    if not INTERPRETED and x.device.type != "cuda":
        return f"Triton kernels run on GPUs (or with TRITON_INTERPRET=1), not on {x.device.type}"
    if not INTERPRETED and torch.version.hip is None and capability(x.device) < (8, 0):
        return f"Triton kernels need compute capability 8.0, this GPU has {capability(x.device)}"
    return None


def is_recording() -> bool:
    """Whether calls are traced by torch.compile or captured as a CUDA graph: values are not there to be looked at."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability."""
    if torch.compiler.is_compiling():  # torch.compile asks once, and warns users of caches
        return torch.cuda.get_device_capability(device)
    return _kept_capability(device)


@cache  # asked for several times a launch, and torch looks it up at length
def _kept_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes `x`'s GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def architecture(device: torch.device) -> str:
    """`sm_90`, `sm_80`, `sm_89`, ... or `hip`; `interpreter` where kernels run in numpy."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    return "sm_{}{}".format(*capability(device))


def triton_or_reference(implementation: str, x: Tensor) -> str:
    """`triton` or `reference` for an op on tensors like `x`; raises ValueError if the one asked for cannot serve it."""
    if implementation == "auto":
        return "triton" if x.device.type == "cuda" and not unsupported(x) else "reference"
    if implementation not in ("triton", "reference"):
        raise ValueError(f"implementation={implementation!r}: must be auto, triton or reference")
    if implementation == "triton" and (why := unsupported(x)):
        raise ValueError(f"implementation=triton: {why}")
    return implementation


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; two where kernels are interpreted or compiled for another machine."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def shared_memory(architecture: str) -> int:
    """Bytes that a program may have; 0 in the interpreter."""
    memory = memory_class(architecture)
    return int(memory.removesuffix(" KiB")) * 1024 if memory.endswith("KiB") else 0


def memory_class(architecture: str) -> str:
    """By the shared memory a program may have, which decides what fits."""
    if architecture in ("sm_80", "sm_87"):
        return "163 KiB"
    if architecture in ("sm_90", "sm_100", "sm_103"):
        return "227 KiB"
    return {"interpreter": "interpreter", "hip": "64 KiB"}.get(architecture, "99 KiB")  # sm_86, sm_89, sm_120
