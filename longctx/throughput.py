"""What a step is: its work, how evenly ranks share it, how fast it was, and how long it will take."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable

import torch

from longctx.batch import Batch
from longctx.config import Config
from longctx.data.packing import IGNORE_INDEX
from longctx.model.transformer import keys_seen, palm_flops, training_flops
from longctx.parallel.context_parallel import ContextParallel
from longctx.parallel.load_balance import Split
from longctx.parallel.mesh import Mesh
from longctx.power import PowerMeter
from longctx.runtime import Runtime
from longctx.step_counters import Memory, Summed
from longctx.step_time import in_words
from longctx.straggler import product_tflops
from longctx.summary import WARM_UP_STEPS

GIB = 2.0**30
LONG_STEP_S = 60  # of which the user is told before

# dense bfloat16 TFLOP/s of one device without sparsity, by a part of its name, from the makers' data sheets
PEAK_TFLOPS = {
    "GB200": 2500.0, "B200": 2250.0, "GH200": 989.4, "H200 NVL": 835.5, "H200": 989.4, "H100 PCIe": 756.0,
    "H100 NVL": 835.5, "H100": 989.4, "A100": 311.9, "L40S": 362.1, "RTX 4090": 165.2, "MI300X": 1307.4,
}  # fmt: skip


def peak_tflops(device_name: str, given: float | None) -> float | None:
    """The rate MFU is a share of: the one given, else that of the device's data sheet, else None."""
    if given is not None:
        return given
    if re.search(r"Laptop|MIG|\bD\b", device_name):  # another chip, a part of one, a slower one for China
        return None
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


class Pace:
    """Mean seconds a step since it was made, with what is done between steps: validations, saves.

    The first steps, in which kernels are compiled, count only until there are others.
    """

    def __init__(self) -> None:
        self.began, self.steps, self.is_warming_up = time.perf_counter(), 0, True

    def of_steps(self) -> float:
        """To be asked once at the end of each step."""
        now = time.perf_counter()
        self.steps += 1
        mean = (now - self.began) / self.steps
        if self.is_warming_up and self.steps == WARM_UP_STEPS:
            self.began, self.steps, self.is_warming_up = now, 0, False
        return mean


class Throughput:
    """Measures the steps of a run on this rank."""

    def __init__(self, config: Config, mesh: Mesh, context_parallel: ContextParallel, runtime: Runtime) -> None:
        self.config, self.mesh, self.context_parallel, self.runtime = config, mesh, context_parallel, runtime
        self.power = PowerMeter(runtime.device)
        self.peak_tflops = peak_tflops(runtime.device_name, config.logging.peak_tflops)

    def expected_s(self, tflops: float, say: Callable[[str], None]) -> float:
        """Seconds a step of so many TFLOP may take, by a short measurement; says so if they are many."""
        device = self.runtime.device
        rate = product_tflops(device, getattr(torch, self.config.precision.compute))
        seconds = tflops / self.runtime.world_size / rate
        if seconds > LONG_STEP_S:
            hint = "" if device.type == "cuda" else "; try recipe=gpt_tiny or data.sequence_length=2048"
            say(
                f"about {in_words(seconds)} a step on this {self.runtime.device_name} "
                f"({tflops:.3g} TFLOP, by its products){hint}"
            )
        return seconds

    def count(self, batches: list[Batch], is_unread: bool) -> Summed:
        """What this rank has read for a step."""
        return Summed(
            valid_targets=sum(float((batch.targets != IGNORE_INDEX).sum()) for batch in batches),
            tflops=sum(training_flops(self.config.model, batch.positions) for batch in batches) / 1e12,
            documents=sum(float((batch.positions == 0).sum()) for batch in batches),
            unread=is_unread,
        )

    def imbalance(self, batches: list[Batch], splits: list[Split]) -> float:
        """Load imbalance: the attention work of this rank (visible keys, summed over its queries) over the mean.

        The mean is that over its context axis; ranks that trade heads attend from the same tokens and share theirs.
        """
        size, together = self.mesh.size("context"), self.context_parallel.choice.ulysses_size
        if size == together:
            return 1.0
        first = self.mesh.rank("context") // together * together
        mine, whole = 0.0, 0.0
        for batch, split in zip(batches, splits, strict=True):
            keys = keys_seen(self.config.model, batch.positions)
            mine += sum(float(split.shard(keys, rank).sum()) for rank in range(first, first + together))
            whole += float(keys.sum())
        return mine / together / (whole / size)

    def of_step(self, seconds: float, watts: float | None, counts: Summed) -> dict[str, float]:
        """Throughput and utilisation of a step that took `seconds`, in which this rank's GPU drew `watts`, if known."""
        config, world_size = self.config, self.runtime.world_size
        copies = self.mesh.ranks_of_a_reader
        tokens = config.data.sequences_per_step * config.data.sequence_length
        tflops = counts.tflops / copies / seconds / world_size
        values = {
            "perf/tokens_per_s": tokens / seconds,
            "perf/tokens_per_s_per_gpu": tokens / seconds / world_size,
            "perf/step_s": seconds,
            "perf/tflops_per_gpu": tflops,
            "data/documents_per_sequence": counts.documents / copies / config.data.sequences_per_step,
        }
        if watts is not None:
            values["perf/joules_per_token"] = watts * seconds / tokens * world_size
        if self.peak_tflops:
            palm = palm_flops(config.model, tokens, config.data.sequence_length) / 1e12 / seconds / world_size
            values |= {"perf/mfu": tflops / self.peak_tflops, "perf/mfu_palm": palm / self.peak_tflops}
        return values

    def memory(self) -> Memory:
        """Of this rank, up to now."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        transport = self.context_parallel.shared_bytes() / GIB
        if self.runtime.device.type != "cuda":
            return Memory(peak_alloc_gib=host, transport_gib=transport, host_gib=host)
        found = torch.cuda.memory_stats(self.runtime.device)
        reserved = found["reserved_bytes.all.peak"] / GIB
        return Memory(
            peak_alloc_gib=found["allocated_bytes.all.peak"] / GIB + transport,
            transport_gib=transport,
            host_gib=host,
            peak_reserved_gib=reserved,
            peak_of_device=(reserved + transport) * GIB / self.runtime.device_bytes,
            alloc_retries=found["num_alloc_retries"],
        )
