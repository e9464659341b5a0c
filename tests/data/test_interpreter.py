"""The interpreter's own text: within its limit, the same every time, held out by document."""

import pytest

from prairie.data.interpreter import LONGEST_DOCUMENT, interpreter_texts
from prairie.errors import DataError


def size(texts):
    return sum(len(text.text.encode()) for text in texts)


def test_fills_its_limit_and_repeats_exactly():
    texts = interpreter_texts(400_000, seed=0)
    assert 0.97 * 400_000 < size(texts) <= 400_000
    assert texts == interpreter_texts(400_000, seed=0)
    assert texts != interpreter_texts(400_000, seed=1)
    assert {text.source.split(":")[0] for text in texts} == {"topics", "docstrings", "source"}
    assert max(len(text.text) for text in texts) <= LONGEST_DOCUMENT
    assert len({text.source for text in texts}) == len(texts)


def test_nothing_from_site_packages_or_tests():
    for text in interpreter_texts(500_000, seed=0):
        assert "site-packages" not in text.source and "/test/" not in text.source


def test_held_out_documents_are_never_trained_on_in_any_kind():
    held_out = {text.source.partition(":")[2] for text in interpreter_texts(300_000, seed=0, split="held_out")}
    trained = {text.source.partition(":")[2] for text in interpreter_texts(1_000_000, seed=1)}
    assert len(held_out) > 20 and not held_out & trained


def test_no_room_is_refused():
    with pytest.raises(DataError, match="limit_bytes 0"):
        interpreter_texts(0, seed=0)
