"""Votes become records, by the rules of this one file.

    pairs     choice        the chosen answer over each other one; a tie or "both bad" prefers nothing
    (DPO)     edit          the corrected text over the answer that was corrected
              thumbs        an answer with a thumb up over one with a thumb down, same user and same prompt
    weak      regenerate    the answer that was asked for instead, over the one that was not liked; an act and not a
    (apart)                 word, so it weighs `REGENERATE_WEIGHT`; a turn does not learn from it
    labelled  thumb         prompt, answer and up or down
    (KTO)     rating        4 and 5 are up, 1 and 2 down, 3 says nothing
              copy          up, at `COPY_WEIGHT`, unless the same user said otherwise; abandon says nothing by itself
    edits     edit          prompt and corrected text
    (SFT)
    comments  comment       prompt, answer and what was said of it, for people who write rubrics

What keeps one person, or one person with many names, from steering a model:
  - answers that judged a candidate (purpose `gate`) are never learned from;
  - near copies of what the same user said before are dropped, of anybody for edits and thumbs;
  - a user gives at most `per_user` pairs, and at most `MOST_OF_MEDIAN` times what the user in the middle gives;
  - a user is trusted as far as they agree with gold questions and with others on the same two answers; who is wrong
    more often than not is not learned from. The others' pairs and labels weigh as they are trusted, a stranger's 1.
Personal data is masked in all that is written (`prairie.data.personal`). Every record names the events it stands on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from prairie.data.clean import near_duplicates
from prairie.data.personal import FindNames, mask_personal
from prairie.data.records import Chat, Message, Preference, Tools, tools_from_json
from prairie.store.feedback import Response, Vote

HELD_OUT_SHARE = 0.25
PER_USER = 100
MOST_OF_MEDIAN = 3
LEAST_SHARE = 20
"""Below so many pairs nobody is cut for giving more than the user in the middle."""
REGENERATE_WEIGHT = 0.25
COPY_WEIGHT = 0.25
NEAR = 0.8
"""Jaccard similarity of word 5-grams from which two records are one said twice."""
TRUST_PRIOR = (4.0, 1.0)
"""Agreements and disagreements that everybody is given beforehand: a stranger is trusted to 80%, who is wrong twice is
not cast out for it."""
STRANGER = TRUST_PRIOR[0] / sum(TRUST_PRIOR)
LEAST_TRUST = 0.5
LEAST_CHECKS = 5
"""Comparisons with gold or with others below which nobody is judged."""

Gold = Callable[[Sequence[Message], str, str], bool | None]
"""Prompt, preferred text, other text -> is that preference known to be right, wrong, or not known?"""


@dataclass
class Curated:
    """Records, and what became of the votes that gave none."""

    pairs: list[Preference] = field(default_factory=list)
    weak: list[Preference] = field(default_factory=list)
    labelled: list[Chat] = field(default_factory=list)
    """The last message is the answer; `label` in the tags is True for a thumb up."""
    edits: list[Chat] = field(default_factory=list)
    comments: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """Every event that stands behind a pair."""
    dropped: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)
    """Personal data in the pairs, by kind."""
    trust: dict[str, float] = field(default_factory=dict)
    """Of the users who were compared with gold or with others."""

    @property
    def labelled_events(self) -> list[str]:
        """Every event that stands behind a labelled answer."""
        return list(dict.fromkeys(event for answer in self.labelled for event in answer.tags["events"]))

    @property
    def all_events(self) -> list[str]:
        """Every event that stands behind a record of any kind."""
        records: list[Preference | Chat] = [*self.pairs, *self.weak, *self.labelled, *self.edits]
        named = [event for record in records for event in record.tags["events"]]
        return list(dict.fromkeys([*named, *(event for comment in self.comments for event in comment["events"])]))


def curate(
    votes: Sequence[Vote], per_user: int = PER_USER, gold: Gold | None = None, names: FindNames | None = None
) -> Curated:
    """Records of all votes, in the order in which they were cast."""
    result = Curated()
    opinions = list(_opinions(votes, result.dropped))
    result.trust = trust(opinions, gold)
    cast_out = {user for user, how_far in result.trust.items() if how_far < LEAST_TRUST}
    opinions = _tell_apart(opinions, cast_out, result.dropped)
    share = _share_of_one(opinions, per_user)
    given: Counter[str] = Counter()
    for opinion in opinions:
        if opinion.why != "regenerate" and given[opinion.user] >= share:
            result.dropped["over this user's share"] += 1
            continue
        pair = _preference(opinion, result.trust, names, result.masked)
        if opinion.why == "regenerate":
            result.weak.append(pair)
            continue
        given[opinion.user] += 1
        result.pairs.append(pair)
        result.events += opinion.events
    result.events = list(dict.fromkeys(result.events))
    _others(result, [vote for vote in votes if (vote.event.user or "") not in cast_out], share, names)
    return result


def is_held_out(user: str, share: float = HELD_OUT_SHARE) -> bool:
    """Does this user judge instead of teach? Decided by a hash of the name, so it never changes."""
    return int.from_bytes(hashlib.sha256(f"gate:{user}".encode()).digest()[:8], "big") / 2**64 < share


def split_by_time(votes: Sequence[Vote], share: float) -> tuple[list[Vote], list[Vote]]:
    """(earlier, later): the newest `share` of the votes apart. All votes of one moment, and on one prompt of one user,
    stay together, so nothing later is told by something earlier."""
    ordered = sorted(votes, key=lambda vote: vote.event.created)
    if not ordered or share <= 0:
        return ordered, []
    border = ordered[min(len(ordered) - 1, round(len(ordered) * (1 - share)))].event.created
    early = {_asked(vote) for vote in ordered if vote.event.created < border}
    later = [vote for vote in ordered if vote.event.created >= border and _asked(vote) not in early]
    kept = {id(vote) for vote in later}
    return [vote for vote in ordered if id(vote) not in kept], later


def gold_of(known: Sequence[Preference]) -> Gold:
    """Gold questions from preferences that are known to be right: who prefers the chosen answer of one, or anything to
    its rejected answer, is right; who does the opposite is wrong; of other answers nothing is known."""
    answers = {
        (repr(p.prompt), side[-1].content): right
        for p in known
        for side, right in ((p.chosen, True), (p.rejected, False))
    }

    def judge(prompt: Sequence[Message], better: str, worse: str) -> bool | None:
        first, second = answers.get((repr(tuple(prompt)), better)), answers.get((repr(tuple(prompt)), worse))
        return None if first == second else first if first is not None else not second

    return judge


def trust(opinions: Sequence[Opinion], gold: Gold | None = None) -> dict[str, float]:
    """How far each user is to be believed: the share of their preferences that gold, or the majority of OTHER users on
    the same two answers, confirms; drawn to 80% by `TRUST_PRIOR`. Only users with `LEAST_CHECKS` checks."""
    said: dict[tuple[str, frozenset[str]], dict[str, str]] = defaultdict(dict)
    for one in opinions:
        if one.why == "choice":
            said[repr(one.prompt), frozenset((one.better, one.text))][one.user] = one.better
    checks: dict[str, list[bool]] = defaultdict(list)
    for one in opinions:
        known = gold(one.prompt, one.better, one.text) if gold is not None else None
        if known is None and one.why == "choice":
            others = said[repr(one.prompt), frozenset((one.better, one.text))]
            votes = Counter(better == one.better for user, better in others.items() if user != one.user)
            known = None if votes[True] == votes[False] else votes[True] > votes[False]
        if known is not None:
            checks[one.user].append(known)
    agreed, disagreed = TRUST_PRIOR
    return {
        user: (sum(found) + agreed) / (len(found) + agreed + disagreed)
        for user, found in checks.items()
        if len(found) >= LEAST_CHECKS
    }


@dataclass(frozen=True)
class Opinion:
    """One preference of one user: `better` over the text of `worse`, by the rule `why`."""

    events: tuple[str, ...]
    user: str
    better: str
    worse: Response
    why: str

    @property
    def text(self) -> str:
        return self.worse.text or ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        return _prompt(self.worse)


def _opinions(votes: Sequence[Vote], dropped: Counter[str]) -> Iterator[Opinion]:
    """Preferences that can be learned from; what prefers nothing is counted in `dropped`."""
    for one in _said(votes, dropped):
        if one.worse.sampling.get("template"):  # another prompt than the one that rows are made with
            dropped["asked with options of the template"] += 1
        elif not one.prompt or not one.better.strip() or one.better == one.text:
            dropped["the answers do not differ" if one.prompt else "a raw completion, not a conversation"] += 1
        else:
            yield one


def _said(votes: Sequence[Vote], dropped: Counter[str]) -> Iterator[Opinion]:
    thumbs: dict[tuple[str, str], list[Vote]] = defaultdict(list)
    for vote in votes:
        event, user = vote.event, vote.event.user or ""
        if event.kind == "choice" and vote.decided:
            for loser in vote.over:
                yield Opinion((str(event.id),), user, vote.response.text or "", loser, "choice")
        elif event.kind == "choice":
            dropped["a tie"] += 1
        elif event.kind == "edit" and event.text:
            yield Opinion((str(event.id),), user, event.text, vote.response, "edit")
        elif event.kind == "regenerate" and vote.over:
            yield Opinion((str(event.id),), user, vote.over[0].text or "", vote.response, "regenerate")
        elif event.kind == "thumb":
            thumbs[_asked(vote)].append(vote)
        else:
            dropped[f"a {event.kind} prefers nothing by itself"] += 1
    for (user, _), group in thumbs.items():
        yield from _thumb_pairs(user, group, dropped)


def _thumb_pairs(user: str, group: Iterable[Vote], dropped: Counter[str]) -> Iterator[Opinion]:
    ups = [vote for vote in group if vote.event.thumb == "up"]
    downs = [vote for vote in group if vote.event.thumb == "down"]
    for up, down in zip(ups, downs, strict=False):
        yield Opinion((str(up.event.id), str(down.event.id)), user, up.response.text or "", down.response, "thumbs")
    dropped["a thumb without its opposite"] += abs(len(ups) - len(downs))


def _tell_apart(opinions: Sequence[Opinion], cast_out: set[str], dropped: Counter[str]) -> list[Opinion]:
    """Without those who are not believed, and without what was said before in nearly the same words."""
    believed = [one for one in opinions if one.user not in cast_out]
    dropped["a user who is wrong more often than not"] += len(opinions) - len(believed)
    # Long enough texts are compared by their words; short ones are copies only if they are equal.
    long = [i for i, one in enumerate(believed) if len(one.better) + len(one.text) >= 200]
    texts = ["\n".join((repr(one.prompt), one.better, "<over>", one.text)) for one in believed]
    near = {long[i]: long[j] for i, j in near_duplicates([texts[i] for i in long], threshold=NEAR).items()}
    kept, seen, spoken = [], set(), set()
    for place, one in enumerate(believed):
        key = texts[near.get(place, place)]
        # Two people who choose alike are two voices; an edit or a pair of thumbs said again teaches nothing new.
        if (key, one.user) in spoken or (key in seen and one.why != "choice"):
            dropped["said before"] += 1
            continue
        seen.add(key)
        spoken.add((key, one.user))
        kept.append(one)
    return kept


def _share_of_one(opinions: Sequence[Opinion], per_user: int) -> int:
    """The most pairs that one user may give."""
    counts = Counter(one.user for one in opinions if one.why != "regenerate")
    middle = median(counts.values()) if len(counts) > 1 else per_user
    return min(per_user, max(LEAST_SHARE, int(MOST_OF_MEDIAN * middle)))


def _preference(
    one: Opinion, trusted: Mapping[str, float], names: FindNames | None, masked: Counter[str]
) -> Preference:
    tags: dict[str, Any] = {"why": one.why, "user": one.user, "events": list(one.events)}
    if one.user in trusted:
        tags["trust"] = round(trusted[one.user], 3)
    weight = _weight(one.user, trusted, REGENERATE_WEIGHT if one.why == "regenerate" else 1.0)

    def clean(text: str) -> str:
        found, counts = mask_personal(text, names)
        masked.update(counts)
        return found

    prompt = tuple(_masked(message, clean) for message in one.prompt)
    chosen, rejected = Message("assistant", clean(one.better)), Message("assistant", clean(one.text))
    return Preference(prompt, (chosen,), (rejected,), "votes", tags, _tools(one.worse), weight)


def _weight(user: str, trusted: Mapping[str, float], weight: float) -> float:
    """How much a record counts: what its kind weighs, times how far its user is trusted against a stranger."""
    return round(weight * trusted.get(user, STRANGER) / STRANGER, 3)


def _masked(message: Message, clean: Callable[[str], str]) -> Message:
    """A turn without personal data in its text, its thoughts and the arguments of its calls."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(each) for key, each in value.items()}
        if isinstance(value, list):
            return [cleaned(each) for each in value]
        return clean(value) if isinstance(value, str) else value

    calls = tuple(
        replace(call, arguments=json.dumps(cleaned(json.loads(call.arguments)), ensure_ascii=False))
        for call in message.tool_calls
    )
    return replace(message, content=clean(message.content), reasoning=clean(message.reasoning), tool_calls=calls)


def _others(result: Curated, votes: Sequence[Vote], share: int, names: FindNames | None) -> None:
    """Fills labelled answers, edits and comments, with the same share for everybody."""
    given: Counter[tuple[str, str]] = Counter()
    labels = {(vote.event.user, vote.response.id) for vote in votes if vote.event.kind in ("thumb", "rating")}
    for vote in votes:
        event, response = vote.event, vote.response
        prompt, user = () if response.sampling.get("template") else _prompt(response), event.user or ""
        label, weight = _label(vote)
        if event.kind == "copy" and (event.user, response.id) in labels:
            label = None
        what = "label" if label is not None else event.kind if event.kind in ("edit", "comment") else ""
        if not what or not prompt or given[user, what] >= share:
            continue
        given[user, what] += 1
        tags: dict[str, Any] = {"why": event.kind, "user": user, "events": [str(event.id)]}
        asked = tuple(_masked(m, lambda text: mask_personal(text, names)[0]) for m in prompt)
        answer = mask_personal(response.text or "", names)[0]
        said = mask_personal(event.text or "", names)[0]
        if what == "label" and answer.strip():
            tags |= {"label": label, **({"reasons": event.reasons} if event.reasons else {})}
            messages, weight = (*asked, Message("assistant", answer)), _weight(user, result.trust, weight)
            result.labelled.append(Chat(messages, "votes", tags, _tools(response), weight))
        elif what == "edit":
            result.edits.append(Chat((*asked, Message("assistant", said)), "votes", tags, _tools(response)))
        elif what == "comment":
            facts = {"prompt": [m.to_json() for m in asked], "answer": answer, "comment": said}
            result.comments.append({**facts, "user": user, "events": tags["events"]})


def _label(vote: Vote) -> tuple[bool | None, float]:
    """What a vote says of one answer alone, and how much that weighs."""
    event = vote.event
    if event.thumb:
        return event.thumb == "up", 1.0
    if event.kind == "rating":
        return (None if event.value == 3 else event.value > 3), 1.0
    return (True if event.kind == "copy" else None), COPY_WEIGHT


def _asked(vote: Vote) -> tuple[str, str]:
    return vote.event.user or "", repr((vote.response.prompt, vote.response.sampling.get("tools")))


def _tools(response: Response) -> Tools:
    """What the model could call when it answered."""
    return tools_from_json(response.sampling.get("tools"))


def _prompt(response: Response) -> tuple[Message, ...]:
    return () if isinstance(response.prompt, str) else tuple(response.prompt)
