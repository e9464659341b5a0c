"""`prairie evaluate`: models on the frozen held-out items of the tasks, with 95% intervals."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prairie.cli.options import HomeOption, JsonOption, emit, say, table


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Lines, versions or model folders.")],
    tasks: Annotated[str, typer.Option(help="Names joined by commas; default: all tasks.")] = "",
    items: Annotated[int, typer.Option(min=1, help="Held-out items of each task.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 48,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score models on held-out tasks, with intervals."""
    import prairie
    from prairie.pipeline.held_out import score_suite, suite
    from prairie.tasks.catalog import TASKS, task

    names = [name.strip() for name in tasks.split(",") if name.strip()] or list(TASKS)
    asked = suite([task(name).name for name in names], items)
    loaded = [prairie.load(name, home) for name in models]  # a wrong name is found before the first minute of work
    found: dict[str, dict[str, Any]] = {}
    for name, model in zip(models, loaded, strict=True):
        say(f"{name}: {len(asked)} items")
        found[name] = score_suite(model, asked, max_tokens).to_json()
    emit({"items": items, "models": found}, as_json, lambda: _text(found))


def _text(found: dict[str, dict[str, Any]]) -> str:
    tasks = [*next(iter(found.values()))["tasks"], "overall"]
    rows = [[name, *(_cell({**scores["tasks"], "overall": scores["overall"]}[t]) for t in tasks)]
            for name, scores in found.items()]  # fmt: skip
    return table(["model", *tasks], rows)


def _cell(score: dict[str, Any]) -> str:
    return f"{score['accuracy']:.1%} [{score['low']:.1%}, {score['high']:.1%}]"
