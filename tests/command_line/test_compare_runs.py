"""`tools/compare_runs.py`, as a user runs it."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from in_process import run_script
from longctx.tools import compare_runs as tool
from runs import ROOT


def made_run(folder: Path, lr: float, speed: float, losses: list[float]) -> None:
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step, "loss/train": loss, "data/tokens": 100 * step, "perf/tokens_per_s": speed,
            "perf/tokens_per_s_per_gpu": speed / 2, "perf/step_s": 100 / speed,
        }
        for step, loss in enumerate(losses, 1)
    ]  # fmt: skip
    lines.append({"step": len(losses), "data/tokens": 100 * len(losses), "loss/val": losses[-1], "loss/pos/1": 5.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"configuration": {"name": folder.name, "optim": {"lr": lr, "steps": 9}}, "facts": {"ranks": 2}}
    (folder / "run.json").write_text(json.dumps(record | {"ended": "complete"}))


def compare(folder: Path, *words: str) -> CompletedProcess[str]:
    return run_script(ROOT / "tools" / "compare_runs.py", *words, "--output", str(folder / "page.html"))


def test_what_differs_and_how_much(tmp_path):
    made_run(tmp_path / "a", 1e-3, 1000, [4.0, 3.0, 2.5, 2.0, 2.0])
    made_run(tmp_path / "b", 2e-3, 1500, [4.0, 3.0, 2.5, 2.0, 1.5])
    result = compare(tmp_path, f"{tmp_path}/[ab]")
    assert result.returncode == 0, result.stderr
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert ["a", "b"] in rows
    assert ["tokens/s", "1,000", "1,500"] in rows
    assert ["last validation loss", "2.0000", "1.5000"] in rows
    assert [row[1:] for row in rows if row[0] == "relative to the first"] == [
        ["1.000", "0.750"], ["1.000", "1.500"], ["1.000", "1.500"],
    ]  # fmt: skip
    assert ["optim.lr", "0.001", "0.002"] in rows
    assert not any("optim.steps" in row or "run.ranks" in row for row in rows)
    written = (tmp_path / "page.html").read_text()
    charts = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', written)]
    assert all([series["label"] for series in chart["series"]] == ["a", "b"] for chart in charts)
    assert len(charts) == 4  # of training, validation, throughput and by position


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """By the folders above; and a loss that is not finite is not that of before."""
    made_run(tmp_path / "old" / "gpt", 1e-3, 1000, [4.0, 3.0])
    made_run(tmp_path / "new" / "gpt", 1e-3, 1000, [4.0, 2.0])
    with (tmp_path / "new" / "gpt" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss/val": null}\n')
    monkeypatch.chdir(tmp_path / "old" / "gpt")
    result = compare(tmp_path, ".", "../../new/gpt")
    assert result.returncode == 0, result.stderr
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert ["old/gpt", "new/gpt"] in rows
    assert ["best validation loss", "3.0000", "2.0000"] in rows
    assert ["last validation loss", "3.0000", "not finite"] in rows
    marks = re.findall(r'<g clip-path="[^"]*">\s*<use', (tmp_path / "page.html").read_text())
    assert len(marks) == 4  # of a lone validation, by tokens and by position, for each run


def test_a_run_has_one_colour_on_a_page(tmp_path):
    """In pictures that lack the runs before it too; and it is compared with others alone, into a folder of its own."""
    for name, losses in (("a", []), ("b", [4.0, 3.0]), ("c", [4.0, 2.0])):
        made_run(tmp_path / name, 1e-3, 1000, losses or [math.nan])
    runs = tool.open_runs([str(tmp_path / "a"), os.path.relpath(tmp_path / "a"), f"{tmp_path}/[bc]"])
    assert [run.name for run in runs] == ["a", "b", "c"]
    assert [tool.looks(n)["color"] for n in (0, 1, 11)] == ["C0", "C1", "C1"]
    assert tool.looks(1) != tool.looks(11)
    styles = []
    with mock.patch.object(tool.Chart, "line", lambda _chart, name, _x, y, **style: styles.append((name, y, style))):
        tool.curves(runs)
    assert {(name, style["color"]) for name, _, style in styles} == {("a", "C0"), ("b", "C1"), ("c", "C2")}
    where = tmp_path / "new" / "page.html"
    result = run_script(ROOT / "tools" / "compare_runs.py", f"{tmp_path}/[abc]", "--output", str(where))
    assert result.returncode == 0, result.stderr
    assert where.exists()


def test_equal_losses_are_asserted(tmp_path):
    made_run(tmp_path / "a", 1e-3, 1000, [4.0, 3.0])
    made_run(tmp_path / "b", 1e-3, 1000, [4.0, 3.0 + 1e-7])
    made_run(tmp_path / "c", 1e-3, 1000, [4.0, 3.1])
    made_run(tmp_path / "d", 1e-3, 1000, [4.0])
    assert compare(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"), "--assert-equal").returncode == 0
    result = compare(tmp_path, str(tmp_path / "a"), str(tmp_path / "c"), "--assert-equal")
    assert result.returncode == 1
    assert "not equal: step 2: a has loss 3.0, c 3.1, 3.3e-02 apart; --tolerance is 1e-05" in result.stderr
    for name, losses in (("e", [4.0, None]), ("f", [4.0, None])):  # whose last step was skipped
        made_run(tmp_path / name, 1e-3, 1000, losses)
    assert compare(tmp_path, str(tmp_path / "e"), str(tmp_path / "f"), "--assert-equal").returncode == 0
    result = compare(tmp_path, str(tmp_path / "a"), str(tmp_path / "e"), "--assert-equal")
    assert "not equal: step 2: a has loss 3.0, e nan" in result.stderr
    for name in ("g", "h"):  # which has trained nothing
        made_run(tmp_path / name, 1e-3, 1000, [None])
    result = compare(tmp_path, str(tmp_path / "g"), str(tmp_path / "h"), "--assert-equal")
    assert "g and h: no step has a training loss that is finite, so none was compared" in result.stderr
    result = compare(tmp_path, str(tmp_path / "a"), str(tmp_path / "d"), "--assert-equal")
    assert "not equal: a ends at step 2, d at step 1; both must end alike" in result.stderr
    result = compare(tmp_path, str(tmp_path / "a"), str(tmp_path / "nothing"))
    assert f"{tmp_path}/nothing: no folder of a run" in result.stderr


def test_steps_that_one_of_two_has_logged_are_not_compared(tmp_path):
    """As the last one of a run that was stopped and went on."""
    for name, losses in (("a", [4.0, 3.0, 2.0]), ("b", [4.0, 3.5, 2.0])):
        made_run(tmp_path / name, 1e-3, 1000, losses)
    assert compare(tmp_path, f"{tmp_path}/[ab]", "--assert-equal").returncode == 1
    path = tmp_path / "b" / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"step": 2' not in line))
    assert compare(tmp_path, f"{tmp_path}/[ab]", "--assert-equal").returncode == 0


def test_names_that_differ_at_their_ends_are_told_apart_when_printed():
    names = [f"gpt_tiny-{'a-long-sweep-' * 5}lr_{n}" for n in (1, 2)]
    head, row = (line.split() for line in tool.printed([["x", "1", "2"]], ["", *names]).splitlines())
    assert [(name[-4:], len(name)) for name in head] == [("lr_1", 59), ("lr_2", 59)]
    assert row == ["x", "1", "2"]
