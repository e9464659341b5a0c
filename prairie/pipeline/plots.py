"""The plots of a report, each as a string of SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

FIRE = "#c8501e"
INK = "#39402f"
LINES = (FIRE, INK, "#4a7c8c", "#b08a2e", "#7a5a8c", "#6b8c4a")


def accuracies(models: Mapping[str, Any]) -> str:
    """Held-out accuracy by task, a bar a model, with 95% intervals."""
    tasks = list(dict.fromkeys(task for scores in models.values() for task in scores["tasks"]))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(models)
    for number, (name, scores) in enumerate(models.items()):
        rows = [scores["tasks"][task] for task in tasks]
        at = [i + (number - (len(models) - 1) / 2) * width for i in range(len(tasks))]
        heights = [row["accuracy"] for row in rows]
        spread = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
        axes.bar(at, heights, width, yerr=spread, label=name, color=_shade(number, len(models)),
                 error_kw={"elinewidth": 0.8})  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("held-out accuracy")
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _svg(figure)


def curves(series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Training loss by step, a panel a stage."""
    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(9, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, points) in zip(panels, series.items(), strict=False):
        panel.plot([step for step, _ in points], [loss for _, loss in points], color=FIRE, linewidth=1.2)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels[len(series) :]:
        panel.set_axis_off()
    return _svg(figure)


@dataclass(frozen=True)
class Panel:
    """One small plot of a run: lines by name, each (step, value); `level` is a horizontal line with its name."""

    title: str
    lines: Mapping[str, Sequence[tuple[int, float]]]
    level: tuple[str, float] | None = None


def panels(shown: Sequence[Panel], columns: int = 2) -> str:
    """The panels in rows of `columns`; evaluations, of which there are few, get marks."""
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(9, 2.5 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, panel in zip(places, shown, strict=False):
        for number, (name, points) in enumerate(panel.lines.items()):
            mark = "o" if len(points) <= 12 else None
            place.plot([step for step, _ in points], [value for _, value in points], label=name, marker=mark,
                       markersize=3, linewidth=1.2, color=LINES[number % len(LINES)])  # fmt: skip
        if panel.level is not None:
            place.axhline(panel.level[1], color="#999", linewidth=1, linestyle="--", label=panel.level[0])
        if len(panel.lines) > 1 or panel.level is not None:
            place.legend(fontsize=7, frameon=False)
        place.set_title(panel.title, fontsize=9)
        place.tick_params(labelsize=7)
    for place in places[len(shown) :]:
        place.set_axis_off()
    return _svg(figure)


def turns(figures: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What the gate measured, and the true preference of candidate and champion against the first model."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    marks = [
        ("judged", "candidate against champion, held-out users", INK, -0.15),
        ("true", "champion after the turn against the first model, true preference", FIRE, 0.15),
    ]
    for key, label, colour, shift in marks:
        points = [(i + shift, f[key]) for i, (_, f) in enumerate(figures) if f.get(key)]
        if points:
            at = [x for x, _ in points]
            rate = [p["win_rate"] for _, p in points]
            spread = [[p["win_rate"] - p["low"] for _, p in points], [p["high"] - p["win_rate"] for _, p in points]]
            axes.errorbar(at, rate, yerr=spread, fmt="o", color=colour, label=label, capsize=3)
    axes.axhline(0.5, color="#999", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(figures)), [f"{n}\n{'promoted' if f['promoted'] else 'refused'}" for n, f in figures])
    axes.set_xlim(-0.5, len(figures) - 0.5)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("win rate")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _svg(figure)


def lineage(edges: Mapping[str, Sequence[str]]) -> str:
    """Which stage stands on which; left to right."""
    depth: dict[str, int] = {}
    for name in edges:  # stages come in order, so what a stage reads has its depth already
        depth[name] = 1 + max((depth.get(read, 0) for read in edges[name]), default=0)
    columns: dict[int, list[str]] = {}
    for name, level in depth.items():
        columns.setdefault(level, []).append(name)
    place = {
        name: (level, (len(names) - 1) / 2 - index)
        for level, names in columns.items()
        for index, name in enumerate(names)
    }
    tallest = max((len(names) for names in columns.values()), default=1)
    figure = Figure(figsize=(max(9, 1.25 * len(columns)), 0.55 * tallest + 0.8), layout="constrained")
    axes = figure.subplots()
    for name, reads in edges.items():
        for read in reads:
            axes.annotate("", xy=place[name], xytext=place[read],
                          arrowprops={"arrowstyle": "->", "color": "#999", "shrinkA": 18, "shrinkB": 18,
                                      "connectionstyle": "arc3,rad=0.06"})  # fmt: skip
    for name, (x, y) in place.items():
        axes.text(x, y, name, ha="center", va="center", fontsize=8, color=INK,
                  bbox={"boxstyle": "round,pad=0.3", "facecolor": "#f6efe2", "edgecolor": FIRE})  # fmt: skip
    axes.set_xlim(0.4, max(columns, default=1) + 0.6)
    axes.set_ylim(-(tallest - 1) / 2 - 0.7, (tallest - 1) / 2 + 0.7)
    axes.set_axis_off()
    return _svg(figure)


def _shade(number: int, count: int) -> tuple[float, float, float]:
    """From prairie grass to fire."""
    share = number / max(1, count - 1)
    grass, fire = (0.78, 0.80, 0.62), (0.78, 0.31, 0.12)
    return tuple(a + (b - a) * share for a, b in zip(grass, fire, strict=True))  # type: ignore[return-value]


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    return text[text.index("<svg") :]
