"""What a task is: items with an exact answer, the wordings an answer may come in, a check and a reward.

An item's `answer` is a value ("四千零七十二", "Friday", "3000 m"). How a value is WORDED is a style, orthogonal to
correctness: every style is an anchored template, so a reader takes the style off and compares the value alone. Text
that fits no template must be the value itself, whole: a right value somewhere inside a wrong answer earns nothing.

A task knows which of its facts are held out; the training split never shows one of those facts, in any phrasing.
Not here: the tasks (one short file each), the list of them (`catalog`), scoring a model (`prairie.evals.harness`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prairie.data.records import Chat, Message
from prairie.errors import DataError

Split = Literal["train", "held_out"]
Language = Literal["en", "zh"]
Style = Literal["plain", "sentence", "warm"]
SPLITS: tuple[Split, ...] = get_args(Split)
LANGUAGES: tuple[Language, ...] = get_args(Language)
STYLES: tuple[Style, ...] = get_args(Style)

WORDINGS: Mapping[Language, Mapping[Style, str]] = {
    "en": {"plain": "{a}", "sentence": "The answer is {a}.", "warm": "Sure! It is {a}. Anything else?"},
    "zh": {"plain": "{a}", "sentence": "答案是{a}。", "warm": "好的!是{a}。还有别的吗?"},
}
"""How most tasks word a value; a task whose values are whole sentences brings its own."""

WELL_FORMED_REWARD = 0.1
"""For a wrong value that is at least a value: enough to teach the form, far too little to be worth guessing for."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question with one right value; `id` is a hash of all the rest, the same on every machine."""

    task: str
    id: str
    language: Language
    prompt: str
    answer: str

    def to_json(self) -> dict[str, str]:
        return {
            "task": self.task,
            "id": self.id,
            "language": self.language,
            "prompt": self.prompt,
            "answer": self.answer,
        }


@dataclass(frozen=True)
class Task:
    """Items of one kind.

    draw: one question for a split, as (language, prompt, answer); must never cross the splits.
    canonical: a value's normal form (two spellings of one value have one), or None for what is no value of this task.
    """

    name: str
    draw: Callable[[Split, random.Random], tuple[Language, str, str]]
    canonical: Callable[[str], str | None]
    wordings: Mapping[Language, Mapping[Style, str]] = field(default_factory=lambda: WORDINGS)

    def items(self, split: Split, count: int, seed: int, *, distinct: bool | None = None) -> list[Item]:
        """`count` items, the same for the same arguments. Held-out items are distinct unless told otherwise, training
        items may repeat. Raises DataError for an unknown split or when so many distinct items do not exist."""
        if split not in SPLITS:
            raise DataError(f"task {self.name} has no such split", got=repr(split), wanted=" | ".join(SPLITS))
        distinct = split == "held_out" if distinct is None else distinct
        rng = random.Random(f"{self.name}/{split}/{seed}")
        made: list[Item] = []
        seen: set[str] = set()
        failures = 0
        while len(made) < count:
            item = self._item(split, rng)
            if distinct and item.id in seen:
                failures += 1
                if failures > 2000:  # in a row: what is left unseen, if anything, is drawn too rarely to wait for
                    raise DataError(
                        f"task {self.name} has too few distinct {split} items",
                        got=f"{len(made)} found",
                        wanted=f"{count}",
                        mend="ask for fewer items",
                    )
                continue
            failures = 0
            seen.add(item.id)
            made.append(item)
        return made

    def _item(self, split: Split, rng: random.Random) -> Item:
        language, prompt, answer = self.draw(split, rng)
        digest = hashlib.sha256("\n".join((self.name, language, prompt, answer)).encode()).hexdigest()
        return Item(self.name, f"{self.name}-{digest[:12]}", language, prompt, answer)

    def worded(self, item: Item, style: Style, value: str | None = None) -> str:
        """The right answer (or `value`) in a style."""
        return self.wordings[item.language][style].replace("{a}", item.answer if value is None else value)

    def read(self, item: Item, text: str) -> tuple[Style, str]:
        """(style, value) of an answer. Whatever fits no other template is `plain`, and its value is the whole text."""
        text = text.strip()
        for style, template in self.wordings[item.language].items():
            before, after = template.split("{a}")
            if style != "plain" and (match := re.fullmatch(f"{re.escape(before)}(.+){re.escape(after)}", text)):
                return style, match[1]
        return "plain", text

    def check(self, item: Item, text: str) -> bool:
        """Is the value right? Exact: no substring, no leading or trailing chatter beyond a known wording."""
        value = self.canonical(self.read(item, text)[1])
        return value is not None and value == self.canonical(item.answer)

    def reward(self, item: Item, text: str) -> float:
        """1 for the right value, `WELL_FORMED_REWARD` for another value of this task, 0 for anything else."""
        if self.check(item, text):
            return 1.0
        return WELL_FORMED_REWARD if self.canonical(self.read(item, text)[1]) is not None else 0.0

    def chats(self, split: Split, count: int, seed: int, styles: Sequence[Style] = STYLES) -> list[Chat]:
        """Supervised conversations. Styles take turns, so each is equally common whatever the item: a preference for
        one of them stays something that votes can teach. Tags: task, language, style, item (its id)."""
        if unknown := [style for style in styles if style not in STYLES]:
            raise DataError("no such style", got=", ".join(unknown), wanted=" | ".join(STYLES))
        chats = []
        for index, item in enumerate(self.items(split, count, seed, distinct=False)):
            style = styles[index % len(styles)]
            messages = (Message("user", item.prompt), Message("assistant", self.worded(item, style)))
            tags: dict[str, Any] = {"task": self.name, "language": item.language, "style": style, "item": item.id}
            chats.append(Chat(messages, source=f"task:{self.name}", tags=tags))
        return chats


def is_held_out(task: str, fact: str, one_in: int = 10) -> bool:
    """Does this fact belong to the held-out split? Decided by a hash of its name, so it never depends on a seed."""
    return int(hashlib.sha256(f"{task}:{fact}".encode()).hexdigest()[:8], 16) % one_in == 0


def draw_until(
    split: Split, rng: random.Random, make: Callable[[], tuple[str, tuple[Language, str, str]]], task: str
) -> tuple[Language, str, str]:
    """Draws (fact name, question) until the fact is of the wanted split."""
    for _ in range(10_000):
        fact, question = make()
        if is_held_out(task, fact) == (split == "held_out"):
            return question
    raise DataError(f"task {task} has no {split} facts")
