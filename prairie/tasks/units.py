"""Units of length, mass, volume and time: "Convert 3 km to m.", 5小时等于多少分钟?

Held out: one quantity in ten for each pair of units, in both directions and languages. Not here: fractions (whole
results only), imperial units, temperatures.
"""

from __future__ import annotations

import random
import re

from prairie.tasks.task import Language, Split, Task, is_held_out

CONVERSIONS: tuple[tuple[str, str, int, int], ...] = (
    # larger unit, smaller unit, how many of the smaller, largest quantity asked
    ("km", "m", 1000, 999),
    ("m", "cm", 100, 999),
    ("m", "mm", 1000, 999),
    ("cm", "mm", 10, 999),
    ("kg", "g", 1000, 999),
    ("t", "kg", 1000, 999),
    ("l", "ml", 1000, 999),
    ("hours", "minutes", 60, 30),
    ("minutes", "seconds", 60, 30),
    ("weeks", "days", 7, 30),
)
_WEIGHTS = [3 if factor % 10 == 0 and factor != 60 else 1 for _, _, factor, _ in CONVERSIONS]
"""Decimal units have thirty times the quantities of the others, and are asked for three times as often."""
_CHINESE = {
    "km": "公里",
    "m": "米",
    "cm": "厘米",
    "mm": "毫米",
    "kg": "公斤",
    "g": "克",
    "t": "吨",
    "l": "升",
    "ml": "毫升",
    "hours": "小时",
    "minutes": "分钟",
    "seconds": "秒",
    "weeks": "周",
    "days": "天",
}
_UNITS = sorted({*_CHINESE, *_CHINESE.values()}, key=len, reverse=True)


def canonical(value: str) -> str | None:
    """Number and unit; the space between them does not matter, "1 hour" is "1 hours", a number without unit is none."""
    value = re.sub(r"(hour|minute|second|week|day)$", r"\1s", value)
    match = re.fullmatch(rf"([1-9][0-9]*) ?({'|'.join(_UNITS)})", value)
    return f"{match[1]} {match[2]}" if match else None


def _in_english(quantity: int, unit: str) -> str:
    return f"{quantity} {unit.removesuffix('s') if quantity == 1 and len(unit) > 2 else unit}"


def draw(split: Split, rng: random.Random) -> tuple[Language, str, str]:
    large, small, factor, largest = rng.choices(CONVERSIONS, _WEIGHTS)[0]
    while True:
        quantity = rng.randint(1, rng.choice((9, 99, largest)) if largest > 99 else largest)
        if is_held_out("units", f"{quantity} {large} {small}") == (split == "held_out"):
            break
    sides = [(quantity, large), (quantity * factor, small)]
    if rng.random() < 0.4:
        sides.reverse()
    (given, from_unit), (wanted, to_unit) = sides
    language: Language = rng.choice(("en", "zh"))
    if language == "zh":
        prompt = rng.choice(("{}{}等于多少{}?", "把{}{}换算成{}。"))
        return language, prompt.format(given, _CHINESE[from_unit], _CHINESE[to_unit]), f"{wanted}{_CHINESE[to_unit]}"
    prompt = rng.choice(("Convert {} to {}.", "What is {} in {}?"))
    return language, prompt.format(_in_english(given, from_unit), to_unit), _in_english(wanted, to_unit)


TASK = Task("units", draw, canonical)
