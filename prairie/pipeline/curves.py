"""`curves.html` beside a trained model: one self-contained page that says how the training went.

Everything is read from the lines of metrics.jsonl. Not here: the report of a whole recipe (`report`), how it is drawn
(`plots`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prairie.pipeline import plots
from prairie.pipeline.plots import Panel
from prairie.pipeline.report import STYLE

Points = list[tuple[int, float]]

TRAINING = (
    ("gradient norm, before it is clipped", ("grad_norm",)),
    ("learning rate", ("lr",)),
    ("tokens a second", ("tokens_per_s",)),
    ("share of the machine's matrix product (MFU)", ("mfu",)),
    ("shares of tokens: supervised, padding in attention", ("supervised_share", "padding")),
)
"""Panels of every run: title, and the figures of a line in it."""
PREFERENCES = (
    ("log-probability of an answer", ("logps_chosen", "logps_rejected")),
    ("score", ("score_chosen", "score_rejected")),
    ("margin", ("margin",)),
    ("tokens of an answer", ("length_chosen", "length_rejected")),
)


def curve_page(metrics: Path, title: str, figures: Mapping[str, Any]) -> str:
    """The whole page, of a run's metrics.jsonl and the figures that it ended with."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    drawn = plots.panels(panels_of(lines, figures))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)} · training · Prairie</title><style>{STYLE}figure svg{{width:100%}}</style><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(_summary(figures))}</p><figure>{drawn}</figure>"
        f"<h2>Figures</h2><div class=wide><table>{_rows(figures)}</table></div></body></html>"
    )


def panels_of(lines: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> list[Panel]:
    """What a run's lines have to show; a panel without a point is left out."""
    steps = [line for line in lines if "loss" in line]
    looks = [line for line in lines if "evaluation" in line]
    baseline = figures.get("length_baseline")
    held_out = _by_name(looks, lambda look: {k: v["loss"] for k, v in look.get("held_out", {}).items()})
    accurate = _by_name(looks, lambda look: {k: v["accuracy"] for k, v in look.get("held_out", {}).items()
                                             if "accuracy" in v})  # fmt: skip
    tasks = _by_name(looks, lambda look: look.get("tasks", {}))
    accuracy = {"training": _points(steps, "accuracy"), **{f"held out: {k}": v for k, v in accurate.items()}}
    found = [
        Panel("loss", {"training": _points(steps, "loss"), **{f"held out: {k}": v for k, v in held_out.items()}}),
        Panel("accuracy", accuracy, None if baseline is None else ("length alone", float(baseline))),
        Panel("held-out accuracy of tasks", tasks),
    ]
    found += [Panel(title, {n: _points(steps, n) for n in names}) for title, names in (*PREFERENCES, *TRAINING)]
    full = [Panel(p.title, {name: points for name, points in p.lines.items() if points}, p.level) for p in found]
    return [panel for panel in full if panel.lines]


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [(line["step"], line[name]) for line in lines if name in line]


def _by_name(
    looks: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], Mapping[str, float]]
) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for look in looks:
        for name, value in values(look["evaluation"]).items():
            found.setdefault(name, []).append((look["step"], value))
    return found


def _summary(figures: Mapping[str, Any]) -> str:
    parts = [f"{figures['steps']} steps", f"{figures['tokens']:,} tokens", f"{figures['seconds']:.1f} s"]
    parts.append(f"loss {figures['loss_first']:.4g} to {figures['loss_last']:.4g}")
    if "best_step" in figures:
        parts.append(f"best score {figures['best_score']:.4g} at step {figures['best_step']}")
    if "ended" in figures:
        parts.append(f"ended early: {figures['ended']}")
    if "length_baseline" in figures:
        parts.append(f"length alone tells {figures['length_baseline']:.0%} of the pairs")
    return " · ".join(parts)


def _rows(figures: Mapping[str, Any], before: str = "") -> str:
    out = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            out.append(_rows(value, f"{before}{name}: "))
        elif not isinstance(value, list):
            shown = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            out.append(f"<tr><td>{html.escape(before + name)}<td>{html.escape(str(shown))}")
    return "".join(out)
