"""The whole wheel on a tiny model: text to tokens to weights to a server, people who vote over HTTP, two turns, report.

The same recipe is carried out a second time, as if it had been killed after the second turn was recorded and before
its artifact was sealed: nothing is trained, asked or promoted again.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from tiny_recipes import learning, write_jsonl, write_recipe
from two_homes import differences, main

from prairie.flywheel.curate import is_held_out
from prairie.models.weights import read_manifest
from prairie.pipeline.publishing import free_port
from prairie.store.home import Home

pytestmark = pytest.mark.long
OTHERS = {"X-Prairie-Purpose": "gate"}
"""What strangers ask is not counted as a conversation on the line."""


def wheel_recipe(text):
    turn = {
        "kind": "turn", "line": "spark", "start": "publish", "server": "server", "tasks": ["numbers"],
        "users": {"count": 8, "prompts": 4, "noise": 0.0},
        "learn": {"steps": 10, "tokens_per_batch": 512, "max_tokens": 96, "lr": 5e-3, "weight_decay": 0.0,
                  "sft_weight": 0.2, "adapter": {"rank": 4}},
        "gate": {"users": 8, "prompts": 3, "items": 10},
    }  # fmt: skip
    sft = learning(60, data="chats", start="base", lr=1e-2, optimizer="muon")
    return {
        "name": "wheel",
        "seed": 3,
        "stages": {
            "corpus": {"kind": "prepare", "source": "file", "path": str(text), "held_out": 0.1},
            "chats": {"kind": "prepare", "source": "tasks", "tasks": ["numbers"], "rows": 300, "held_out": 0.1},
            "tokenizer": {"kind": "tokenizer", "data": ["corpus", "chats"], "vocab_size": 400},
            "base": learning(
                5, data="corpus", tokenizer="tokenizer", shape={"depth": 2, "dim": 32, "context": 192},
            ),
            "sft": {**sft, "tokens_per_batch": 1024},
            "publish": {"kind": "publish", "line": "spark", "model": "sft"},
            "server": {"kind": "serve", "port": 0, "after": ["publish"]},
            "turn1": turn,
            "turn2": {**turn, "start": "turn1"},
            "child": learning(2, data="chats", start="turn2"),
            "scores": {"kind": "evaluate", "models": ["base", "sft", "turn2"], "tasks": ["numbers"], "items": 10,
                       "text": ["corpus", "chats"]},
            "report": {"kind": "report", "of": ["chats", "base", "sft", "publish", "turn1", "turn2", "scores"]},
        },
    }  # fmt: skip


def prairie_run(recipe, home):
    done = subprocess.run(
        [sys.executable, "-m", "prairie", "run", recipe, "--home", home, "--threads", "1", "--no-serve", "--json"],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nothing_runs_on(home):
    """No server of this home is left."""
    with Home(home) as opened, opened.lock("run"):
        pass
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return str(home) not in found


@pytest.mark.timeout(290)
def test_the_whole_wheel(tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"Page {n}. " + (str.__doc__ or "")} for n in range(60)])
    recipe, root = write_recipe(tmp_path / "wheel.yaml", wheel_recipe(text)), tmp_path / "home"
    result = prairie_run(recipe, root)
    stages = {name: stage["figures"] for name, stage in result["stages"].items()}
    assert nothing_runs_on(root)
    for name in ("turn1", "turn2"):
        turn = stages[name]
        assert turn["talk"]["requests"] == 32 and turn["talk"]["failed"] == turn["talk"]["lost_votes"] == 0
        assert turn["during"]["failed"] == 0 and turn["during"]["requests"] > 0
        assert turn["verdict"]["n"] == 24 and turn["verdict"]["users"] == 8
        assert turn["rows"] >= 8 and turn["learned"]["tokens"] > 0
        assert turn["champion_artifact"] in (turn["candidate_artifact"], stages["publish"]["artifact"])
    assert (stages["turn1"]["turn"], stages["turn2"]["turn"]) == (1, 2)
    assert "turn1: " in result["table"] and "loss corpus" in result["table"]
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "Turns of the wheel" in page and "blind votes" in page and "Samples" in page

    with Home(root) as home:
        registry = home.registry
        turns = registry.turns("spark")
        assert [turn.key for turn in turns] == [result["stages"][name]["id"] for name in ("turn1", "turn2")]
        assert registry.champion("spark").artifact_id == stages["turn2"]["champion_artifact"]
        teachers = {e.user for e in home.feedback.events(purpose="chat")}
        judges = {e.user for e in home.feedback.events(purpose="gate")}
        assert not teachers & judges and all(map(is_held_out, judges)) and not any(map(is_held_out, teachers))
        first, second = (home.artifacts.get(turn.dataset) for turn in turns)
        assert first.events
        undecided = not turns[0].promoted and turns[0].verdict["test"]["decision"] == "undecided"
        assert (set(first.events) < set(second.events)) == undecided, "what was undecided comes again"
        assert bool(set(first.events) & set(second.events)) == undecided, "no other vote teaches twice"
        asked = {response.version_id for response in home.feedback.responses(purpose="chat")}
        assert asked <= {turn.champion for turn in turns} | {stages["turn2"]["champion_artifact"]}
        before = (registry.generation(), len(home.feedback.events()), len(home.artifacts.list()))

        child = result["stages"]["child"]["id"]
        assert stages["turn2"]["champion_artifact"] in home.artifacts.get(child).inputs
        learned = home.feedback.learned_from(first.events[:1])
        models = {model["id"] for model in learned["models"]}
        taught = turns if undecided else turns[:1]
        assert {dataset["id"] for dataset in learned["datasets"]} == {turn.dataset for turn in taught}
        assert stages["turn1"]["candidate_artifact"] in models
        assert (child in models) == any(turn.promoted for turn in taught)
        assert read_manifest(home.artifacts.get(child).path)["kind"] in ("model", "adapter")

    _unseal(root / "artifacts" / result["stages"]["turn2"]["id"])
    again = prairie_run(recipe, root)
    assert {name for name, stage in again["stages"].items() if not stage["reused"]} == {
        "publish", "server", "turn2", "report",
    }  # fmt: skip
    recalled = again["stages"]["turn2"]["figures"]
    assert recalled["talk"] is None, "nobody was sent a second time"
    assert {k: recalled[k] for k in ("turn", "verdict", "true", "champion_artifact", "summary")} == {
        k: stages["turn2"][k] for k in ("turn", "verdict", "true", "champion_artifact", "summary")
    }
    assert again["table"] == result["table"]
    with Home(root) as home:
        assert before == (home.registry.generation(), len(home.feedback.events()), len(home.artifacts.list()))


def _unseal(folder):
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_recipe_turns_out_the_same_whatever_else_is_asked(tmp_path):
    """Another home, and strangers who ask all the while: the same datasets, candidates, verdicts and champions, though
    people talk side by side and are answered in another order."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"Page {n}. " + (str.__doc__ or "")} for n in range(60)])
    tree = wheel_recipe(text)
    for name in ("child", "scores", "report"):
        del tree["stages"][name]
    found = []
    for name, strangers in (("calm", 0), ("busy", 3)):
        port = tree["stages"]["server"]["port"] = free_port("127.0.0.1")
        with asking(f"http://127.0.0.1:{port}", strangers) as asked:
            result = prairie_run(write_recipe(tmp_path / f"{name}.yaml", tree), tmp_path / name)
        assert bool(asked) == bool(strangers)
        found.append([
            {key: result["stages"][turn]["figures"][key] for key in ("champion_artifact", "verdict", "true")}
            for turn in ("turn1", "turn2")
        ])  # fmt: skip
    assert found[0] == found[1]
    with Home(tmp_path / "calm") as calm, Home(tmp_path / "busy") as busy:
        same, told = differences(calm, busy)
        assert (same["candidate"], same["votes"], same["turn"], told) == (2, 2, 4, []), "turns: artifacts and rows"


def test_what_differs_between_two_homes_is_named(tmp_path, capsys):
    for name, text in (("one", "a"), ("other", "b")):
        with Home(tmp_path / name) as home:
            for kind, said in (("votes", "same"), ("candidate", text)):
                with home.artifacts.create(kind, "made", {}) as folder:
                    (folder / "train.jsonl").write_text(said)
                    (folder / "metrics.jsonl").write_text(name)
            with home.artifacts.create("train", "made", {"of": name}) as folder:
                (folder / "weights").write_text("w")
            id = home.artifacts.list("candidate")[0].id
            home.registry.register("spark", id, kind="model")
            home.registry.record_turn("spark", 1, None, id, None, {"win_rate": 0.5}, False)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert main([one, one]) == 0 and "nothing differs" in capsys.readouterr().out
    assert main([one, other]) == 1
    said = capsys.readouterr().out
    assert "the same in both: 1 turn, 1 votes\n" in said and f"candidate {id}: train.jsonl\n" in said
    assert said.count(f"only in {one}") == said.count(f"only in {other}") == 1


@contextmanager
def asking(url, strangers):
    """So many people who are no part of the recipe ask whatever comes to their mind; what is yielded fills with the
    answers' numbers of tokens."""
    ended, asked = threading.Event(), []

    def ask(seed):
        rng = random.Random(seed)
        while not ended.wait(0.02):
            words = " ".join(str(rng.randrange(100)) for _ in range(rng.randrange(1, 12)))
            body = {"model": "spark", "messages": [{"role": "user", "content": words}], "max_tokens": 24}
            with suppress(httpx.HTTPError, KeyError):
                told = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30, headers=OTHERS).json()
                asked.append(told["usage"]["completion_tokens"])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(strangers)]
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        ended.set()
        for thread in threads:
            thread.join()
