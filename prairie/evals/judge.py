"""A language model as a judge of two answers, over any OpenAI URL: each pair in both orders, length taken out.

A judge that prefers what it reads first contradicts itself when the order is turned round; such a pair is a tie (arXiv
2306.05685). Judges like long answers as well, so the win rate is also given as it would be at equal length: the
intercept of a logistic regression on the difference in length (arXiv 2404.04475).
Not here: which questions are asked, what a verdict means for a release (`prairie.flywheel`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import numpy as np

from prairie.errors import DataError, RequestError

PROMPT = """Two answers to one question. Which is better: right first, then helpful and clear? Length is no merit.

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Say one letter and nothing else: A, B, or C if neither is better."""

ASKED_AT_ONCE = 4


@dataclass(frozen=True)
class Opinion:
    """What a judge said of one pair. `outcome`: 1 the first answer, 0 the second, 1/2 a tie or a contradiction."""

    outcome: float
    shown_first: float
    """How often the answer that was shown first won, over both orders: 1/2 for a judge who minds the answers alone."""


@dataclass(frozen=True)
class Judge:
    """A model behind `url` (`.../v1`). Raises RequestError when it cannot be asked or says no letter."""

    url: str
    model: str
    api_key: str | None = None

    def opinions(self, pairs: Sequence[tuple[str, str, str]]) -> list[Opinion]:
        """Of (question, first answer, second answer), each asked twice, in both orders."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        with (
            httpx.Client(base_url=self.url.rstrip("/"), headers=headers, timeout=120) as client,
            ThreadPoolExecutor(ASKED_AT_ONCE) as pool,
        ):
            return list(pool.map(lambda pair: self._opinion(client, *pair), pairs))

    def _opinion(self, client: httpx.Client, question: str, first: str, second: str) -> Opinion:
        if first == second:
            return Opinion(0.5, 0.5)
        straight = self._vote(client, question, first, second)
        turned = self._vote(client, question, second, first)
        agreed = straight == 1 - turned
        return Opinion(straight if agreed else 0.5, (straight + turned) / 2)

    def _vote(self, client: httpx.Client, question: str, first: str, second: str) -> float:
        """1 for what was shown first, 0 for the other, 1/2 for neither."""
        text = PROMPT.format(question=question, first=first, second=second)
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
        try:
            answer = client.post("/chat/completions", json=body).raise_for_status().json()
            said = str(answer["choices"][0]["message"]["content"])
        except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestError(
                f"the judge at {self.url} cannot be asked", got=f"{type(error).__name__}: {error}"
            ) from error
        letter = re.match(r"\W*([ABC])\b", said.strip())
        if letter is None:
            raise RequestError(f"the judge {self.model} said no letter", got=repr(said[:80]), wanted="A, B or C")
        return {"A": 1.0, "B": 0.0, "C": 0.5}[letter[1]]


def length_controlled(outcomes: Sequence[float], lengths: Sequence[tuple[int, int]]) -> float:
    """The share of pairs that the first answer would win if both were equally long.

    lengths: (first, second) of each pair. P(win) = sigmoid(a + b * d), where d is the difference in length over its
    spread; the answer is sigmoid(a). A small ridge keeps it finite where one side wins all. Raises DataError without
    pairs or when the two do not match.
    """
    if not outcomes or len(outcomes) != len(lengths):
        raise DataError(
            "nothing to control for length", got=f"{len(outcomes)} outcomes, {len(lengths)} pairs of lengths"
        )
    differences = np.array([first - second for first, second in lengths], dtype=np.float64)
    spread = float(np.sqrt(np.mean(differences**2))) or 1.0
    x = np.stack([np.ones(len(differences)), np.tanh(differences / spread)], axis=1)
    won, weights, ridge = np.asarray(outcomes, dtype=np.float64), np.zeros(2), 0.1 * np.eye(2)
    for _ in range(50):  # Newton's method on a concave function of two numbers
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (won - p) - ridge @ weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
        weights += step
        if float(np.abs(step).max()) < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))
