"""Numbers 0 to 9999 between digits, Chinese numerals and English words.

Held out: one number in ten above twenty (the round tens below a hundred are always taught): such a number is never in
the training split, in any direction or language. Not here: arithmetic, fractions, ordinals, numbers of five digits.
"""

from __future__ import annotations

import random
import re

from prairie.tasks.task import Language, Split, Task, is_held_out

LARGEST = 9999
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DIGITS = "零一二三四五六七八九"

PHRASINGS: tuple[tuple[Language, str, str, str], ...] = (
    # language of the prompt, form given, form wanted, prompt
    ("en", "digits", "zh", "Write {} in Chinese."),
    ("en", "digits", "zh", "How do you write {} in Chinese?"),
    ("en", "digits", "en", "Write {} in English words."),
    ("en", "digits", "en", "Spell out {}."),
    ("en", "en", "digits", "Write {} in digits."),
    ("en", "en", "digits", "What number is {}?"),
    ("en", "zh", "digits", "What number is {}?"),
    ("zh", "digits", "zh", "把{}写成中文数字。"),
    ("zh", "digits", "zh", "{}用中文怎么写?"),
    ("zh", "digits", "en", "把{}写成英文。"),
    ("zh", "zh", "digits", "把{}写成阿拉伯数字。"),
    ("zh", "zh", "digits", "{}是多少?"),
    ("zh", "en", "digits", "{}是多少?"),
)


def english(number: int) -> str:
    """In words, American: 4072 is "four thousand seventy-two"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    return f"{english(number // unit)} {name}" + (f" {english(number % unit)}" if number % unit else "")


def chinese(number: int) -> str:
    """In numerals: 4072 is 四千零七十二, 17 is 十七, 110 is 一百一十, 4010 is 四千零一十."""
    if number == 0:
        return "零"
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // unit % 10
        if digit:
            text += ("零" if gap and text else "") + _DIGITS[digit] + name
        gap = digit == 0
    return text[1:] if 10 <= number < 20 else text


def from_english(text: str) -> int | None:
    """Back from words; "and", hyphens and capitals do not matter. None for anything that `english` would not say."""
    words = [word for word in text.casefold().replace("-", " ").split() if word != "and"]
    total = group = 0
    for word in words:
        if word in _ONES:
            group += _ONES.index(word)
        elif word in _TENS[2:]:
            group += 10 * _TENS.index(word)
        elif word == "hundred":
            group *= 100
        elif word == "thousand":
            total, group = group * 1000, 0
        else:
            return None
    number = total + group
    said_so = number <= LARGEST and words == english(number).replace("-", " ").split()
    return number if said_so else None


def from_chinese(text: str) -> int | None:
    """Back from numerals (两 reads as 二). None for anything that `chinese` would not say."""
    text = text.replace("两", "二")
    number = digit = 0
    for letter in text:
        if letter in "千百十":
            number += (digit or 1) * {"千": 1000, "百": 100, "十": 10}[letter]
            digit = 0
        elif letter in _DIGITS:
            digit = _DIGITS.index(letter)
        else:
            return None
    number += digit
    return number if text and number <= LARGEST and chinese(number) == text else None


def canonical(value: str) -> str | None:
    """The number with the form it is written in: the question asks for a form, so another form is another value."""
    if re.fullmatch(r"0|[1-9][0-9]{0,3}|[1-9],[0-9]{3}", value):
        return "digits " + value.replace(",", "")
    for form, number in (("zh", from_chinese(value)), ("en", from_english(value))):
        if number is not None:
            return f"{form} {number}"
    return None


def number_is_held_out(number: int) -> bool:
    always_taught = number <= 20 or (number < 100 and number % 10 == 0)
    return not always_taught and is_held_out("numbers", str(number))


def draw(split: Split, rng: random.Random) -> tuple[Language, str, str]:
    while True:
        number = rng.randrange(rng.choice((100, 1000, LARGEST + 1, LARGEST + 1)))  # short numbers are rare otherwise
        if number_is_held_out(number) == (split == "held_out"):
            break
    language, given, wanted, phrasing = rng.choice(PHRASINGS)
    forms = {"digits": str(number), "zh": chinese(number), "en": english(number)}
    prompt = phrasing.format(forms[given])
    return language, prompt, forms[wanted]


TASK = Task("numbers", draw, canonical)
