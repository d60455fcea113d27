"""Times the tiles that the Hopper attention kernels may have, and writes the fastest where the kernels read them.

    python tools/tune_attention.py            # on a GPU of compute capability 9.0: some minutes, prints all
    python tools/tune_attention.py --write    # and kernels/attention/hopper_tiles.json, with where and when

Causal, bfloat16, one sequence; each variant is compared with the first one's result. The tiles in use stay unless
others are more than 1 % faster in both of two rounds: clocks vary by about as much.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar
from unittest import mock

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from longctx.kernels.attention import hopper_backward, hopper_forward, hopper_tiles
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from longctx.tools import benchmarking

SHAPES = {64: (32768, 32, 32), 128: (32768, 32, 8), 256: (16384, 16, 16)}  # tokens, query heads, key heads
Tile = TypeVar("Tile", hopper_tiles.HopperForward, hopper_tiles.HopperBackward)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def forward_tiles(head_dim: int) -> list[hopper_tiles.HopperForward]:
    """What fits and hardly spills."""
    keys, stages = {64: (128, (3, 4)), 128: (128, (2,)), 256: (64, (2,))}[head_dim]
    return [
        hopper_tiles.HopperForward(consumers, keys, n, own_out, ping_pong, *registers)
        for n in stages
        for own_out in ((True, False) if head_dim <= 128 else (False,))
        for ping_pong in (True, False)
        for consumers, *registers in ((2, 240, 24), (2, 232, 40), *([(3, 160, 24)] if head_dim == 64 else []))
    ]


def backward_tiles(head_dim: int) -> list[hopper_tiles.HopperBackward]:
    """Of the form whose sums come in any order; `ordered_dq_stages` are those in use."""
    rows, ordered_dq_stages = {64: (128, 1), 128: (64, 2), 256: (64, 1)}[head_dim]
    return [hopper_tiles.HopperBackward(rows, 2, ordered_dq_stages, registers) for registers in (240, 232)]


def first_of(now: Tile, tiles: list[Tile]) -> list[Tile]:
    return [now, *(tile for tile in tiles if tile != now)]


def random_inputs(head_dim: int, device: torch.device) -> Inputs:
    length, heads, kv_heads = SHAPES[head_dim]
    return Inputs(
        *(
            torch.randn(1, length, h, head_dim, device=device, dtype=torch.bfloat16)
            for h in (heads, kv_heads, kv_heads, heads)
        )
    )


def fastest(
    what: str, tiles: Sequence[Tile], run: Callable[[], tuple[Tensor, ...]], flops: float, device: torch.device
) -> Tile:
    """Of `tiles`, with which `hopper_tiles.<what>` is replaced while `run` is timed."""
    rounds: list[dict[Tile, float]] = [{}, {}]
    expected: tuple[Tensor, ...] | None = None
    for milliseconds in rounds:
        for tile in tiles:
            with mock.patch.object(hopper_tiles, what, return_value=tile):
                try:
                    results = run()
                except Exception as error:  # too much shared memory, or registers
                    print(f"{what} {tile}: {type(error).__name__}: {str(error)[:100]}")
                    continue
                expected = expected or results
                for mine, other in zip(results, expected, strict=True):
                    error = float((mine.float() - other.float()).norm() / other.float().norm())
                    assert error < 5e-3, f"{what} {tile}: differs from the first by {error:.1e}"
                milliseconds[tile] = benchmarking.median_ms(run, device, 0.3)
            print(f"{what} {tile}: {flops / milliseconds[tile] / 1e9:.0f} TFLOP/s", flush=True)
    ran = [tile for tile in tiles if all(tile in milliseconds for milliseconds in rounds)]
    if not ran:
        raise SystemExit(f"tune_attention: none of the tiles of {what} runs here")
    best = ran[0]
    for tile in ran[1:]:
        if all(milliseconds[tile] < 0.99 * milliseconds[best] for milliseconds in rounds):
            best = tile
    return best


def tune(head_dim: int, device: torch.device) -> tuple[hopper_tiles.HopperForward, hopper_tiles.HopperBackward]:
    q, k, v, dout = random_inputs(head_dim, device)
    mask, options = KeyIntervals.causal(q.shape[1]), Options(head_dim**-0.5)
    flops = 2.0 * head_dim * q.shape[2] * q.shape[1] ** 2

    def forward() -> tuple[Tensor, ...]:
        return hopper_forward.forward_on_hopper(q, k, v, mask, options)

    of_forward = fastest(
        "forward_tiles", first_of(hopper_tiles.forward_tiles(q), forward_tiles(head_dim)), forward, flops, device
    )
    out, lse = forward()

    def backward() -> tuple[Tensor, ...]:
        return hopper_backward.backward_on_hopper(dout, None, Saved(q, k, v, out, lse), mask, options)

    tiles = first_of(hopper_tiles.backward_tiles(q), backward_tiles(head_dim))
    return of_forward, fastest("backward_tiles", tiles, backward, 2.5 * flops, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the fastest tiles where the kernels read them")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("tune_attention: needs a GPU of compute capability 9.0, there is none here")
    device = torch.device("cuda")
    table: dict[str, dict] = {"measured_on": benchmarking.setting(device), "forward": {}, "backward": {}}
    for head_dim in SHAPES:
        forward, backward = tune(head_dim, device)
        table["forward"][str(head_dim)] = forward._asdict()
        table["backward"][str(head_dim)] = backward._asdict()
    text = json.dumps(table, indent=2) + "\n"
    print(text)
    if arguments.write:
        hopper_tiles.HOPPER_TILES.write_text(text)


if __name__ == "__main__":
    main()
