"""A new base: its verticals wait, are served on the old one, and are trained and judged anew."""

import io
import json
import shutil

import pytest

from prairie.cli.main import main
from prairie.data.records import Message
from prairie.errors import RequestError
from prairie.flywheel import chat
from prairie.flywheel.chat import ChatActor, ChatGate, make_candidate
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.loop import Flywheel
from prairie.flywheel.remake import Rebase
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, save_model
from prairie.pipeline.context import Context
from prairie.pipeline.held_out import suite
from prairie.recipe import GateRules, VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.feedback import FeedbackEvent, Response
from prairie.store.home import Home

pytestmark = pytest.mark.long

LEARN = VoteLearning(steps=12, tokens_per_batch=512, max_tokens=128, lr=1e-2, weight_decay=0.0, adapter={"rank": 4})


def context_of(home):
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    return Context(recipe, home, Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True)))


@pytest.fixture(scope="module")
def _with_a_vertical(make_voted, tmp_path_factory):
    """`voted` with spark:poet@1, an adapter on spark@1 that learned from votes, and spark@2, another model."""
    root = tmp_path_factory.mktemp("vertical") / "home"
    make_voted(root)
    with Home(root) as home:
        context = context_of(home)
        registry, first = home.registry, home.artifacts.get(home.registry.champion("spark").artifact_id)
        poet = make_candidate(
            context, LEARN, first, ChatActor(context, "spark").act(registry.champion("spark")), "poet"
        )
        registry.promote(registry.register("spark:poet", poet.id, kind="adapter", base=first.id))
        config = load_model(first.path).config
        with home.artifacts.create("model", "second", {"n": 2}) as folder:
            save_model(Transformer(config).init_weights(9), folder)
            for path in first.path.iterdir():
                if path.name != "manifest.json" and not (folder / path.name).exists():
                    (folder / path.name).write_bytes(path.read_bytes())
        second = next(artifact for artifact in home.artifacts.list() if artifact.name == "second")
        registry.register("spark", second.id, kind="model")
    return root


@pytest.fixture
def voted(_with_a_vertical, tmp_path):
    return shutil.copytree(_with_a_vertical, tmp_path / "voted")


@pytest.fixture
def context(voted):
    with Home(voted) as home:
        yield context_of(home)


def judges_vote(home):
    talks = []
    for name in [f"user-{n}" for n in range(60) if is_held_out(f"user-{n}")][:9]:
        answers = [
            Response(
                f"{name}-poet-{side}", "spark:poet", (Message("user", "and?"),), line="spark:poet", text=text,
                user=name, status="done", finish_reason="stop",
            )
            for side, text in enumerate(("Surely it is fine.", "No idea at all."))
        ]  # fmt: skip
        vote = FeedbackEvent(answers[0].id, "choice", {"over": [answers[1].id]}, user=name)
        talks += [(answers[1], []), (answers[0], [(f"poet-{name}", vote)])]
    home.feedback.take_over(talks)


def test_a_vertical_waits_for_its_lines_new_base_and_no_other(context, voted, capsys):
    registry = context.home.registry
    assert registry.waiting() == {}
    registry.promote("spark@2")
    assert registry.waiting() == {"spark:poet": registry.resolve("spark@2")}
    for command in (["models", "history", "spark:poet"], ["models", "list"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--home", str(voted)])
        assert end.value.code == 0
        assert "stands on the base before spark@2 and is served on it; it waits" in capsys.readouterr().out
    registry.rollback("spark")
    assert registry.waiting() == {}


def test_what_is_no_vertical_is_an_error(voted, capsys):
    for name in ("spark:poem", "spark", "nobody"):
        with pytest.raises(SystemExit) as end:
            main(["rejudge", name, "--home", str(voted)])
        assert end.value.code == 1
        assert f"no such vertical: got {name}, wanted spark:poet" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["rebuild", "nobody", "--home", str(voted)])
    assert end.value.code == 1 and "no such model: got `nobody`" in capsys.readouterr().err


def test_it_is_trained_on_the_new_base_judged_and_waits_no_more(context, voted, capsys, monkeypatch):
    monkeypatch.setattr(chat, "suite", lambda tasks, count: suite(tasks, 5))  # what ends the waiting is the votes
    registry = context.home.registry
    registry.promote("spark@2")
    base, served = registry.resolve("spark@2").artifact_id, registry.champion("spark:poet")
    roles, gate = Rebase(context, base), ChatGate(context, GateRules(items=5), ["numbers"], max_tokens=8)
    turned = Flywheel("spark:poet", registry, roles, roles, gate).turn()
    assert turned.candidate.base_artifact_id == base and turned.records.kind == "votes"
    assert turned.candidate.weights_hash != served.weights_hash
    assert not turned.verdict.passed and registry.champion("spark:poet") == served, "nobody has judged it yet"
    assert "spark:poet" in registry.waiting(), "an undecided verdict settles nothing"
    judges_vote(context.home)
    with pytest.raises(SystemExit) as end:
        main(["rejudge", "--tasks", "numbers", "--home", str(voted), "--threads", "1", "--json"])
    assert end.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert [(turn["turn"], turn["base"]) for turn in told["turns"]] == [(2, "spark@2")]
    assert told["turns"][0]["candidate"] == turned.candidate.name, "trained once"
    assert told["turns"][0]["verdict"]["test"]["decision"] != "undecided" and registry.waiting() == {}
    promoted = told["turns"][0]["promoted"]
    assert (registry.champion("spark:poet").base_artifact_id == base) == promoted


def test_a_turn_to_a_new_base_goes_on_with_the_verticals(context, voted, capsys, monkeypatch):
    monkeypatch.setattr(chat, "suite", lambda tasks, count: suite(tasks, 40))
    registry, served = context.home.registry, context.home.registry.champion("spark:poet")
    keys = ["adapter=null", "steps=8", "tokens_per_batch=512", "max_tokens=128", "lr=1e-3", "weight_decay=0.0"]
    with pytest.raises(SystemExit) as end:
        main(["turn", "spark", *keys, "--tasks", "numbers", "--home", str(voted), "--threads", "1", "--json"])
    told, base = json.loads(capsys.readouterr().out), registry.champion("spark")
    assert told["promoted"], told["verdict"]["reasons"]
    assert end.value.code == 0 and told["waiting"] == [] and base.base_artifact_id is None
    (again,) = told["verticals"]
    made = registry.resolve(again["candidate"])
    assert again["base"] == base.name and made.line == "spark:poet" and made.base_artifact_id == base.artifact_id
    assert registry.champion("spark:poet") == served, "nobody has judged it yet"


def test_what_was_not_trained_here_is_told_apart(context):
    registry, home = context.home.registry, context.home
    poet = home.artifacts.get(registry.champion("spark:poet").artifact_id)
    with home.artifacts.create("imported", "poet from elsewhere", {}) as folder:
        for path in poet.path.iterdir():
            if path.name != "manifest.json":
                (folder / path.name).write_bytes(path.read_bytes())
    other = next(artifact for artifact in home.artifacts.list() if artifact.kind == "imported")
    version = registry.register("spark:poet", other.id, kind="adapter", base=poet.inputs[0])
    with pytest.raises(RequestError, match="cannot be trained again on a new base: got a imported"):
        Rebase(context, "-").act(version)
