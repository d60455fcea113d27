"""A page of curves that needs nothing beside itself: for `report.html` and for comparisons of runs.

matplotlib draws; a small script in the page shows the values under the pointer.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

SIZE = 5.6, 3.1  # inches: on a phone as wide as its screen, so that the letters stay legible
MARGINS = {"left": 0.13, "right": 0.98, "bottom": 0.15, "top": 0.97}  # of the picture
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
POINTS = 400  # of a curve, at most
LONGEST_LEGEND, MOST_NAMES = 100, 6  # letters of all names together: longer ones and more stand below the picture
CSS = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}  # linestyles

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
<script>{script}</script></body></html>
"""

STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1b1b;--faint:#6a6a6a;--line:#d8d8d8;--card:#f6f6f6}
@media (prefers-color-scheme:dark){:root{--back:#16181c;--text:#e6e6e6;--faint:#9a9a9a;--line:#3a3d44;--card:#1f2228}
figure svg,.legend i{filter:invert(.92) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:1.5em auto;padding:0 1em;
background:var(--back);color:var(--text)}
h1{font-size:1.5em;margin:.2em 0;overflow-wrap:anywhere} h2{font-size:1.1em;margin:1.4em 0 .4em}
p{margin:.2em 0;overflow-wrap:anywhere} a{color:inherit}
.faint,figcaption{color:var(--faint)} figcaption{font-size:.85em}
.figures{display:flex;flex-wrap:wrap;gap:.6em;margin:1em 0}
.figures div{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.4em .8em;min-width:8.5em}
.figures b{display:block;font-size:1.25em;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30em),1fr));gap:1.2em}
figure{margin:0;position:relative;min-width:0} figure svg{width:100%;height:auto;display:block}
.value{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:4px;
padding:.2em .5em;font-size:.8em;white-space:pre;display:none;z-index:1;font-variant-numeric:tabular-nums}
.legend{font-size:.8em} .legend span{margin-right:1em} .legend i{display:inline-block;width:1.8em;
margin-right:.4em;vertical-align:middle}
.scroll{overflow-x:auto} table{border-collapse:collapse} td,th{padding:.15em .8em .15em 0;text-align:left;
border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums;vertical-align:top}
pre{background:var(--card);padding:.8em;overflow:auto;border-radius:6px} summary{cursor:pointer;font-weight:600}
details{margin:1em 0}
"""

SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), value = figure.querySelector(".value"), box = chart.box;
  const scale = chart.log ? Math.log2 : x => x, [low, high] = chart.limits.map(scale);
  const short = x => Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential(3) : +x.toPrecision(5);
  figure.addEventListener("pointermove", event => {
    const place = svg.getBoundingClientRect(), at = (event.clientX - place.left) / place.width;
    const x = low + (at - box[0]) / (box[1] - box[0]) * (high - low);
    const near = xs => xs.reduce((best, one, i) =>
      Math.abs(scale(one) - x) < Math.abs(scale(xs[best]) - x) ? i : best, 0);
    const filled = chart.series.filter(s => s.x.length);
    if (at < box[0] || at > box[1] || !filled.length) { value.style.display = "none"; return; }
    const first = filled[0], lines = [`${chart.x} ${first.x[near(first.x)].toLocaleString("en")}`];
    for (const s of filled) lines.push(`${s.label}  ${short(s.y[near(s.x)])}`);
    value.textContent = lines.join("\\n");
    value.style.display = "block";
    const left = event.clientX - place.left + 14, width = value.offsetWidth;
    value.style.left = Math.max(0, Math.min(left, place.width - width)) + "px";
    value.style.top = "1.5em";
  });
  figure.addEventListener("pointerleave", () => { value.style.display = "none"; });
}
"""


class Chart:
    """One picture: curves over one axis, and what the pointer finds there."""

    def __init__(self, title: str, sentence: str, x: str, y: str, is_log: bool = False) -> None:
        """`x`, `y`: what the axes are; `is_log`: x in powers of two."""
        self.title, self.sentence, self.x, self.y, self.is_log = title, sentence, x, y, is_log
        self.series: list[dict[str, Any]] = []
        self.drawings: list[
            tuple[list[str], Callable[[Axes], Any]]
        ] = []  # names of the legend, of the artists returned

    def line(self, label: str, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        """A curve, thinned to what can be seen, if there is one; `style` as of matplotlib."""
        pairs = [pair for pair in zip(x, y, strict=True) if math.isfinite(pair[1])]
        if not pairs:
            return
        x, y = thinned([a for a, _ in pairs], [b for _, b in pairs])
        self.series.append({"label": label, "x": x, "y": y})
        if len(x) == 1:  # a line of one point is none
            style = {"marker": "o", "markersize": 3, **style}
        self.drawings.append(([label], lambda axes: axes.plot(x, y, **{"linewidth": 1.4, **style})))

    def faint(self, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        """A curve behind the others with all its peaks, which the pointer does not read."""
        x, y = with_peaks(x, y)
        self.drawings.append(([], lambda axes: axes.plot(x, y, linewidth=0.7, alpha=0.35, **style)))

    def areas(self, labels: list[str], x: list[float], ys: list[list[float]]) -> None:
        """Shares over each other."""
        thin = [thinned(x, y) for y in ys]
        self.series += [{"label": label, "x": a, "y": b} for label, (a, b) in zip(labels, thin, strict=True)]
        at, shares = thin[0][0], [b for _, b in thin]
        if len(at) == 1:  # as wide as a step
            at, shares = [at[0] - 0.5, at[0] + 0.5], [share * 2 for share in shares]
        self.drawings.append((labels, lambda axes: axes.stackplot(at, shares, alpha=0.85)))

    def level(self, label: str, y: float) -> None:
        """A line across at one height."""
        self.drawings.append(([label], lambda axes: [axes.axhline(y, linestyle="--", linewidth=1, color="gray")]))

    def limit(self, low: float, high: float) -> None:
        """What the upright axis shows."""
        self.drawings.append(([], lambda axes: axes.set_ylim(low, high)))

    def html(self) -> str:
        """The figure, its sentence, and its values for the script; nothing if there is nothing to draw."""
        if not any(series["x"] for series in self.series):
            return ""
        with mpl.rc_context({"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
            figure = Figure(figsize=SIZE)
            figure.subplots_adjust(**MARGINS)  # a layout by matplotlib draws everything twice
            figure.patch.set_alpha(0)
            axes = figure.subplots()
            axes.patch.set_alpha(0)
            legend: dict[str, Artist] = {}
            for names, draw in self.drawings:
                legend |= zip(names, draw(axes), strict=False)
            if self.is_log:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(lambda value, _place: in_powers_of_two(value))
                axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.yaxis, *([] if self.is_log else [axes.xaxis])):
                axis.set_major_formatter(lambda value, _place: short(value))
            axes.set_xlabel(self.x)
            axes.set_ylabel(self.y)
            is_inside = sum(map(len, legend)) <= LONGEST_LEGEND and len(legend) <= MOST_NAMES
            if legend and is_inside:
                texts = axes.legend(list(legend.values()), [""] * len(legend), fontsize=8, framealpha=0.4).get_texts()
                for text, name in zip(texts, legend, strict=True):  # as it is: `_` hides nothing, `$` begins no formula
                    text.set_text(name)
                    text.set_parse_math(False)
            image = io.StringIO()
            figure.savefig(image, format="svg", metadata={"Date": None})
        svg = image.getvalue()
        area = axes.get_position()
        values = {
            "x": self.x, "log": self.is_log, "limits": list(axes.get_xlim()), "box": [area.x0, area.x1],
            "series": self.series,
        }  # fmt: skip
        data = json.dumps(values, allow_nan=False).replace("<", "\\u003c")
        return (
            f'<figure><h2>{html.escape(self.title)}</h2>{svg[svg.index("<svg") :]}<div class="value"></div>'
            f"{'' if is_inside else legend_below(legend)}"
            f'<figcaption>{html.escape(self.sentence)}</figcaption><script type="application/json">{data}</script>'
            "</figure>"
        )


def short(value: float) -> str:
    """A number of a tick in few characters: 0.002, 1500, 20k, 1.5M."""
    size, name = next(((size, name) for size, name in UNITS if abs(value) >= 10 * size), (1.0, ""))
    return f"{value / size:.6g}{name}"


def legend_below(legend: dict[str, Artist]) -> str:
    """Names of lines with their colours and dashes, below a picture that they would cover."""
    names = (
        f'<span><i style="border-top:3px {CSS[str(line.get_linestyle())]} {to_hex(line.get_color())}"></i>'
        f"{html.escape(name)}</span>"
        for name, line in legend.items()
        if isinstance(line, Line2D)
    )
    return f'<p class="legend">{" ".join(names)}</p>'


def in_powers_of_two(value: float) -> str:
    """As people name them: 512, 1k, 128k, 1M."""
    for size, name in ((2**20, "M"), (2**10, "k")):
        if value >= size:
            return f"{value / size:.4g}{name}"
    return f"{value:.4g}"


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """So many points of a curve as can be seen: means over groups of neighbours."""
    group = -(-len(x) // POINTS)
    if group <= 1:
        return list(x), list(y)
    starts = range(0, len(x), group)
    means = [[sum(values[i : i + group]) / len(values[i : i + group]) for i in starts] for values in (x, y)]
    return means[0], means[1]


def with_peaks(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """As `thinned`, but with the least and the largest value of each group."""
    group = -(-len(x) // (POINTS // 2))
    if group <= 2:
        return list(x), list(y)
    kept = []
    for start in range(0, len(x), group):
        places = range(start, min(start + group, len(x)))
        kept += sorted({min(places, key=y.__getitem__), max(places, key=y.__getitem__)})
    return [x[i] for i in kept], [y[i] for i in kept]


def smoothed(y: list[float]) -> list[float]:
    """The mean over the last twentieth of the curve at each point, up to 50 values."""
    width = max(1, min(50, len(y) // 20))
    return [sum(y[max(0, i + 1 - width) : i + 1]) / len(y[max(0, i + 1 - width) : i + 1]) for i in range(len(y))]


def charts(made: list[Chart]) -> str:
    """Beside and below each other."""
    return f'<div class="charts">{"".join(chart.html() for chart in made)}</div>'


def figures(shown: list[tuple[str, str]]) -> str:
    """Figures that count: what each is, and its value with its unit."""
    cells = (f"<div>{html.escape(name)}<b>{html.escape(value)}</b></div>" for name, value in shown)
    return f'<div class="figures">{"".join(cells)}</div>'


def table(rows: list[list[str]], head: list[str] | None = None) -> str:
    """Of text; scrolled where the screen is narrow."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def folded(title: str, content: str) -> str:
    """What opens when it is asked for."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def page(title: str, body: str) -> str:
    """The whole document."""
    return PAGE.format(title=html.escape(title), style=STYLE, body=body, script=SCRIPT)
