"""Which block sizes a kernel is launched with on which device, and what the Triton interpreter cannot do.

A plain function of device and shape: `triton.autotune` needs a GPU to choose on, tunes again in every process, and
picks differently on the ranks of one run.
"""

from __future__ import annotations

import contextlib
import json
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

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


@cache  # asked for several times a launch, and torch looks it up at length
def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability."""
    return torch.cuda.get_device_capability(device)


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes `x`'s GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def power_of_two(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def padded(width: int) -> int:
    """The next tile width: a power of two, 16 or more."""
    return max(16, power_of_two(width))


def readable(x: Tensor) -> Tensor:
    """`x` (..., width) as kernels address it: elements of the last dim beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """`x` (..., width) as a matrix that is `readable`."""
    return readable(x.reshape(-1, x.shape[-1]))


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype of torch.autocast, where that is on: as it does for matrix products."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in tensors]


def dropout_threshold(probability: float) -> int:
    """An entry is dropped where its 32 random bits are below this."""
    return max(2, min(round(probability * 2**32), 2**32 - 1))  # a 1 would become a constant of the compilation


def new_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator, for kernels that draw their own numbers."""
    return torch.randint(2**62, (1,), device=device)


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of a tensor that may be absent."""
    return (0,) * dims if x is None else x.stride()


def shared_stride(x: Tensor | None) -> int:
    """The first stride of a tensor that may be shared along that dim (size 1), or absent."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


class AttentionBlocks(NamedTuple):
    """Rows and keys of a tile, warps and pipeline stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """`sm_90`, `sm_80`, `sm_89`, ... or `hip`; `interpreter` where kernels run in numpy."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    return "sm_{}{}".format(*capability(device))


# the choice between a fused op and its reference ----------------------------------------------------------------------


def choose(implementation: str, x: Tensor) -> str:
    """`triton` or `reference` for an op on tensors like `x`; raises ValueError if the one asked for cannot serve it."""
    if implementation == "auto":
        return "triton" if x.device.type == "cuda" and not unsupported(x) else "reference"
    if implementation not in ("triton", "reference"):
        raise ValueError(f"implementation={implementation!r}: must be auto, triton or reference")
    if implementation == "triton" and (why := unsupported(x)):
        raise ValueError(f"implementation=triton: {why}")
    return implementation


# ops on rows ----------------------------------------------------------------------------------------------------------


class RowBlocks(NamedTuple):
    """Rows and columns of a tile, warps of a program; stages of its loop over tiles, if it has one."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; two where kernels are interpreted or compiled for another machine."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def norm_forward(x: Tensor) -> RowBlocks:
    """For rows x (..., width): 32 elements a thread."""
    columns = min(padded(x.shape[-1]), 16384)
    rows = max(1, min(16, 16384 // columns))
    return RowBlocks(rows, columns, max(4, rows * columns // 2048))


def norm_backward(x: Tensor, groups: int) -> tuple[RowBlocks, int]:
    """For rows x (..., width) whose weights are in `groups`: blocks, and how many programs share the rows.

    Gradient, input, output and the weight's sum are in registers together; rows are copied ahead while one is computed.
    """
    columns = min(padded(x.shape[-1]), 8192)
    rows = max(1, 4096 // columns)
    stage = 3 * rows * columns * x.element_size()  # gradients of output and residual, and the input
    stages = 3 if 3 * stage <= _shared_memory(architecture(x.device)) else 1
    blocks = RowBlocks(rows, columns, max(8, rows * columns // 1024), stages)
    resident = multiprocessors(x.device) * (2 if rows * columns <= 4096 else 1)
    return blocks, groups * max(1, resident // groups)


def softmax(columns: int) -> RowBlocks:
    """For rows of scores: 16 elements a thread."""
    columns = min(padded(columns), 16384)
    rows = max(1, 4096 // columns)
    return RowBlocks(rows, columns, max(4, rows * columns // 512))


def pointwise(columns: int) -> RowBlocks:
    """For matrices whose elements are independent: 16 elements a thread."""
    columns = min(padded(columns), 4096)
    return RowBlocks(4096 // columns, columns, 8)


def gelu_backward(x: Tensor) -> tuple[RowBlocks, int]:
    """For x (rows, columns), and how many programs share the rows of a tile's columns."""
    blocks = RowBlocks(2, 1024, 4)
    across = -(-x.shape[1] // blocks.columns)
    tiles_of_rows = max(1, -(-x.shape[0] // blocks.rows))
    return blocks, min(tiles_of_rows, max(1, 32 * multiprocessors(x.device) // across))


class RotaryBlocks(NamedTuple):
    """Tokens and heads of a tile, warps of a program."""

    tokens: int
    heads: int
    warps: int


def rotary(heads: int, pairs: int) -> RotaryBlocks:
    """Tiles of some 4096 pairs: 16 a thread."""
    block_heads = min(power_of_two(heads), max(1, 4096 // power_of_two(pairs)))
    tokens = max(1, 4096 // (block_heads * power_of_two(pairs)))
    return RotaryBlocks(tokens, block_heads, 8)


class LossBlocks(NamedTuple):
    """Columns that a program reads at a time, its warps and pipeline stages; programs that run at once."""

    columns: int
    warps: int
    stages: int
    programs: int


def cross_entropy(logits: Tensor) -> LossBlocks:
    """For logits (tokens, classes) whose rows are read twice: few programs at once, so that the L2 cache helps."""
    columns = min(padded(logits.shape[1]), 8192)
    processors = multiprocessors(logits.device)
    row_bytes = logits.shape[1] * logits.element_size()
    a_processor = max(2, min(4, (32 << 20) // (row_bytes * processors)))
    return LossBlocks(columns, max(4, columns // 512), 3, processors * a_processor)


# attention -----------------------------------------------------------------------------------------------------------

# Timed on an H200 for the largest class; for the others chosen by compiling: what fits the shared memory and spills
# least. By the class, then by the padded head dim; 16-bit inputs first, then float32, whose tiles take twice the room
# and which has no tensor cores.
_Table = dict[str, dict[int, AttentionBlocks]]
_SMALLEST = {d: AttentionBlocks(16, 16, 1, 1) for d in (16, 32, 64, 128, 256)}
_FORWARD: _Table = {
    "interpreter": _SMALLEST,
    "64 KiB": {
        16: AttentionBlocks(128, 64, 4, 3),
        32: AttentionBlocks(128, 64, 4, 3),
        64: AttentionBlocks(128, 64, 8, 3),
        128: AttentionBlocks(64, 64, 8, 2),
        256: AttentionBlocks(64, 32, 8, 2),
    },
    "99 KiB": {
        16: AttentionBlocks(128, 64, 4, 3),
        32: AttentionBlocks(128, 64, 4, 3),
        64: AttentionBlocks(128, 64, 8, 3),
        128: AttentionBlocks(128, 64, 8, 3),
        256: AttentionBlocks(64, 32, 8, 2),
    },
    "163 KiB": {
        16: AttentionBlocks(128, 64, 4, 3),
        32: AttentionBlocks(128, 64, 4, 3),
        64: AttentionBlocks(128, 64, 8, 3),
        128: AttentionBlocks(64, 64, 4, 3),
        256: AttentionBlocks(64, 32, 8, 3),
    },
    "227 KiB": {
        16: AttentionBlocks(128, 128, 8, 3),
        32: AttentionBlocks(128, 128, 8, 3),
        64: AttentionBlocks(128, 64, 8, 3),
        128: AttentionBlocks(128, 128, 8, 3),
        256: AttentionBlocks(128, 64, 8, 2),
    },
}
_FORWARD_FLOAT32: _Table = {
    "interpreter": _SMALLEST,
    "99 KiB": {
        16: AttentionBlocks(64, 64, 4, 2),
        32: AttentionBlocks(64, 32, 4, 2),
        64: AttentionBlocks(64, 32, 8, 2),
        128: AttentionBlocks(32, 32, 8, 1),
        256: AttentionBlocks(32, 16, 8, 1),
    },
}
_BACKWARD: _Table = {
    "interpreter": _SMALLEST,
    "64 KiB": {
        16: AttentionBlocks(64, 64, 4, 2),
        32: AttentionBlocks(64, 64, 4, 2),
        64: AttentionBlocks(64, 64, 4, 2),
        128: AttentionBlocks(32, 64, 8, 1),
        256: AttentionBlocks(32, 32, 8, 1),
    },
    "99 KiB": {
        16: AttentionBlocks(64, 64, 4, 3),
        32: AttentionBlocks(64, 64, 4, 3),
        64: AttentionBlocks(64, 64, 4, 3),
        128: AttentionBlocks(32, 64, 8, 3),
        256: AttentionBlocks(32, 32, 8, 1),
    },
    "163 KiB": {
        16: AttentionBlocks(64, 64, 4, 3),
        32: AttentionBlocks(64, 64, 4, 3),
        64: AttentionBlocks(64, 128, 8, 3),
        128: AttentionBlocks(64, 64, 8, 3),
        256: AttentionBlocks(32, 64, 8, 3),
    },
    "227 KiB": {
        16: AttentionBlocks(64, 128, 8, 3),
        32: AttentionBlocks(64, 128, 8, 3),
        64: AttentionBlocks(128, 128, 8, 2),
        128: AttentionBlocks(64, 128, 8, 3),
        256: AttentionBlocks(32, 64, 8, 3),
    },
}
_BACKWARD_FLOAT32: _Table = {
    "interpreter": _SMALLEST,
    "99 KiB": {
        16: AttentionBlocks(32, 64, 4, 2),
        32: AttentionBlocks(32, 64, 4, 2),
        64: AttentionBlocks(32, 32, 8, 2),
        128: AttentionBlocks(16, 32, 8, 1),
        256: AttentionBlocks(16, 16, 8, 1),
    },
}


def attention_forward(q: Tensor, is_block_sparse: bool = False) -> AttentionBlocks:
    """Block sizes of the forward pass for queries like `q` (batch, rows, heads, head_dim)."""
    return _attention_blocks(_FORWARD_FLOAT32 if q.dtype == torch.float32 else _FORWARD, q, is_block_sparse)


def attention_backward(q: Tensor, is_block_sparse: bool = False) -> AttentionBlocks:
    """Block sizes of the backward pass for queries like `q` (batch, rows, heads, head_dim)."""
    return _attention_blocks(_BACKWARD_FLOAT32 if q.dtype == torch.float32 else _BACKWARD, q, is_block_sparse)


def _attention_blocks(table: _Table, q: Tensor, is_block_sparse: bool) -> AttentionBlocks:
    """Looking up a layout takes registers and its list of tiles a stage: block-sparse has a small GPU's blocks."""
    memory = _memory_class(architecture(q.device))
    if is_block_sparse and memory.endswith("KiB"):
        memory = "64 KiB"
    return table.get(memory, table["99 KiB"])[padded(q.shape[-1])]


def _shared_memory(architecture: str) -> int:
    """Bytes that a program may have; 0 in the interpreter."""
    memory = _memory_class(architecture)
    return int(memory.removesuffix(" KiB")) * 1024 if memory.endswith("KiB") else 0


def _memory_class(architecture: str) -> str:
    """By the shared memory a program may have, which decides what fits."""
    if architecture in ("sm_80", "sm_87"):
        return "163 KiB"
    if architecture in ("sm_90", "sm_100", "sm_103"):
        return "227 KiB"
    return {"interpreter": "interpreter", "hip": "64 KiB"}.get(architecture, "99 KiB")  # sm_86, sm_89, sm_120


# attention on Hopper: tiles as `tools/tune_attention.py` found them, which writes where and when beside them
HOPPER_TILES = Path(__file__).with_name("attention") / "hopper_tiles.json"


class HopperForward(NamedTuple):
    """Of a tile of 128 rows: keys and stages in shared memory, and how its two warpgroups share a multiprocessor."""

    keys: int
    stages: int
    own_out: bool  # whether the output has shared memory of its own, or takes the queries'
    ping_pong: bool  # whether the warpgroups take turns on the matrix units
    registers: int  # a thread of a warpgroup, and of the warp that copies
    producer_registers: int


class HopperBackward(NamedTuple):
    """Of a tile of 128 keys: rows and stages in shared memory, registers of a thread of a warpgroup."""

    rows: int
    stages: int
    registers: int


@cache
def _hopper_tiles() -> dict[str, dict[str, dict]]:
    return json.loads(HOPPER_TILES.read_text())


def hopper_head_dim(q: Tensor) -> int:
    """The head dim that the Hopper kernels pad to: 64, 128 or 256."""
    return max(64, power_of_two(q.shape[-1]))


def hopper_forward(q: Tensor) -> HopperForward:
    """Tiles of the forward pass on Hopper for queries like `q`."""
    return HopperForward(**_hopper_tiles()["forward"][str(hopper_head_dim(q))])


def hopper_backward(q: Tensor) -> HopperBackward:
    """Tiles of the backward pass on Hopper for queries like `q`, head dims up to 128."""
    return HopperBackward(**_hopper_tiles()["backward"][str(hopper_head_dim(q))])
