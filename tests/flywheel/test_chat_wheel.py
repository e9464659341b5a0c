"""The chat actor without HTTP: votes in the store become a dataset, a candidate and a verdict by people who judge."""

import io

import pytest

from prairie.data.sources import read_records
from prairie.errors import DataError
from prairie.flywheel import chat
from prairie.flywheel.chat import ChatActor, ChatGate, ChatLearner, held_out_votes, judged_vote, learned_events
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.gate import required_sample_size
from prairie.flywheel.loop import Flywheel
from prairie.models.weights import read_manifest
from prairie.pipeline.context import Context
from prairie.pipeline.model_stages import load_language_model
from prairie.recipe import GateRules, VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.feedback import FeedbackEvent
from prairie.store.home import Home

pytestmark = pytest.mark.long

LEARN = VoteLearning(steps=12, tokens_per_batch=512, max_tokens=128, lr=1e-2, weight_decay=0.0, adapter={"rank": 4})


@pytest.fixture
def context(voted):
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    with Home(voted) as home:
        yield Context(recipe, home, Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True)))


def wheel(context, learn=LEARN):
    gate = ChatGate(context, GateRules(items=20), ["numbers"], max_tokens=8)
    return Flywheel("spark", context.home.registry, ChatActor(context, "spark"), ChatLearner(context, learn), gate)


def test_votes_become_a_better_champion_and_are_learned_once(context):
    home = context.home
    turned = wheel(context).turn(key="k")
    assert turned.verdict.passed, turned.verdict.text()
    assert (turned.verdict.users, turned.verdict.n, turned.verdict.wins) == (7, 28, 28)
    assert home.registry.champion("spark") == turned.candidate
    assert (turned.candidate.kind, turned.candidate.base_artifact_id) == ("adapter", turned.champion.artifact_id)

    pairs = read_records(turned.records.path / "train.jsonl").records
    assert {pair.chosen[0].content for pair in pairs} == {"Surely it is fine."}
    assert len(pairs) == turned.records.figures["rows"] == 32
    assert not any(is_held_out(pair.tags["user"]) for pair in pairs), "who judges does not teach"
    assert set(turned.records.events) == {event for pair in pairs for event in pair.tags["events"]}
    candidate = home.artifacts.get(turned.candidate.artifact_id)
    assert candidate.inputs == [turned.champion.artifact_id, turned.records.id]
    assert read_manifest(candidate.path)["base_artifact"] == turned.champion.artifact_id

    assert learned_events(context, "spark") == set(turned.records.events)
    with pytest.raises(DataError, match=r"the votes on `spark` teach too little: got 0 preferences from 0 votes"):
        wheel(context).turn()
    assert [t.number for t in home.registry.turns("spark")] == [1]


def test_thumbs_alone_turn_the_wheel_by_kto(context):
    """Every teacher's choices are taken back; what they liked and disliked one by one is learned from instead."""
    home, learn = context.home, LEARN.model_copy(update={"objective": "kto"})
    actor = ChatActor(context, "spark", objective="kto")
    for event in [e for e in home.feedback.events() if not is_held_out(e.user)]:
        home.feedback.add(FeedbackEvent(event.response_id, "retract", {"event": event.id}, user=event.user))
        home.feedback.add(FeedbackEvent(event.response_id, "thumb", "up", user=event.user))
        if event.user.endswith("4"):
            home.feedback.add(FeedbackEvent(event.value["over"][0], "copy", {}, user=event.user))
    champion = home.registry.champion("spark")
    with pytest.raises(DataError, match=r"teach too little: got \d+ judged answers from \d+ votes, \d+ of them liked"):
        actor.act(champion)
    for event in [e for e in home.feedback.events() if e.kind == "choice" and not is_held_out(e.user)][:20]:
        home.feedback.add(FeedbackEvent(event.value["over"][0], "thumb", "down", user=event.user))
    gate = ChatGate(context, GateRules(items=5), ["numbers"], max_tokens=8)
    turned = Flywheel("spark", home.registry, actor, ChatLearner(context, learn), gate).turn(key="k")
    rows = read_records(turned.records.path / "train.jsonl").records
    assert turned.records.figures["kind"] == "judged" and len(rows) == turned.records.figures["rows"]
    assert {row.label for row in rows} == {True, False} and not any(is_held_out(row.tags["user"]) for row in rows)
    assert set(turned.records.events) == {event for row in rows for event in row.tags["events"]}
    candidate = home.artifacts.get(turned.candidate.artifact_id)
    assert candidate.manifest["config"]["objective"] == "kto" and candidate.figures["margin"] > 0
    assert turned.verdict.wins == turned.verdict.n == 28, turned.verdict.text()
    assert learned_events(context, "spark") == set(turned.records.events)


@pytest.mark.slow
def test_the_next_turn_goes_on_from_the_adapter(context):
    first = wheel(context).turn()
    votes = [e for e in context.home.feedback.events() if not is_held_out(e.user)]
    for event in votes[:12]:
        over = event.value["over"][0]
        context.home.feedback.add(FeedbackEvent(over, "edit", {"text": f"Surely {event.user}."}, user=event.user))
    second = wheel(context).turn()
    assert second.champion == first.candidate and second.records.figures["rows"] == 12
    assert second.candidate.base_artifact_id == first.champion.artifact_id, "one adapter on the base, not a pile"
    assert context.home.artifacts.get(second.candidate.artifact_id).inputs[0] == first.candidate.artifact_id


@pytest.mark.slow
def test_a_turn_that_is_cut_off_ends_as_it_would_have(context, monkeypatch, voted, tmp_path):
    import shutil

    shutil.copytree(voted, tmp_path / "calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "judge", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            wheel(context).turn(key="k")
    assert context.home.registry.champion("spark").number == 1
    turned = wheel(context).turn(key="k")
    with Home(tmp_path / "calm") as home:
        calm = wheel(Context(context.recipe, home, context.runtime)).turn(key="k")
        assert calm.candidate.weights_hash == turned.candidate.weights_hash
        assert calm.to_json() == turned.to_json()
    monkeypatch.setattr(ChatActor, "act", None)
    assert wheel(context).turn(key="k").to_json() == turned.to_json()


def test_too_few_votes_teach_nothing(context):
    feedback = context.home.feedback
    for event in [e for e in feedback.events() if not is_held_out(e.user)][:-5]:
        feedback.add(FeedbackEvent(event.response_id, "retract", {"event": event.id}, user=event.user))
    with pytest.raises(DataError, match=r"got 5 preferences from 5 votes, wanted at least 8; let people vote more"):
        ChatActor(context, "spark").act(context.home.registry.champion("spark"))
    assert [a.kind for a in context.home.artifacts.list()] == ["model"]


def test_the_same_votes_are_the_same_dataset_and_other_votes_another(context):
    champion = context.home.registry.champion("spark")
    first = ChatActor(context, "spark").act(champion)
    assert ChatActor(context, "spark").act(champion).id == first.id
    victim = next(e for e in context.home.feedback.events() if not is_held_out(e.user))
    context.home.feedback.add(FeedbackEvent(victim.response_id, "retract", {"event": victim.id}, user=victim.user))
    second = ChatActor(context, "spark").act(champion)
    assert second.id != first.id and victim.id in first.events and victim.id not in second.events


def test_forgetting_a_user_names_the_dataset_and_every_model_that_learned_from_them(context):
    turned = wheel(context).turn()
    teacher = next(e.user for e in context.home.feedback.events() if not is_held_out(e.user))
    judge = next(e.user for e in context.home.feedback.events() if is_held_out(e.user))
    found = context.home.feedback.forget(teacher)
    assert found["events"] == 4
    assert [(d["id"], d["events"]) for d in found["datasets"]] == [(turned.records.id, 4)]
    assert [(m["id"], m["versions"]) for m in found["models"]] == [(turned.candidate.artifact_id, ["spark@2"])]
    assert found["champions"] == ["spark@2"]
    only_judged = context.home.feedback.forget(judge)
    assert (only_judged["events"], only_judged["datasets"], only_judged["models"]) == (4, [], [])


def test_held_out_votes_judge_by_likelihood(context):
    registry, store = context.home.registry, context.home.artifacts
    champion = registry.champion("spark")
    actor, learner = ChatActor(context, "spark"), ChatLearner(context, LEARN)
    candidate = learner.learn(champion, actor.act(champion))
    new, old = (load_language_model(store.get(v.artifact_id), context.runtime) for v in (candidate, champion))
    assert {c.outcome for c in held_out_votes(context, "spark", new, old)} == {1.0}
    assert {c.outcome for c in held_out_votes(context, "spark", old, new)} == {0.0}
    assert {c.outcome for c in held_out_votes(context, "spark", old, old)} == {0.5}
    assert {is_held_out(c.user) for c in held_out_votes(context, "spark", new, old)} == {True}
    worse = ChatGate(context, GateRules(items=5), ["numbers"], max_tokens=8).judge(champion, candidate)
    assert not worse.passed and "users prefer the champion" in " ".join(worse.reasons)


def test_a_model_judges_instead_of_people(context, judge_of):
    rules, said = GateRules(users=24, prompts=3, items=20), io.StringIO()
    context.runtime.progress.stream, context.runtime.progress.quiet = said, False
    turned = wheel(context).turn(dry=True)
    brief = judge_of(lambda a, b: "C" if len(a) == len(b) else "A" if len(a) < len(b) else "B")
    judges = {True: brief, False: judge_of(lambda a, b: "A")}
    for fair, judge in judges.items():
        vote = judged_vote(context, judge, rules, ["numbers"], max_tokens=8)
        gate = ChatGate(context, rules, ["numbers"], vote, max_tokens=8, units="questions")
        verdict = gate.judge(turned.candidate, turned.champion)
        assert (verdict.units, verdict.users, verdict.n) == ("questions", 24, 72) and verdict.judge_noise is not None
        assert verdict.planned == required_sample_size(votes_per_user=3)
        assert "win rate at equal length" in [probe.name for probe in verdict.probes]
        assert any("judge is not fair" in reason for reason in verdict.reasons) != fair
        assert f"{verdict.planned} questions are planned" in said.getvalue(), "beforehand"
        drawn = vote(turned.candidate, turned.champion)
        assert len(drawn.items) == 72 and len(gate._independent(drawn)[0]) == 24, "a probe sees each question once"


def test_without_judges_nobody_is_promoted(context):
    for user in {e.user for e in context.home.feedback.events() if is_held_out(e.user)}:
        context.home.feedback.forget(user)
    turned = wheel(context).turn(key="k")
    assert not turned.verdict.passed and "only 0 users voted" in turned.verdict.reasons[0]
    assert context.home.registry.champion("spark") == turned.champion
    assert learned_events(context, "spark") == set(), "an undecided turn uses no vote up"
    again = wheel(context).turn(key="l")
    assert (again.number, again.records, again.candidate) == (2, turned.records, turned.candidate)
