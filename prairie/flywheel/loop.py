"""One turn of the wheel, written once: act, collect, learn, judge, promote.

Chat feedback, verifiable rewards and self-play are three actors on it. Roles meet in the store: what an actor collected
is an artifact, a candidate is a version, a promotion is one row. Not here: what acting, learning and judging are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from prairie.errors import NotFoundError
from prairie.flywheel.gate import Verdict
from prairie.store.artifacts import Artifact
from prairie.store.registry import Registry, Turn, Version


class Actor(Protocol):
    def act(self, champion: Version) -> Artifact:
        """Lets the champion meet the world; returns what was collected, as a dataset artifact."""


class Learner(Protocol):
    def learn(self, champion: Version, records: Artifact) -> Version:
        """A candidate from the champion, registered and not promoted."""


class Gate(Protocol):
    def judge(self, candidate: Version, champion: Version) -> Verdict:
        """Is the candidate better, and by what evidence?"""


@dataclass(frozen=True)
class Turned:
    """What one turn did."""

    number: int
    champion: Version
    candidate: Version
    records: Artifact
    verdict: Verdict

    @property
    def winner(self) -> Version:
        """Who is champion afterwards."""
        return self.candidate if self.verdict.passed else self.champion

    def to_json(self) -> dict[str, Any]:
        return {
            "turn": self.number,
            "line": self.champion.line,
            "champion": self.champion.name,
            "candidate": self.candidate.name,
            "dataset": self.records.id,
            "promoted": self.verdict.passed,
            "verdict": self.verdict.to_json(),
        }


@dataclass(frozen=True)
class Flywheel:
    """A line and the three roles that turn it."""

    line: str
    registry: Registry
    actor: Actor
    learner: Learner
    gate: Gate

    def turn(self, *, dry: bool = False, key: str | None = None) -> Turned:
        """One turn; `dry` judges and promotes nobody. Raises NotFoundError if the line has no champion, BusyError while
        another process or thread turns it; whatever fails on the way changes no line. A turn whose process died is done
        again and ends as it would have; what was turned under the same `key` before is not turned twice, its recorded
        outcome is returned."""
        with self.registry.home.lock(f"turn-{self.line}"):
            return self._turn(dry, key)

    def _turn(self, dry: bool, key: str | None) -> Turned:
        known = self.registry.turn_of(self.line, key) if key is not None else None
        if known is not None:
            return self._recall(known)
        number = 1 + max((turn.number for turn in self.registry.turns(self.line)), default=0)
        champion = self.registry.champion(self.line)
        if champion is None:
            raise NotFoundError(f"line `{self.line}` has no champion", mend="publish a model to it first")
        records = self.actor.act(champion)
        candidate = self.learner.learn(champion, records)
        verdict = self.gate.judge(candidate, champion)
        turned = Turned(number, champion, candidate, records, verdict)
        if not dry:
            self._remember(turned, key)
        return turned

    def _remember(self, turned: Turned, key: str | None) -> None:
        """The turn's row and the champion's, in one transaction."""
        self.registry.record_turn(
            self.line,
            turned.number,
            turned.champion.artifact_id,
            turned.candidate.artifact_id,
            turned.records.id,
            turned.verdict.to_json(),
            turned.verdict.passed,
            key,
        )

    def _recall(self, turn: Turn) -> Turned:
        """What a recorded turn did."""
        versions = {version.artifact_id: version for version in self.registry.versions(self.line)}
        return Turned(
            turn.number,
            versions[str(turn.champion)],
            versions[str(turn.candidate)],
            self.registry.home.artifacts.get(str(turn.dataset)),
            Verdict.from_json(turn.verdict),
        )
