"""Votes become preferences by the rules of curate.py, and every vote that gives none is counted."""

import itertools

import pytest

from prairie.data.records import Message, Preference
from prairie.flywheel.curate import HELD_OUT_SHARE, REGENERATE_WEIGHT, curate, gold_of, is_held_out, split_by_time
from prairie.store.feedback import FeedbackEvent, Response, Vote

NUMBERS = itertools.count()


def answer(text, prompt="q"):
    asked = (Message("user", prompt),) if prompt else "raw text"
    return Response(f"r{next(NUMBERS)}", "spark", asked, text=text, status="done")


def vote(kind, value, response, over=(), user="ann"):
    return Vote(FeedbackEvent(response.id, kind, value, user, id=f"fb-{next(NUMBERS)}"), response, tuple(over))


def said(text):
    return Message("assistant", text)


def choice(better, *worse, prompt="q", user="ann", **more):
    chosen, losers = answer(better, prompt), [answer(text, prompt) for text in worse]
    return vote("choice", {"over": [one.id for one in losers], **more}, chosen, losers, user)


def pairs(votes, **more):
    return [(p.chosen[0].content, p.rejected[0].content, p.tags["why"]) for p in curate(votes, **more).pairs]


def test_each_rule_gives_its_pairs():
    draft = answer("wrong")
    up, down = answer("good"), answer("bad")
    votes = [
        choice("a", "b", "c"),
        vote("edit", {"text": "right"}, draft),
        vote("thumb", "up", up),
        vote("thumb", {"thumb": "down", "reasons": ["no"]}, down),
    ]
    assert pairs(votes) == [
        ("a", "b", "choice"), ("a", "c", "choice"), ("right", "wrong", "edit"), ("good", "bad", "thumbs"),
    ]  # fmt: skip
    result = curate(votes)
    assert sorted(result.events) == sorted(vote.event.id for vote in votes)
    assert result.pairs[-1].tags["events"] == [votes[2].event.id, votes[3].event.id]
    assert result.pairs[0].prompt == (Message("user", "q"),)
    assert not +result.dropped
    assert [(c.messages[-1].content, c.tags["label"]) for c in result.labelled] == [("good", True), ("bad", False)]
    assert result.labelled[1].tags["reasons"] == ["no"]
    assert [c.messages[-1].content for c in result.edits] == ["right"]


@pytest.mark.parametrize(
    ("votes", "why"),
    [
        ([choice("a", "b", tie=True)], "a tie"),
        ([choice("a", "b", both_bad=True)], "a tie"),
        ([choice("a", "a")], "the answers do not differ"),
        ([choice(" ", "b")], "the answers do not differ"),
        ([choice("a", "b", prompt="")], "a raw completion, not a conversation"),
        ([vote("rating", 5, answer("a"))], "a rating prefers nothing by itself"),
        ([vote("comment", {"text": "hm"}, answer("a"))], "a comment prefers nothing by itself"),
        ([vote("thumb", "up", answer("a"))], "a thumb without its opposite"),
    ],
)
def test_what_prefers_nothing_is_counted(votes, why):
    result = curate(votes)
    assert (result.pairs, result.events) == ([], [])
    assert dict(+result.dropped) == {why: 1}


def test_thumbs_are_paired_within_one_user_and_one_prompt():
    up, down = answer("good", "q1"), answer("bad", "q2")
    assert pairs([vote("thumb", "up", up), vote("thumb", "down", down)]) == []
    up, down = answer("good"), answer("bad")
    assert pairs([vote("thumb", "up", up, user="ann"), vote("thumb", "down", down, user="bob")]) == []


def test_a_flood_is_cut_to_its_share_and_a_repeated_edit_counts_once():
    flood = [choice(f"a{n}", "b", user="busy") for n in range(30)]
    result = curate([*flood, choice("x", "y", user="calm")], per_user=5)
    assert [pair.tags["user"] for pair in result.pairs] == ["busy"] * 5 + ["calm"]
    assert result.dropped["over this user's share"] == 25
    assert len(result.events) == 6, "a vote that taught nothing is not named"
    twice = [vote("edit", {"text": "right"}, answer("wrong"), user=user) for user in ("ann", "bob")]
    assert len(curate(twice).pairs) == 1


def test_who_judges_and_who_teaches_never_changes_and_is_a_quarter():
    users = [f"user-{n}" for n in range(2000)]
    judging = [user for user in users if is_held_out(user)]
    assert abs(len(judging) / len(users) - HELD_OUT_SHARE) < 0.04
    assert [user for user in users if is_held_out(user)] == judging
    assert judging[:3] == ["user-0", "user-1", "user-7"], "another hash would let yesterday's judges teach today"


# --- implicit ------------------------------------------------------------------------------------


def test_what_was_done_and_not_said_is_kept_apart():
    old, new = answer("meh"), answer("fine")
    again = vote("regenerate", {"new": new.id}, old, [new])
    copied, left = vote("copy", {}, answer("useful")), vote("abandon", {}, answer("long"))
    result = curate([again, copied, left])
    assert result.pairs == [] and result.events == []
    assert [(p.chosen[0].content, p.rejected[0].content) for p in result.weak] == [("fine", "meh")]
    assert result.weak[0].weight == REGENERATE_WEIGHT < 1
    assert [(c.messages[-1].content, c.tags["label"], c.weight) for c in result.labelled] == [("useful", True, 0.25)]
    assert set(result.all_events) == {again.event.id, copied.event.id}


def test_a_word_outweighs_a_deed():
    one = answer("useful")
    result = curate([vote("copy", {}, one), vote("thumb", "down", one)])
    assert [chat.tags["label"] for chat in result.labelled] == [False]


def test_ratings_label_and_comments_are_kept_for_people():
    rated = [vote("rating", stars, answer(f"a{stars}")) for stars in (1, 3, 5)]
    spoken = vote("comment", {"text": "too dry, ask 13800138000"}, answer("a"))
    result = curate([*rated, spoken])
    assert [chat.tags["label"] for chat in result.labelled] == [False, True]
    assert result.comments[0]["comment"] == "too dry, ask [phone]" and result.comments[0]["events"] == [spoken.event.id]


# --- floods, copies, trust -----------------------------------------------------------------------

LONG = " ".join(f"word{n}" for n in range(60))


def test_near_copies_of_one_user_are_one_and_of_two_users_two():
    first = choice(LONG + " north.", "No. " + LONG, user="ann")
    again = choice(LONG + " south.", "No. " + LONG, user="ann")
    other = choice(LONG + " south.", "No. " + LONG, user="bob")
    result = curate([first, again, other])
    assert [pair.tags["user"] for pair in result.pairs] == ["ann", "bob"]
    assert result.dropped["said before"] == 1


def test_nobody_gives_more_than_three_times_the_middle():
    crowd = [choice(f"a{u}-{n}", "b", user=f"u{u}") for u in range(5) for n in range(10)]
    flood = [choice(f"f{n}", "b", user="busy") for n in range(90)]
    counts = {}
    for pair in curate([*flood, *crowd]).pairs:
        counts[pair.tags["user"]] = counts.get(pair.tags["user"], 0) + 1
    assert counts == {"busy": 30, **{f"u{u}": 10 for u in range(5)}}


def test_who_contradicts_everybody_is_not_learned_from():
    shared = [(f"good {n}", f"bad {n}") for n in range(8)]
    honest = [choice(a, b, prompt=f"q{a}", user=user) for user in ("ann", "bob", "cid") for a, b in shared]
    liar = [choice(b, a, prompt=f"q{a}", user="eve") for a, b in shared]
    stranger = [choice("x", "y", user="sam")]
    result = curate([*honest, *liar, *stranger])
    assert {pair.tags["user"] for pair in result.pairs} == {"ann", "bob", "cid", "sam"}
    assert result.trust["eve"] < 0.5 < result.trust["ann"] and "sam" not in result.trust
    assert result.dropped["a user who is wrong more often than not"] == 8


def test_what_somebody_says_weighs_as_they_are_trusted():
    shared = [(f"good {n}", f"bad {n}") for n in range(8)]
    votes = [choice(a, b, prompt=f"q{a}", user=user) for user in ("ann", "bob") for a, b in shared]
    mixed = [*shared[:6], *(pair[::-1] for pair in shared[6:])]
    votes += [choice(*pair, prompt=f"q{asked}", user="cid") for pair, (asked, _) in zip(mixed, shared, strict=True)]
    votes += [choice("x", "y", user="sam"), vote("thumb", "up", answer("z"), user="cid")]
    result = curate(votes)
    weights = {pair.tags["user"]: pair.weight for pair in result.pairs}
    assert weights == {"ann": 1.136, "bob": 1.136, "cid": 0.962, "sam": 1.0}  # 10/11 (two are ties), 10/13, over 0.8
    assert result.labelled[0].weight == 0.962


def test_gold_tells_even_when_the_liars_are_the_many():
    shared = [(f"good {n}", f"bad {n}") for n in range(8)]
    honest = [choice(a, b, prompt=f"q{a}", user="ann") for a, b in shared]
    liars = [choice(b, a, prompt=f"q{a}", user=user) for user in ("eve", "mal", "sly") for a, b in shared]

    gold = gold_of([Preference((Message("user", f"q{a}"),), (said(a),), (said(b),)) for a, b in shared])
    asked = (Message("user", "qgood 1"),)
    known = [gold(asked, *answers) for answers in (("good 1", "?"), ("?", "bad 1"), ("?", "good 1"), ("?", "!"))]
    assert known == [True, True, False, None]
    assert {pair.tags["user"] for pair in curate([*honest, *liars], gold=gold).pairs} == {"ann"}
    assert {pair.tags["user"] for pair in curate([*honest, *liars]).pairs} == {"eve", "mal", "sly"}


# --- personal data, splits -----------------------------------------------------------------------


def test_personal_data_is_masked_on_every_side():
    result = curate([choice("mail ada@b.org", "身份证11010519491231002X", prompt="我的手机13800138000")])
    pair = result.pairs[0]
    assert (pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content) == (
        "我的手机[phone]", "mail [email]", "身份证[id]",
    )  # fmt: skip
    assert result.masked == {"phone": 1, "email": 1, "id": 1}


def test_a_split_by_time_keeps_a_question_together():
    def at(when, prompt):
        made = choice("a", "b", prompt=prompt)
        event = FeedbackEvent(made.event.response_id, "choice", made.event.value, "ann", id=f"e{when}", created=when)
        return Vote(event, made.response, made.over)

    votes = [at(when, f"q{when % 8}") for when in range(10)]
    early, late = split_by_time(list(reversed(votes)), 0.3)
    assert [v.event.created for v in late] == [7], "8 and 9 repeat questions of before"
    assert len(early) == 9
    assert split_by_time(votes, 0) == (votes, []) and split_by_time([], 0.5) == ([], [])
