"""Ranks that compute slower than the others, for whom all wait in every step."""

from __future__ import annotations

import time
from statistics import median_low

import torch

from longctx.machine import this_machine
from longctx.runtime import Runtime

SLOW = 1.2  # of the median rank's time
SIZE = {"cuda": 4096, "cpu": 256}
PRODUCTS = 100


def own_ms(device: torch.device) -> float:
    """The least of five times for the same few matrix products, which no other rank takes part in."""
    size, dtype = SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = a @ b
    product[0, 0].item()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=product)
        product[0, 0].item()  # waits for the device
        times.append((time.perf_counter() - started) * 1e3)
    return min(times)


def compare_ranks(runtime: Runtime) -> tuple[dict[str, float], str | None]:
    """The slowest rank and its time over that of the median rank, and what to say of it if it is slow."""
    found = runtime.gather((own_ms(runtime.device), this_machine()))
    times = [ms for ms, _ in found]
    slowest = max(range(len(times)), key=times.__getitem__)
    usual = median_low(times)
    values = {"run/slowest_rank": float(slowest), "run/slowest_over_median": times[slowest] / usual}
    if times[slowest] < SLOW * usual:
        return values, None
    machine = found[slowest][1].split("/")[0]
    return values, (
        f"rank {slowest} on {machine} computes slowly, and all ranks wait for it: {times[slowest]:.2f} ms for what "
        f"takes the median rank {usual:.2f} ms"
    )
