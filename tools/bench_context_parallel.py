"""Attention over a sequence that several GPUs share: all strategies beside the same work without communication.

    torchrun --nproc-per-node 8 tools/bench_context_parallel.py                       # minutes
    torchrun --nproc-per-node 8 tools/bench_context_parallel.py --cases 64k --contenders alone,ring --trace

Each strategy's results are first compared with one GPU's over the whole of a short sequence; one that is wrong ends the
run without a figure. TFLOP/s are those of one GPU: 4 x head_dim a pair of a query and a key it sees and a head forward,
2.5 x that backward, shared evenly over the GPUs, in the time of the slowest. `alone`: a rank's rows with all the keys
they see at hand, `share`: of its rate, both in turns. Times are of several calls in a row that the GPU finds queued, as
layers follow each other in training. GiB are what a forward and a backward pass hold beyond their inputs, the buffers
of the transport included.

The peers of `context_parallel_peers.py`, where they are installed, in the causal cases.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.config import Config, ParallelConfig, Strategy
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.model.attention import Attend
from longctx.parallel import transport
from longctx.parallel.context_parallel import ContextAttend, ContextParallel
from longctx.parallel.load_balance import Split, SplitMask, balanced, imbalance, in_order, zigzag
from longctx.parallel.mesh import make_mesh
from longctx.strategy import choose_strategy
from longctx.tools import benchmarking
from longctx.tools.benchmarking import Row, UnservedError
from longctx.tools.context_parallel_peers import PEERS, peer

HEAD_DIM = 128
GIB = 2.0**30
ROWS = 5
LONG_MS = 500.0  # calls that take longer are timed in two rows
PAUSE_S = 0.0125  # before a row of calls, the same on all ranks: they wait for who pauses longer


@dataclass(frozen=True)
class Case:
    """A sequence of `length` tokens, causal, or packed documents whose lengths are log-normal."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    median: int = 0  # tokens of a document; 0: one document

    @property
    def name(self) -> str:
        heads = " MHA" if self.heads == self.kv_heads else ""
        return _short(self.length) + heads + (f" documents {_short(self.median)}" if self.median else "")

    def starts(self) -> Tensor:
        """(1, length): where each token's document begins."""
        lengths = benchmarking.document_lengths(self.length, self.median) if self.median else [self.length]
        return benchmarking.document_starts(lengths)

    def work(self) -> Tensor:
        """(length,): how many keys each token sees."""
        return torch.arange(self.length) - self.starts()[0] + 1

    def split(self, size: int, contender: str = "") -> Split:
        if contender.startswith("ulysses") and not contender.startswith("ulysses_ring"):
            return in_order(self.length, size)
        return balanced(self.work(), size) if self.median else zigzag(self.length, size)


def _short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


CASES = [
    Case(1 << 16),
    Case(1 << 16, 32, 32),
    Case(1 << 18),
    Case(1 << 18, median=2048),
    Case(1 << 18, median=16384),
    Case(1 << 20),
    Case(1 << 20, median=16384),
]
PARITY = [Case(1 << 14), Case(1 << 14, median=1024)]

Mask = KeyIntervals | SplitMask
Attention = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
Call = tuple[Attention, list[Tensor], Mask]  # and q, k, v and dout of one rank
STRATEGIES = "ring", "gather", "ulysses", "ulysses_ring"
ALONE = ["alone", "alone-fa4"]
CONTENDERS = ["alone", *STRATEGIES, *(f"{name}-messages" for name in STRATEGIES), *PEERS]


@contextmanager
def contender(name: str, case: Case) -> Iterator[Attention]:
    """A strategy, by its name and possibly its transport, a peer, or no communication."""
    if name in PEERS and case.median:
        raise UnservedError("no documents")
    torch.cuda.synchronize()
    dist.barrier()
    made = peer(name) if name in PEERS else nullcontext(Attend("auto")) if name == "alone" else ours(name)
    with made as attend:
        yield attend


@contextmanager
def ours(name: str) -> Iterator[Attention]:
    """Of the product, two GPUs trade heads."""
    strategy, _, form = name.partition("-")
    size = dist.get_world_size()
    parallel = ParallelConfig(context=size, strategy=Strategy(strategy), ulysses=2)
    mesh = make_mesh(parallel, size, "cuda")
    made = ContextParallel.over(choose_strategy(Config(parallel=parallel), size), mesh, timeout_seconds=60)
    if form:
        groups = [of.group for of in made.transports]
        made.close()
        made = ContextParallel(made.choice, [transport.Messages(group) for group in groups])
    try:
        yield made.replace(Attend("auto"))
    finally:
        made.close()


def inputs(case: Case, size: int, seed: int) -> list[Tensor]:
    """q, k, v and dout of one rank."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(1, case.length // size, heads, HEAD_DIM) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    made = [torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in (*shapes, shapes[0])]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def results(attend: Attention, tensors: list[Tensor], mask: Mask) -> list[Tensor]:
    q, k, v, dout = tensors
    out = attend(q, k, v, mask)
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


def check(name: str, case: Case, rank: int, size: int) -> str:
    """Errors against one GPU's results, largest over ranks. Raises ValueError if they are not those of rounding."""
    device, split = torch.device("cuda"), case.split(size, name)
    whole = inputs(case, 1, 0)
    expected = results(Attend("auto"), whole, KeyIntervals.documents(case.starts()).to(device))
    mine = [split.shard(x.detach(), rank).contiguous().requires_grad_(x.requires_grad) for x in whole]
    with contender(name, case) as attend:
        found = results(attend, mine, split.mask(case.starts(), device))
    wanted = [split.shard(x, rank).float() for x in expected]
    errors = torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)])
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    shown = " ".join(f"{e:.1e}" for e in errors.tolist())
    if not bool((errors < 1e-2).all()):
        raise ValueError(f"{name}, {case.name}: errors of out, dq, dk, dv {shown}: no figures of what is wrong")
    return shown


def alone(case: Case, rank: int, size: int) -> Call:
    """A rank's rows and all the keys they see, without the others."""
    tensors = inputs(case, size, rank)
    if not case.median:  # the same number of pairs, in a rectangle
        keys = inputs(Case(case.length // 2, case.heads, case.kv_heads), 1, rank)[1:3]
        mask = KeyIntervals.full(case.length // size, case.length // 2)
    else:
        keys = inputs(case, 1, rank)[1:3]
        whole = KeyIntervals.documents(case.starts()).to("cuda")
        mask = whole.rows(case.split(size).held(rank).cuda())
    return Attend("auto"), [tensors[0], *keys, tensors[3]], mask


def timed(call: Callable[[], object], free: Callable[[], object], seconds: float) -> tuple[float, float]:
    """ms of a call, and its share of the rate of `free`: medians of rows of calls that take turns, as clocks vary."""
    free()
    call()
    one = _row_ms(call, 1)
    calls = max(1, min(10, int(seconds * 1e3 / ROWS / 2 / one)))
    pairs = [(_row_ms(free, calls), _row_ms(call, calls)) for _ in range(ROWS if one < LONG_MS else 2)]
    return median([mine for _, mine in pairs]), median([without / mine for without, mine in pairs])


def _row_ms(call: Callable[[], object], calls: int) -> float:
    """Of a call, on the slowest rank."""
    dist.barrier()
    torch.cuda.synchronize()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    benchmarking.pause_gpu(PAUSE_S)
    before.record()
    for _ in range(calls):
        call()
    after.record()
    torch.cuda.synchronize()
    longest = torch.tensor(before.elapsed_time(after) / calls, device="cuda")
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def passes(attend: Attention, tensors: list[Tensor], mask: Mask) -> list[Callable[[], object]]:
    """The forward pass and the backward pass, to be called many times."""
    q, k, v, dout = tensors
    out = attend(q, k, v, mask)

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v, mask)

    return [forward, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)]


def measure(name: str, case: Case, rank: int, size: int, seconds: float) -> Row:
    free = alone(case, rank, size)
    with contender(name, case) as attend:
        if name in ALONE:
            return timings(case, size, (attend, *free[1:]), free, seconds)
        mask = case.split(size, name).mask(case.starts(), torch.device("cuda"))
        return timings(case, size, (attend, inputs(case, size, rank), mask), free, seconds)


def timings(case: Case, size: int, mine: Call, free: Call, seconds: float) -> Row:
    gib = benchmarking.peak_gib(lambda: results(*mine), torch.device("cuda"))
    assert gib is not None
    if isinstance(mine[0], ContextAttend):
        gib += mine[0].context_parallel.shared_bytes() / GIB
    tflop = 4 * HEAD_DIM * case.heads * float(case.work().double().sum()) / size / 1e12
    row: Row = {"GiB": gib, "imbalance": imbalance(case.work(), case.split(size))}
    both = zip(("forward", "backward"), passes(*mine), passes(*free), (1.0, 2.5), strict=True)
    for which, call, without, factor in both:
        ms, share = timed(call, without, seconds)
        row |= {f"{which} ms": ms, which: factor * tflop / ms * 1e3, f"{which} share": share}
    return row


def trace(name: str, case: Case, rank: int, size: int, folder: Path) -> None:
    """A timeline of one forward and backward pass on rank 0, for Perfetto or chrome://tracing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, mask = inputs(case, size, rank), case.split(size, name).mask(case.starts(), torch.device("cuda"))
    with contender(name, case) as attend:
        results(attend, tensors, mask)
        dist.barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            results(attend, tensors, mask)
            torch.cuda.synchronize()
    if rank == 0:
        profile.export_chrome_trace(str(folder / f"{name}_{case.name}.json".replace(" ", "_")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="those whose name has one of these in it, separated by commas")
    parser.add_argument("--divide", type=int, default=1, help="lengths by this: 2 for the tokens a GPU of 8 on 4 GPUs")
    parser.add_argument("--contenders", default="alone,ring,gather,ulysses", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--trace", action="store_true", help="write a timeline of each strategy")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_context_parallel"), help="folder of the files")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or "RANK" not in os.environ:
        gpus = torch.cuda.device_count()
        sys.exit(
            f"bench_context_parallel: needs GPUs that share a sequence, started by torchrun, and here are {gpus} GPUs "
            f"{'without it' if 'RANK' not in os.environ else ''}: "
            "torchrun --nproc-per-node 8 tools/bench_context_parallel.py"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    names = arguments.contenders.split(",")
    if unknown := set(names) - set(CONTENDERS):
        sys.exit(f"contenders {', '.join(unknown)}: must be of {', '.join(CONTENDERS)}")
    cases = [replace(case, length=case.length // arguments.divide) for case in CASES]
    cases = benchmarking.named(cases, arguments.cases)
    about = benchmarking.setting(device) | {"gpus": size}

    def say(message: object) -> None:
        if rank == 0:
            print(message, flush=True)

    say("  ".join(f"{name} {value}" for name, value in about.items()))
    for name in [name for name in names if name not in ALONE]:
        for case in PARITY[: 1 if name in PEERS else None]:
            try:
                say(f"{name}, {case.name}: errors of out, dq, dk, dv {check(name, case, rank, size)}")
            except Exception as error:
                if name not in PEERS:
                    raise
                say(f"without {name}: {type(error).__name__}: {error}")
                names.remove(name)
    rows: list[Row] = []
    for case in cases:
        for name in names:
            row: Row = {"case": case.name, "contender": name}
            try:
                row |= measure(name, case, rank, size, arguments.seconds)
                if arguments.trace and name not in ALONE:
                    trace(name, case, rank, size, arguments.output)
            except (torch.OutOfMemoryError, UnservedError, ImportError) as error:
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            say(rows[-1])
            gc.collect()
            torch.cuda.empty_cache()
    if rank == 0:
        shown = ["forward ms", "backward ms", "forward", "backward", "forward share", "backward share", "GiB"]
        print(benchmarking.table(rows, ["case", "contender", *shown]))
        benchmarking.write(
            arguments.output, "context_parallel", about, rows, ["forward", "backward"], "TFLOP/s of a GPU"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
