"""Better text from text: one spelling of characters, no copies, no near copies, no rubbish; every loss is counted.

Not here: reading files (`sources`), personal data, quality by a model.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from prairie.data.records import Chat, Preference, Record, Text

R = TypeVar("R", bound=Record)

_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff\u200b\u2060\ufdd0-\ufdef\ufffe\uffff]")
_ODD_SPACES = re.compile("[\xa0\u2000-\u200a\u202f\u205f]")
_SPACES_AT_LINE_END = re.compile(r"[ \t]+(?=\n|\Z)")
_MANY_EMPTY_LINES = re.compile(r"\n{4,}")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile(r"[\u3041-\u30ff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")
_UNITS = re.compile(rf"{_HAN.pattern}|{_KANA.pattern}|\w+")


def normalise(text: str) -> str:
    """NFC, `\\n` line ends, plain spaces, no invisible characters, no spaces at line ends, at most two empty lines.

    Indentation, full-width forms and joined emoji stay: they carry meaning. Idempotent.
    """
    text = _LINE_ENDS.sub("\n", text)
    text = _ODD_SPACES.sub(" ", _INVISIBLE.sub("", text))
    text = unicodedata.normalize("NFC", text)
    text = _SPACES_AT_LINE_END.sub("", text)
    return _MANY_EMPTY_LINES.sub("\n\n\n", text).strip("\n")


def language(text: str) -> str:
    """`zh`, `ja`, `latin` or `other`, by the script of most letters ("" where there are none)."""
    han, kana, latin = (len(pattern.findall(text)) for pattern in (_HAN, _KANA, _LATIN))
    letters = len(_LETTER.findall(text))
    if not letters:
        return ""
    if han + kana >= letters / 3:  # one Han character says as much as several letters
        return "ja" if kana > han / 4 else "zh"
    return "latin" if latin >= letters / 2 else "other"


def deduplicate_exact(records: Iterable[R]) -> list[R]:
    """The first of each set of equal records; white space, case and where they come from do not tell them apart."""
    seen: set[bytes] = set()
    kept = []
    for record in records:
        key = hashlib.blake2b("\0".join(_parts(record)).casefold().encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            kept.append(record)
    return kept


def near_duplicates(
    texts: Sequence[str], *, threshold: float = 0.8, shingle: int = 5, permutations: int = 64, seed: int = 0
) -> dict[int, int]:
    """Which texts nearly repeat an earlier one: `{number: number of the first of its kind}`.

    MinHash over sets of `shingle` words (Han characters count as words) and locality-sensitive hashing (Broder 1997;
    Lee et al. 2021, arXiv:2107.06499); each candidate pair is then checked by its true Jaccard similarity.
    """
    sets = [_shingles(text, shingle) for text in texts]
    signatures = _minhash(sets, permutations, seed)
    first: dict[int, int] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    width = _band_width(threshold, permutations)
    for i, signature in enumerate(signatures):
        if not len(sets[i]):
            continue
        keys = [(b, signature[b : b + width].tobytes()) for b in range(0, permutations - width + 1, width)]
        candidates = sorted({j for key in keys for j in buckets.get(key, ())})
        match = next((j for j in candidates if _jaccard(sets[i], sets[j]) >= threshold), None)
        if match is not None:
            first[i] = match
            continue
        for key in keys:
            buckets.setdefault(key, []).append(i)
    return first


def clean(
    texts: Iterable[Text],
    *,
    min_characters: int = 1,
    max_characters: int | None = None,
    languages: Sequence[str] | None = None,
    max_symbol_share: float = 0.5,
    max_line_repeats: float = 0.5,
    near_threshold: float | None = 0.8,
) -> tuple[list[Text], dict[str, Any]]:
    """Normalises, filters and deduplicates. The report counts every document that was lost, by reason.

    `languages`: as `language` says. `max_symbol_share`: of characters that are neither letters, digits, marks nor
    space. `max_line_repeats`: of lines (Rae et al. 2021, arXiv:2112.11446, A1.1). `near_threshold`: None keeps near
    copies.
    """
    lost: Counter[str] = Counter()
    kept: list[Text] = []
    documents = characters = 0
    for record in texts:
        documents += 1
        characters += len(record.text)
        text = normalise(record.text)
        reason = _why_not(text, min_characters, max_characters, languages, max_symbol_share, max_line_repeats)
        if reason:
            lost[reason] += 1
        else:
            kept.append(replace(record, text=text))
    unique = deduplicate_exact(kept)
    lost["copies"] += len(kept) - len(unique)
    if near_threshold is not None:
        near = near_duplicates([record.text for record in unique], threshold=near_threshold)
        lost["near copies"] += len(near)
        unique = [record for i, record in enumerate(unique) if i not in near]
    report = {
        "documents": documents,
        "kept": len(unique),
        "lost": {reason: count for reason, count in sorted(lost.items()) if count},
        "characters": characters,
        "characters_kept": sum(len(record.text) for record in unique),
        "languages": dict(sorted(Counter(language(record.text) for record in unique).items())),
    }
    return unique, report


def _why_not(
    text: str,
    min_characters: int,
    max_characters: int | None,
    languages: Sequence[str] | None,
    max_symbol_share: float,
    max_line_repeats: float,
) -> str:
    """Empty, or why the document is lost."""
    if not text.strip():
        return "empty"
    if len(text) < min_characters:
        return "too short"
    if max_characters is not None and len(text) > max_characters:
        return "too long"
    if languages is not None and language(text) not in languages:
        return "other language"
    symbols = sum(not (char.isalnum() or char.isspace() or unicodedata.category(char)[0] == "M") for char in text)
    if symbols > max_symbol_share * len(text):
        return "mostly symbols"
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) >= 4 and 1 - len(set(lines)) / len(lines) > max_line_repeats:
        return "repeats itself"
    return ""


def _parts(record: Record) -> list[str]:
    """What tells a record from another, with white space made one."""
    if isinstance(record, Text):
        parts = [record.text]
    elif isinstance(record, Chat):
        parts = [part for m in record.messages for part in (m.role, m.written)]
    else:
        assert isinstance(record, Preference)
        sides = (record.prompt, record.chosen, record.rejected)
        parts = [part for side in sides for part in (str(len(side)), *(p for m in side for p in (m.role, m.written)))]
    return [" ".join(part.split()) for part in parts]


def _shingles(text: str, size: int) -> npt.NDArray[np.uint64]:
    """The set of hashes of all runs of `size` words, sorted."""
    units = _UNITS.findall(text.casefold())
    count = max(len(units) - size + 1, 1 if units else 0)
    hashes = [
        int.from_bytes(hashlib.blake2b(" ".join(units[i : i + size]).encode(), digest_size=8).digest(), "little")
        for i in range(count)
    ]
    return np.unique(np.array(hashes, np.uint64))


def _minhash(sets: Sequence[npt.NDArray[np.uint64]], permutations: int, seed: int) -> npt.NDArray[np.uint64]:
    """(texts, permutations): the least multiply-shift hash of each set (Dietzfelbinger et al. 1997)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    multiply = generator.integers(1, 2**64, (permutations, 1), np.uint64) | np.uint64(1)
    add = generator.integers(0, 2**64, (permutations, 1), np.uint64)
    signatures = np.zeros((len(sets), permutations), np.uint64)
    for i, values in enumerate(sets):
        if len(values):
            signatures[i] = ((values * multiply + add) >> np.uint64(16)).min(axis=1)
    return signatures


def _band_width(threshold: float, permutations: int) -> int:
    """The widest band for which texts at the threshold meet in a bucket with a chance of 95 % or more."""
    widths = range(1, permutations + 1)
    return max((w for w in widths if 1 - (1 - threshold**w) ** (permutations // w) >= 0.95), default=1)


def _jaccard(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
