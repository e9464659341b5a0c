"""Texts to ids a word at a time, each distinct word once: most of what people write are words that they wrote before.

A byte-pair tokenizer cuts a text by a regular expression before it merges anything, and most of its time goes there.
Where no token can reach from what is not white space over a space into what follows, the text may be cut at such
places first and its words be looked up. That is so for the tokenizers that `cuts_at_spaces` knows; nothing is assumed
of others.

Not here: what a tokenizer is (`tokenizer`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST = 24
"""Characters to a word on average; in texts of longer ones (Chinese has no spaces) few words come again."""
MARKED = 0
"""The number of words that hold a mark."""
KEPT = 2_000_000
"""Characters of words that are remembered (and 8 for each word); then all are forgotten. With their ids some 40 MB."""
Encode = Callable[[Sequence[str]], list[list[int]]]
_SPACE = re.compile(r" (?<=\S )")
"""A space behind what is not white space."""
_RUN = re.compile(r"\s ")
"""White space of which the last space is to stay with what is before it, as a space at the beginning of a text is."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
EXPRESSIONS: frozenset[str] = frozenset(
    [
        rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",  # GPT-2
        rf"(?i:{_CONTRACTIONS})|{_LETTERS}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",  # Llama 3
        rf"(?i:{_CONTRACTIONS})|{_LETTERS}\p{{L}}+|\p{{N}}|{_REST}",  # Qwen 2
        rf"{_LETTERS}{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?|{_LETTERS}{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?"
        rf"|\p{{N}}{{1,3}}|{_REST}".replace(r"[\r\n]*", r"[\r\n/]*", 1),  # GPT-4o
    ]
)
"""Expressions of which no match holds a space behind what is not white space, nor looks from one side of such a place
to the other: a space is only ever a match's first character or part of a run of white space."""


def cuts_at_spaces(spec: dict[str, Any], expressions: frozenset[str] = EXPRESSIONS) -> bool:
    """Whether a tokenizer (the content of `tokenizer.json`) reads "a b" as it reads "a" and then " b", for all a that
    end in what is not white space and all b. `expressions` are those that cut so; False also where it is not known."""
    model = spec["model"]
    if model["type"] != "BPE" or model.get("dropout") or not all(map(_stays_in_a_word, spec.get("added_tokens") or [])):
        return False
    normal = _steps(spec.get("normalizer"), "normalizers")
    cutting = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    if cutting:  # NFC joins nothing with a space
        alone = len(cutting) == 1 or not any(step.get("add_prefix_space") for step in cutting)
        known = all(step["type"] in ("ByteLevel", "Digits") or _cuts(step, expressions) for step in cutting)
        cut = known and alone and any(_cuts(step, expressions) for step in cutting)
        return cut and all(step["type"] == "NFC" for step in normal)
    written = [step for step in normal if step["type"] != "Prepend"]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    vocabulary: dict[str, int] = model["vocab"]
    within = all("▁" not in token.lstrip("▁") for token in vocabulary)  # what no token holds no merge can make
    return written == [space] and not affixes and "▁" in vocabulary and within


def _stays_in_a_word(added: dict[str, Any]) -> bool:
    """Special tokens are not looked for in a text; others are, and one of spaces alone stands in a run of them."""
    content: str = added["content"]
    if added.get("special"):
        return True
    reaches = any(added.get(key) for key in ("lstrip", "rstrip", "single_word"))
    return not reaches and not any(char.isspace() for char in content.lstrip(" "))


def _cuts(step: dict[str, Any], expressions: frozenset[str]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    told = step.get("pattern") or {}
    isolated = str(step.get("behavior")).lower() == "isolated" and not step.get("invert")
    return step["type"] == "Split" and isolated and told.get("Regex") in expressions


def _steps(part: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list."""
    if part is None:
        return []
    return list(part[several]) if part["type"] == "Sequence" else [part]


@dataclass(frozen=True, slots=True)
class Spans:
    """Ids of texts: text i is `ids[starts[i]:starts[i] + sizes[i]]`."""

    ids: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def lists(self) -> list[list[int]]:
        """Of each text."""
        ids, ends = self.ids.tolist(), (self.starts + self.sizes).tolist()
        return [ids[start:end] for start, end in zip(self.starts.tolist(), ends, strict=True)]


class Words:
    """What a tokenizer makes of words, remembered. `encode` reads what a text begins with, `encode_inside` what stands
    in the midst of one; what holds one of `marks` is not read here."""

    def __init__(self, encode: Encode, encode_inside: Encode, marks: frozenset[int]) -> None:
        self._encode, self._encode_inside, self._marks = encode, encode_inside, marks
        self._lock = threading.Lock()
        self._first: dict[str, int] = {}
        """The number of each word that begins a text."""
        self._inside: dict[str, int] = {}
        """Of each that follows a space, which is part of it and not written here."""
        self._ids: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._offsets: npt.NDArray[np.int64] = np.zeros(2, np.int64)
        """Word n is `_ids[_offsets[n]:_offsets[n + 1]]`; the word 0 stands for those with a mark."""
        self._size = 0

    def read(self, texts: Sequence[str]) -> tuple[Spans, npt.NDArray[np.bool_]]:
        """The ids of texts, and of which of them: not of one whose words are long, or hold a mark."""
        runs = [text.startswith(" ") or _RUN.search(text) is not None for text in texts]
        counts = np.array([
            len(_SPACE.findall(text)) + 1 if run else text.count(" ") + 1 for text, run in zip(texts, runs, strict=True)
        ], np.int64)  # fmt: skip
        worth = LONGEST * counts >= np.fromiter(map(len, texts), np.int64, len(texts))
        plain = [i for i, run in enumerate(runs) if worth[i] and not run]
        others = [i for i, run in enumerate(runs) if worth[i] and run]
        words = " ".join([texts[i] for i in plain]).split(" ") if plain else []
        words += chain.from_iterable(_SPACE.split(texts[i]) for i in others)
        order = np.array(plain + others, np.int64)
        ends = np.cumsum(counts[order])
        firsts = ends - counts[order]
        with self._lock:
            if self._size > KEPT:
                self._forget()
            numbers = self._numbers(words, firsts)
            starts, sizes = self._offsets[numbers], self._offsets[numbers + 1] - self._offsets[numbers]
            ids = self._ids[spread(starts, sizes)]
        until = np.concatenate([[0], np.cumsum(sizes)])
        marked = np.concatenate([[0], np.cumsum(numbers == MARKED)])
        spans = Spans(ids, np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64))
        spans.starts[order], spans.sizes[order] = until[firsts], until[ends] - until[firsts]
        worth[order] = marked[ends] == marked[firsts]
        return spans, worth

    def _numbers(self, words: list[str], firsts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of each word, of which those at `firsts` begin texts; those that are new are read."""
        numbers = np.fromiter(map(self._inside.get, words, repeat(-1)), np.int64, len(words))
        numbers[firsts] = MARKED
        new = np.flatnonzero(numbers < 0).tolist()
        if new:
            self._learn(self._inside, list(dict.fromkeys(words[i] for i in new)), " ", self._encode_inside)
            numbers[new] = [self._inside[words[i]] for i in new]
        begun = [words[i] for i in firsts.tolist()]
        if new_first := [word for word in dict.fromkeys(begun) if word not in self._first]:
            self._learn(self._first, new_first, "", self._encode)
        numbers[firsts] = [self._first[word] for word in begun]
        return numbers

    def _learn(self, known: dict[str, int], words: list[str], before: str, encode: Encode) -> None:
        read = encode([before + word for word in words])
        kept = [(word, ids) for word, ids in zip(words, read, strict=True) if self._marks.isdisjoint(ids)]
        known.update(dict.fromkeys(words, MARKED))
        known.update((word, len(self._offsets) - 1 + i) for i, (word, _) in enumerate(kept))
        self._ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(ids for _, ids in kept), np.uint32)])
        ends = np.cumsum([len(ids) for _, ids in kept], dtype=np.int64)
        self._offsets = np.concatenate([self._offsets, self._offsets[-1] + ends])
        self._size += sum(map(len, words)) + 8 * len(words)

    def _forget(self) -> None:
        self._first, self._inside, self._size = {}, {}, 0
        self._ids, self._offsets = np.zeros(0, np.uint32), np.zeros(2, np.int64)


def spread(starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... `sizes[0]` of them, then those of starts[1], and so on."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(sizes.sum())
