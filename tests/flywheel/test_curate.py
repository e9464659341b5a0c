"""Votes become preferences by the rules of curate.py, and every vote that gives none is counted."""

import itertools

import pytest

from prairie.data.records import Message
from prairie.flywheel.curate import HELD_OUT_SHARE, curate, is_held_out
from prairie.store.feedback import FeedbackEvent, Response, Vote

NUMBERS = itertools.count()


def answer(text, prompt="q"):
    asked = (Message("user", prompt),) if prompt else "raw text"
    return Response(f"r{next(NUMBERS)}", "spark", asked, text=text, status="done")


def vote(kind, value, response, over=(), user="ann"):
    return Vote(FeedbackEvent(response.id, kind, value, user, id=f"fb-{next(NUMBERS)}"), response, tuple(over))


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
