"""Sums, differences and the times table, in words: "What is seven plus twelve?", 十七加八等于几?

Held out: one problem in ten, in both languages and every phrasing. Its other order may be taught (9 + 7 after 7 + 9,
12 - 5 after 12 - 7), and for a product it always is: so small a table has too few facts to guess one from nothing.
Not here: negative results, division, digits in the question.
"""

from __future__ import annotations

import random
import re

from prairie.tasks.numbers import chinese, english, from_chinese, from_english
from prairie.tasks.task import Language, Split, Task, is_held_out

LARGEST_OPERAND = 20
LARGEST_FACTOR = 12
_SIGNS = {"+": ("plus", "加"), "-": ("minus", "减"), "x": ("times", "乘")}
_PHRASINGS: dict[Language, tuple[str, ...]] = {
    "en": ("What is {}?", "How much is {}?"),
    "zh": ("{}等于几?", "{}是多少?"),
}


def canonical(value: str) -> str | None:
    """The number itself: nineteen, 十九 and 19 are one answer."""
    if re.fullmatch(r"0|[1-9][0-9]{0,3}", value):
        return value
    number = from_chinese(value)
    number = from_english(value) if number is None else number
    return None if number is None else str(number)


def problem_is_held_out(sign: str, a: int, b: int) -> bool:
    if sign == "x":
        low, high = sorted((a, b))
        held_order = (high, low) if is_held_out("arithmetic", f"order of {low}x{high}", 2) else (low, high)
        return low != high and is_held_out("arithmetic", f"{low}x{high}", 6) and (a, b) == held_order
    return is_held_out("arithmetic", f"{a}{sign}{b}")


def draw(split: Split, rng: random.Random) -> tuple[Language, str, str]:
    sign = rng.choice("++++----xx")
    while True:
        largest = LARGEST_FACTOR if sign == "x" else LARGEST_OPERAND
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        if problem_is_held_out(sign, a, b) == (split == "held_out"):
            break
    result = {"+": a + b, "-": a - b, "x": a * b}[sign]
    language: Language = rng.choice(("en", "zh"))
    phrasing = rng.choice(_PHRASINGS[language])
    if language == "en":
        return language, phrasing.format(f"{english(a)} {_SIGNS[sign][0]} {english(b)}"), english(result)
    return language, phrasing.format(f"{chinese(a)}{_SIGNS[sign][1]}{chinese(b)}"), chinese(result)


TASK = Task("arithmetic", draw, canonical)
