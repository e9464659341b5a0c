"""The `turn` stage of a recipe: a turn of a line's wheel, with people who come over HTTP, while the server answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, cast

import httpx

from prairie.evals.statistics import Interval
from prairie.flywheel.chat import ChatActor, ChatGate, ChatLearner, simulated_talk, simulated_vote
from prairie.flywheel.loop import Flywheel, Turned
from prairie.flywheel.users import win_rate_true
from prairie.pipeline.context import Context, Handler, Work
from prairie.pipeline.held_out import score_suite, suite
from prairie.pipeline.model_stages import load_language_model
from prairie.recipe import Turn
from prairie.store.registry import Registry, Version
from prairie.tasks.task import Style

SWITCH_LIMIT_S = 15.0


class Caller(threading.Thread):
    """Somebody who goes on asking during a turn, to see whether any request fails and when the new model answers."""

    def __init__(self, url: str, line: str, every_s: float = 0.4) -> None:
        super().__init__(daemon=True)
        self.url, self.line, self.every_s = url, line, every_s
        self.requests = 0
        self.failed = 0
        self.seen: dict[str, float] = {}
        """Artifact id -> monotonic time of its first answer."""
        self._stop_asking = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30, headers={"X-Prairie-Purpose": "gate"}) as client:
            while not self._stop_asking.wait(self.every_s):
                self.requests += 1
                body = {"model": self.line, "messages": [{"role": "user", "content": "1 + 1"}], "max_tokens": 4}
                try:
                    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
                    self.seen.setdefault(answer["prairie"]["artifact_id"], time.monotonic())
                except (httpx.HTTPError, KeyError, ValueError):
                    self.failed += 1

    def wait_for(self, artifact_id: str, limit_s: float = SWITCH_LIMIT_S) -> float | None:
        """Seconds until that model answered, None when it did not within the limit."""
        began = time.monotonic()
        while time.monotonic() - began < limit_s:
            if artifact_id in self.seen:
                return max(0.0, self.seen[artifact_id] - began)
            time.sleep(0.02)
        return None

    def stop(self) -> None:
        self._stop_asking.set()
        self.join(30)


def turn(work: Work) -> dict[str, Any]:
    """Carries out one turn; done again after a crash it doubles no vote and turns nothing twice (`talk` is then None:
    nobody was sent)."""
    config: Turn = work.config
    context, url = work.context, str(work.inputs[config.server].figures["url"])
    actor = ChatActor(
        context,
        config.line,
        simulated_talk(context, url, config.line, config.users, config.tasks, work.name, work.identity),
        objective=config.learn.objective,
    )
    learner = ChatLearner(context, config.learn, work.name)
    gate = ChatGate(
        context, config.gate, config.tasks,
        simulated_vote(context, url, config.users, config.gate, config.tasks, work.name, work.identity),
    )  # fmt: skip
    caller = Caller(url, config.line)
    caller.start()
    try:
        turned = Flywheel(config.line, Registry(context.home), actor, learner, gate).turn(key=work.identity)
        switched_s = caller.wait_for(turned.winner.artifact_id)
    finally:
        caller.stop()
    first = _first_version(context, config.line)
    true = true_win_rate(context, turned.winner, first, config)
    return {
        **turned.to_json(),
        "champion_artifact": turned.winner.artifact_id,
        "candidate_artifact": turned.candidate.artifact_id,
        "summary": _summary(turned, true),
        "verdict_text": turned.verdict.text(),
        "judged": {"win_rate": turned.verdict.win_rate, "low": turned.verdict.low, "high": turned.verdict.high},
        "true": {"win_rate": true.value, "low": true.low, "high": true.high, "n": true.n},
        "hidden_preference": (
            f"The simulated users' hidden preference: a right value first, then wording `{config.users.preference}`."
            " Training never saw this sentence, only votes."
        ),
        "rows": turned.records.figures["rows"],
        "votes": turned.records.figures["votes"],
        "talk": actor.report.to_json() if actor.report is not None else None,
        "learned": turned.candidate.figures,
        "during": {"requests": caller.requests, "failed": caller.failed, "switched_s": switched_s},
    }


def true_win_rate(context: Context, version: Version, first: Version, config: Turn) -> Interval:
    """How often the hidden preference takes this version's answer over the first one's, on held-out questions."""
    asked = suite(config.tasks, config.gate.items)
    answers = []
    for one in (version, first):
        model = load_language_model(context.home.artifacts.get(one.artifact_id), context.runtime)
        answers.append(list(score_suite(model, asked, 48).answers))
    return win_rate_true(answers[0], answers[1], asked, cast(Style, config.users.preference))


def _first_version(context: Context, line: str) -> Version:
    """The champion that the line began with."""
    registry = Registry(context.home)
    number = registry.history(line)[0].number
    return next(version for version in registry.versions(line) if version.number == number)


def _summary(turned: Turned, true: Interval) -> str:
    verdict = turned.verdict
    outcome = f"{turned.candidate.name} promoted" if verdict.passed else f"refused, {turned.champion.name} stays"
    return (
        f"{outcome}: wins {verdict.win_rate:.1%} [{verdict.low:.1%}, {verdict.high:.1%}] of {verdict.n} blind votes; "
        f"true preference of the champion against the first: {true.value:.1%} [{true.low:.1%}, {true.high:.1%}]"
    )


HANDLERS: Mapping[str, Handler] = {
    "turn": Handler(turn, ("data", "models", "ops", "train", "engine", "evals", "tasks", "flywheel")),
}
