"""What a candidate goes over again: drawn from its lineage, named by it, and never what a person took back."""

import io
import shutil

import pytest

from prairie.data.records import Chat, Message
from prairie.data.sources import read_records, write_records
from prairie.flywheel.chat import ChatActor, ChatLearner
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.remake import rebuild, reproduce
from prairie.flywheel.replay import below, replayed
from prairie.pipeline.context import Context
from prairie.recipe import Replay, VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.feedback import FeedbackEvent
from prairie.store.home import Home

pytestmark = pytest.mark.long

PLAIN = VoteLearning(steps=2, tokens_per_batch=512, max_tokens=128, lr=1e-2, weight_decay=0.0, adapter={"rank": 4})


def learn(share=1.0, sources=("data", "votes"), **more):
    return PLAIN.model_copy(update={"replay": Replay(share=share, sources=list(sources)), **more})


@pytest.fixture
def context(voted):
    """The line's first model was trained on some chats."""
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    with Home(voted) as home:
        first = home.registry.champion("spark")
        chats = [Chat((Message("user", f"{n} and 1?"), Message("assistant", f"{n + 1}.")), "t") for n in range(50)]
        with home.artifacts.create("prepare", "chats", {}) as folder:
            write_records(folder / "train.jsonl", chats)
        below = [a.id for a in home.artifacts.list("prepare")]
        old = home.artifacts.get(first.artifact_id)
        with home.artifacts.create("train", "taught", {}, below) as folder:
            shutil.copytree(old.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        taught = home.artifacts.list("train")[0]
        home.registry.promote(home.registry.register("spark", taught.id, kind="model"))
        runtime = Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True))
        yield Context(recipe, home, runtime)


def turned(context, config):
    """A candidate that is champion at once; everybody who teaches corrects an answer afterwards."""
    home, champion = context.home, context.home.registry.champion("spark")
    records = ChatActor(context, "spark").act(champion)
    candidate = ChatLearner(context, config).learn(champion, records)
    ids = (champion.artifact_id, candidate.artifact_id, records.id)
    home.registry.record_turn("spark", candidate.number, *ids, {"passed": True}, True)
    for event in [e for e in home.feedback.events(["choice"]) if not is_held_out(e.user)][:20]:
        text = {"text": f"Surely, {event.user}."}
        home.feedback.add(FeedbackEvent(event.value["over"][0], "edit", text, user=event.user), f"e-{event.id}")
    return home.artifacts.get(candidate.artifact_id), records


def rows_of(artifact):
    return read_records(artifact.path / "train.jsonl").records


def test_earlier_rows_are_drawn_named_and_made_the_same_again(context):
    home = context.home
    first, records = turned(context, learn(0.5, ["data"]))
    assert home.artifacts.get(first.inputs[2]).kind == "replay" and first.figures["replayed"] == 16
    drawn = home.artifacts.get(first.inputs[2])
    assert (drawn.inputs, drawn.events) == ([a.id for a in home.artifacts.list("prepare")], [])
    assert all(row.messages[-1].content.endswith(".") for row in rows_of(drawn)) and len(rows_of(drawn)) == 16
    assert first.figures["replay_loss"] > 0

    second, more = turned(context, learn())
    drawn = home.artifacts.get(second.inputs[2])
    assert set(drawn.inputs) == {records.id, *(a.id for a in home.artifacts.list("prepare"))}
    assert drawn.events and set(drawn.events) <= set(records.events), "what taught the turn before"
    assert {row.source for row in rows_of(drawn)} == {"t", "votes"} and not set(drawn.events) & set(more.events)
    assert replayed(context, learn(), home.artifacts.get(second.inputs[0]), more) == drawn, "drawn the same every time"
    assert reproduce(home, second, context.runtime).same


def test_what_was_forgotten_or_taken_back_does_not_come_back(context):
    home = context.home
    parent, _ = turned(context, PLAIN)
    version = home.registry.champion("spark")
    third, _ = turned(context, learn(4.0, ["votes"]))
    teachers = sorted({e.user for e in home.feedback.events(["edit"])})
    gone, regrets = teachers[0], next(e for e in home.feedback.events(["choice"], users=[teachers[1]]))
    drawn = home.artifacts.get(third.inputs[2])
    events = {e.id for e in home.feedback.events(users=[gone])}
    assert events & set(drawn.events), "all votes of the turn before were drawn"
    assert {d["id"] for d in home.feedback.forget(gone)["datasets"]} >= {drawn.id, parent.inputs[1]}
    home.feedback.add(FeedbackEvent(regrets.response_id, "retract", {"event": regrets.id}, user=regrets.user))

    again = replayed(context, learn(4.0, ["votes"]), parent, home.artifacts.get(third.inputs[1]))
    assert again.events and not (events | {regrets.id}) & set(again.events)
    assert not [row for row in rows_of(again) if row.tags["user"] == gone]

    new = rebuild(home, home.registry.champion("spark"), context.runtime)
    seen, todo = [], [home.artifacts.get(new.artifact_id)]
    while todo:
        seen.append(todo.pop())
        todo += map(home.artifacts.get, seen[-1].inputs)
    assert "replay" in {a.kind for a in seen} and version.artifact_id not in {a.id for a in seen}
    assert not [a for a in seen if events & set(a.events)]


def test_nothing_to_go_over_again_is_said(context):
    said = io.StringIO()
    context.runtime.progress.stream, context.runtime.progress.quiet = said, False
    home = context.home
    bare = home.artifacts.list("model")[0]
    records = ChatActor(context, "spark").act(home.registry.champion("spark"))
    assert below(home, bare) == [] and replayed(context, learn(), bare, records) is None
    assert "nothing to go over again: first was made from no conversations" in said.getvalue()
