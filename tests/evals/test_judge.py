"""The judge over HTTP: position bias becomes ties, length is taken out, refusals are sentences."""

import random

import pytest

from prairie.errors import DataError, RequestError
from prairie.evals.judge import Judge, length_controlled


def test_both_orders_are_asked_and_a_contradiction_is_a_tie(judge_of):
    fair = judge_of(lambda first, second: "A" if "good" in first else "B.")
    pairs = [("q", "good", "bad"), ("q", "bad", "good"), ("q", "same", "same")]
    assert [o.outcome for o in fair.opinions(pairs)] == [1.0, 0.0, 0.5]
    assert {o.shown_first for o in fair.opinions(pairs)} == {0.5}
    biased = judge_of(lambda first, second: "A")
    assert [(o.outcome, o.shown_first) for o in biased.opinions(pairs[:2])] == [(0.5, 1.0)] * 2
    with pytest.raises(RequestError, match="said no letter: got 'I think', wanted A, B or C"):
        judge_of(lambda first, second: "I think").opinions(pairs)
    with pytest.raises(RequestError, match="cannot be asked"):
        Judge("http://127.0.0.1:9/v1", "nobody").opinions(pairs)


def test_a_judge_who_likes_length_is_corrected():
    chance, outcomes, lengths = random.Random(0), [], []
    for _ in range(600):
        first, second = chance.randrange(50, 250), chance.randrange(20, 120)
        lengths.append((first, second))
        outcomes.append(float(chance.random() < (0.85 if first > second else 0.15)))
    raw = sum(outcomes) / len(outcomes)
    assert raw > 0.7 and abs(length_controlled(outcomes, lengths) - 0.5) < 0.1
    assert length_controlled([1.0] * 20, [(5, 5)] * 20) > 0.9
    with pytest.raises(DataError, match="nothing to control"):
        length_controlled([], [])
