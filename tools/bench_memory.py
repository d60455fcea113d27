"""What each way to hold less costs: a training step's memory and time, beside what the planner expects of them.

    torchrun --nproc-per-node 1 tools/bench_memory.py recipe=llama3_8b_128k model.layers=4 data.sequence_length=65536

Words as of train.py; each variant below is put on top of them. Every one takes five steps on random tokens, each
sequence one document, from the same start. GiB are the most that torch held in the last three steps, and what ranks
share beside it; ms the median of these of the slowest rank. `bits` is a number made of all parameters at the end: with
`--deterministic`, which has attention add in one order, variants that compute the same have the same.

With `--timeline FOLDER` one more step of each variant is profiled: FOLDER/VARIANT.json is for chrome://tracing or
Perfetto, `idle ms` how long rank 0's GPU ran no kernel between its first and its last, and `idle, copying ms` how long
of that it copied from or to host memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from longctx import plan, remedies, runtime, step_time
from longctx.batch import Batch
from longctx.config import Config, micro_batch
from longctx.config_checks import check
from longctx.errors import UserError
from longctx.local_part import local_of
from longctx.model.transformer import Block
from longctx.optim import Optimizers, global_norm
from longctx.parallel.load_balance import zigzag
from longctx.parallel.local_batch import LocalBatch
from longctx.parallel.loss import forward_backward, token_weight
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.runtime import Runtime
from longctx.strategy import strategy_for
from longctx.tools import benchmarking
from longctx.tools.plan import composed

STEPS, TIMED = 5, 3
OFFLOAD, ON_HOST = "parallel.offload={most}", "parallel.offload_optimizer=true"  # most: all layers but the last
MOST_GROUPS = 4  # of heads
VARIANTS = {
    "compiled": ["parallel.compile=true"],
    "eager": ["parallel.compile=false"],
    "tile16k": ["parallel.tile=16384"],
    "tile8k": ["parallel.tile=8192"],
    "tile16k+groups": ["parallel.tile=16384", "parallel.head_groups={groups}"],
    "offload": [OFFLOAD],
    "tile16k+offload": ["parallel.tile=16384", OFFLOAD],
    "tile16k+offload+optimizer": ["parallel.tile=16384", OFFLOAD, ON_HOST],
}


def measured(
    config: Config, run: Runtime, is_deterministic: bool, timeline: Path | None = None
) -> benchmarking.Row:  # fmt: skip
    """A row of the table; `timeline`: the file of a profiled step, if there is to be one."""
    device, mesh = run.device, make_mesh(config.parallel, run.world_size, run.device.type)
    model, context_parallel = parallelize(config, mesh, run.ranks_of_a_machine, device)
    for block in model.blocks:
        assert isinstance(block, Block)
        attend = getattr(block.attention.attend, "attend", block.attention.attend)
        attend.options["deterministic"] = is_deterministic
    optimizer = Optimizers(
        model, config.optim, getattr(torch, config.precision.compute), config.parallel.offload_optimizer
    )
    shape = micro_batch(config.data, mesh.readers), config.data.sequence_length + 1
    tokens = torch.randint(config.model.vocab_size, shape, generator=_seeded(0))
    start = torch.zeros_like(tokens[:, 1:])
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(start.shape[1]).expand_as(start).contiguous(), start)
    local = LocalBatch.of(batch, zigzag(start.shape[1], mesh.size("context")), mesh, device)
    weight = token_weight(start.numel() * mesh.readers, device)

    def step() -> float:
        began = _now(device)
        forward_backward(model, local, weight)
        global_norm(list(model.parameters()))
        optimizer.step(config.optim.steps // 2)
        optimizer.zero_grad()
        return _now(device) - began

    seconds = []
    for number in range(STEPS):
        if device.type == "cuda" and number == STEPS - TIMED:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(step())
    parts = [local_of(p).detach() for p in model.parameters()]
    bits = torch.stack([part.view(torch.int32).sum(dtype=torch.int64) for part in parts]).sum().cpu()
    dist.all_reduce(bits)
    allocated = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    slowest = torch.tensor([median(seconds[-TIMED:]), allocated], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    shared = context_parallel.shared_bytes()
    row = {"ms": 1000 * float(slowest[0]), "GiB": (float(slowest[1]) + shared) / plan.GIB, "bits": f"{int(bits):x}"}
    if timeline is not None:
        row |= profiled(step, timeline, run)
    context_parallel.close()
    return row


Intervals = list[tuple[float, float]]  # beginnings and ends


def profiled(step: Callable[[], float], file: Path, run: Runtime) -> benchmarking.Row:
    """Writes the timeline of a step on rank 0, and says how long its GPU was idle."""
    of_device = getattr(torch.profiler.ProfilerActivity, run.device.type.upper())
    with torch.profiler.profile(activities=[of_device]) as profile:
        step()
    if not run.is_main:
        return {}
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))
    kernels: Intervals = []
    copies: Intervals = []
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            with_host = event.name.startswith(("Memcpy DtoH", "Memcpy HtoD"))
            (copies if with_host else kernels).append((event.time_range.start, event.time_range.end))
    idle = gaps(kernels)
    return {"idle ms": total(idle) / 1000, "idle, copying ms": (total(idle) - total(without(idle, copies))) / 1000}


def gaps(busy: Intervals) -> Intervals:
    """What lies between intervals, which may overlap."""
    found: Intervals = []
    last = math.inf
    for begin, end in sorted(busy):
        if begin > last:
            found.append((last, begin))
        last = end if last == math.inf else max(last, end)
    return found


def without(intervals: Intervals, others: Intervals) -> Intervals:
    """What is in `intervals`, which do not overlap, and in none of `others`."""
    found: Intervals = []
    for begin, end in intervals:
        inside = [(max(begin, b), min(end, e)) for b, e in others if b < end and e > begin]
        found += gaps([(begin, begin), *inside, (end, end)])
    return found


def total(intervals: Intervals) -> float:
    return sum(end - begin for begin, end in intervals)


def release(device: torch.device) -> None:
    """Gives back what the last model held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def expected(config: Config, run: Runtime) -> benchmarking.Row:
    """What the planner says of the same."""
    rates = step_time.rates_of_device(run.device_name)
    seconds = step_time.seconds(config, run.world_size, rates) if rates and step_time.is_timed(config) else {}
    return {
        "GiB expected": plan.memory(config, run.world_size, strategy_for(run.ranks_of_a_machine)(config)).total
        / plan.GIB,
        "ms expected": 1000 * sum(seconds.values()),
    }


def row(
    name: str, words: list[str], run: Runtime, is_deterministic: bool, timelines: Path | None
) -> benchmarking.Row:  # fmt: skip
    """A variant of the run that `words` say."""
    model = composed(words).model
    numbers = {"most": model.layers - 1, "groups": math.gcd(model.kv_heads, MOST_GROUPS)}
    config = composed([*words, *(word.format(**numbers) for word in VARIANTS[name])])
    check(config, run.world_size)
    capacity = remedies.usable(run.device_bytes) if run.device.type == "cuda" else math.inf
    config = remedies.with_layers_chosen(config, run.world_size, strategy_for(run.ranks_of_a_machine), capacity)
    try:
        found = measured(config, run, is_deterministic, timelines and timelines / f"{name}.json")
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    release(run.device)
    return {"variant": name} | expected(config, run) | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="of train.py")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    parser.add_argument("--deterministic", action="store_true", help="attention adds in one order")
    parser.add_argument("--output", type=Path, help="file for the rows as JSON")
    parser.add_argument("--timeline", type=Path, metavar="FOLDER", help="profile one more step of each variant")
    arguments = parser.parse_args()
    names = arguments.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        sys.exit(f"bench_memory: variants {', '.join(unknown)}: must be of {', '.join(VARIANTS)}")
    run = runtime.start(600)
    try:
        rows = [row(name, arguments.words, run, arguments.deterministic, arguments.timeline) for name in names]
    except UserError as error:
        sys.exit(f"bench_memory: {error}")
    if run.is_main:
        about = benchmarking.setting(run.device) | {"gpus": run.world_size, "words": " ".join(arguments.words)}
        print("  ".join(f"{name} {value}" for name, value in about.items()))
        columns = ["variant", "GiB expected", "GiB", "ms expected", "ms", "bits"]
        print(benchmarking.table(rows, columns + ["idle ms", "idle, copying ms"] * bool(arguments.timeline)))
        if arguments.output:
            arguments.output.write_text(json.dumps({"setting": about, "rows": rows}, indent=1) + "\n")
    runtime.stop()


if __name__ == "__main__":
    main()
