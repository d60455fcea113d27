"""The rates of a GPU that the planner counts with, measured in about a minute, and the file that keeps them.

    python tools/bench_rates.py            # prints them
    python tools/bench_rates.py --write    # and writes longctx/rates/NAME.json

Attention by head dim, products and copies are timed alone. What a training step takes beside them is fitted to steps of
several models and lengths: the share of the products' rate that products in a step reach, what other kernels need a
token, and what traffic a parameter makes beside the products, in FSDP2's copies, the norm and the update. A step of
hardly any tokens says how long a layer takes to launch, below which no step comes. Nothing else should run on the
machine. Each step is printed with the seconds that the rates give it; rates that cannot be, or a step that is off by
more than a tenth, end the tool without a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from longctx import plan, runtime, step_time
from longctx.config import Config
from longctx.host_memory import HostCopies, host_tensor
from longctx.runtime import Runtime
from longctx.throughput import peak_tflops
from longctx.tools import bench_attention, bench_memory, benchmarking
from longctx.tools.plan import composed

ATTENTION = {"64": "32k causal d64", "128": "32k causal d128", "256": "16k causal d256"}  # cases of bench_attention
EAGER = ["optim=adamw", "parallel.compile=false"]


def sequences(count: int, length: int) -> list[str]:
    """A step of so many sequences at once."""
    names = "data.sequences_per_step", "data.sequences_per_micro_batch"
    return [f"data.sequence_length={length}", *(f"{name}={count}" for name in names)]


# short sequences where a model is small: a share of a long one's attention would be more than all else
STEPS = {
    "4 layers of the 8B, 32k": ["recipe=llama3_8b_128k", "model.layers=4", *sequences(1, 32768)],
    "4 layers of the 8B, 8k": ["recipe=llama3_8b_128k", "model.layers=4", *sequences(1, 8192)],
    "one layer of the 8B, 16k": ["recipe=llama3_8b_128k", "model.layers=1", *sequences(1, 16384)],
    "gpt_91m, 8 of 16k": ["recipe=gpt_32k", *sequences(8, 16384)],
    "gpt_91m, 32 of 4k": ["recipe=gpt_32k", *sequences(32, 4096)],
}
MOST_OFF = 0.1  # of a step's seconds
LAUNCHES = ["recipe=gpt_32k", *sequences(1, 1024)]
FITTED = ("share_of_product_tflops", "other_kernels_us_a_token_of_width_4096", "update_bytes_a_parameter")
HOST_BYTES = 1 << 31


class Step(NamedTuple):
    """A training step: what it took, and what it would take by rates of which the fitted ones are 1.

    `unit`: products at their full rate, other kernels at 1 us, weights at 1 byte a parameter.
    """

    name: str
    seconds: float
    attention: float
    unit: tuple[float, float, float]

    def expected(self, fitted: dict[str, float]) -> float:
        share, others, update = (fitted[name] for name in FITTED)
        return self.attention + self.unit[0] / share + self.unit[1] * others + self.unit[2] * update


def fit(steps: list[Step]) -> dict[str, float]:
    """The rates with which steps take what they took, in the sense of least squares of relative errors."""
    weights = torch.tensor([1 / step.seconds for step in steps], dtype=torch.float64)
    units = torch.tensor([step.unit for step in steps], dtype=torch.float64) * weights.unsqueeze(1)
    rest = torch.tensor([step.seconds - step.attention for step in steps], dtype=torch.float64) * weights
    inverse_share, others, update = torch.linalg.lstsq(units, rest.unsqueeze(1)).solution.flatten().tolist()
    return dict(zip(FITTED, (1 / inverse_share, others, update), strict=True))


def unlikely(steps: list[Step], fitted: dict[str, float]) -> str | None:
    """What speaks against rates that were fitted to steps, if anything does."""
    for name in FITTED:
        if fitted[name] <= 0 or (name == FITTED[0] and fitted[name] > 1):
            return f"the fit gives {name} {fitted[name]:.3g}"
    off = {step.name: step.expected(fitted) / step.seconds - 1 for step in steps}
    worst = max(off, key=lambda name: abs(off[name]))
    return f"{worst} is off by {off[worst]:+.0%}" if abs(off[worst]) > MOST_OFF else None


def number(row: benchmarking.Row, name: str) -> float:
    """A figure of a row. Exits with the row's error where it has none."""
    value = row.get(name)
    if not isinstance(value, float):
        sys.exit(f"bench_rates: {name}: {row.get('error', 'was not measured')}")
    return value


def alone(device: torch.device) -> dict[str, Any]:
    """The rates of what is timed alone."""
    attention, implementation = {}, "hopper" if torch.cuda.get_device_capability(device) == (9, 0) else "triton"
    for width, part in ATTENTION.items():
        [case] = [case for case in bench_attention.CASES if part in case.name]
        row = bench_attention.measure(implementation, case, device, torch.bfloat16)
        attention[width] = {name: round(number(row, f"{name}_tflops")) for name in ("forward", "backward")}
    ceilings = benchmarking.ceilings(device)
    return {
        "attention_tflops": attention,
        "product_tflops": round(number(ceilings, "matmul_tflops")),
        "memory_tb_per_s": round(number(ceilings, "copy_tb_per_s"), 2),
        "host_gb_per_s": round(host_gb_per_s(device), 1),
    }


def host_gb_per_s(device: torch.device) -> float:
    """GB/s of copies to page-locked memory while as much comes back."""
    numbers = HOST_BYTES // 2
    on_host = [host_tensor([numbers], torch.bfloat16, device) for _ in range(2)]
    here = [torch.zeros(numbers, dtype=torch.bfloat16, device=device) for _ in range(2)]
    copies = HostCopies(device)

    def both() -> None:
        for event in (copies.to_host(here[0], on_host[0]), copies.to_device(on_host[1], here[1])):
            copies.wait(event)

    return HOST_BYTES / benchmarking.median_ms(both, device) / 1e6


def seconds_of_a_step(config: Config, run: Runtime) -> float:
    """Of training on one GPU."""
    found = number(bench_memory.measured(config, run, is_deterministic=False), "ms") / 1000
    bench_memory.release(run.device)
    return found


def timed(name: str, config: Config, run: Runtime, rates: dict[str, Any]) -> Step:
    """A training step of this configuration."""
    parts = step_time.seconds(config, 1, rates | dict.fromkeys(FITTED, 1.0) | {"launches_ms_a_layer": 0.0})
    unit = parts["products"], parts["other kernels"], parts["weights"]
    return Step(name, seconds_of_a_step(config, run), parts["attention"], unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the file that the planner reads")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_rates: measures a GPU, and there is none here; start it on a machine with the one to plan for")
    run = runtime.start(600)
    about, peak = benchmarking.setting(run.device), peak_tflops(run.device_name, None)
    if peak is None:
        sys.exit(f"bench_rates: no peak of {run.device_name} in PEAK_TFLOPS of longctx/throughput.py; add it there")
    rates = {
        "gpu": run.device_name,
        "gib": round(run.device_bytes / plan.GIB, 1),
        "peak_tflops": peak,
        **alone(run.device),
    }
    steps = [timed(name, composed([*words, *EAGER]), run, rates) for name, words in STEPS.items()]
    rates |= {name: round(value, 3) for name, value in fit(steps).items()}
    short = composed([*LAUNCHES, *EAGER])
    rates["launches_ms_a_layer"] = round(1000 * seconds_of_a_step(short, run) / short.model.layers, 2)
    rates["provenance"] = (
        f"one {run.device_name}, torch {about['torch']}, triton {about['triton']}, bfloat16, {about['date']}, commit "
        f"{about['commit']}, by tools/bench_rates.py"
    )
    rates["assumed"] = []
    rows = [{"step": s.name, "s": s.seconds, "s expected": s.expected(rates), "attention": s.attention} for s in steps]
    print(benchmarking.table(rows, ["step", "s", "s expected", "attention"]))
    text = json.dumps(rates, indent=2)
    print(text)
    if why := unlikely(steps, rates):
        sys.exit(f"bench_rates: {why}; run it again while nothing else uses the machine")
    if arguments.write:
        name = run.device_name.removeprefix("NVIDIA ").lower().replace(" ", "_")
        (step_time.RATES / f"{name}.json").write_text(text + "\n")
    runtime.stop()


if __name__ == "__main__":
    main()
