"""Personal data in text: found by rules that can be checked, and masked before anything is learned from it.

    email     name@host.tld
    card      13 to 19 digits of a payment network, with a right check digit (Luhn, ISO/IEC 7812)
    id        a Chinese resident number (18 places, a real date, a right check character, GB 11643), a US social
              security number of an issued range
    iban      with a right remainder (ISO 13616)
    phone     a Chinese mobile or landline, a North American number, any number that begins with + and a country
    ip        IPv4 and IPv6

A number that fails its check is no such number and stays: a checksum is wrong in nine of ten made-up numbers. English
and Chinese text alike; full-width digits count. Names of people have no such rule: `names` is whatever finds them, as
`personal_names` does by a library, and without it names stay.
Not here: what is done with a text afterwards (`prairie.flywheel.curate`), secrets of machines.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FindNames = Callable[[str], Iterable[tuple[int, int]]]
"""Text -> (start, end) of each name of a person in it."""

_BEFORE, _AFTER = r"(?<![0-9A-Za-z_.+-])", r"(?![0-9A-Za-z_]|[.-][0-9])"
_SEPARATOR = r"[ \-\u2010-\u2015]?"


@dataclass(frozen=True, slots=True)
class Found:
    """A piece of personal data: its kind and where it stands."""

    kind: str
    start: int
    end: int


def find_personal(text: str, names: FindNames | None = None) -> list[Found]:
    """All personal data in a text, in order, without overlaps; where two rules match, the first of the table wins."""
    plain = _plain_digits(text)
    taken: list[Found] = []

    def take(kind: str, start: int, end: int) -> None:
        if start < end and all(end <= other.start or start >= other.end for other in taken):
            taken.append(Found(kind, start, end))

    for kind, pattern, holds in _RULES:
        for match in pattern.finditer(plain):
            if holds(match[0]):
                take(kind, *match.span())
    for start, end in names(text) if names is not None else ():
        take("name", start, end)
    return sorted(taken, key=lambda found: found.start)


def mask_personal(text: str, names: FindNames | None = None) -> tuple[str, Counter[str]]:
    """The text with `[email]`, `[phone]`, ... in place of personal data, and how much of each kind there was."""
    found = find_personal(text, names)
    for one in reversed(found):
        text = f"{text[: one.start]}[{one.kind}]{text[one.end :]}"
    return text, Counter(one.kind for one in found)


def luhn(digits: str) -> bool:
    """Is the last digit the check digit of the others? Every second digit from the right is doubled."""
    values = [int(digit) for digit in reversed(digits)]
    return sum(value if place % 2 == 0 else sum(divmod(2 * value, 10)) for place, value in enumerate(values)) % 10 == 0


def is_resident_number(text: str) -> bool:
    """A Chinese resident number: 6 digits of a place, a date of birth, 3 of an order, a check character (GB 11643)."""
    if not re.fullmatch(r"[1-9]\d{16}[\dXx]", text):
        return False
    try:
        born = datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    if not 1900 <= born.year <= 2100:
        return False
    total = sum(pow(2, 17 - place, 11) * int(digit) for place, digit in enumerate(text[:17]))
    return "10X98765432"[total % 11] == text[17].upper()


def _plain_digits(text: str) -> str:
    """Full-width forms as ASCII, character by character, so that places stay the same."""
    return "".join(unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uff5e" else c for c in text)


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return len(digits) in range(13, 20) and luhn(digits) and len(set(digits)) > 1


def _is_iban(text: str) -> bool:
    code = re.sub(r"\s", "", text)
    moved = code[4:] + code[:4]
    return 15 <= len(code) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _is_ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


def _is_issued(text: str) -> bool:
    area, group, serial = re.split(r"[ -]", text)
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _always(_: str) -> bool:
    return True


def _has_digits(text: str) -> bool:
    return 8 <= len(re.sub(r"\D", "", text)) <= 15


_RULES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "email",
        re.compile(
            r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z])"
        ),
        _always,
    ),
    ("id", re.compile(_BEFORE + r"[1-9]\d{16}[\dXx]" + _AFTER), is_resident_number),
    ("card", re.compile(_BEFORE + rf"[2-6]\d{{3}}(?:{_SEPARATOR}\d){{9,15}}" + _AFTER), _is_card),
    ("iban", re.compile(_BEFORE + r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?" + _AFTER), _is_iban),
    ("id", re.compile(_BEFORE + r"\d{3}-\d{2}-\d{4}" + _AFTER), _is_issued),
    ("ip", re.compile(r"(?<![0-9A-Za-z.:])(?:\d{1,3}\.){3}\d{1,3}(?![0-9A-Za-z]|\.\d)"), _is_ip),
    ("ip", re.compile(r"(?<![0-9A-Za-z:.])[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){3,7}(?![0-9A-Za-z:])"), _is_ip),
    (
        "phone",
        re.compile(r"(?<![0-9A-Za-z_.-])(?:\+?86[ -]?|0086[ -]?)?1[3-9]\d(?:[ -]?\d{4}){2}" + _AFTER),
        _always,
    ),
    ("phone", re.compile(r"(?<![0-9A-Za-z_.+-])\(?0\d{2,3}[)）\-— ]\s?[2-9]\d{6,7}" + _AFTER), _always),
    ("phone", re.compile(r"(?<![0-9A-Za-z_])\+[1-9]\d{0,2}(?:[ ().-]{0,2}\d){7,13}" + _AFTER), _has_digits),
    (
        "phone",
        re.compile(r"(?<![0-9A-Za-z_.+-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[-.])[2-9]\d{2}[-. ]\d{4}" + _AFTER),
        _always,
    ),
)
