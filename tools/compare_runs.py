"""Compares runs: `python tools/compare_runs.py runs/a runs/b ...` (folders, or patterns such as 'runs/lr-*').

Writes one page with their curves over each other, and prints what differs in configuration and results, speed and loss
relative to the first. `--assert-equal` fails if the training losses differ, as those of two layouts must not.
"""

from __future__ import annotations

import argparse
import glob
import html
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longctx.metric_names import octaves
from longctx.metrics_file import read_metrics
from longctx.page import Chart, charts, page, smoothed, table
from longctx.report import NOT_FINITE, costs_of, quality_of, series, speed_of
from longctx.run_record import read_record
from longctx.summary import summary

RESULTS = {  # by their name in `summary`: what they are called, how they are written
    "best/loss_val": ("best validation loss", "{:.4f}"), "best/step": ("at step", "{:,.0f}"),
    "last/loss_val": ("last validation loss", "{:.4f}"), "last/bits_per_byte": ("bits a byte", "{:.4f}"),
    "mean/tokens_per_s": ("tokens/s", "{:,.0f}"), "mean/tokens_per_s_per_gpu": ("tokens/s a rank", "{:,.0f}"),
    "mean/mfu": ("MFU", "{:.1%}"), "mean/step_s": ("seconds a step", "{:.4g}"),
    "peak/mem_alloc_gib": ("peak memory, GiB", "{:.2f}"), "last/tokens": ("tokens", "{:,.0f}"),
    "last/device_s": ("seconds times ranks", "{:,.0f}"), "last/pflop": ("PFLOP", "{:,.4g}"),
    "last/ettr": ("ETTR", "{:.1%}"), "last/skipped_steps": ("skipped steps", "{:.0f}"),
}  # fmt: skip
RELATIVE = ("mean/tokens_per_s", "mean/tokens_per_s_per_gpu", "last/loss_val")  # also told as a ratio to the first run
WIDEST = 60  # letters of a cell that is printed
NO_DIFFERENCE = ("name", "folder")  # of a configuration: which run it is


class Run(NamedTuple):
    """What a run's folder holds."""

    name: str
    record: dict[str, Any]
    rows: list[dict[str, float]]
    figures: dict[str, float]


def open_runs(patterns: list[str]) -> list[Run]:
    """The runs of folders and patterns, in that order. Raises SystemExit where there is none, and of fewer than two."""
    folders: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_dir() else sorted(glob.glob(pattern))
        found = [Path(path) for path in matches if (Path(path) / "metrics.jsonl").is_file()]
        if not found:
            sys.exit(f"{pattern}: no folder of a run (with a metrics.jsonl); give runs/NAME, or a pattern in quotes")
        known = {folder.resolve() for folder in folders}
        folders += [folder for folder in found if folder.resolve() not in known]
    if len(folders) < 2:
        sys.exit(f"{folders[0]}: is one run; give another to compare it with")
    runs = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        rows = read_metrics(folder / "metrics.jsonl")
        runs.append(Run(name, read_record(folder), rows, summary(rows)))
    return runs


def names_of(folders: list[Path]) -> list[str]:
    """Each by its last part, and as many before that as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next(n for n in range(1, len(mine) + 1) if all(other[-n:] != mine[-n:] for other in others))
        names.append("/".join(mine[-length:]))
    return names


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by dotted keys, as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def differences(runs: list[Run]) -> list[list[str]]:
    """A row for each key of configuration and facts whose values are not all the same."""
    of_runs = [
        flat(run.record.get("configuration", {})) | flat(run.record.get("facts", {}), "run.")
        for run in runs
    ]  # fmt: skip
    keys = sorted({key for values in of_runs for key in values} - set(NO_DIFFERENCE))
    rows = [[key, *(values.get(key, "") for values in of_runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def results(runs: list[Run]) -> list[list[str]]:
    """A row for each figure, and one for its ratio to the first run's where that tells something."""
    rows = []
    for key, (name, form) in RESULTS.items():
        found = [run.figures.get(key) for run in runs]
        if all(value is None for value in found):
            continue
        rows.append([name, *("" if x is None else form.format(x) if math.isfinite(x) else NOT_FINITE for x in found)])
        if key in RELATIVE:
            values = [math.nan if value is None else value for value in found]
            ratios = [value / values[0] if values[0] else math.nan for value in values]
            rows.append(["  relative to the first", *(f"{x:.3f}" if math.isfinite(x) else "" for x in ratios)])
    rows.append(["ended", *(str(run.record.get("ended", "")) for run in runs)])
    return rows


def curves(runs: list[Run]) -> list[Chart]:
    """Of all runs over each other."""
    speed, unit = speed_of(runs[0].record)
    costs, (quality, bits) = costs_of(runs[0].record), quality_of(runs[0].rows)
    places_of = {"tokens": "data/tokens", "step": "step", **costs}
    made = []
    for title, x, y, key, is_smoothed in (
        ("Training loss", "tokens", "nats a token", "loss/train", True),
        ("Validation loss", "tokens", "nats a token", "loss/val", False),
        *((f"Quality for {cost}", cost, bits, quality, False) for cost in costs),
        ("Throughput", "step", unit, f"perf/{speed}", True),
        ("Memory", "step", "GiB", "mem/peak_alloc_gib", False),
        ("Gradient norm", "step", "before clipping", "optim/grad_norm", True),
    ):
        chart = Chart(title, "The mean of the last steps." if is_smoothed else "", x, y)
        for number, run in enumerate(runs):
            places, values = series(run.rows, places_of[x], key)
            marks = {} if is_smoothed or key.startswith("mem/") else {"marker": "o", "markersize": 3}
            chart.line(run.name, places, smoothed(values) if is_smoothed else values, **looks(number), **marks)
        made.append(chart)
    for title, x, y, prefix in (
        ("Validation loss by position", "tokens of the document before it", "nats a token", "loss/pos/"),
        ("Recall by distance", "tokens back", "share recalled", "recall/"),
    ):
        chart = Chart(title, "Of each run's last validation.", x, y, is_log=True)
        if prefix == "recall/":
            chart.limit(-0.02, 1.02)
        for number, run in enumerate(runs):
            last = next((octaves(row, prefix) for row in reversed(run.rows) if octaves(row, prefix)), {})
            values = [last[at] for at in sorted(last)]
            chart.line(run.name, sorted(last), values, marker="o", markersize=3, **looks(number))
        made.append(chart)
    return made


def looks(number: int) -> dict[str, str]:
    """Of a run's lines in all pictures: ten colours, then the same ones dashed."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def unequal(runs: list[Run], tolerance: float) -> str | None:
    """The first step whose training loss is not that of the first run, up to a relative `tolerance`; None: all are.

    Of the steps that both have logged: one that was stopped has logged its last one too. Runs that end elsewhere are
    not equal, nor are those of which no loss is known.
    """
    first, *others = ({row["step"]: row["loss/train"] for row in run.rows if "loss/train" in row} for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        ends = [max(losses, default=0) for losses in (first, other)]
        if ends[0] != ends[1]:
            return f"{runs[0].name} ends at step {ends[0]:.0f}, {run.name} at step {ends[1]:.0f}; both must end alike"
        if not any(map(math.isfinite, first.values())):
            return f"{runs[0].name} and {run.name}: no step has a training loss that is finite, so none was compared"
        for step in sorted(first.keys() & other.keys()):
            loss = first[step]
            are_unknown = math.isnan(loss) and math.isnan(other[step])  # steps that were skipped
            if not math.isclose(loss, other[step], rel_tol=tolerance) and not are_unknown:
                return (
                    f"step {step:.0f}: {runs[0].name} has loss {loss!r}, {run.name} {other[step]!r}, "
                    f"{abs(other[step] - loss) / abs(loss or 1):.1e} apart; --tolerance is {tolerance:g}"
                )
    return None


def printed(rows: list[list[str]], head: list[str]) -> str:
    """A table for the console; what is long is cut in its middle: names of a sweep differ at their ends."""
    half = (WIDEST - 3) // 2
    lines = [
        [cell if len(cell) <= WIDEST else f"{cell[:half]}...{cell[-half:]}" for cell in row] for row in [head, *rows]
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a pattern in quotes")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="the page (%(default)s)")
    parser.add_argument("--assert-equal", action="store_true", help="fail if the training losses differ")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, of --assert-equal (%(default)s)")
    given = parser.parse_args()
    runs = open_runs(given.runs)
    head = ["", *(run.name for run in runs)]
    rows, changed = results(runs), differences(runs)
    print(printed(rows, head))
    if changed:
        print(f"\nwhat differs:\n{printed(changed, head)}")
    title = f"{runs[0].name} and {len(runs) - 1} more" if len(runs) > 2 else f"{runs[0].name} and {runs[1].name}"
    body = [
        table(rows, head), charts(curves(runs)), f"<h2>{html.escape('What differs')}</h2>", table(changed, head),
    ]  # fmt: skip
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(page(title, "\n".join(body)), encoding="utf-8")
    print(f"\npage: {given.output}")
    if given.assert_equal and (problem := unequal(runs, given.tolerance)):
        sys.exit(f"not equal: {problem}")


if __name__ == "__main__":
    main()
