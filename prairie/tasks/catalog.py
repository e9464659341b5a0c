"""The tasks by name, and the same questions asked of any item: check, reward, worded, style.

Not here: what a task is (`task`), the tasks themselves (one file each).
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence

from prairie.data.records import Chat
from prairie.errors import NotFoundError
from prairie.tasks import arithmetic, dates, docs, numbers, units
from prairie.tasks.task import STYLES, Item, Split, Style, Task

TASKS: Mapping[str, Task] = {
    task.name: task for task in (numbers.TASK, arithmetic.TASK, dates.TASK, units.TASK, docs.TASK)
}


def task(name: str) -> Task:
    """Raises NotFoundError naming the nearest task."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    mend = f"did you mean {near[0]}?" if near else "choose one of them"
    raise NotFoundError("no such task", got=name, wanted=" | ".join(TASKS), mend=mend)


def check(item: Item, text: str) -> bool:
    return task(item.task).check(item, text)


def reward(item: Item, text: str) -> float:
    return task(item.task).reward(item, text)


def style_of(item: Item, text: str) -> Style:
    return task(item.task).read(item, text)[0]


def worded(item: Item, style: Style, value: str | None = None) -> str:
    return task(item.task).worded(item, style, value)


def items(names: Sequence[str], split: Split, count: int, seed: int, *, distinct: bool | None = None) -> list[Item]:
    """`count` items of EACH named task, shuffled together."""
    drawn = [item for name in names for item in task(name).items(split, count, seed, distinct=distinct)]
    random.Random(f"items/{split}/{seed}").shuffle(drawn)
    return drawn


def chats(names: Sequence[str], split: Split, count: int, seed: int, styles: Sequence[Style] = STYLES) -> list[Chat]:
    """`count` conversations of EACH named task, shuffled together; see `Task.chats`."""
    made = [chat for name in names for chat in task(name).chats(split, count, seed, styles)]
    random.Random(f"chats/{split}/{seed}").shuffle(made)
    return made
