"""What README and the pages say can be typed: code runs, commands are accepted, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from in_process import output_of
from longctx.config_checks import check
from runs import ROOT, composed, run_as_typed

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The words of each command, without its comment; lines that a backslash joins are one."""
    lines = "".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    programs = "python", "torchrun", ".venv/bin/", "make", "wandb", "pip"
    return [shlex.split(line, comments=True) for line in lines if line.startswith(programs)]


def runs_of_training() -> list[tuple[str, ...]]:
    """Of all pages: the words after `train.py`, and how many ranks there are, as text, before them."""
    found = []
    for words in (words for page in PAGES for words in commands(page) if "train.py" in words):
        at = words.index("train.py")
        ranks = words[words.index("--nproc-per-node") + 1] if "--nproc-per-node" in words else "1"
        ranks = "1" if ranks == "gpu" else ranks
        rest = words[at + 1 :]
        if rest and not {"-m", "--help", "--config-dir"} & set(rest):  # sweeps are run by test_sweeps.py
            found.append((ranks, *(word for word in rest if word not in ("--cfg", "job"))))
    return list(dict.fromkeys(found))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if path.startswith("http"):
                continue
            assert (page.parent / path).exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", (page.parent / path).read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}, target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    for page in pages - {"index"}:
        assert f"({page}.md)" in index, page
    contents = set((ROOT / "docs" / "contents.rst").read_text().split())
    assert pages <= contents, pages - contents


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks(page):
    """In order, with tensors of the names that the page uses."""
    torch.manual_seed(0)
    names: dict[str, object] = {
        "q": torch.randn(1, 256, 4, 16, requires_grad=True), "k": torch.randn(1, 256, 2, 16), "weight": torch.ones(64),
        "v": torch.randn(1, 256, 2, 16), "branch": torch.randn(32, 64), "stream": torch.randn(32, 64),
        "hidden": torch.randn(32, 64), "vocabulary": torch.randn(128, 64), "targets": torch.randint(128, (32,)),
    }  # fmt: skip
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("words", runs_of_training(), ids=" ".join)
def test_commands_of_training(words, monkeypatch):
    """Compose to configurations in which nothing is wrong on as many ranks."""
    ranks, *overrides = words
    monkeypatch.setenv("WORLD_SIZE", ranks)
    config = composed(*(word.replace("model=mine", "model=llama3_8b") for word in overrides))
    check(config, int(ranks))


def test_from_text_to_weights(tmp_path):
    """The first door of README, and what docs/checkpoints.md does with a run, with two short steps on one rank."""
    (tmp_path / "texts").mkdir()
    for file in Path(sys.modules["json"].__file__ or "").parent.glob("*.py"):
        (tmp_path / "texts" / f"{file.stem}.txt").write_text(file.read_text() * 4)
    prepare, train = [words for words in commands(ROOT / "README.md") if {"texts/", "name=mine"} & set(words)]
    assert "train on it" in run_as_typed(prepare, folder=tmp_path)
    short = ["data.sequence_length=128", "validation.sequences=2", "validation.sample_tokens=0", "model.layers=1"]
    out = run_as_typed(train, "optim.steps=2", "optim.warmup_steps=0", *short, folder=tmp_path)
    assert "step 2/2" in out
    (tmp_path / "runs" / "my-run").symlink_to(tmp_path / "runs" / "mine")
    kept, sound, weights = [w for w in commands(ROOT / "docs" / "checkpoints.md") if "tools/checkpoint.py" in w]
    assert "step_2" in run_as_typed(kept, folder=tmp_path)
    assert re.search(
        r"step_2: .* written by [1-9]\d* ranks.*, every byte as written", run_as_typed(sound, folder=tmp_path)
    )
    run_as_typed(weights, folder=tmp_path)
    assert (tmp_path / "weights" / "model.safetensors").stat().st_size > 10_000
    export = next(w for w in commands(ROOT / "docs" / "checkpoints.md") if "export" in w and "out" in w)
    run_as_typed([word.replace("llama3_8b_128k", "mine") for word in export], folder=tmp_path)
    assert (tmp_path / "out" / "config.json").exists()


def test_pictures_are_drawn_from_what_is_there(tmp_path):
    """From the code as it is now, and from figures that the benchmarks have."""
    output_of(ROOT / "docs" / "figures" / "draw.py", str(tmp_path))
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert len(drawn) == 9
    for name, picture in drawn.items():
        assert picture == (ROOT / "docs" / "figures" / name).read_text(), f"{name}: run docs/figures/draw.py"
    figures = json.loads((ROOT / "docs" / "figures" / "benchmarks.json").read_text())
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for ours, theirs in zip(figures["longctx"], figures["torchtitan"], strict=True):
        assert re.search(rf"\| {ours} \|.*\| {theirs} \|", page), (ours, theirs)
    assert figures["commit"] in page
