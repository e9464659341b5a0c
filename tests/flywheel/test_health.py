"""Votes that teach a collapse are refused, as self-played games that have collapsed are; ordinary ones pass."""

import random

import pytest

from prairie.errors import DataError
from prairie.flywheel.health import ENOUGH, ChatHealth

WORDS = ["fox", "oak", "rain", "bird", "grass", "wind", "sun", "wave", "story", "old", "green", "waits", "sings"]


def texts(*sides, count=40):
    """(liked, disliked)."""
    chance = random.Random(0)
    both = [[side(chance) for side in sides] for _ in range(count)]
    return [one for one, _ in both], [other for _, other in both]


def sentence(chance, words=9):
    return " ".join(chance.choices(WORDS, k=words)) + "."


def test_ordinary_votes_are_healthy():
    health = ChatHealth.of(*texts(sentence, sentence))
    assert health.faults() == [] and health.answers == 40 and 0.8 < health.length_ratio < 1.25
    assert health.repetition == health.refusals == 0 and health.distinct > 0.9
    health.check()


@pytest.mark.parametrize(
    ("chosen", "fault"),
    [
        (lambda chance: "", "have 0 characters"),
        (lambda chance: "ok", r"are 0\.0\d times as long as the others"),
        (lambda chance: " ".join(sentence(chance, 60) for _ in range(4)), r"times as long as the others"),
        (lambda chance: "I think so. " * 6, "100% of the preferred answers repeat themselves"),
        (lambda chance: "I'm sorry, but I cannot help with that.", "100% of the preferred answers refuse"),
    ],
)
def test_a_collapse_is_refused_in_one_sentence(chosen, fault):
    with pytest.raises(
        DataError, match="the preferred answers have collapsed, they are not learnt from: got .*" + fault
    ):
        ChatHealth.of(*texts(chosen, sentence)).check()


def test_a_few_votes_are_too_few_to_speak_of_shares():
    refusing = texts(lambda chance: "I cannot answer that.", sentence, count=ENOUGH - 1)
    ChatHealth.of(*refusing).check()
