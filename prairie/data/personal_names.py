"""Names of people, found by libraries of the user's choice: what `personal` masks besides what has a rule.

    Chinese   jieba (extra `names`): a name is a word that it tags as one (nr, nrt, nrfg)
    English   spaCy, if it and one of its English pipelines are installed (`python -m spacy download en_core_web_sm`);
              a name is an entity that it calls a PERSON

Both guess. jieba takes words that are also names for names (白云, 田野) and misses names in Latin letters, many foreign
ones and double surnames (of 欧阳娜娜 it finds 娜娜); it knows no Japanese or Korean. The small pipeline of spaCy misses
names in small letters, given names alone and many that are not English (Xiaoming Wang). What is masked needlessly costs
a word, what is missed stays. Not here: everything that has a check (`personal`).
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator
from typing import Any

from prairie.data.personal import FindNames
from prairie.errors import UsageError

ENGLISH = ("en_core_web_trf", "en_core_web_lg", "en_core_web_md", "en_core_web_sm")
"""spaCy's English pipelines, the best first."""
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Z]")


def name_finder() -> FindNames:
    """Finds names by what is installed. Raises UsageError when no library is."""
    finders: list[tuple[re.Pattern[str], FindNames]] = []
    if _installed("jieba"):
        finders.append((_CHINESE, _chinese()))
    english = next((name for name in ENGLISH if _installed("spacy") and _installed(name)), None)
    if english is not None:
        finders.append((_LATIN, _english(english)))
    if not finders:
        raise UsageError(
            "names cannot be masked: no library that finds them is installed", wanted="jieba, or spaCy with a pipeline",
            mend="pip install 'prairie[names]'",
        )  # fmt: skip

    def find(text: str) -> Iterator[tuple[int, int]]:
        for letters, finder in finders:
            if letters.search(text):
                yield from finder(text)

    return find


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _chinese() -> FindNames:
    import jieba
    import jieba.posseg

    jieba.setLogLevel(logging.WARNING)

    def find(text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for word in jieba.posseg.cut(text):
            end = start + len(word.word)
            if word.flag.startswith("nr") and _CHINESE.search(word.word):
                yield start, end
            start = end

    return find


def _english(pipeline: str) -> FindNames:
    import spacy

    try:
        model: Any = spacy.load(pipeline, exclude=["lemmatizer"])
    except (OSError, ValueError) as error:  # of another version of spaCy, or only half installed
        raise UsageError(
            f"spaCy cannot load its pipeline {pipeline}",
            got=str(error).split("\n")[0][:200],
            mend=f"python -m spacy download {pipeline}",
        ) from None

    def find(text: str) -> Iterator[tuple[int, int]]:
        for entity in model(text).ents:
            if entity.label_ == "PERSON":
                yield entity.start_char, entity.end_char

    return find
