"""Speed, work and memory of a step, of ranks that are not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from longctx import throughput
from longctx.batch import Batch
from longctx.config import Config
from longctx.model.transformer import palm_flops
from longctx.parallel.load_balance import in_order
from longctx.step_counters import Summed
from longctx.throughput import GIB, Throughput
from runs import TINY


def of_eight_ranks(ulysses_size=2) -> Throughput:
    """Of the last rank of a context axis of four; no process group."""
    config = Config(model=TINY)
    config.data.sequences_per_step, config.data.sequence_length, config.logging.peak_tflops = 4, 64, 10.0
    mesh = SimpleNamespace(ranks_of_a_reader=4, size=lambda _axis: 4, rank=lambda _axis: 3)
    context_parallel = SimpleNamespace(choice=SimpleNamespace(ulysses_size=ulysses_size), shared_bytes=lambda: GIB)
    runtime = SimpleNamespace(device=torch.device("cpu"), device_name="CPU", world_size=8, device_bytes=142 * GIB)
    return Throughput(config, mesh, context_parallel, runtime)


def test_speed_and_work_of_a_step_of_eight_ranks():
    """Four ranks read the same sequences, and each counts them."""
    found = of_eight_ranks().of_step(2.0, 500.0, Summed(0.0, tflops=320.0, documents=48.0, unread=0.0))
    assert found == {
        "perf/tokens_per_s": 128, "perf/tokens_per_s_per_gpu": 16, "perf/step_s": 2, "perf/tflops_per_gpu": 5,
        "data/documents_per_sequence": 3, "perf/joules_per_token": 500 * 8 * 2 / 256, "perf/mfu": 0.5,
        "perf/mfu_palm": pytest.approx(palm_flops(TINY, 256, 64) / 1e12 / 2 / 8 / 10),
    }  # fmt: skip


def test_a_long_step_is_expected_of_all_ranks(monkeypatch):
    monkeypatch.setattr(throughput, "product_tflops", lambda *_: 2.0)
    assert of_eight_ranks().expected_s(160.0, print) == 10


@pytest.mark.parametrize(("ulysses_size", "expected"), [(1, 58 / 34), (2, 50 / 34), (4, 1)])
def test_imbalance_of_ranks_that_trade_heads_is_that_of_their_tokens(ulysses_size, expected):
    """16 tokens see 1 to 16 keys, 34 a rank; the last rank's 58, and with its neighbour's 42 on average 50."""
    positions = torch.arange(16).unsqueeze(0)
    batch = Batch(positions, positions, positions, torch.zeros_like(positions))
    found = of_eight_ranks(ulysses_size).imbalance([batch], [in_order(16, 4)])
    assert found == pytest.approx(expected)


def test_memory_of_a_gpu(monkeypatch):
    stats = {"reserved_bytes.all.peak": 70 * GIB, "allocated_bytes.all.peak": 60 * GIB, "num_alloc_retries": 3}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _device: stats)
    measured = of_eight_ranks()
    measured.runtime.device = torch.device("cuda")
    found = measured.memory()
    assert (found.peak_alloc_gib, found.transport_gib, found.peak_reserved_gib) == (61, 1, 70)
    assert (found.peak_of_device, found.alloc_retries) == (0.5, 3)
