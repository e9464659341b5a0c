"""Votes become preferences, by the rules of this one file.

    choice        the chosen answer over each other one; a tie or "both bad" prefers nothing
    edit          the corrected text over the answer that was corrected
    thumbs        an answer with a thumb up over one with a thumb down, same user and same prompt

Answers that judged a candidate (purpose `gate`) are never learned from. One user gives at most `per_user` pairs, so
that nobody's flood outweighs the others. Every pair names the events it stands on.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prairie.data.records import Message, Preference
from prairie.store.feedback import Response, Vote

HELD_OUT_SHARE = 0.25


@dataclass
class Curated:
    """Pairs, and what became of the votes that gave none."""

    pairs: list[Preference] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """Every event that stands behind a pair."""
    dropped: Counter[str] = field(default_factory=Counter)


def curate(votes: Sequence[Vote], per_user: int = 100) -> Curated:
    """Preferences of all votes, in the order in which they were cast."""
    result = Curated()
    given: Counter[str] = Counter()
    seen: set[tuple[str, str, str]] = set()
    for events, user, better, worse, why in _opinions(votes, result.dropped):
        text = worse.text or ""
        prompt = _prompt(worse)
        if not prompt or not better.strip() or better == text:
            result.dropped["the answers do not differ" if prompt else "a raw completion, not a conversation"] += 1
            continue
        key = (repr(prompt), better, text)
        if key in seen and why != "choice":
            result.dropped["said before"] += 1
            continue
        if given[user] >= per_user:
            result.dropped["over this user's share"] += 1
            continue
        seen.add(key)
        given[user] += 1
        tags = {"why": why, "user": user, "events": list(events)}
        result.pairs.append(
            Preference(prompt, (Message("assistant", better),), (Message("assistant", text),), "votes", tags)
        )
        result.events += events
    result.events = list(dict.fromkeys(result.events))
    return result


def is_held_out(user: str, share: float = HELD_OUT_SHARE) -> bool:
    """Does this user judge instead of teach? Decided by a hash of the name, so it never changes."""
    return int.from_bytes(hashlib.sha256(f"gate:{user}".encode()).digest()[:8], "big") / 2**64 < share


_Opinion = tuple[tuple[str, ...], str, str, Response, str]
"""Events, user, the better text, the worse answer, the rule."""


def _opinions(votes: Sequence[Vote], dropped: Counter[str]) -> Iterator[_Opinion]:
    thumbs: dict[tuple[str, str], list[Vote]] = defaultdict(list)
    for vote in votes:
        event, user = vote.event, vote.event.user or ""
        if event.kind == "choice" and vote.decided:
            for loser in vote.over:
                yield (str(event.id),), user, vote.response.text or "", loser, "choice"
        elif event.kind == "choice":
            dropped["a tie"] += 1
        elif event.kind == "edit" and event.text:
            yield (str(event.id),), user, event.text, vote.response, "edit"
        elif event.kind == "thumb":
            thumbs[user, repr(vote.response.prompt)].append(vote)
        else:
            dropped[f"a {event.kind} prefers nothing by itself"] += 1
    for (user, _), group in thumbs.items():
        yield from _thumb_pairs(user, group, dropped)


def _thumb_pairs(user: str, group: Iterable[Vote], dropped: Counter[str]) -> Iterator[_Opinion]:
    ups = [vote for vote in group if vote.event.thumb == "up"]
    downs = [vote for vote in group if vote.event.thumb == "down"]
    for up, down in zip(ups, downs, strict=False):
        yield (str(up.event.id), str(down.event.id)), user, up.response.text or "", down.response, "thumbs"
    dropped["a thumb without its opposite"] += abs(len(ups) - len(downs))


def _prompt(response: Response) -> tuple[Message, ...]:
    return () if isinstance(response.prompt, str) else tuple(response.prompt)
