"""The guard: ends a trial, or takes back a promotion, when what is seen of the new version is worse by more than noise.

The k-th answer (or person) of the new version is paired with the k-th of the old one, and one anytime-valid test
(`prairie.evals.sequential`: betting, arXiv 2010.09686) is asked after every pair whether the new one is worse by more
than a tolerance. So a version that is not worse is taken back in at most `ERROR` of cases for each signal, however long
and often one looks.

    signal    of each    worse means                                           tolerance
    errors    answer     a larger share ends by a fault of the model           `ERRORS_WORSE_BY`
    latency   answer     more time a token, in the larger part of the pairs    `SLOWER` times
    votes     person     a larger share of first thumbs and ratings are down   `DISLIKED_WORSE_BY`

On trial, both versions answer at the same time, so all signals count; a shadow's answers have no votes. A version that
was promoted at once is compared with the last answers of the champion before it: without latency, which depends on the
hour. It is watched for its first `MOST_ANSWERS` answers.
Not here: reading the signals (`prairie.store.signals`), the change itself (`prairie.store.registry`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prairie.errors import ConflictError, NotFoundError
from prairie.serve.metrics import Metrics

if TYPE_CHECKING:
    from prairie.store.home import Home
    from prairie.store.registry import Trial
    from prairie.store.signals import Signals

log = logging.getLogger("prairie.serve")

ERROR = 0.01
ERRORS_WORSE_BY = 0.01
SLOWER = 1.5
DISLIKED_WORSE_BY = 0.1
WHO = "prairie serve"


def alarm(new: Signals, old: Signals, *, timed: bool) -> str | None:
    """What is worse about the new version, in one sentence; None while nothing is certain."""
    checks = [
        ("of its answers fail", ERRORS_WORSE_BY, new.failed, old.failed),
        ("of the people who vote dislike its answers", DISLIKED_WORSE_BY, new.disliked, old.disliked),
    ]
    for what, tolerance, ours, theirs in checks:
        pairs = list(zip(ours, theirs, strict=False))
        worse = [(1 + one - other) / 2 for one, other in pairs]
        if evidence := _certain(worse, (1 + tolerance) / 2):
            shares = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
            return f"{shares[0]:.1%} {what}, {shares[1]:.1%} before; {evidence}"
    if timed:
        slower = [float(one > SLOWER * other) for one, other in zip(new.ms_per_token, old.ms_per_token, strict=False)]
        if evidence := _certain(slower, 0.5):
            share = sum(slower) / len(slower)
            return f"{share:.1%} of its answers take more than {SLOWER:g} times the champion's time a token; {evidence}"
    return None


def _certain(values: Sequence[float], mean: float) -> str | None:
    """The evidence that `values` in [0, 1] lie above `mean`, if it is enough."""
    import numpy as np

    from prairie.evals.sequential import wealth

    grown = wealth(np.asarray(values, dtype=np.float64), mean)
    reached = np.flatnonzero(grown >= 1 / ERROR)
    if not len(reached):
        return None
    return f"certain after {int(reached[0]) + 1} pairs (evidence {grown.max():.3g} of {1 / ERROR:.0f})"


def _since(moment: float) -> float | None:
    """What has come since; all there is when the clock was put back behind that moment."""
    return moment if moment <= time.time() else None


class Guard:
    """Looks at every line that is served. Called by the watcher's thread."""

    def __init__(self, home: Home, metrics: Metrics) -> None:
        self.home, self.metrics = home, metrics
        self._over: set[int] = set()
        """Ids of promotions that have been watched for long enough."""

    def look(self, lines: Sequence[str]) -> None:
        """Ends trials and takes promotions back; each of them once, whichever server sees it first."""
        for line in lines:
            trial = self.home.registry.trial(line)
            if trial is not None:
                self._look_at_trial(trial)
            else:
                self._look_at_promotion(line)

    def _look_at_trial(self, trial: Trial) -> None:
        from prairie.store.signals import signals

        champion = self.home.registry.champion(trial.version.line)
        if champion is None:
            return
        purpose = "shadow" if trial.share is None else "chat"
        new = signals(self.home, trial.version, purpose=purpose, since=_since(trial.created))
        old = signals(self.home, champion, since=_since(trial.created))
        why = alarm(new, old, timed=True)
        if why is not None and self.home.registry.end_trial(trial, who=WHO, why=why):
            self._tell(trial.version.line, f"the trial of {trial.version.name} is over, {champion.name} stays", why)

    def _look_at_promotion(self, line: str) -> None:
        from prairie.store.signals import MOST_ANSWERS, signals

        registry = self.home.registry
        changes = [event for event in registry.history(line) if event.action in ("promote", "rollback")]
        last = changes[-1] if changes else None
        if last is None or last.action != "promote" or last.previous is None or last.id in self._over:
            return
        new = signals(self.home, registry.resolve(f"{line}@{last.number}"), since=_since(last.created))
        if len(new.failed) >= MOST_ANSWERS:
            self._over.add(last.id)
        before = registry.resolve(f"{line}@{last.previous}")
        old = signals(self.home, before, before=last.created, backwards=True)
        why = alarm(new, old, timed=False)
        if why is None:
            return
        try:
            champion = registry.rollback(line, who=WHO, why=why, only=last.number)
        except (ConflictError, NotFoundError):  # somebody else was faster
            return
        self._tell(line, f"{line}@{last.number} is taken back, {champion.name} is champion again", why)

    def _tell(self, line: str, what: str, why: str) -> None:
        self.metrics.taken_back.labels(line).inc()
        log.error("%s: %s", what, why)
