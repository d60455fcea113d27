"""`report.html`: what a run was, the figures that count, its curves, and everything else folded."""

from __future__ import annotations

import html
import math
import time
from pathlib import Path
from typing import Any

import yaml

from longctx.metric_names import metric_of, octaves
from longctx.metrics_file import read_metrics
from longctx.page import Chart, charts, figures, folded, page, smoothed, table
from longctx.run_record import read_record
from longctx.step_time import in_words
from longctx.summary import summary

Rows = list[dict[str, float]]
NOT_FINITE = "not finite"
PARTS_OF_A_STEP = {  # by what a stack of shares calls them; what is left of the step is `other`
    "data": "time/data_s", "forward": "time/forward_s", "backward": "time/backward_s", "optimizer": "time/optimizer_s",
}  # fmt: skip


def write_report(folder: Path, samples: list[str]) -> Path:
    """Draws what a run's folder holds; returns the page's path. What was never logged is left out."""
    record, rows = read_record(folder), read_metrics(folder / "metrics.jsonl")
    traces = sorted(folder.glob("trace_step_*.json.gz"))
    body = [
        _what_it_was(record),
        figures(figures_that_count(rows, record)),
        _links(record, traces),
        charts(_charts(rows, record)),
        *(["<h2>Samples</h2>", *(f"<pre>{html.escape(sample)}</pre>" for sample in samples)] if samples else []),
        folded("Configuration", f"<pre>{html.escape(yaml.safe_dump(record.get('configuration', {})))}</pre>"),
        folded("Last value of every metric", _last_values(rows)),
    ]
    path = folder / "report.html"
    path.write_text(page(str(record.get("name", folder.name)), "\n".join(body)), encoding="utf-8")
    return path


def _what_it_was(record: dict[str, Any]) -> str:
    """Four lines: the model, the data, the machines, and when it ran."""
    facts, configuration = record.get("facts"), record.get("configuration")
    if not facts or not configuration:
        return ""
    model, data = configuration["model"], configuration["data"]
    axes = " x ".join(f"{axis} {size}" for axis, size in facts["layout"].items() if size > 1) or "one rank"
    context = "" if facts["strategy"] == "none" else f", {facts['strategy']} by {facts['transport']}"
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["started_at"]))
    commit = f"commit {facts['commit']}, " if facts["commit"] else ""
    lines = (
        f"{facts['parameters'] / 1e6:,.1f}M parameters: {model['layers']} layers of width {model['width']}, "
        f"{model['heads']} heads of {model['head_dim']} ({model['kv_heads']} for keys and values)",
        f"{facts['data']}; {facts['tokens_per_step']:,} tokens a step in sequences of {data['sequence_length']:,}",
        f"{facts['ranks']} x {facts['device']} on {_count(facts['machines'], 'machine')}, {axes}{context}; "
        f"attention: {facts['attention']}",
        f"{commit}torch {facts['versions']['torch']}, started {started}; {record['ended']}",
    )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def speed_of(record: dict[str, Any]) -> tuple[str, str]:
    """The measure of speed that is meant, and its unit: a GPU's; on CPUs, which ranks share, that of all ranks."""
    is_gpu = record.get("facts", {}).get("device", "CPU") != "CPU"
    return ("tokens_per_s_per_gpu", "tokens/s a GPU") if is_gpu else ("tokens_per_s", "tokens/s")


def figures_that_count(rows: Rows, record: dict[str, Any]) -> list[tuple[str, str]]:
    """What is asked for first, each with its unit, out of `summary.summary`."""
    found, (speed, unit) = summary(rows), speed_of(record)
    shown: list[tuple[str, str, Any]] = [
        ("best validation loss", "best/loss_val", lambda x: f"{x:.4f} (step {found['best/step']:,.0f})"),
        ("last validation loss", "last/loss_val", lambda x: f"{x:.4f} nats a token"),
        ("bits a byte", "last/bits_per_byte", lambda x: f"{x:.4f}"),
        ("mean speed", f"mean/{speed}", lambda x: f"{x:,.0f} {unit}"),
        ("MFU", "mean/mfu", lambda x: f"{100 * x:.1f} %"),
        ("peak memory", "peak/mem_alloc_gib", lambda x: f"{x:.1f} GiB"),
        ("tokens", "last/tokens", lambda x: f"{x:,.0f}"),
        (next(iter(costs_of(record))), "last/device_s", lambda x: f"{x:,.0f}"),
        ("PFLOP", "last/pflop", lambda x: f"{x:,.3g}"),
        ("ETTR", "last/ettr", lambda x: f"{100 * x:.1f} %"),
        ("skipped steps", "last/skipped_steps", lambda x: f"{x:.0f}"),
    ]
    lines = [
        (name, words(found[key]) if math.isfinite(found[key]) else NOT_FINITE)
        for name, key, words in shown
        if key in found
    ]
    if record.get("ended_at"):
        lines.append(("this start took", in_words(record["ended_at"] - record["started_at"])))
    return lines


def _links(record: dict[str, Any], traces: list[Path]) -> str:
    names = {trace.name: trace.name.split(".")[0].removeprefix("trace_") for trace in traces}
    links = [f'<a href="{file}">timeline of {name}</a>' for file, name in names.items()]
    where = html.escape(str(record.get("wandb", "")))
    if where:
        links.insert(0, f'<a href="{where}">W&amp;B</a>' if where.startswith("http") else f"W&amp;B: {where}")
    return f'<p class="faint">{" · ".join(links)}</p>' if links else ""


# the curves -----------------------------------------------------------------------------------------------------------


def series(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    """The finite values of two metrics in the lines that have both."""
    pairs = [(row.get(x, math.nan), row.get(y, math.nan)) for row in rows]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _charts(rows: Rows, record: dict[str, Any]) -> list[Chart]:
    speed, unit = speed_of(record)
    mfu = [("MFU", "perf/mfu"), ("as others print it", "perf/mfu_palm")]
    rates = [("AdamW", "optim/lr"), ("Muon", "optim/muon_lr")]
    return [
        _loss(rows),
        *(_quality_for_cost(rows, cost, key) for cost, key in costs_of(record).items()),
        _by_octave(
            rows, "loss/pos/", "Validation loss by position", "nats a token", "tokens of the document before it",
            "A curve that goes on falling to the right: the model uses what stands far before.",
        ),
        _by_octave(
            rows, "recall/", "Recall by distance", "share recalled", "tokens back",
            "How often a token is known that can be read off so many tokens before.",
        ),
        _where_a_step_goes(rows),
        _over_steps(
            rows, "Throughput", unit, [("speed", f"perf/{speed}")],
            "Faint: each line that was logged; strong: the mean of the last ones.",
        ),
        _over_steps(
            rows, "Model FLOPs utilisation", "share of the peak", mfu,
            "The FLOPs that the model needs, causal and within documents, over what the GPUs could do.",
        ),
        _memory(rows, record),
        _over_steps(
            rows, "Gradient norm", "before clipping", [("norm", "optim/grad_norm")],
            "A peak is an unusual batch; growth is trouble.",
        ),
        _over_steps(rows, "Learning rate", "rate", rates, "As scheduled."),
    ]  # fmt: skip


def _loss(rows: Rows) -> Chart:
    sentence = "Over tokens read. Faint: each line that was logged; strong: the mean of the last ones."
    chart = Chart("Loss", sentence, "tokens", "nats a token")
    tokens, loss = series(rows, "data/tokens", "loss/train")
    chart.faint(tokens, loss, color="C0")
    chart.line("training", tokens, smoothed(loss), color="C0")
    chart.line("validation", *series(rows, "data/tokens", "loss/val"), color="C1", marker="o", markersize=3)
    return chart


def costs_of(record: dict[str, Any]) -> dict[str, str]:
    """The metrics of what a run has cost so far, by their unit."""
    is_gpu = record.get("facts", {}).get("device", "CPU") != "CPU"
    return {"GPU-seconds" if is_gpu else "process-seconds": "run/device_s", "PFLOP": "run/pflop"}


def quality_of(rows: Rows) -> tuple[str, str]:
    """The measure of quality that does not depend on the tokenizer, and its unit; without bytes of text, the loss."""
    is_text = any("loss/val_bits_per_byte" in row for row in rows)
    return ("loss/val_bits_per_byte", "bits a byte") if is_text else ("loss/val", "nats a token")


def _quality_for_cost(rows: Rows, cost: str, key: str) -> Chart:
    quality, unit = quality_of(rows)
    chart = Chart(f"Quality for {cost}", "Of each validation; steps alone, without validations and saves.", cost, unit)
    chart.line("validation", *series(rows, key, quality), color="C1", marker="o", markersize=3)
    return chart


def _by_octave(rows: Rows, prefix: str, title: str, y: str, x: str, sentence: str) -> Chart:
    chart = Chart(title, sentence, x, y, is_log=True)
    for row in [row for row in rows if octaves(row, prefix)][-4:]:
        found = octaves(row, prefix)
        at = sorted(found)
        chart.line(f"step {row['step']:.0f}", at, [found[k] for k in at], marker="o", markersize=3)
    if y.startswith("share"):
        chart.limit(-0.02, 1.02)
    return chart


def _where_a_step_goes(rows: Rows) -> Chart:
    steps = [row for row in rows if "time/forward_s" in row]
    passes = sum(row["time/forward_s"] + row["time/backward_s"] for row in steps)
    waits = {
        "keys and values of others": sum(row.get("time/context_exposed_s", 0.0) for row in steps),
        "FSDP's parameters": sum(row.get("time/fsdp_exposed_s", 0.0) for row in steps),
    }
    sentence = "Shares of a step's seconds on rank 0."
    if any(waits.values()):
        waited = (f"{100 * seconds / passes:.1f} % for {what}" for what, seconds in waits.items() if seconds)
        sentence += f" Forward and backward waited {' and '.join(waited)}."
    chart = Chart("Where a step goes", sentence, "step", "share")
    whole = [row["perf/step_s"] for row in steps]
    shares = {
        part: smoothed([row.get(key, 0.0) / seconds for row, seconds in zip(steps, whole, strict=True)])
        for part, key in PARTS_OF_A_STEP.items()
        if any(row.get(key) for row in steps)
    }
    if shares:
        chart.limit(0, 1)
        other = [max(0.0, 1 - sum(values)) for values in zip(*shares.values(), strict=True)]
        chart.areas([*shares, "other"], [row["step"] for row in steps], [*shares.values(), other])
    return chart


def _memory(rows: Rows, record: dict[str, Any]) -> Chart:
    chart = Chart("Memory", "The most of any rank up to the step.", "step", "GiB")
    for label, key in (("allocated", "peak_alloc"), ("reserved", "peak_reserved"), ("process", "host")):
        chart.line(label, *series(rows, "step", f"mem/{key}_gib"))
    if device := record.get("facts", {}).get("device_gib"):
        chart.level("the device's", device)
    return chart


def _over_steps(rows: Rows, title: str, unit: str, lines: list[tuple[str, str]], sentence: str) -> Chart:
    chart = Chart(title, sentence, "step", unit)
    for number, (label, key) in enumerate(lines):
        steps, values = series(rows, "step", key)
        chart.faint(steps, values, color=f"C{number}")
        chart.line(label, steps, smoothed(values), color=f"C{number}")
    return chart


def _last_values(rows: Rows) -> str:
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    lines = []
    for key, value in sorted(last.items(), key=lambda item: _by_number(item[0])):
        known = metric_of(key)
        lines.append([key, _in_full(value), known.unit if known else "", known.meaning if known else ""])
    return table(lines, ["name", "value", "unit", "meaning"])


def _by_number(name: str) -> tuple[str, int]:
    """So that `loss/pos/128` comes after `loss/pos/16`."""
    group, _, last = name.rpartition("/")
    return (group, int(last)) if last.isdecimal() else (name, 0)


def _in_full(value: float) -> str:
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"
