"""The choice of threads, by the times that steps would take."""

from __future__ import annotations

import pytest

from prairie.engine import probe as probing
from prairie.engine.probe import Choice, probe


def chosen(times: dict[tuple[int, int], float], most: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Choice, set]:
    monkeypatch.setattr(probing, "EACH_S", 0.0)
    asked: list[tuple[int, int]] = []

    def step_s(tokens: int, threads: int) -> float:
        first = (tokens, threads) not in asked
        asked.append((tokens, threads))
        return times[tokens, threads] * (20 if first and times[tokens, threads] < 0.002 else 1)  # the first is cold

    return probe(step_s, most), set(asked)


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


def test_one_core_is_not_asked(monkeypatch):
    choice, asked = chosen({}, 1, monkeypatch)
    assert not asked
    assert (choice.few, choice.many) == (1, 1)
