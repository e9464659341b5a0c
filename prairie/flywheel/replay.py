"""What a candidate goes over again while it learns from votes: rows that its champion's lineage was made from.

A drawn set of conversations becomes an artifact of its own, which names the datasets that it was drawn from and every
event that stands in it: lineage shows it, forgetting a person finds it. A row that stands on votes is drawn only while
all of them count: what was forgotten or taken back does not come back by this way.
Not here: how the rows enter the loss (`prairie.train.objectives.replay`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prairie.data.records import Chat, Preference
from prairie.data.sources import write_records
from prairie.pipeline.context import Context, code_revision
from prairie.pipeline.data_stages import train_records
from prairie.recipe import VoteLearning
from prairie.store.artifacts import Artifact
from prairie.store.home import Home

CODE = ("data/records", "data/sources", "flywheel/replay")


def replayed(context: Context, config: VoteLearning, parent: Artifact, records: Artifact) -> Artifact | None:
    """The rows to go over while `parent` learns from `records`: drawn by the recipe's seed, the same every time. None
    if the recipe asks for none, or if the lineage holds none, which is said."""
    if config.replay is None:
        return None
    wanted = max(1, math.ceil(config.replay.share * records.figures["rows"] * (config.epochs or 1)))
    asked = config.replay.sources
    sources = [a for a in below(context.home, parent) if ("votes" if a.kind == "votes" else "data") in asked]
    known = _counting(context.home, sources)
    rows = [(row, source.id) for source in sources for row in _answers(source) if _stands(row, known)]
    if not rows:
        context.runtime.progress.say(
            f"nothing to go over again: {parent.name} was made from no conversations that are kept here"
        )
        return None
    drawn = random.Random(f"{context.recipe.seed}/{records.id}").sample(rows, min(wanted, len(rows)))
    kept = [row for row, _ in drawn]
    inputs = [source.id for source in sources if source.id in {id for _, id in drawn}]
    config_of_it = {"seed": context.recipe.seed, "for": records.id, "rows": wanted, "events": events_of(kept)}
    return sealed(context.home, f"replay-{records.name}", config_of_it, inputs, code_revision(CODE), kept)


def sealed(
    home: Home, name: str, config: dict[str, Any], inputs: Sequence[str], code: str, rows: Sequence[Chat]
) -> Artifact:
    """The artifact of these rows: the one that is there, or a new one."""
    store = home.artifacts
    id = store.id_of("replay", config, inputs, code)
    if store.find(id) is None:
        figures = {"rows": len(rows), "kind": "chat"}
        events = config["events"]
        with store.create("replay", name, config, inputs, code, figures=figures, events=events) as folder:
            write_records(folder / "train.jsonl", rows)
    return store.get(id)


def below(home: Home, model: Artifact) -> list[Artifact]:
    """The datasets that a model and those before it were made from, nearest first; not what those went over again."""
    found: dict[str, Artifact] = {}
    todo = [model]
    while todo:
        artifact = todo.pop(0)
        for id in artifact.inputs:
            below = home.artifacts.get(id)
            if id in found or below.kind == "replay":
                continue
            found[id] = below
            todo.append(below)
    return [a for a in found.values() if not a.is_model and "train.jsonl" in a.manifest["files"]]


def events_of(rows: Sequence[Chat]) -> list[str]:
    """Every event that these rows stand on."""
    return list(dict.fromkeys(event for row in rows for event in row.tags.get("events", ())))


def _answers(source: Artifact) -> list[Chat]:
    """Conversations to be learnt as they are: of a preference the side that was preferred, of judged answers those that
    were liked. Text is none."""
    found: list[Chat] = []
    for row in train_records(source.path):
        if isinstance(row, Preference):
            found.append(Chat((*row.prompt, *row.chosen), row.source, row.tags, row.tools))
        elif isinstance(row, Chat) and row.label is not False:
            tags = {name: value for name, value in row.tags.items() if name != "label"}
            found.append(replace(row, tags=tags, weight=1.0))
    return found


def _counting(home: Home, sources: Sequence[Artifact]) -> set[str]:
    """Ids of the events that count now, if any source stands on some."""
    return {str(event.id) for event in home.feedback.current()} if any(a.events for a in sources) else set()


def _stands(row: Chat, known: set[str]) -> bool:
    return set(row.tags.get("events", ())) <= known
