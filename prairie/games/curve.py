"""A line's learning curve: Elo against the processor time that it cost.

Each promotion adds what its match says of candidate against champion; a sum of such steps flatters, since each was
measured against the version before and not against the first. Not here: where turns are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

MOST = 0.98
"""A match that was won whole says no more than its number of games allows: a step is bounded by 676 Elo."""


@dataclass(frozen=True)
class Step:
    """One turn: seconds of self-play and training, the candidate's share of the match, whether it was promoted."""

    cpu_s: float
    win_rate: float
    promoted: bool


@dataclass(frozen=True)
class Point:
    """Where a line stands after a turn; the first version is at 0."""

    cpu_minutes: float
    elo: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def learning_curve(steps: Iterable[Step]) -> list[Point]:
    """One point for each turn, in their order."""
    points, seconds, elo = list[Point](), 0.0, 0.0
    for step in steps:
        seconds += step.cpu_s
        elo += elo_of(step.win_rate) if step.promoted else 0.0
        points.append(Point(round(seconds / 60, 3), round(elo, 1)))
    return points


def elo_of(share: float) -> float:
    """The difference in Elo that a win rate stands for, bounded."""
    share = min(max(share, 1 - MOST), MOST)
    return -400 * math.log10(1 / share - 1)
