"""A reward model judges: trained on some of the people who judge, tried on the others, refused when it guesses."""

import io
import random

import pytest

from prairie.data.records import Message
from prairie.errors import DataError
from prairie.flywheel.chat import ChatGate, judged_vote, rules_for
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.gate import Verdict, as_judged, required_sample_size
from prairie.flywheel.reward_judge import TRIED_SHARE, train_reward_judge
from prairie.pipeline.context import Context
from prairie.recipe import GateRules, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.feedback import FeedbackEvent, Response
from prairie.store.home import Home

LIKED, OTHER = "the quick brown fox", "13 lazy dogs"


@pytest.fixture
def context(voted):
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    with Home(voted) as home:
        yield Context(recipe, home, Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True)))


def people_vote(home, right, people=20, each=4):
    """Held-out people prefer answers that begin with LIKED in `right` of their votes; returns their names."""
    chance, names = random.Random(7), [f"more-{n}" for n in range(people * 6) if is_held_out(f"more-{n}")][:people]
    talks = []
    for name in names:
        for vote in range(each):
            tail = f" {chance.randrange(1000)}"
            texts = {"liked": LIKED + tail, "other": OTHER + tail}
            better = "liked" if chance.random() < right else "other"
            worse = {"liked": "other", "other": "liked"}[better]
            answers = {
                which: Response(
                    f"{name}-{vote}-{which}", "spark", (Message("user", f"say {vote}"),), line="spark", text=text,
                    user=name, status="done", finish_reason="stop",
                )
                for which, text in texts.items()
            }  # fmt: skip
            event = FeedbackEvent(answers[better].id, "choice", {"over": [answers[worse].id]}, user=name)
            talks += [(answers[worse], []), (answers[better], [(f"{name}-{vote}", event)])]
    home.feedback.take_over(talks)
    return names


def test_it_learns_what_people_prefer_and_is_tried_on_others(context):
    names = people_vote(context.home, 0.95)
    judge = train_reward_judge(context, "spark")
    events = {event.id: event.user for event in context.home.feedback.events()}
    learned = {events[id] for id in judge.artifact.events}
    tried = {events[id] for id in judge.artifact.manifest["config"]["tried_on"]}
    assert learned and tried and not learned & tried and learned | tried >= set(names)
    assert all(is_held_out(name) for name in learned | tried), "nobody who teaches a candidate"
    assert all(is_held_out(f"tried {name}", TRIED_SHARE) for name in tried)
    assert 0.75 < judge.accuracy.low < judge.accuracy.value <= 1 and judge.accuracy.n == len(tried)
    said = judge.opinions([
        ("say 1", f"{LIKED} 5001", f"{OTHER} 5001"), ("say 2", f"{OTHER} 7777", f"{LIKED} 7777"),
        ("say 3", LIKED, LIKED), ("say 4", "", OTHER), ("say 5", " ", ""),
    ])  # fmt: skip
    assert [opinion.outcome for opinion in said] == [1, 0, 0.5, 0, 0.5]
    assert train_reward_judge(context, "spark").artifact.id == judge.artifact.id, "made once"

    rules, champion = GateRules(users=24, prompts=2, items=5), context.home.registry.champion("spark")
    assert rules_for(rules, judge.accuracy).users > required_sample_size(votes_per_user=2), (
        "a judge errs, people do not"
    )
    vote = judged_vote(context, judge, rules, ["numbers"], max_tokens=8, accuracy=judge.accuracy)
    gate = ChatGate(context, rules, ["numbers"], vote, 8, "questions", judge.accuracy)
    verdict = gate.judge(champion, champion)
    assert verdict.test.wanted == as_judged(0.55, judge.accuracy) < 0.55 and verdict.users == 24
    assert verdict.planned == rules_for(rules, judge.accuracy).users
    assert verdict.judge_accuracy == judge.accuracy and verdict.judge_noise is not None and not verdict.passed
    assert "a reward model: right on" in verdict.text()
    assert Verdict.from_json(verdict.to_json()).judge_accuracy == judge.accuracy


def test_a_judge_that_guesses_is_refused(context):
    people_vote(context.home, 0.5)
    for user in {event.user for event in context.home.feedback.events() if not event.user.startswith("more-")}:
        context.home.feedback.forget(user)
    with pytest.raises(DataError, match=r"does not judge better than chance: got right on .* wanted an interval above"):
        train_reward_judge(context, "spark")


def test_few_votes_make_no_judge(context):
    with pytest.raises(DataError, match="voted too little to train a judge"):
        train_reward_judge(context, "spark")
    assert not list(context.home.root.glob("artifacts/*/tried.jsonl"))
