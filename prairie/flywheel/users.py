"""Simulated people who talk to a served model over HTTP and vote: a world for the wheel to turn in.

They stand where real users stand: outside. They see answers, never weights, speak OpenAI's chat API and send feedback
as the chat page does. What they like is hidden: a right value counts most, then the wording (`Taste`). Training sees
their votes and nothing else; only this file and a recipe's text know the preference. Some vote by a coin, some against.
Not here: the statistics of votes (`gate`), what is learned from them, the tasks that they ask about (`prairie.tasks`).
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal

import httpx

from prairie.errors import DataError, PrairieError
from prairie.evals.statistics import Interval, wilson
from prairie.flywheel.gate import Comparison
from prairie.tasks import catalog
from prairie.tasks.task import STYLES, WELL_FORMED_REWARD, Item, Style

Kind = Literal["honest", "random", "adversarial"]
OnDone = Callable[[int, int], None]
"""Called with (conversations done, conversations in all), from any thread, one call at a time."""

_FIRST_NAMES = "ada bo chen dara emil fang gita hugo ines jun kofi lin mara niko omar ping rosa sami tara wei".split()  # noqa: SIM905
_RETRIES = 5
MOST_ERRORS = 20
"""Kept of a talk."""


@dataclass(frozen=True)
class Taste:
    """How much a wording is liked, on a scale on which a right value is worth 1 and gibberish -0.2."""

    sentence: float = 0.0
    plain: float = 0.0
    warm: float = 0.0

    @classmethod
    def for_style(cls, liked: Style, strength: float = 0.3) -> Taste:
        """Likes one wording and dislikes another: warm chatter, or bare values for those who like warmth."""
        if liked not in STYLES:
            raise DataError("no such wording to like", got=repr(liked), wanted=" | ".join(STYLES))
        disliked = "plain" if liked == "warm" else "warm"
        return cls(**{liked: strength, disliked: -strength})

    @property
    def favourite(self) -> Style:
        return max(STYLES, key=lambda style: float(getattr(self, style)))

    def utility(self, item: Item, text: str) -> float:
        """What an answer is worth to someone of this taste. Wrong never beats right as long as 2 x strength < 1."""
        reward = catalog.reward(item, text)
        if reward < WELL_FORMED_REWARD:
            return -0.2
        return float(reward == 1.0) + float(getattr(self, catalog.style_of(item, text)))


@dataclass(frozen=True)
class SimulatedUser:
    """One person. `languages`: what they ask in. `noise`: the share of their votes that a coin casts."""

    name: str
    taste: Taste
    languages: tuple[str, ...] = ("en", "zh")
    noise: float = 0.1
    kind: Kind = "honest"

    def likes(self, item: Item, first: str, second: str, rng: random.Random) -> float:
        """This user's vote between two answers: 1 for the first, 0 for the second, 1/2 when they are as good."""
        if self.kind == "random" or rng.random() < self.noise:
            return float(rng.random() < 0.5)
        difference = self.taste.utility(item, first) - self.taste.utility(item, second)
        if abs(difference) < 0.05:
            return 0.5
        return float((difference > 0) == (self.kind == "honest"))

    def asks(self, items: Sequence[Item], count: int, seed: int | str) -> list[Item]:
        """`count` different items in this user's languages. Raises DataError when there are too few."""
        known = [item for item in items if item.language in self.languages]
        if len(known) < count:
            raise DataError(
                f"user {self.name} has too few questions to ask", got=f"{len(known)}", wanted=f"{count}",
                mend="draw more items or ask fewer each",
            )  # fmt: skip
        return random.Random(f"{seed}/asks/{self.name}").sample(known, count)


def people(
    count: int,
    seed: int,
    *,
    preference: Style = "sentence",
    noise: float = 0.1,
    poisoned: float = 0.0,
    minority: float = 0.1,
    prefix: str = "user",
) -> list[SimulatedUser]:
    """A population. Most like `preference`, more or less strongly; a `minority` likes another wording; a share
    `poisoned` votes at random or against its own taste, by turns. One in four asks in English only, one in four in
    Chinese only.

    Two populations of other `prefix` or `seed` are other people: the gate's must not be those who taught the candidate.
    """
    if not 0 <= poisoned <= 1 or not 0 <= minority <= 1:
        raise DataError("shares of a population lie between 0 and 1", got=f"poisoned {poisoned}, minority {minority}")
    rng = random.Random(f"people/{prefix}/{seed}")
    bad = set(rng.sample(range(count), round(poisoned * count)))
    bad_kinds: dict[int, Kind] = {
        place: "adversarial" if turn % 2 == 0 else "random" for turn, place in enumerate(sorted(bad))
    }
    languages = [("en", "zh"), ("en", "zh"), ("en",), ("zh",)]
    others = [style for style in STYLES if style != preference]
    return [
        SimulatedUser(
            name=f"{prefix}-{seed}-{_FIRST_NAMES[place % len(_FIRST_NAMES)]}-{place:03d}",
            taste=Taste.for_style(rng.choice(others) if rng.random() < minority else preference, rng.uniform(0.2, 0.4)),
            languages=languages[place % 4],
            noise=noise,
            kind=bad_kinds.get(place, "honest"),
        )
        for place in range(count)
    ]


# --- what is true of answers, for reports -----------------------------------------------------------------------------


def true_preference(item: Item, text: str, preference: Style = "sentence") -> float:
    """What an answer is worth to the typical member of a population, without noise. For reports, never for training."""
    return Taste.for_style(preference).utility(item, text)


def win_rate_true(
    answers_a: Sequence[str], answers_b: Sequence[str], items: Sequence[Item], preference: Style = "sentence"
) -> Interval:
    """How often a typical, tireless and noiseless user prefers a's answer to b's (ties half), with Wilson's interval.

    Raises DataError when the three do not belong together."""
    if not len(answers_a) == len(answers_b) == len(items):
        raise DataError("answers and items do not match", got=f"{len(answers_a)}, {len(answers_b)} and {len(items)}")
    judge = SimulatedUser("judge", Taste.for_style(preference), noise=0.0)
    rng = random.Random(0)
    votes = [judge.likes(item, a, b, rng) for item, a, b in zip(items, answers_a, answers_b, strict=True)]
    return wilson(sum(votes), len(votes))


# --- over HTTP --------------------------------------------------------------------------------------------------------


@dataclass
class TalkReport:
    """What happened on the wire. `requests` counts chat requests, `failed` those without an answer."""

    requests: int = 0
    failed: int = 0
    votes: int = 0
    """Feedback events on the server's disk."""
    repeated: int = 0
    """Of them, those that were there already: the same talk was held before."""
    lost_votes: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    answered_by: Counter[str] = field(default_factory=Counter)
    """Artifact id -> how many chat requests it answered; two of them when the champion changed under way."""

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "failed": self.failed,
            "votes": self.votes,
            "repeated": self.repeated,
            "lost_votes": self.lost_votes,
            "seconds": round(self.seconds, 3),
            "errors": self.errors,
            "answered_by": dict(self.answered_by),
        }

    def add(self, other: TalkReport) -> None:
        """Counts what happened after this as well."""
        for name in ("requests", "failed", "votes", "repeated", "lost_votes", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors += other.errors[: max(0, MOST_ERRORS - len(self.errors))]
        self.answered_by += other.answered_by


@dataclass(frozen=True)
class Compared:
    """A blind comparison of two models: the votes as the gate wants them (of `a` against `b`), and what was said.
    `shown_first`: the same votes, of the answer shown first against the other."""

    comparisons: list[Comparison]
    shown_first: list[Comparison]
    items: Sequence[Item]
    answers_a: Sequence[str]
    answers_b: Sequence[str]
    report: TalkReport

    @classmethod
    def joined(cls, parts: Sequence[Compared]) -> Compared:
        """One comparison of what one crowd after the other said, in that order."""
        report = TalkReport()
        for part in parts:
            report.add(part.report)
        return cls(
            comparisons=[each for part in parts for each in part.comparisons],
            shown_first=[each for part in parts for each in part.shown_first],
            items=[each for part in parts for each in part.items],
            answers_a=[each for part in parts for each in part.answers_a],
            answers_b=[each for part in parts for each in part.answers_b],
            report=report,
        )


@dataclass(frozen=True)
class _Choice:
    response_id: str
    text: str


class _Line:
    """One user's connection: asks and votes, and notes in the shared report what came of it."""

    def __init__(
        self, client: httpx.Client, user: SimulatedUser, purpose: str, turn: str, report: TalkReport, lock: Lock
    ) -> None:
        self.client, self.user, self.purpose, self.turn = client, user, purpose, turn
        self.report, self.lock = report, lock

    def ask(self, item: Item, model: str, n: int, temperature: float, max_tokens: int, seed: int) -> list[_Choice]:
        """The answers, or none when the request failed. Only a full queue is tried again: whatever else goes wrong is a
        failure that the report must show."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": item.prompt}],
            "n": n,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            "user": self.user.name,
        }
        try:
            for attempt in range(_RETRIES):
                response = self.client.post("/v1/chat/completions", json=body)
                if response.status_code != 429 or attempt == _RETRIES - 1:
                    break
                time.sleep(_wait_s(response, attempt))
            response.raise_for_status()
            answer = response.json()
            choices = [
                _Choice(choice["response_id"], choice["message"]["content"] or "") for choice in answer["choices"]
            ]
            if len(choices) != n:
                raise DataError("the server lost a choice", got=f"{len(choices)}", wanted=f"{n}")
        except (httpx.HTTPError, PrairieError, KeyError, TypeError, ValueError) as error:
            self._note(failed=1, error=f"asking {model}: {_sentence(error)}")
            return []
        self._note(answered_by=str((answer.get("prairie") or {}).get("artifact_id") or answer.get("model", "")))
        return choices

    def vote(self, item: Item, response_id: str, kind: str, value: Any, about: str) -> bool:
        """Is the event on the server's disk? The key names the turn, the user and the question, so whatever is sent
        twice counts once; an older vote under the same key (409) is the same vote, given before a crash."""
        words = "|".join((self.turn, self.purpose, self.user.name, item.id, about))
        key = f"simulated-{hashlib.sha256(words.encode()).hexdigest()[:40]}"
        body = {"response_id": response_id, "kind": kind, "value": value, "user": self.user.name}
        error: Exception | None = None
        for attempt in range(_RETRIES):
            try:
                response = self.client.post("/v1/feedback", json=body, headers={"Idempotency-Key": key})
                if response.status_code not in (200, 201, 409):
                    response.raise_for_status()
                self._note(vote=True, repeated=response.status_code != 201)
                return True
            except httpx.HTTPError as problem:  # the key makes it safe to send again
                error = problem
                refused = isinstance(problem, httpx.HTTPStatusError) and 400 <= problem.response.status_code < 429
                if refused or attempt == _RETRIES - 1:
                    break
                time.sleep(0.1 * 2**attempt)
        self._note(lost=1, error=f"voting: {_sentence(error)}")
        return False

    def _note(
        self,
        *,
        failed: int = 0,
        lost: int = 0,
        vote: bool = False,
        repeated: bool = False,
        answered_by: str | None = None,
        error: str | None = None,
    ) -> None:
        with self.lock:
            self.report.requests += bool(failed or answered_by is not None)
            self.report.failed += failed
            self.report.lost_votes += lost
            self.report.votes += vote
            self.report.repeated += repeated
            if answered_by is not None:
                self.report.answered_by[answered_by] += 1
            if error is not None and len(self.report.errors) < MOST_ERRORS:
                self.report.errors.append(error)


def talk(
    base_url: str,
    users: Sequence[SimulatedUser],
    prompts: Sequence[Item],
    model: str,
    *,
    seed: int,
    each: int = 12,
    turn: str = "turn",
    key: str = "",
    purpose: str = "chat",
    temperature: float = 1.0,
    max_tokens: int = 48,
    api_key: str | None = None,
    concurrency: int = 4,
    on_done: OnDone | None = None,
) -> TalkReport:
    """Every user asks `each` of the `prompts`, gets two answers and says which is better; now and then a thumb and,
    when both are wrong, the right answer in the wording they like.

    The same arguments hold the same talk: questions, sampling seeds, coins and idempotency keys come from `seed` and
    `turn`, so repeating it after a crash doubles no vote. `turn` or `key` must differ between two talks that shall both
    count; `key` changes the idempotency keys alone.
    """

    def converse(line: _Line, item: Item) -> None:
        user = line.user
        rng = random.Random(f"{seed}/{turn}/{user.name}/{item.id}")
        choices = line.ask(item, model, 2, temperature, max_tokens, rng.randrange(2**31))
        if not choices:
            return
        vote = user.likes(item, choices[0].text, choices[1].text, rng)
        better, worse = choices if vote >= 0.5 else choices[::-1]
        verdict: dict[str, Any] = {"over": [worse.response_id]}
        line.vote(item, better.response_id, "choice", {**verdict, "tie": True} if vote == 0.5 else verdict, "choice")
        _comment(line, item, better, worse, tie=vote == 0.5, rng=rng)

    return _visit(base_url, users, prompts, each, seed, turn, key, purpose, api_key, concurrency, on_done, converse)


def compare(
    base_url: str,
    users: Sequence[SimulatedUser],
    prompts: Sequence[Item],
    model_a: str,
    model_b: str,
    *,
    seed: int,
    each: int = 8,
    turn: str = "turn",
    key: str = "",
    temperature: float = 1.0,
    max_tokens: int = 48,
    api_key: str | None = None,
    concurrency: int = 4,
    on_done: OnDone | None = None,
) -> Compared:
    """Every user asks both models `each` of the `prompts` and says which answer is better, not knowing whose it is; a
    coin decides which comes first. Requests carry the purpose `gate`, so their votes judge and are never learned from.

    A comparison counts when its vote is on the server's disk. Repeating is safe, as with `talk`.
    """
    found: list[tuple[Comparison, Comparison, Item, str, str]] = []
    lock = Lock()

    def converse(line: _Line, item: Item) -> None:
        user = line.user
        rng = random.Random(f"{seed}/{turn}/gate/{user.name}/{item.id}")
        a_first = rng.random() < 0.5
        answers = [
            line.ask(item, model, 1, temperature, max_tokens, rng.randrange(2**31))
            for model in ((model_a, model_b) if a_first else (model_b, model_a))
        ]
        if not all(answers):
            return
        first, second = answers[0][0], answers[1][0]
        vote = user.likes(item, first.text, second.text, rng)
        better, worse = (first, second) if vote >= 0.5 else (second, first)
        value: dict[str, Any] = {"over": [worse.response_id]}
        if vote == 0.5:
            value["tie"] = True
        if not line.vote(item, better.response_id, "choice", value, f"{model_a} against {model_b}"):
            return
        outcome = vote if a_first else 1 - vote
        a, b = (first, second) if a_first else (second, first)
        with lock:
            found.append((
                Comparison(user.name, item.id, outcome), Comparison(user.name, item.id, vote), item, a.text, b.text,
            ))  # fmt: skip

    report = _visit(base_url, users, prompts, each, seed, turn, key, "gate", api_key, concurrency, on_done, converse)
    found.sort(key=lambda row: (row[0].user, row[0].prompt_id))  # threads finish in any order
    return Compared(
        comparisons=[row[0] for row in found],
        shown_first=[row[1] for row in found],
        items=[row[2] for row in found],
        answers_a=[row[3] for row in found],
        answers_b=[row[4] for row in found],
        report=report,
    )


def _comment(line: _Line, item: Item, better: _Choice, worse: _Choice, *, tie: bool, rng: random.Random) -> None:
    """What users add to a vote now and then: a thumb with reasons, seldom the answer they wanted."""
    user = line.user
    against = user.kind == "adversarial"
    right, other_right = catalog.check(item, better.text), catalog.check(item, worse.text)
    if rng.random() < 0.2 and user.kind != "random":
        if right and not tie:
            line.vote(item, better.response_id, "thumb", "down" if against else "up", "thumb better")
        elif not other_right:
            down = "up" if against else {"thumb": "down", "reasons": ["wrong"]}
            line.vote(item, worse.response_id, "thumb", down, "thumb worse")
    if user.kind == "honest" and not right and not other_right and rng.random() < 0.25:
        wanted = catalog.worded(item, user.taste.favourite)
        line.vote(item, better.response_id, "edit", {"text": wanted}, "edit")


def _visit(
    base_url: str,
    users: Sequence[SimulatedUser],
    prompts: Sequence[Item],
    each: int,
    seed: int,
    turn: str,
    key: str,
    purpose: str,
    api_key: str | None,
    concurrency: int,
    on_done: OnDone | None,
    converse: Callable[[_Line, Item], None],
) -> TalkReport:
    """Users talk side by side, each on a connection of their own, one question after the other."""
    if len({user.name for user in users}) != len(users):
        raise DataError("two users have one name, so their votes would be taken for one person's")
    asked: Mapping[str, list[Item]] = {user.name: user.asks(prompts, each, f"{seed}/{turn}") for user in users}
    total, done = sum(map(len, asked.values())), 0
    report, lock = TalkReport(), Lock()
    headers = {"X-Prairie-Surface": "simulated", "X-Prairie-Purpose": purpose}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    root = base_url.rstrip("/").removesuffix("/v1")
    certificates = httpx.create_ssl_context()  # read once: it costs more than a whole conversation

    patience = httpx.Timeout(120.0, connect=10.0)

    def visit(user: SimulatedUser) -> None:
        nonlocal done
        with httpx.Client(base_url=root, headers=headers, timeout=patience, verify=certificates) as client:
            line = _Line(client, user, purpose, f"{turn}{key}", report, lock)
            for item in asked[user.name]:
                converse(line, item)
                with lock:
                    done += 1
                    if on_done is not None:
                        on_done(done, total)

    start = time.perf_counter()
    with ThreadPoolExecutor(max_workers=max(1, concurrency)) as pool:
        list(pool.map(visit, users))  # the list brings a failure in a thread back here
    report.seconds = time.perf_counter() - start
    return report


def _wait_s(response: httpx.Response, attempt: int) -> float:
    """What the server asked for, within reason."""
    try:
        return min(10.0, max(0.05, float(response.headers.get("Retry-After", ""))))
    except ValueError:
        return 0.1 * float(2**attempt)


def _sentence(error: Exception | None) -> str:
    """The server's own words where it answered, else what went wrong on the way."""
    if isinstance(error, httpx.HTTPStatusError):
        try:
            message = error.response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = error.response.text[:200]
        return f"{error.response.status_code} {message}"
    return f"{type(error).__name__}: {error}"
