"""A dashboard for the runs of a W&B project: `python tools/wandb_dashboard.py ENTITY/PROJECT`.

Makes a saved workspace with wandb-workspaces (`pip install '.[wandb]'`) and prints its address. Without a login,
or with `--output FILE`, it writes the workspace as JSON instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ImportError:
    sys.exit("wandb-workspaces is not installed: pip install '.[wandb]' in a checkout of longctx")

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longctx.wandb_log import CURVES, has_wandb_key

TOKENS, STEP, TIME = "data/tokens", "step", "_runtime"
STACKED, SMOOTHED = "pct-area", "smoothed"
PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 8, 6, 3  # of W&B's grid, 24 wide


class Line(NamedTuple):
    """Metrics over steps or tokens."""

    title: str
    metrics: list[str]
    x: str = STEP
    form: str = "line"


class Number(NamedTuple):
    """One figure a run, of its summary."""

    title: str
    metric: str


class Curve(NamedTuple):
    """A table of a validation, as a curve; by its name in `wandb_log.CURVES`."""

    title: str
    table: str


PARTS = ("data", "forward", "backward", "optimizer")  # of the time of a step
SYSTEM = "system/gpu.0."  # as W&B names what it measures of the first GPU itself

SECTIONS: dict[str, list[Line | Number | Curve]] = {
    "Head": [
        Number("Tokens/s a GPU", "mean/tokens_per_s_per_gpu"),
        Number("MFU", "mean/mfu"),
        Number("Tokens", "last/tokens"),
        Number("Best validation loss", "best/loss_val"),
        Number("at step", "best/step"),
        Line("Seconds left", ["time/left_s"]),
    ],
    "Throughput": [
        Line("Tokens/s a GPU", ["perf/tokens_per_s_per_gpu"], TOKENS),
        Line("Tokens/s in all", ["perf/tokens_per_s"], TOKENS),
        Line("MFU, causal and as others print it (PaLM)", ["perf/mfu", "perf/mfu_palm"], TOKENS),
        Line("Seconds a step, and the 95th percentile", ["perf/step_s", "perf/step_s_p95"], TOKENS),
        Line("TFLOP/s a GPU", ["perf/tflops_per_gpu"], TOKENS),
    ],
    "Where a step goes": [
        Line("Shares", [f"time/{part}_s" for part in PARTS], STEP, STACKED),
        Line(
            "Waiting within forward and backward: for keys and values of others, for parameters (FSDP)",
            ["time/context_exposed_s", "time/fsdp_exposed_s"],
        ),
        Line("Validation", ["time/validation_s"]),
    ],
    "Balance": [
        Line("Attention: most work over the mean", ["data/attention_imbalance"]),
        Line("Slowest rank over the fastest, each step", ["perf/slowest_over_fastest"]),
        Line("Slowest rank over the median, in products of a validation", ["run/slowest_over_median"]),
        Line("Which rank is slowest", ["run/slowest_rank"]),
    ],
    "Memory": [
        Line("Allocated and reserved, the largest of all ranks", ["mem/peak_alloc_gib", "mem/peak_reserved_gib"]),
        Line("Share of the device", ["mem/peak_of_device"]),
        Line("Allocator retries", ["mem/alloc_retries"]),
        Line("Transports", ["mem/transport_gib"]),
        Line("Host", ["mem/host_gib"]),
    ],
    "System": [
        Line("GPU utilisation", [f"{SYSTEM}gpu"], TIME),
        Line("Power", [f"{SYSTEM}powerWatts"], TIME),
        Line("Joules a token", ["perf/joules_per_token"]),
        Line("Temperature", [f"{SYSTEM}temp"], TIME),
    ],
    "Goodput": [
        Line("Effective training time ratio", ["run/ettr"]),
        Line("Restarts, lost and skipped steps", ["run/restarts", "run/lost_steps", "optim/skipped_steps"]),
        Line("Seconds of saves", ["checkpoint/save_s", "time/checkpoint_stall_s"]),
        Line("GiB/s of saves", ["checkpoint/gib_per_s"]),
    ],
    "Learning": [
        Line("Loss", ["loss/train", "loss/val"], TOKENS),
        Line("Bits a byte", ["loss/val_bits_per_byte"], TOKENS),
        Line("Bits a byte for GPU-seconds", ["loss/val_bits_per_byte"], "run/device_s"),
        Line("Bits a byte for PFLOP", ["loss/val_bits_per_byte"], "run/pflop"),
        Line("Loss over the process's time", ["loss/train"], TIME),
        Line("Gradient norm", ["optim/grad_norm"], TOKENS),
        Line("Share of clipped steps", ["optim/clipped"], TOKENS, SMOOTHED),
        Line("Learning rates", ["optim/lr", "optim/muon_lr"], TOKENS),
    ],
    "Long context": [
        *(Curve(title, name) for name, title, _x, _y in CURVES.values()),
        Line("Last octave minus 1k: below 0, a long context helps", ["loss/last_octave_minus_1k"], TOKENS),
        Line("Span of attention", ["data/span"], TOKENS),
    ],
}  # fmt: skip


def workspace(entity: str, project: str) -> ws.Workspace:
    """The dashboard of a project."""
    sections = [
        ws.Section(
            name=name, is_open=True, panels=[_panel(panel, place) for place, panel in enumerate(panels)],
            layout_settings=ws.SectionLayoutSettings(columns=COLUMNS, rows=-(-len(panels) // COLUMNS)),
        )
        for name, panels in SECTIONS.items()
    ]  # fmt: skip
    return ws.Workspace(entity=entity, project=project, name="longctx", sections=sections, auto_generate_panels=False)


def _panel(panel: Line | Number | Curve, place: int) -> wr.LinePlot | wr.ScalarChart | wr.CustomChart:
    layout = wr.Layout(
        x=place % COLUMNS * PANEL_WIDTH, y=place // COLUMNS * PANEL_HEIGHT, w=PANEL_WIDTH, h=PANEL_HEIGHT
    )
    if isinstance(panel, Number):
        return wr.ScalarChart(title=panel.title, metric=wr.SummaryMetric(panel.metric), layout=layout)
    if isinstance(panel, Curve):
        _name, _title, x, y = next(curve for curve in CURVES.values() if curve[0] == panel.table)
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{panel.table}_table"}}, chart_name="wandb/line/v0",
            chart_fields={"x": x, "y": y}, chart_strings={"title": panel.title}, layout=layout,
        )  # fmt: skip
    line: dict[str, Any] = {"title": panel.title, "x": panel.x, "y": panel.metrics, "layout": layout}
    if panel.form == SMOOTHED:
        return wr.LinePlot(**line, smoothing_type="average", smoothing_factor=50)
    return wr.LinePlot(**line, plot_type="pct-area" if panel.form == STACKED else "line")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="as in the address of the project's page")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of saving the workspace")
    given = parser.parse_args()
    entity, slash, project = given.project.partition("/")
    if not slash or not entity or not project or "/" in project:
        parser.error(f"{given.project}: is not ENTITY/PROJECT; give both, as in https://wandb.ai/ENTITY/PROJECT")
    made = workspace(entity, project)
    if given.output is None and has_wandb_key():
        made.save()
        print(f"saved: {made.url}")
        return
    output = given.output or Path("wandb_dashboard.json")
    view = made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    output.write_text(json.dumps(view, indent=1) + "\n")
    reason = "" if given.output else "no login of W&B (`wandb login`), so it is not saved there; "
    print(f"{reason}written: {output}")


if __name__ == "__main__":
    main()
