"""A model made again: the same bytes from its lineage, and other ones without what was taken back."""

import io
import json

import pytest
import torch

from prairie.cli.main import main
from prairie.data.sources import read_records
from prairie.errors import RequestError, StoreError
from prairie.flywheel.chat import ChatActor, ChatLearner
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.remake import rebuild, reproduce
from prairie.pipeline.context import Context
from prairie.recipe import VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.feedback import FeedbackEvent
from prairie.store.home import Home

pytestmark = pytest.mark.long

LEARN = VoteLearning(steps=4, tokens_per_batch=512, max_tokens=128, lr=1e-2, weight_decay=0.0, adapter={"rank": 4})


@pytest.fixture
def context(voted):
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    with Home(voted) as home:
        yield Context(recipe, home, Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True)))


def learned(context):
    """Two turns: spark@2 from votes, spark@3 from corrections on top of it, champion."""
    registry, feedback = context.home.registry, context.home.feedback
    champion = registry.champion("spark")
    for _ in range(2):
        candidate = ChatLearner(context, LEARN).learn(champion, ChatActor(context, "spark").act(champion))
        registry.record_turn(
            "spark", candidate.number, champion.artifact_id, candidate.artifact_id,
            context.home.artifacts.get(candidate.artifact_id).inputs[1], {"passed": True}, True,
        )  # fmt: skip
        champion = candidate
        for event in [e for e in feedback.events(["choice"]) if not is_held_out(e.user)][:20]:
            edit = {"text": f"Surely, {event.user}."}
            feedback.add(FeedbackEvent(event.value["over"][0], "edit", edit, user=event.user), f"edit-{event.id}")
    return champion


def test_a_candidate_comes_out_the_same(context, voted, capsys):
    version = learned(context)
    artifact = context.home.artifacts.get(version.artifact_id)
    before = sorted(path.name for path in (voted / "artifacts").iterdir())
    found = reproduce(context.home, artifact, context.runtime)
    assert found.same and found.same_code and "adapter_model.safetensors" in found.files
    assert sorted(path.name for path in (voted / "artifacts").iterdir()) == before
    assert not list((voted / "tmp").glob("again-*"))
    threads = str(torch.get_num_threads())  # the same bits want the same threads
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "spark", "--home", str(voted), "--threads", threads, "--json"])
    assert end.value.code == 0 and json.loads(capsys.readouterr().out)["same"] is True


def test_another_seed_or_a_changed_input_is_noticed(context, voted, capsys):
    artifact = context.home.artifacts.get(learned(context).artifact_id)
    artifact.manifest["config"]["lr"] = 0.02
    found = reproduce(context.home, artifact, context.runtime)
    assert not found.same and found.files["adapter_model.safetensors"] is False
    rows = context.home.artifacts.get(artifact.inputs[1]).path / "train.jsonl"
    rows.chmod(0o644)
    rows.write_bytes(rows.read_bytes().replace(b"Surely", b"Hardly", 1))
    with pytest.raises(StoreError, match="another content"):
        reproduce(context.home, artifact, context.runtime)
    with pytest.raises(RequestError, match="a votes cannot be made again"):
        records = context.home.artifacts.get(artifact.inputs[0]).inputs[1]
        reproduce(context.home, context.home.artifacts.get(records), context.runtime)


def test_what_was_forgotten_is_queued_and_rebuilt_without(context, voted, capsys):
    home, version = context.home, learned(context)
    with pytest.raises(RequestError, match="nothing that was forgotten"):
        rebuild(home, version, context.runtime)
    assert home.feedback.to_rebuild() == []
    teacher = next(e.user for e in home.feedback.events(["edit"]))
    taken_back = {e.id for e in home.feedback.events(users=[teacher])}
    report = home.feedback.forget(teacher)
    assert report["queued"] == home.feedback.to_rebuild() == ["spark@3"]

    with pytest.raises(SystemExit) as end:
        main(["rebuild", "--home", str(voted), "--threads", "1", "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["rebuilt"] == [{"champion": "spark@3", "version": "spark@4"}]
    new = home.registry.resolve("spark@4")
    assert home.registry.champion("spark") == version, "nobody is promoted without a gate"
    tree = home.registry.lineage(new)["artifact"]
    seen = list(nodes(tree))
    assert len([node for node in seen if node["kind"] == "votes"]) == 2, "both turns learned again"
    for node in seen:
        assert not taken_back & set(node["events"])
        if node["kind"] == "votes":
            rows = read_records(home.artifacts.get(node["id"]).path / "train.jsonl").records
            assert rows and not [row for row in rows if row.tags["user"] == teacher or teacher in str(row)]
    assert rebuild(home, version, context.runtime) == new, "made once"
    home.registry.promote(new)
    assert home.feedback.to_rebuild() == []


def test_a_turn_of_which_too_little_is_left_is_as_if_it_had_not_been(context):
    home, version = context.home, learned(context)
    for teacher in {e.user for e in home.feedback.events(["edit"])}:
        home.feedback.forget(teacher)
    new = rebuild(home, version, context.runtime)
    inputs = home.artifacts.get(new.artifact_id).inputs
    assert inputs[0] == home.registry.resolve("spark@1").artifact_id, "one turn is left, on the first model"


def test_lineage_says_all_of_it(context, voted, capsys):
    learned(context)
    with pytest.raises(SystemExit) as end:
        main(["lineage", "spark", "--home", str(voted)])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for wanted in ("candidate", "votes-spark", "model first", "code ", "python ", "turn 3", "promoted", "recipe t"):
        assert wanted in text, wanted


def nodes(tree):
    yield tree
    for below in tree.get("inputs", []):
        yield from nodes(below) if "events" in below else ()
