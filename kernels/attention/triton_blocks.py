"""Block sizes of the Triton attention kernels, by device and head dim."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.addressing import padded


class AttentionBlocks(NamedTuple):
    """Rows and keys of a tile, warps and pipeline stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


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
    memory = hardware.memory_class(hardware.architecture(q.device))
    if is_block_sparse and memory.endswith("KiB"):
        memory = "64 KiB"
    return table.get(memory, table["99 KiB"])[padded(q.shape[-1])]
