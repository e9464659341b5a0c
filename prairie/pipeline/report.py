"""What a run came to: one JSON object, one table for the terminal, one self-contained `report.html`.

Everything is read back from the artifacts, so a report of a reused run equals the report of the run that made it.
"""

from __future__ import annotations

import html
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prairie.pipeline import plots
from prairie.pipeline.context import Context, Made, Work
from prairie.recipe import Report
from prairie.store.disk import disk_errors

STYLE = """
:root{color-scheme:light dark;--ink:#22281f;--paper:#fbfaf6;--line:#d9d6c8;--fire:#c8501e;--soft:#f1eee3}
@media(prefers-color-scheme:dark){:root{--ink:#e8e5da;--paper:#191a17;--line:#3a3b34;--soft:#23241f;--fire:#f08a4b}}
body{font:15px/1.55 system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;color:var(--ink);
background:var(--paper);max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-weight:650}h2{margin-top:2.4rem;border-bottom:2px solid var(--fire);padding-bottom:.2rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}td,th{border-bottom:1px solid var(--line);
padding:.3rem .5rem;text-align:left;vertical-align:top;overflow-wrap:break-word}
th{font-weight:600}small,.quiet{opacity:.7}
pre{background:var(--soft);padding:.8rem;overflow:auto;border-radius:6px;white-space:pre-wrap}
.wide{overflow-x:auto}figure{margin:1rem 0;background:#fff;border-radius:6px;padding:.4rem}
svg{max-width:100%;height:auto}
.right{color:#2f7d32}.wrong{color:var(--fire)}
"""


def report(work: Work) -> dict[str, Any]:
    """The `report` stage: writes HOME/reports/NAME/report.html and leaves its path."""
    config: Report = work.config
    folder = work.context.home.root / "reports" / work.context.recipe.name
    path, draft = folder / "report.html", folder / "report.html.part"
    text = page(work.context, [work.inputs[name] for name in config.of], config.samples)
    with disk_errors(f"the report {path} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    return {"path": str(path)}


def result_of(context: Context) -> dict[str, Any]:
    """The JSON object of a run: every stage's id, time and figures, the table, the report's path."""
    stages = {
        name: {
            "kind": made.kind,
            "id": made.artifact.id if made.artifact else None,
            "seconds": round(made.seconds, 2),
            "reused": made.reused,
            "figures": made.figures,
        }
        for name, made in context.made.items()
    }
    reports = [made.figures["path"] for made in context.made.values() if made.kind == "report"]
    return {
        "recipe": context.recipe.name,
        "recipe_hash": context.recipe.hash(),
        "seconds": round(sum(made.seconds for made in context.made.values()), 1),
        "stages": stages,
        "table": table(list(context.made.values())),
        "report": reports[0] if reports else None,
    }


def table(made: Sequence[Made]) -> str:
    """Accuracy by model and task with half-widths of the 95% intervals, losses, verdicts; plain text."""
    lines: list[str] = []
    for stage in made:
        if stage.kind == "evaluate":
            lines += _score_lines(stage.figures["models"])
        if stage.kind in ("turn", "selfplay"):
            lines.append(f"{stage.name}: {stage.figures['summary']}")
    return "\n".join(lines) or "\n".join(f"{stage.name}: {stage.kind}, {stage.seconds:.1f}s" for stage in made)


def page(context: Context, stages: Sequence[Made], samples: int) -> str:
    """The whole HTML page."""
    recipe = context.recipe
    evaluations = [made for made in stages if made.kind == "evaluate"]
    turns = [made for made in stages if made.kind == "turn"]
    parts = [
        f"<h1>{html.escape(recipe.name)}</h1><p>{html.escape(recipe.about)}</p>",
        f"<p class=quiet>recipe {recipe.hash()[:12]} · seed {recipe.seed} · "
        f"{sum(m.figures.get('seconds', m.seconds) for m in context.made.values()):.0f} s in all · "
        f"{html.escape(platform.processor() or platform.machine())}, {context.runtime.threads} threads · "
        f"Python {platform.python_version()} · {time.strftime('%Y-%m-%d %H:%M')}</p>",
    ]
    for made in evaluations:
        parts.append(_evaluation(made, samples))
    if turns:
        parts.append(_turns(turns))
    parts.append("<h2>Training</h2>" + _curves(stages))
    parts.append("<h2>Lineage</h2>" + _figure(plots.lineage(_edges(stages))))
    parts.append("<h2>Stages</h2>" + _stage_table(stages))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(recipe.name)} · Prairie</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def _score_lines(models: dict[str, Any]) -> list[str]:
    tasks = list(dict.fromkeys(task for scores in models.values() for task in scores["tasks"]))
    losses = list(dict.fromkeys(stage for scores in models.values() for stage in scores["loss"]))
    pairs = list(dict.fromkeys(stage for scores in models.values() for stage in scores["preferences"]))
    sampled = ["sampled"] if any("sampled" in scores for scores in models.values()) else []
    head = [
        *tasks,
        *sampled,
        *(f"loss {stage}" for stage in losses),
        *(f"reward {stage}" for stage in pairs),
        *(f"likelier {stage}" for stage in pairs),
    ]
    widths = [max(len(title), 11) for title in head]
    first = max([len(name) for name in models] + [5])
    rows = [["model".ljust(first), *(t.rjust(w) for t, w in zip(head, widths, strict=True))]]
    for name, scores in models.items():
        cells = [_accuracy(scores["tasks"].get(task)) for task in tasks]
        cells += [_accuracy(scores.get(column)) for column in sampled]
        cells += [_loss_cell(scores["loss"].get(stage)) for stage in losses]
        cells += [_accuracy(scores["preferences"].get(stage)) for stage in pairs]
        cells += [_likelihood(scores["preferences"].get(stage)) for stage in pairs]
        rows.append([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])
    return ["  ".join(row) for row in rows]


def _accuracy(score: dict[str, Any] | None) -> str:
    if not score:
        return "-"
    return f"{score['accuracy']:.1%} ±{(score['high'] - score['low']) / 2:.1%}"


def _likelihood(pairs: dict[str, Any] | None) -> str:
    if not pairs:
        return "-"
    low, high = pairs["likelihood_low"], pairs["likelihood_high"]
    return _accuracy({"accuracy": pairs["accuracy_by_likelihood"], "low": low, "high": high})


def _loss_cell(loss: dict[str, Any] | None) -> str:
    if not loss:
        return "-"
    return f"{loss['bits_per_byte']:.3f} b/B" if "bits_per_byte" in loss else f"{loss['loss']:.4f}"


def _evaluation(made: Made, samples: int) -> str:
    models: dict[str, Any] = made.figures["models"]
    head, *rows = (line.split("  ") for line in _score_lines(models))
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row if c.strip()) + "</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(c)}</th>" for c in head if c.strip())
    out = f"<h2>{html.escape(made.name)}</h2><div class=wide><table><tr>{titles}</tr>{cells}</table></div>"
    out += "<p class=quiet>Held-out items, greedy answers, 95% Wilson intervals; `sampled`: all at temperature 1.</p>"
    if any(scores["tasks"] for scores in models.values()):
        out += _figure(plots.accuracies(models))
    return out + (_samples(made, samples) if samples and made.artifact else "")


def _samples(made: Made, count: int) -> str:
    answers = {
        path.stem.removeprefix("answers-"): [json.loads(line) for line in path.open(encoding="utf-8")]
        for path in sorted(made.product.path.glob("answers-*.jsonl"))
    }
    answers = {name: answers[name] for name in made.figures["models"] if name in answers}
    if not answers:
        return ""
    total = len(next(iter(answers.values())))
    chosen = [i * total // count for i in range(min(count, total))]
    names = list(answers)
    out = ["<h3>Samples</h3><div class=wide><table><tr><th>question<th>right answer"]
    out += [f"<th>{html.escape(name)}" for name in names]
    for index in chosen:
        row = answers[names[0]][index]
        out.append(f"<tr><td>{html.escape(row['prompt'])}<td>{html.escape(row['want'])}")
        out += [f"<td>{html.escape(answers[name][index]['answer'][:160])}" for name in names]
    return "".join(out) + "</table></div>"


def _turns(turns: Sequence[Made]) -> str:
    first = turns[0].figures
    out = ["<h2>Turns of the wheel</h2>", f"<p>{html.escape(first.get('hidden_preference', ''))}</p>"]
    out.append(_figure(plots.turns([(made.name, made.figures) for made in turns])))
    for made in turns:
        figures = made.figures
        out.append(f"<h3>{html.escape(made.name)}: {html.escape(figures['summary'])}</h3>")
        out.append(f"<pre>{html.escape(figures['verdict_text'])}</pre>")
    return "".join(out)


def _curves(stages: Sequence[Made]) -> str:
    curves = {}
    for made in stages:
        path = made.artifact.path / "metrics.jsonl" if made.artifact else Path("-")
        if made.kind == "train" and path.is_file():
            rows = [json.loads(line) for line in path.open(encoding="utf-8")]
            curves[made.name] = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    return _figure(plots.curves(curves)) if curves else "<p>Nothing was trained.</p>"


def _edges(stages: Sequence[Made]) -> dict[str, list[str]]:
    known = {made.name for made in stages}
    edges = {}
    for made in stages:
        reads = made.artifact.manifest["config"]["reads"] if made.artifact else made.figures.get("reads", {})
        edges[made.name] = [name for name in reads if name in known]
    return edges


def _stage_table(stages: Sequence[Made]) -> str:
    rows = []
    for made in stages:
        simple = {k: v for k, v in made.figures.items() if isinstance(v, int | float | str) and len(str(v)) < 60}
        figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in simple.items())
        name = made.artifact.id[:12] if made.artifact else "-"
        rows.append(f"<tr><td>{html.escape(made.name)}<td>{made.kind}<td><code>{name}</code><td>{html.escape(figures)}")
    return f"<div class=wide><table><tr><th>stage<th>kind<th>artifact<th>figures{''.join(rows)}</table></div>"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"
