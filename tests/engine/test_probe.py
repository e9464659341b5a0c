"""The choice of threads, by the times that steps would take."""

from __future__ import annotations

import pytest

from prairie.engine import probe as probing
from prairie.engine.probe import Choice, numbers_to_try, of_dtype, probe


def chosen(times: dict[tuple[int, int], float], most: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Choice, set]:
    monkeypatch.setattr(probing, "EACH_S", 0.0)
    asked: list[tuple[int, int]] = []

    def step_s(tokens: int, threads: int) -> float:
        first = (tokens, threads) not in asked
        asked.append((tokens, threads))
        return times[tokens, threads] * (20 if first and times[tokens, threads] < 0.002 else 1)  # the first is cold

    return probe(step_s, numbers_to_try(most)), set(asked)


def test_each_size_gets_its_own(monkeypatch):
    times = {(1, 4): 0.0003, (1, 2): 0.0002, (1, 1): 0.0001, (16, 4): 0.001, (16, 2): 0.0015, (16, 1): 0.003}
    choice, _ = chosen(times, 4, monkeypatch)
    assert (choice.few, choice.many) == (1, 4)
    assert [choice.threads(tokens) for tokens in (1, 3, 4, 500)] == [1, 1, 4, 4]
    assert choice.step_ms[1, 2] == pytest.approx(0.2)
    assert "1 token on 1: 0.1 ms" in str(choice)
    assert choice.to_json()["step_ms"]["16 tokens, 4 threads"] == 1.0


def test_a_tie_goes_to_more(monkeypatch):
    times = {(1, 3): 0.001, (1, 2): 0.00095, (1, 1): 0.00092, (16, 3): 0.001, (16, 2): 0.00085, (16, 1): 0.00084}
    choice, _ = chosen(times, 3, monkeypatch)
    assert (choice.few, choice.many) == (3, 2)


def test_long_steps_are_not_tried_again(monkeypatch):
    choice, asked = chosen({(1, 8): 0.2, (16, 8): 2.0}, 8, monkeypatch)
    assert asked == {(1, 8), (16, 8)}
    assert (choice.few, choice.many) == (8, 8)


def test_bfloat16_is_taken_where_single_tokens_gain_and_larger_steps_lose_nothing():
    wide = Choice(2, 2, {(1, 2): 2.0, (1, 1): 3.0, (16, 2): 10.0})
    for one, many, taken in ((1.0, 9.0, True), (1.7, 10.4, True), (1.9, 5.0, False), (1.0, 11.0, False)):
        choice = of_dtype(Choice(1, 2, {(1, 2): 5.0, (1, 1): one, (16, 2): many}), wide)
        assert choice.dtype == ("bfloat16" if taken else "float32")
        assert choice.few == (1 if taken else 2), "the threads are those of the form"
        assert f"a step of 1 takes {one:.3g} ms and 2 in float32" in str(choice)
        assert choice.to_json()["dtype"] == choice.dtype
    assert "dtype" not in wide.to_json()
