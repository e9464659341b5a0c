"""Task items x a generator -> scores with error bars, per task, per language and over all.

A generator is any function from conversations to answers: an engine, a remote endpoint, a lookup table in a test.
Not here: how answers are made, pairwise comparison (`arena`), what a fall of a score means for a release
(`prairie.flywheel.gate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prairie.data.records import Message
from prairie.errors import DataError
from prairie.evals.statistics import wilson
from prairie.tasks import catalog
from prairie.tasks.task import LANGUAGES, Item

Generate = Callable[[list[list[Message]]], list[str]]


@dataclass(frozen=True)
class TaskScore:
    """The share of items answered rightly. `results` keeps each item's outcome, so that two models' scores on the same
    items can be compared item by item."""

    task: str
    results: Mapping[str, bool]
    """Item id -> right or wrong."""
    by_language: Mapping[str, float]

    @property
    def n(self) -> int:
        return len(self.results)

    @property
    def accuracy(self) -> float:
        return sum(self.results.values()) / self.n

    @property
    def stderr(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def low(self) -> float:
        """Lower end of Wilson's 95% interval."""
        return wilson(sum(self.results.values()), self.n).low

    @property
    def high(self) -> float:
        return wilson(sum(self.results.values()), self.n).high

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "n": self.n,
            "accuracy": self.accuracy,
            "stderr": self.stderr,
            "low": self.low,
            "high": self.high,
            "by_language": dict(self.by_language),
        }

    def text(self) -> str:
        return f"{self.task:<12} {self.accuracy:6.1%}  [{self.low:.1%}, {self.high:.1%}]  n={self.n}"


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model and the answers that earned them, in the order of the items."""

    tasks: Mapping[str, TaskScore]
    overall: TaskScore
    items: Sequence[Item]
    answers: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "overall": self.overall.to_json(),
            "tasks": {name: score.to_json() for name, score in self.tasks.items()},
        }

    def text(self) -> str:
        return "\n".join(score.text() for score in (*self.tasks.values(), self.overall))

    def wrong(self) -> list[tuple[Item, str]]:
        """What went wrong, to be read."""
        return [
            (item, answer)
            for item, answer in zip(self.items, self.answers, strict=True)
            if not self.overall.results[item.id]
        ]


def evaluate(generate: Generate, items: Iterable[Item]) -> Evaluation:
    """All items in ONE call of `generate`, so that an engine can batch them.

    Raises DataError for no items, an item twice, or another number of answers than of questions."""
    items = list(items)
    if not items:
        raise DataError("there is nothing to evaluate on", wanted="at least one item")
    if len({item.id for item in items}) != len(items):
        raise DataError("an item stands twice in the suite, so it would count twice", mend="draw distinct items")
    answers = generate([[Message("user", item.prompt)] for item in items])
    if len(answers) != len(items):
        raise DataError("the generator lost answers", got=f"{len(answers)}", wanted=f"{len(items)}")
    right = {item.id: catalog.check(item, answer) for item, answer in zip(items, answers, strict=True)}
    names = dict.fromkeys(item.task for item in items)
    tasks = {name: _score(name, [item for item in items if item.task == name], right) for name in names}
    return Evaluation(tasks, _score("overall", items, right), items, answers)


def _score(name: str, items: Sequence[Item], right: Mapping[str, bool]) -> TaskScore:
    by_language: dict[str, float] = {}
    for language in LANGUAGES:
        outcomes = [right[item.id] for item in items if item.language == language]
        if outcomes:
            by_language[language] = sum(outcomes) / len(outcomes)
    return TaskScore(name, {item.id: right[item.id] for item in items}, by_language)
