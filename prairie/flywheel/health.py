"""Is what a turn collected fit to be learnt from? Figures that a collapse shows in before any loss does.

The twin of the health of self-played games (`prairie.games.selfplay.Health`): there games grow short and alike, here
the answers that people preferred do. Both are written into the dataset's figures and both refuse it with one sentence.
Not here: what a candidate's answers may become (`probes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from prairie.errors import DataError
from prairie.flywheel.probes import refuses, repeats_itself

ENOUGH = 24
"""Preferences below which a share is noise and only lengths are looked at."""


@dataclass(frozen=True)
class ChatHealth:
    """Of the answers that people preferred."""

    answers: int
    mean_length: float
    """Characters."""
    length_ratio: float
    """Preferred answers over the ones they were preferred to: far from 1, length is all that is taught."""
    repetition: float
    """Share that repeats itself."""
    refusals: float
    """Share that refuses to answer."""
    distinct: float
    """Share of different texts."""

    @classmethod
    def of(cls, chosen: Sequence[str], rejected: Sequence[str]) -> ChatHealth:
        """Of what people preferred or liked, at least one answer, against what they did not."""
        other = fmean(map(len, rejected)) if rejected else fmean(map(len, chosen))
        return cls(
            len(chosen), round(fmean(map(len, chosen)), 2),
            round(fmean(map(len, chosen)) / max(1.0, other), 4),
            round(fmean(map(repeats_itself, chosen)), 4), round(fmean(map(refuses, chosen)), 4),
            round(len(set(chosen)) / len(chosen), 4),
        )  # fmt: skip

    def faults(self) -> list[str]:
        """What says that nothing good can be learnt; empty when nothing does."""
        many = self.answers >= ENOUGH
        found = [
            (self.mean_length < 1, f"the preferred answers have {self.mean_length:g} characters"),
            (
                many and not 0.1 <= self.length_ratio <= 10,
                f"the preferred answers are {self.length_ratio:.2f} times as long as the others",
            ),
            (many and self.repetition > 0.5, f"{self.repetition:.0%} of the preferred answers repeat themselves"),
            (many and self.refusals > 0.5, f"{self.refusals:.0%} of the preferred answers refuse to answer"),
        ]
        return [text for bad, text in found if bad]

    def check(self) -> None:
        """Raises DataError when the votes teach a collapse."""
        faults = self.faults()
        if faults:
            raise DataError(
                "the preferred answers have collapsed, they are not learnt from", got="; ".join(faults),
                mend="look at the votes with `prairie feedback curate`, or roll the line back",
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
