"""What the bench_* tools share: command line, timing by medians, and a table, JSON and a plot of what is measured."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROUND_S = 0.4  # that a figure is measured for in one of several rounds

Row = dict[str, str | float | None]


class UnservedError(Exception):
    """A contender does not serve a case, for this reason."""


class Report(NamedTuple):
    """What of the rows is shown: columns of the table, values of the plot and their unit."""

    name: str
    columns: list[str]
    values: list[str]
    unit: str


def run(
    description: str | None,
    cases: Sequence[Any],
    contenders: Iterable[str],
    divided: Callable[[Any, int], Any],
    measure: Callable[[str, Any, torch.device, torch.dtype], Row],
    report: Report,
) -> None:
    """A tool's `main`: measures what the command line asks for, prints a table, writes JSON and plot.

    Contenders are measured in turns, since a GPU at its power limit gets slower while it works.
    bfloat16 on a GPU, float32 on a CPU; `divided(case, n)` is a case n times smaller.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="those whose name has one of these in it, separated by commas")
    parser.add_argument("--contenders", default=",".join(contenders), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="contenders take turns so often; the median is shown")
    parser.add_argument("--divide", type=int, default=1, help="sizes by this, to try the tool")
    parser.add_argument(
        "--output", type=Path, default=Path(f"runs/bench_{report.name}"), help="folder of the JSON and the plot"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = arguments.contenders.split(",")
    if unknown := set(names) - set(contenders):
        sys.exit(f"contenders {', '.join(unknown)}: must be of {', '.join(contenders)}")
    if device.type == "cpu" and arguments.divide == 1:
        sys.exit(
            f"bench_{report.name}: measures GPUs, and there is none here; to try the tool make the cases small: "
            f"TRITON_INTERPRET=1 python tools/bench_{report.name}.py --divide 4096"
        )
    chosen = [divided(case, arguments.divide) for case in named(cases, arguments.cases)]
    if arguments.rounds < 1:
        sys.exit(f"--rounds {arguments.rounds}: must be 1 or more")
    if not chosen:
        there = ", ".join(case.name for case in cases)
        sys.exit(f"no case has one of {arguments.cases!r} in its name; there are {there}")
    about = setting(device) | ceilings(device)
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rows = []
    for case in chosen:
        of_rounds: dict[str, list[Row]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name, measured in of_rounds.items():
                if not any("error" in row for row in measured):
                    measured.append(measure(name, case, device, dtype))
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        for name, measured in of_rounds.items():
            rows.append({"case": case.name, "contender": name} | median_row(measured))
            print(rows[-1], flush=True)
    print(table(rows, ["case", "contender", *report.columns]))
    write(arguments.output, report.name, about, rows, report.values, report.unit)
    print(f"written to {arguments.output}")


def median_row(measured: list[Row]) -> Row:
    """The median of each figure over several rounds, of errors to float64 the largest; the reason, if one failed."""
    for row in measured:
        if "error" in row:
            return row
    found: Row = {}
    for key in measured[0]:
        values: list[Any] = [row[key] for row in measured]
        of_all = max if key == "error_to_float64" else statistics.median
        found[key] = None if None in values else of_all(values)
    return found


def named(cases: Sequence[Any], parts: str) -> list[Any]:
    """The cases whose name has one of `parts` in it, which are separated by commas."""
    return [case for case in cases if any(part in case.name for part in parts.split(","))]


def document_lengths(total: int, median: int) -> list[int]:
    """Tokens of each document of a sequence of `total`: log-normal, sigma 1, the last cut to fill it."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = int(median * torch.randn((), generator=generator).exp())
        lengths.append(min(max(drawn, 1), total - sum(lengths)))
    return lengths


def document_starts(lengths: list[int]) -> torch.Tensor:
    """(1, tokens): where each token's document begins."""
    tokens = torch.tensor(lengths)
    return (tokens.cumsum(0) - tokens).repeat_interleave(tokens).unsqueeze(0)


def median_ms(call: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float:
    """Median time of a call: on a GPU of 5 to 50 calls in some `seconds`, after three to warm up; elsewhere of one."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    for _ in range(3):
        call()
    one = _gpu_times_ms(call, 1)[0]
    repeats = max(5, min(50, int(seconds * 1e3 / max(one, 1e-3))))
    return sorted(_gpu_times_ms(call, repeats))[repeats // 2]


def _gpu_times_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Of calls that wait in the GPU's queue until all are there, so that the time to launch them does not count."""
    started = time.perf_counter()
    call()
    launching = time.perf_counter() - started
    torch.cuda.synchronize()
    pause_gpu(min(1.0, 1.5 * repeats * launching))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def pause_gpu(seconds: float) -> None:
    """About so long the GPU does nothing, while what follows comes into its queue."""
    torch.cuda._sleep(int(2e9 * seconds))  # cycles


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """Memory a call takes beyond what is there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def ceilings(device: torch.device) -> Row:
    """What the machine itself reaches in this run: bfloat16 8192^3 matmul in TFLOP/s, device copy in TB/s."""
    if device.type != "cuda":
        return {}
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {
        "matmul_tflops": 2 * 8192**3 / median_ms(lambda: a @ b, device) / 1e9,
        "copy_tb_per_s": 4 * x.numel() / median_ms(lambda: y.copy_(x), device) / 1e9,
    }


def setting(device: torch.device) -> Row:
    """Where the figures come from."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[Row], columns: list[str]) -> str:
    """The rows in Markdown; an `error` takes the place of the last figure."""

    def cell(row: Row, column: str) -> str:
        value = row.get(column)
        if column == columns[-1] and "error" in row:
            return str(row["error"])
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row, column) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(folder: Path, name: str, about: Row, rows: list[Row], values: list[str], unit: str) -> None:
    """`name`.json with all there is, and `name`.png: one panel a value, cases side by side, one bar a contender."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"setting": about, "rows": rows}, indent=1) + "\n")

    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    contenders = list(dict.fromkeys(str(row["contender"]) for row in rows))
    figure, panels = plt.subplots(len(values), 1, figsize=(1.6 + 1.6 * len(cases), 3 * len(values)), squeeze=False)
    for (panel,), value in zip(panels, values, strict=True):
        for i, contender in enumerate(contenders):
            heights = {str(row["case"]): row.get(value) for row in rows if row["contender"] == contender}
            places = [c + (i + 0.5) / (len(contenders) + 1) for c in range(len(cases))]
            panel.bar(places, [heights.get(c) or 0 for c in cases], 0.9 / (len(contenders) + 1), label=contender)
        panel.set_xticks([c + 0.45 for c in range(len(cases))], cases, rotation=12, fontsize=8)
        panel.set_ylabel(f"{value} {unit}")
    panels[0][0].legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)
