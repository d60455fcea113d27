"""`report.html`: one self-contained page with the curves of a run."""

from __future__ import annotations

import html
import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longctx.metrics import read_metrics

mpl.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}}
svg{{width:100%;height:auto}} table{{border-collapse:collapse}} td,th{{padding:.2em .8em;text-align:left}}
tr:nth-child(even){{background:#f3f3f3}} pre{{background:#f6f6f6;padding:1em;overflow:auto}}</style>
<h1>{title}</h1><h2>At the end</h2>{table}{figures}{samples}
<details><summary>Configuration</summary><pre>{configuration}</pre></details></html>
"""


def write_report(folder: Path, name: str, configuration: str, samples: list[str]) -> Path:
    """Draws `metrics.jsonl` of a run folder; returns the page's path. Values that were never logged are left out."""
    by_step: dict[float, dict[str, float]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):  # training and validation of a step are lines of their own
        by_step[row["step"]] = by_step.get(row["step"], {}) | row
    rows = list(by_step.values())
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    figures = [
        _figure("Loss over tokens", lambda axes: _loss(axes, rows), any("loss/train" in r for r in rows)),
        *(
            _figure(
                title, lambda axes, of=(key, x, y): _by_octave(axes, rows, *of), any(_octaves(r, key) for r in rows)
            )
            for title, key, x, y in (
                (
                    "Validation loss by position",
                    "loss/pos/",
                    "tokens of the document before the target",
                    "nats a token",
                ),
                ("Recall by distance", "recall/", "tokens back to where it can be read off", "share recalled"),
            )
        ),
        *(
            _figure(title, lambda axes, key=key, unit=unit: _over_steps(axes, rows, key, unit), key in last)
            for title, key, unit in (
                ("Throughput", "perf/tokens_per_s_per_gpu", "tokens/s a GPU"),
                ("Model FLOPs utilisation", "perf/mfu", "share of the peak"),
                ("Memory", "mem/peak_alloc_gib", "GiB"),
                ("Gradient norm", "optim/grad_norm", "before clipping"),
                ("Learning rate", "optim/lr", ""),
            )
        ),
    ]
    path = folder / "report.html"
    path.write_text(
        PAGE.format(
            title=html.escape(name),
            table=_table(last),
            figures="".join(figures),
            samples="".join(
                ["<h2>Samples</h2>", *(f"<pre>{html.escape(s)}</pre>" for s in samples)] if samples else []
            ),
            configuration=html.escape(configuration),
        )
    )
    return path


def _figure(title: str, draw, has_data: bool) -> str:
    if not has_data:
        return ""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    draw(figure.subplots())
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    svg = image.getvalue()
    return f"<h2>{html.escape(title)}</h2>{svg[svg.index('<svg') :]}"


def _series(rows: list[dict[str, float]], x: str, y: str) -> tuple[list[float], list[float]]:
    pairs = [(row[x], row[y]) for row in rows if x in row and y in row]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _loss(axes: Axes, rows: list[dict[str, float]]) -> None:
    axes.plot(*_series(rows, "data/tokens", "loss/train"), linewidth=0.8, label="training")
    axes.plot(*_series(rows, "data/tokens", "loss/val"), marker="o", markersize=3, label="validation")
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats a token")
    axes.legend()


def _octaves(row: dict[str, float], prefix: str) -> list[tuple[int, float]]:
    return [(int(key.removeprefix(prefix)), value) for key, value in row.items() if key.startswith(prefix)]


def _by_octave(axes: Axes, rows: list[dict[str, float]], prefix: str, x: str, y: str) -> None:
    validations = [row for row in rows if _octaves(row, prefix)]
    for row in validations[-4:]:
        axes.plot(*zip(*_octaves(row, prefix), strict=True), marker="o", markersize=3, label=f"step {row['step']}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()


def _over_steps(axes: Axes, rows: list[dict[str, float]], key: str, unit: str) -> None:
    axes.plot(*_series(rows, "step", key), linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)


def _table(last: dict[str, float]) -> str:
    cells = (f"<tr><td>{html.escape(key)}</td><td>{value:,.6g}</td></tr>" for key, value in sorted(last.items()))
    return f"<table>{''.join(cells)}</table>"
