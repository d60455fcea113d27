"""Tiles of the Hopper attention kernels, as `tools/tune_attention.py` found them and wrote into hopper_tiles.json."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from longctx.kernels.addressing import power_of_two

# attention on Hopper: tiles as `tools/tune_attention.py` found them, which writes where and when beside them
HOPPER_TILES = Path(__file__).with_name("hopper_tiles.json")


class HopperForward(NamedTuple):
    """Of a tile of 64 rows a warpgroup: keys and stages in shared memory, and how they share a multiprocessor."""

    consumers: int  # warpgroups: 2 or 3
    keys: int
    stages: int
    own_out: bool  # whether the output has shared memory of its own, or takes the queries'
    ping_pong: bool  # whether the warpgroups take turns on the matrix units
    registers: int  # a thread of a warpgroup, and of the warp that copies
    producer_registers: int


class HopperBackward(NamedTuple):
    """Of a tile of 128 keys, or 64 at a head dim of 256: rows and stages in shared memory, registers of a thread."""

    rows: int
    stages: int
    ordered_dq_stages: int  # buffers of each warpgroup for its part of dQ, if that is added in a fixed order
    registers: int


@cache
def _hopper_tiles() -> dict[str, dict[str, dict]]:
    return json.loads(HOPPER_TILES.read_text())


def hopper_head_dim(q: Tensor) -> int:
    """The head dim that the Hopper kernels pad to: 64, 128 or 256."""
    return max(64, power_of_two(q.shape[-1]))


def forward_tiles(q: Tensor) -> HopperForward:
    """Tiles of the forward pass on Hopper for queries like `q`."""
    return HopperForward(**_hopper_tiles()["forward"][str(hopper_head_dim(q))])


def backward_tiles(q: Tensor) -> HopperBackward:
    """Tiles of the backward pass on Hopper for queries like `q`."""
    return HopperBackward(**_hopper_tiles()["backward"][str(hopper_head_dim(q))])
