"""Weekdays, months and dates: 3 days after Tuesday, 5 months before March, 2026-11-22 in English or Chinese.

Held out: one (start, steps, direction) in ten, in both languages, and one date in ten, in every form. Steps stay below
one turn of the week or year, so "4 days before Tuesday" and "3 days after Tuesday" share an answer; a held-out step is
never the only road to its answer. Not here: leap years, the weekday of a date, clock times.
"""

from __future__ import annotations

import datetime
import random
import re

from prairie.tasks.task import Language, Split, Task, is_held_out

_DAYS = {
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "zh": [f"星期{day}" for day in "一二三四五六日"],
}
_MONTHS = {
    "en": [
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ],
    "zh": [f"{month}月" for month in range(1, 13)],
}
_FIRST_YEAR, _LAST_YEAR = 1900, 2099


def canonical(value: str) -> str | None:
    """A weekday, a month or a date as it is written; 星期天 is 星期日. A date that does not exist is no value."""
    value = value.replace("星期天", "星期日")
    if any(value in names for table in (_DAYS, _MONTHS) for names in table.values()):
        return value
    patterns = (r"(?P<y>\d{4})-(?P<m>\d\d)-(?P<d>\d\d)", r"(?P<y>\d{4})年(?P<m>\d{1,2})月(?P<d>\d{1,2})日")
    for pattern in (*patterns, rf"(?P<d>\d{{1,2}}) (?P<m>{'|'.join(_MONTHS['en'])}) (?P<y>\d{{4}})"):
        if match := re.fullmatch(pattern, value, re.ASCII):
            month = match["m"]
            number = _MONTHS["en"].index(month) + 1 if month.isalpha() else int(month)
            try:
                datetime.date(int(match["y"]), number, int(match["d"]))
            except ValueError:
                return None
            return value
    return None


def _step(split: Split, rng: random.Random) -> tuple[Language, str, str]:
    months = rng.random() < 0.5
    names = _MONTHS if months else _DAYS
    turn = len(names["en"])
    while True:
        start, steps, sign = rng.randrange(turn), rng.randrange(1, turn), rng.choice((1, -1))
        if is_held_out("dates", f"{turn} {start} {steps * sign}") == (split == "held_out"):
            break
    language: Language = rng.choice(("en", "zh"))
    end = names[language][(start + steps * sign) % turn]
    if language == "en":
        unit = ("month" if months else "day") + ("s" if steps > 1 else "")
        word, direction = "month" if months else "day", "after" if sign > 0 else "before"
        return language, f"What {word} comes {steps} {unit} {direction} {names[language][start]}?", end
    unit, asked = ("个月", "几月") if months else ("天", "星期几")
    return language, f"{names[language][start]}{'之后' if sign > 0 else '之前'}第{steps}{unit}是{asked}?", end


def _form(split: Split, rng: random.Random) -> tuple[Language, str, str]:
    first = datetime.date(_FIRST_YEAR, 1, 1).toordinal()
    last = datetime.date(_LAST_YEAR, 12, 31).toordinal()
    while True:
        date = datetime.date.fromordinal(rng.randint(first, last))
        if is_held_out("dates", date.isoformat()) == (split == "held_out"):
            break
    english = f"{date.day} {_MONTHS['en'][date.month - 1]} {date.year}"
    chinese = f"{date.year}年{date.month}月{date.day}日"
    questions: tuple[tuple[Language, str, str], ...] = (
        ("en", f"Write {date.isoformat()} in English.", english),
        ("en", f"Write {date.isoformat()} in Chinese.", chinese),
        ("en", f"Write {english} as an ISO date.", date.isoformat()),
        ("zh", f"把{date.isoformat()}写成中文。", chinese),
        ("zh", f"把{date.isoformat()}写成英文。", english),
        ("zh", f"把{chinese}写成ISO日期。", date.isoformat()),
    )
    return rng.choice(questions)


def draw(split: Split, rng: random.Random) -> tuple[Language, str, str]:
    return (_step if rng.random() < 0.4 else _form)(split, rng)


TASK = Task("dates", draw, canonical)
