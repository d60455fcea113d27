"""Ranks that compute slower than the others, for whom all wait in every step."""

from __future__ import annotations

import time
from statistics import median_low

import torch

from longctx.machine import this_machine
from longctx.runtime import Runtime

SLOW = 1.2  # of the median rank's time
TRIES = 3  # a rank is slow if it is so each time: others use the machine for moments
SIZE = {"cuda": 4096, "cpu": 256}
PRODUCTS = 100


def own_ms(device: torch.device) -> float:
    """Milliseconds of a fixed local benchmark, 100 matrix products: how fast this rank's device is by itself.

    The best of five, without communication.
    """
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


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a matrix product on this rank, the best of three."""
    size = 2 * SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)[0, 0].item()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2e-12 * size**3 / min(times)


def compare_ranks(runtime: Runtime) -> tuple[dict[str, float], str | None]:
    """The slowest rank and its time over that of the median rank, and what to say of one that is slow each time.

    Nothing is said of ranks that share the cores of one machine: whatever else runs there slows one of them.
    """
    machines = runtime.gather(this_machine())
    shares_cores = runtime.device.type == "cpu" and len(set(machines)) < len(machines)
    values: dict[str, float] = {}
    times, usual, slow = [0.0], 0.0, set(range(len(machines)))
    for _ in range(TRIES):
        times = runtime.gather(own_ms(runtime.device))
        slowest, usual = max(range(len(times)), key=times.__getitem__), median_low(times)
        values = {"run/slowest_rank": float(slowest), "run/slowest_over_median": times[slowest] / usual}
        slow &= {rank for rank, ms in enumerate(times) if ms >= SLOW * usual}
        if not slow or shares_cores:
            return values, None
    named = max(slow, key=times.__getitem__)
    return values, (
        f"rank {named} on {machines[named].split('/')[0]} computes slowly, and all ranks wait for it: "
        f"{times[named]:.2f} ms for what takes the median rank {usual:.2f} ms"
    )
