"""Draws the pictures of the documentation: `python docs/figures/draw.py [FOLDER]`.

Each comes from the code it explains or from a JSON file beside it, whose figures are those of `docs/benchmarks.md`. The
report's screenshot is a photograph of a real run and is not drawn here.
"""

from __future__ import annotations

import ast
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.tiles import key_tiles
from longctx.parallel.key_exchange import make_exchange_plan
from longctx.parallel.load_balance import Split, balanced, imbalance, in_order, zigzag

HERE = Path(__file__).parent
COLOURS = ("#3b6fb6", "#d9822b", "#4a9a5b", "#b5485d")  # of ranks
GREY, DARK = "#c9ced6", "#39414d"
DOCUMENTS = (0, 640, 1024, 2560)  # first tokens, of a sequence of 4096


def work_of_documents(length: int) -> torch.Tensor:
    """Keys that each token of the packed sequence sees."""
    return torch.arange(length) - document_start(length)[0] + 1


def document_start(length: int) -> torch.Tensor:
    """(1, length): of each token the first of its document."""
    firsts = torch.tensor(DOCUMENTS)
    return firsts[torch.searchsorted(firsts, torch.arange(length), right=True) - 1][None]


def speed() -> plt.Figure:
    """Tokens a second against context, ours and torchtitan's."""
    data = json.loads((HERE / "benchmarks.json").read_text())
    figure, axes = plt.subplots(figsize=(6.4, 2.6))
    places = np.arange(len(data["context"]))
    for offset, name, colour in ((-0.19, "longctx", COLOURS[0]), (0.19, "torchtitan", GREY)):
        bars = axes.bar(places + offset, data[name], 0.36, color=colour, label=name)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=9, padding=2)
    axes.set_xticks(places, [f"{tokens // 1024}k tokens" for tokens in data["context"]])
    axes.set_ylabel("tokens/s a GPU")
    axes.set_ylim(0, 1.18 * max(data["longctx"]))
    axes.set_title("Llama 3.1 8B on four H200s", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return figure


def learning() -> plt.Figure:
    """What gpt_32k has learnt when: bits a byte, loss by position and recall by distance, of its validations."""
    data = json.loads((HERE / "learning.json").read_text())
    seen = data["validations"]
    figure, (quality, by_position, by_distance) = plt.subplots(1, 3, figsize=(11, 3))
    recipe = {
        "name": "the recipe",
        "gpu_s": [r["gpu_s"] for r in seen],
        "bits_per_byte": [r["bits_per_byte"] for r in seen],
    }
    lines = *((line, COLOURS[0]) for line in ("o-", "o--", "o:")), *(("s-", colour) for colour in COLOURS[1:])
    for row, (line, colour) in zip((recipe, *data["longer"], *data["before"]), lines, strict=True):
        quality.plot(row["gpu_s"], row["bits_per_byte"], line, markersize=4, color=colour, label=row["name"])
    quality.legend(frameon=False, fontsize=8, loc="upper right")
    quality.set(xlabel="GPU-seconds", title="Held-out text, bits a byte", ylim=(0.5, 3.0), xlim=(60, 1400))
    for row, shade in zip(seen, (0.25, 0.5, 0.75, 1.0), strict=True):
        label = f"step {row['step']}, {row['gpu_s']} s"
        draw_use_of_context(by_position, by_distance, row, label, color=COLOURS[0], alpha=shade)
    by_position.legend(frameon=False, fontsize=8)
    quality.title.set_size(10)
    figure.tight_layout()
    return figure


def learning_128k() -> plt.Figure:
    """What gpt_128k has learnt when: loss by position and recall by distance, of its validations."""
    data = json.loads((HERE / "learning_128k.json").read_text())
    figure, (by_position, by_distance) = plt.subplots(1, 2, figsize=(8.4, 3))
    for row, shade in zip(data["validations"], (0.25, 0.5, 0.75, 1.0), strict=True):
        label = f"step {row['step']}: {row['bits_per_byte']:.3f}"
        draw_use_of_context(by_position, by_distance, row, label, color=COLOURS[0], alpha=shade)
    by_position.legend(frameon=False, fontsize=8, title="bits a byte", title_fontsize=8)
    figure.tight_layout()
    return figure


def draw_use_of_context(by_position: Axes, by_distance: Axes, row: dict[str, Any], label: str, **style: Any) -> None:
    """A validation's loss by position and recall by distance, as a line in each."""
    for axes, key in ((by_position, "loss_by_position"), (by_distance, "recall_by_distance")):
        places = sorted(map(int, row[key]))
        axes.plot(places, [row[key][str(place)] for place in places], marker="o", markersize=3, label=label, **style)
        axes.set_xscale("log", base=2)
    by_position.set(xlabel="tokens of the document before", title="Loss by position, nats a token")
    by_distance.set(xlabel="tokens back", title="Recall of copies, share")
    for axes in (by_position, by_distance):
        axes.title.set_size(10)


def extension() -> plt.Figure:
    """A model of 2k tokens on sequences of 16k: as it is, with other positions, and after training with these."""
    data = json.loads((HERE / "extension.json").read_text())
    figure, (by_position, by_distance) = plt.subplots(1, 2, figsize=(8.4, 3))
    for row, colour in zip(data["runs"], (DARK, *COLOURS[1:3], COLOURS[0]), strict=True):
        draw_use_of_context(by_position, by_distance, row, f"{row['name']}: {row['bits_per_byte']:.3f}", color=colour)
    for axes in (by_position, by_distance):
        axes.axvline(2048, color=GREY, linewidth=1, zorder=0)
    by_position.set(xlim=(128, None), ylim=(1, 2.6))
    by_distance.legend(frameon=False, fontsize=8, title="bits a byte", title_fontsize=8, loc="lower left")
    figure.tight_layout()
    return figure


def who_holds_which_tokens() -> plt.Figure:
    """Splits of one sequence over four ranks, and the work that each gives them."""
    length, size = 4096, 4
    work = work_of_documents(length)
    rows: list[tuple[str, Split, torch.Tensor]] = [
        ("in order (Ulysses)", in_order(length, size), torch.arange(length) + 1),
        ("zigzag: one document", zigzag(length, size), torch.arange(length) + 1),
        ("zigzag: four documents", zigzag(length, size), work),
        ("balanced: four documents", balanced(work, size), work),
    ]
    figure, axes = plt.subplots(figsize=(8, 2.6))
    for row, (name, split, keys) in enumerate(rows):
        y = len(rows) - 1 - row
        for rank in range(size):
            held = split.held(rank)
            cuts = [0, *((held[1:] != held[:-1] + 1).nonzero().flatten() + 1).tolist(), len(held)]
            for begin, end in pairwise(cuts):
                axes.broken_barh([(int(held[begin]), end - begin)], (y - 0.36, 0.72), color=COLOURS[rank], lw=0)
        trades_heads = split is rows[0][1]
        shares = (
            "all tokens, a share of the heads" if trades_heads else f"most work / mean {imbalance(keys, split):.2f}"
        )
        axes.text(length * 1.01, y, shares, va="center", fontsize=9)
        axes.text(-length * 0.01, y, name, va="center", ha="right", fontsize=9)
    for first in DOCUMENTS[1:]:
        axes.plot([first, first], [-0.45, 1.45], color="white", lw=1.5)
        axes.text(first, -0.75, "document", ha="left", va="center", fontsize=7, color=DARK)
    axes.legend(
        handles=[Rectangle((0, 0), 1, 1, color=colour, label=f"rank {rank}") for rank, colour in enumerate(COLOURS)],
        loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=4, frameon=False, fontsize=9,
    )  # fmt: skip
    axes.set_xlim(0, length)
    axes.set_ylim(-0.9, len(rows) - 0.5)
    axes.axis("off")
    return figure


def ring_timeline() -> plt.Figure:
    """What each of four ranks attends from and copies, step by step: by the plan that a run follows."""
    length, size = 8192, 4
    order = zigzag(length, size).order
    mask = KeyIntervals.causal(length)
    start, end = (bound[:, order] for bound in mask.bounds("cpu"))
    plan = make_exchange_plan(order, start, end, size, 0, 1)
    rows = torch.arange(length)
    figure, axes = plt.subplots(figsize=(8, 3.0))
    unit = 0.0
    begins = [0.0] * size
    for step in range(len(plan.moves)):
        for rank in range(size):
            keys = plan.tokens(step, rank)
            held = order.view(size, -1)[rank]
            pairs = float((rows[held][:, None] >= keys[None]).sum())
            unit = unit or pairs
            owners = sorted({move.owner for move in plan.fetched(step, rank)})
            y, width = size - 1 - rank, pairs / unit
            axes.broken_barh([(begins[rank], width)], (y, 0.42), color=COLOURS[owners[0]], edgecolor="white")
            label = "own keys" if step == 0 else f"keys of rank {owners[0]}"
            axes.text(begins[rank] + width / 2, y + 0.21, label, ha="center", va="center", color="white", fontsize=8)
            if step + 1 < len(plan.moves):
                coming = plan.fetched(step + 1, rank)
                share = sum(move.length for move in coming) / (length / size)
                copy = (begins[rank], 0.55 * share)
                axes.broken_barh([copy], (y - 0.26, 0.16), color=COLOURS[coming[0].owner], alpha=0.5)
            begins[rank] += width
        begins = [max(begins)] * size if step == 0 else begins
    for rank in range(size):
        axes.text(-0.04, size - 1 - rank + 0.1, f"rank {rank}", ha="right", va="center", fontsize=9)
    axes.set_title("attention (thick) and the copy of the next keys beside it (thin): zigzag, causal", fontsize=9)
    axes.set_xlim(0, max(begins) * 1.01)
    axes.set_xlabel("time, in units of a rank's own block; copies to no scale", fontsize=8)
    axes.set_yticks([])
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def draw_mask(axes: Axes, mask: KeyIntervals, title: str, tile: int) -> None:
    rows = mask.n_queries // tile
    kinds = np.zeros((rows, mask.n_keys // tile))
    for row, (first, full_first, full_last, last) in enumerate(key_tiles(mask, tile, tile)[0].tolist()):
        kinds[row, first:last] = 2
        kinds[row, full_first:full_last] = 1
    axes.imshow(kinds, cmap=mpl.colors.ListedColormap(["#f1f3f6", COLOURS[0], COLOURS[1]]), vmin=0, vmax=2)
    start, end = (bound[0].numpy() / tile - 0.5 for bound in mask.bounds("cpu"))
    y = np.arange(mask.n_queries) / tile - 0.5
    axes.plot(start, y, color=DARK, lw=0.9)
    axes.plot(end, y, color=DARK, lw=0.9)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def masks() -> plt.Figure:
    """Masks as intervals of keys, with the tiles that kernels leave out, take whole, or look at."""
    length, tile = 4096, 256
    documents = KeyIntervals.documents(document_start(length))
    window = KeyIntervals.causal(length).windowed(1024, torch.device("cpu"))
    shard = documents.rows(zigzag(length, 4).held(1))
    figure, all_axes = plt.subplots(1, 4, figsize=(9, 2.7))
    titles = "causal", "window of 1024", "four documents", "the rows of rank 1 of 4"
    drawn = KeyIntervals.causal(length).with_bounds("cpu"), window, documents, shard
    for axes, mask, title in zip(all_axes, drawn, titles, strict=True):
        draw_mask(axes, mask, title, tile)
    all_axes[0].set_ylabel("queries", fontsize=8)
    all_axes[0].set_xlabel("keys", fontsize=8)
    kinds = ("empty: left out", "#f1f3f6"), ("full: no mask", COLOURS[0]), ("edge: masked", COLOURS[1])
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor=GREY, label=kind) for kind, colour in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.subplots_adjust(bottom=0.16)
    return figure


def may_import() -> dict[str, set[str]]:
    """The table of the test that holds the imports of each layer."""
    tree = ast.parse((HERE.parents[1] / "tests" / "test_architecture.py").read_text())
    annotated = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    table = next(node for node in annotated if ast.unparse(node.target) == "MAY_IMPORT")
    assert isinstance(table.value, ast.Dict)
    found = {}
    for key, value in zip(table.value.keys, table.value.values, strict=True):
        assert isinstance(key, ast.Constant)
        found[str(key.value)] = set(ast.literal_eval(value)) if isinstance(value, ast.Set) else set()
    return found


def layers() -> plt.Figure:
    """The parts of the package, each above all that it may import."""
    table = may_import()
    depth: dict[str, int] = {}

    def depth_of(layer: str) -> int:
        if layer not in depth:
            depth[layer] = 1 + max((depth_of(lower) for lower in table[layer]), default=-1)
        return depth[layer]

    by_depth: dict[int, list[str]] = {}
    for layer in sorted(table):
        by_depth.setdefault(depth_of(layer), []).append(layer)
    figure, axes = plt.subplots(figsize=(9, 5.4))
    place = {}
    for level, names in by_depth.items():
        for i, name in enumerate(names):
            place[name] = ((i + 0.5) / len(names) * 15, level + (0.2 if i % 2 else -0.2) * (len(names) > 8))
    for layer, lowers in table.items():
        for lower in sorted(lowers):
            if depth[layer] - depth[lower] == 1:
                ends = place[layer], place[lower]
                axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=6, color=GREY, lw=0.6))
    big = {"model", "parallel", "kernels", "data", "trainer", "ops", "train", "run", "hugging_face"}
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.25", "fc": COLOURS[0] if name in big else "#eef1f5", "ec": "none"}
        axes.text(x, y, name, ha="center", va="center", fontsize=7, color="white" if name in big else DARK, bbox=box)
    axes.set_xlim(0, 15)
    axes.set_ylim(-0.6, max(by_depth) + 0.6)
    axes.axis("off")
    return figure


COMMIT = (
    ("each rank writes\nand hashes its shard", "after a shard"),
    ("rank 0 writes\nthe manifest", "before the manifest"),
    ("the folder is\nrenamed to step_N", "before the rename"),
    ("latest points\nto it", "before latest"),
    ("older ones\nare removed", "before the purge"),
)  # what a save does, and where the tests kill it: `POINTS` of tests/run/test_checkpoint.py


def checkpoint_commit() -> plt.Figure:
    """A save from its first byte to its end, what loads after a kill, and where tests kill."""
    figure, axes = plt.subplots(figsize=(9, 2.3))
    for i, (what, point) in enumerate(COMMIT):
        is_committed = i >= 3
        x = 2.2 * i
        axes.add_patch(Rectangle((x, 0), 1.8, 0.9, facecolor=COLOURS[2] if is_committed else GREY, lw=0))
        axes.text(x + 0.9, 0.45, what, ha="center", va="center", fontsize=8, color="white" if is_committed else DARK)
        at = x + 2.0 if point.startswith("after") else x - 0.2
        axes.plot([at], [0.45], marker="x", color=COLOURS[3], markersize=8, mew=2)
        axes.text(at, -0.28 - 0.3 * (i == 1), point, ha="center", fontsize=7.5, color=COLOURS[3])
    axes.text(3.1, 1.15, "killed here: the checkpoint before loads", ha="center", fontsize=9, color=DARK)
    axes.text(8.6, 1.15, "killed here: this one loads", ha="center", fontsize=9, color=DARK)
    axes.set_xlim(-0.4, 10.9)
    axes.set_ylim(-0.8, 1.4)
    axes.axis("off")
    return figure


PICTURES = {
    "speed": speed, "learning": learning, "learning_128k": learning_128k, "extension": extension,
    "who_holds_which_tokens": who_holds_which_tokens,
    "ring_timeline": ring_timeline, "masks": masks, "layers": layers, "checkpoint_commit": checkpoint_commit,
}  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    style = {
        "svg.hashsalt": "longctx", "svg.fonttype": "path", "font.family": "DejaVu Sans", "axes.spines.top": False,
        "axes.spines.right": False, "text.color": DARK, "axes.labelcolor": DARK, "savefig.facecolor": "white",
    }  # fmt: skip
    with mpl.rc_context(style):
        for name, draw in PICTURES.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
            plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
