"""`report.html`: what it says, and how a browser shows it, where there is one."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from matplotlib.axes import Axes

from longctx.page import POINTS, Chart, page, short, smoothed, thinned, with_peaks
from longctx.report import figures_that_count, write_report
from longctx.summary import summary

RECORD = {
    "name": "long <run>", "started_at": 1.79e9, "ended_at": 1.79e9 + 7300, "ended": "stopped by SIGTERM",
    "wandb": "https://wandb.ai/somebody/longctx/runs/1",
    "configuration": {
        "model": {"layers": 12, "width": 768, "heads": 6, "kv_heads": 2, "head_dim": 128},
        "data": {"sequence_length": 32768},
    },
    "facts": {
        "parameters": 124.4e6, "data": "builtin (0a1b)", "tokens_per_step": 262144, "ranks": 2, "machines": 1,
        "device": "NVIDIA H200", "layout": {"replicate": 1, "shard": 1, "context": 2, "tensor": 1}, "strategy": "ring",
        "transport": "one-sided copies", "attention": "hopper", "versions": {"torch": "2.11.0"}, "commit": "abc123",
    },
}  # fmt: skip


def made_run(folder: Path, steps: int = 1000) -> list[dict[str, float]]:
    """A run's folder with what a run of two GPUs logs."""
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        rows.append({
            "step": step, "loss/train": 3 + 6 / step, "data/tokens": 262144 * step, "perf/step_s": 1.0 + (step < 3),
            "perf/tokens_per_s": 262144 / (1.0 + (step < 3)), "perf/tokens_per_s_per_gpu": 131072 / (1.0 + (step < 3)),
            "perf/mfu": 0.5, "perf/mfu_palm": 0.6, "time/data_s": 0.01, "time/forward_s": 0.3, "time/backward_s": 0.6,
            "time/optimizer_s": 0.05, "time/context_exposed_s": 0.02, "time/checkpoint_stall_s": 0.0,
            "mem/peak_alloc_gib": 60.0, "mem/peak_reserved_gib": 70.0, "mem/host_gib": 5.0, "mem/transport_gib": 0.5,
            "mem/peak_of_device": 0.5, "optim/grad_norm": 1.0, "optim/lr": 1e-3, "optim/muon_lr": 0.02, "run/ettr": 0.9,
            "run/device_s": 2.0 * step, "run/pflop": 0.4 * step,
        })  # fmt: skip
        if step % 250 == 0:
            rows.append({"step": step, "data/tokens": 262144 * step, "loss/val": 4 - step / 1000 * (step < 1000)})
            rows[-1] |= {"run/device_s": 2.0 * step, "run/pflop": 0.4 * step}
            rows[-1] |= {f"loss/pos/{2**k}": 4 - 0.1 * k for k in range(15)}
            rows[-1] |= {f"recall/{2**k}": 1 - 0.05 * k for k in range(5, 15)}
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "trace_step_5.json.gz").touch()
    return rows


def test_it_opens_with_what_the_run_was(tmp_path):
    made_run(tmp_path)
    text = html.unescape(re.sub(r"<[^>]+>", " ", write_report(tmp_path, ["a <sample>"]).read_text()))
    for line in (
        "124.4M parameters: 12 layers of width 768, 6 heads of 128 (2 for keys and values)",
        "builtin (0a1b); 262,144 tokens a step in sequences of 32,768",
        "2 x NVIDIA H200 on 1 machine, context 2, ring by one-sided copies; attention: hopper",
        "commit abc123, torch 2.11.0, started ",
        "; stopped by SIGTERM",
        "a <sample>",
    ):
        assert line in text
    figures = dict(re.findall(r"<div>([^<]+)<b>([^<]+)</b></div>", (tmp_path / "report.html").read_text()))
    assert figures == {
        "best validation loss": "3.2500 (step 750)", "last validation loss": "4.0000 nats a token",
        "mean speed": "131,072 tokens/s a GPU", "MFU": "50.0 %", "peak memory": "60.0 GiB", "tokens": "262,144,000",
        "GPU-seconds": "2,000", "PFLOP": "400", "ETTR": "90.0 %", "this start took": "2 h",
    }  # fmt: skip


def test_quality_is_drawn_over_what_it_has_cost(tmp_path):
    made_run(tmp_path)
    found = re.findall(r'<script type="application/json">(.*?)</script>', write_report(tmp_path, []).read_text())
    lines = [line for chart in map(json.loads, found) for line in chart["series"] if line["label"] == "validation"]
    losses = [3.75, 3.5, 3.25, 4.0]
    assert [(line["x"], line["y"]) for line in lines] == [
        ([65536000, 131072000, 196608000, 262144000], losses),
        ([500, 1000, 1500, 2000], losses),
        ([100, 200, 300, 400], losses),
    ]


def test_a_folder_without_anything_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/train": null}\n')
    assert "<figure" not in write_report(tmp_path, []).read_text()


def test_curves_are_thinned_by_means_and_smoothed_behind():
    x, y = thinned(list(range(4001)), [1.0] * 4000 + [4.0])
    assert len(x) == len(y) == 364 <= POINTS
    assert (x[0], y[-1]) == (5.0, 1.375)  # means of 11 points, and of the last 8
    assert smoothed([0.0] * 30 + [10.0] * 30)[29:34] == [0.0, pytest.approx(10 / 3), pytest.approx(20 / 3), 10.0, 10.0]


def test_faint_curves_keep_their_peaks():
    y = [1.0] * 4001
    y[1234], y[3999] = 9.0, -9.0
    x, kept = with_peaks([float(i) for i in range(4001)], y)
    assert len(x) == len(kept) <= POINTS
    assert (max(kept), x[kept.index(9.0)]) == (9.0, 1234.0)
    assert (min(kept), x[kept.index(-9.0)]) == (-9.0, 3999.0)
    assert x == sorted(x)


def test_what_is_not_finite_is_no_point_of_a_curve():
    """NaN is no JSON: the pointer's script would stop at it."""
    chart = Chart("a", "b", "x", "y")
    chart.line("l", [1.0, 2.0, 3.0], [3.0, math.nan, 4.0])
    [written] = re.findall(r'<script type="application/json">(.*?)</script>', chart.html())
    assert json.loads(written)["series"] == [{"label": "l", "x": [1.0, 3.0], "y": [3.0, 4.0]}]


def test_a_branch_leaves_its_first_steps_out_too():
    rows = [{"step": float(s), "perf/step_s": 1.0 + 9 * (s < 504), "perf/tokens_per_s": 1.0} for s in range(501, 507)]
    assert summary(rows)["mean/step_s"] == 1.0


def test_the_first_steps_of_a_start_are_no_measure_of_speed():
    """The last two of the first start were not logged."""

    def row(step: float, seconds: float, start: int) -> dict[str, float]:
        return {"step": step, "perf/step_s": seconds, "perf/tokens_per_s": 10 / seconds, "run/start_step": start}

    rows = [row(s, 10.0, 0) for s in (1, 2, 3)] + [row(s, 1.0, 0) for s in (4, 5, 6)]
    rows += [row(s, 10.0, 8) for s in (9, 10, 11)] + [row(12, 2.0, 8)]
    found = summary(rows)
    assert found["mean/tokens_per_s"] == pytest.approx(40 / 5)  # tokens over seconds of steps 4, 5, 6 and 12
    assert found["mean/step_s"] == pytest.approx(5 / 4)
    assert found["peak/tokens_per_s"] == 10.0
    assert summary(rows[:2])["mean/tokens_per_s"] == 1.0  # nothing else is left


def test_lines_that_do_not_say_where_a_start_began():
    """Of earlier versions: it began after the last line before."""
    rows = [{"step": float(s), "perf/step_s": 10.0, "perf/tokens_per_s": 1.0, "run/restarts": 0} for s in range(1, 4)]
    rows += [{"step": float(s), "perf/step_s": 1.0, "perf/tokens_per_s": 10.0, "run/restarts": 0} for s in range(4, 7)]
    rows += [{"step": float(s), "perf/step_s": 10.0, "perf/tokens_per_s": 1.0, "run/restarts": 1} for s in range(7, 10)]
    rows += [{"step": 10.0, "perf/step_s": 2.0, "perf/tokens_per_s": 5.0, "run/restarts": 1}]
    assert summary(rows)["mean/tokens_per_s"] == pytest.approx(40 / 5)  # tokens over seconds of steps 4, 5, 6 and 10


def test_a_last_validation_that_is_not_finite_is_the_last():
    rows = [{"step": 6.0, "loss/val": 4.9, "loss/val_bits_per_byte": 1.9}, {"step": 12.0, "loss/val": math.nan}]
    shown = dict(figures_that_count(rows, {}))
    assert shown["best validation loss"] == "4.9000 (step 6)"
    assert (shown["last validation loss"], shown["bits a byte"]) == ("not finite", "not finite")


def test_a_last_loss_that_is_not_finite_is_the_last():
    rows = [
        {"step": 1.0, "loss/train": 4.9, "perf/step_s": 1.0},
        {"step": 2.0, "loss/train": math.nan, "perf/step_s": 1.0},
    ]
    assert math.isnan(summary(rows)["last/loss_train"])


def test_one_point_is_seen():
    """A line gets a mark, shares the width of a step."""
    line, areas = (Chart("a", "", "step", "b") for _ in range(2))
    line.line("a", [3.0], [1.0])
    areas.areas(["a", "b"], [3.0], [[0.25], [0.75]])
    with mock.patch("matplotlib.axes.Axes.plot", autospec=True, side_effect=Axes.plot) as plot:
        line.html()
    assert plot.call_args.kwargs["marker"] == "o"
    with mock.patch("matplotlib.axes.Axes.stackplot", autospec=True, side_effect=Axes.stackplot) as stackplot:
        areas.html()
    assert stackplot.call_args.args[1:] == ([2.5, 3.5], [[0.25, 0.25], [0.75, 0.75]])


def test_names_of_curves_are_shown_as_they_are():
    """None is hidden for a `_`, read as a formula between two `$`, or ends the page's script."""
    names = ["_a", "cost$a_{$", "<!--<script>"]
    chart = Chart("a", "", "step", "b")
    for name in names:
        chart.line(name, [1.0, 2.0], [1.0, 2.0])
    made = chart.html()
    assert [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", made)][-3:] == names
    data = re.search(r'<script type="application/json">(.*?)</script>', made)
    assert data is not None
    assert "<" not in data.group(1)
    assert [series["label"] for series in json.loads(data.group(1))["series"]] == names


def test_a_legend_that_would_cover_the_picture_is_below_it():
    chart = Chart("a", "", "step", "b")
    for number in range(3):
        chart.line(f"{number} {'long ' * 8}<run>", [1.0, 2.0], [1.0, 2.0], color=f"C{number}")
    made = chart.html()
    assert len(re.findall(r'<i style="border-top:3px solid #\w{6}"></i>\d long [^<]*&lt;run&gt;</span>', made)) == 3
    assert "long" not in made[: made.index("</svg>")]
    many = Chart("a", "", "step", "b")
    for number in range(11):
        many.line(f"s{number}", [1.0, 2.0], [1.0, 2.0], color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
    marks = dict(re.findall(r'border-top:3px (\w+ #\w{6})"></i>(s\d+)</span>', many.html()))
    assert len(marks) == 11
    assert marks["dashed #1f77b4"] == "s10"


@pytest.mark.parametrize(
    ("value", "text"), [(20005, "20.005k"), (20978600000, "20.9786G"), (0.1 + 0.2, "0.3"), (1500, "1500"), (0, "0")]
)
def test_ticks_that_differ_are_told_apart(value, text):
    assert short(value) == text


# in a browser --------------------------------------------------------------------------------------------------------

CHECK = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("load", () => {
  const charts = [...document.querySelectorAll("figure")].map(figure => {
    const place = figure.querySelector("svg").getBoundingClientRect();
    const at = {clientX: place.left + 0.6 * place.width, clientY: place.top + 20, bubbles: true};
    figure.dispatchEvent(new PointerEvent("pointermove", at));
    return {width: place.width, height: place.height, value: figure.querySelector(".value").textContent};
  });
  const page = document.documentElement;
  document.body.innerHTML = "";
  document.title = "checked";
  const found = document.createElement("pre");
  found.textContent = JSON.stringify({errors, charts, wide: page_width, screen: innerWidth});
  document.body.append(found);
});
let page_width = 0;
addEventListener("DOMContentLoaded", () => { page_width = document.documentElement.scrollWidth; });
</script>
"""


def seen(file: Path, width: int) -> dict:
    """What a browser of so many pixels makes of a page: errors, the size of each picture, what the pointer finds."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser is not None
    (file.parent / "checked.html").write_text(file.read_text().replace("<title>", f"{CHECK}<title>", 1))
    result = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={file.parent / 'browser'}",
            f"--window-size={width},900", "--dump-dom", (file.parent / "checked.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return json.loads(html.unescape(re.findall(r"<pre>(.*)</pre>", result.stdout)[0]))


@pytest.mark.parametrize("width", [1200, 500])
def test_every_picture_is_drawn(tmp_path, width):
    """Without an error or overflow; and the pointer finds the values. Without a browser, by what is written."""
    rows = made_run(tmp_path)
    file = write_report(tmp_path, ["x" * 300])
    written = re.findall(r'<script type="application/json">(.*?)</script>', file.read_text())
    assert len(written) == file.read_text().count("<svg") == 11
    loss = json.loads(written[0])
    assert [series["label"] for series in loss["series"]] == ["training", "validation"]
    assert loss["series"][1]["y"] == [row["loss/val"] for row in rows if "loss/val" in row]
    assert 0 < loss["box"][0] < 0.2
    assert 0.9 < loss["box"][1] <= 1
    if shutil.which("chromium") or shutil.which("google-chrome"):
        found = seen(file, width)
        assert found["errors"] == []
        assert found["wide"] <= found["screen"] == width
        assert len(found["charts"]) == 11
        for chart in found["charts"]:
            assert chart["width"] > 300
            assert 0.4 < chart["height"] / chart["width"] < 0.8
            assert chart["value"]
        # the pointer stands at 60 % of the picture, which is a place on the axis between the limits
        low, high = loss["limits"]
        tokens = low + (0.6 - loss["box"][0]) / (loss["box"][1] - loss["box"][0]) * (high - low)
        first, second = found["charts"][0]["value"].split("\n")[:2]
        near = float(first.removeprefix("tokens ").replace(",", ""))
        assert near == pytest.approx(tokens, abs=262144 * math.ceil(1000 / POINTS))
        assert second.startswith("training  3.")


def test_a_page_names_nothing_outside():
    chart = Chart("a", "b", "x", "y")
    chart.line("l", [1.0, 2.0], [3.0, 4.0])
    assert not re.search(r'(src|href)="https?:', page("t", chart.html()).replace("xlink:href", ""))
