"""New champions while people talk: nobody is turned away, and every answer is that of the version it names."""

import gc
import itertools
import threading
import weakref
from collections import Counter

import httpx
import pytest
from tiny_server import ask, register_adapter, register_model, running, wait_for

from prairie.data.records import Message
from prairie.engine.language_model import LanguageModel

QUESTIONS = ["fox", "草原 fox", "the quick brown dog", "🐎", "13 lazy dogs", "naïve"]


def truth(home, name):
    """Question -> the greedy answer of a version, from the library alone."""
    version = home.registry.resolve(name)
    folder = home.artifacts.get(version.artifact_id).path
    if version.base_artifact_id is None:
        model = LanguageModel.load(folder)
    else:
        model = LanguageModel.load(home.artifacts.get(version.base_artifact_id).path, adapter=folder)
    return {q: model.generate([Message("user", q)], temperature=0, max_tokens=12).text for q in QUESTIONS}


def version_of(server, name):
    return server.service.models.describe(name)["prairie"]["version"]


def test_swap_under_load(home):
    versions = ["spark@1", "spark@2", "spark@3"]
    right = {name: truth(home, name) for name in [*versions, "spark:poet@1"]}
    assert len({tuple(answers.values()) for answers in right.values()}) == 4, "the versions must answer apart"
    wrong, seen, stop = [], Counter(), threading.Event()

    def client(number, url):
        with httpx.Client(base_url=url, timeout=60) as http:
            for turn in itertools.count(number):
                if stop.is_set():
                    return
                model = "spark:poet" if turn % 4 == 3 else "spark"
                question = QUESTIONS[turn % len(QUESTIONS)]
                answer = http.post("/v1/chat/completions", json=ask(model, question))
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                body = answer.json()
                name = f"{body['prairie']['line']}@{body['prairie']['version']}"
                seen[name] += 1
                text = body["choices"][0]["message"]["content"]
                if right[name][question] != text:
                    wrong.append((name, question, text))

    with running(home) as server:
        threads = [threading.Thread(target=client, args=(i, server.url)) for i in range(8)]
        for thread in threads:
            thread.start()
        for name in ["spark@2", "spark@3", "spark@1", "spark@3", "spark@2", "spark@1"]:
            home.registry.promote(name)
            number, before = int(name.split("@")[1]), seen[name]
            wait_for(lambda number=number: version_of(server, "spark") == number)
            wait_for(lambda name=name, before=before: seen[name] > before or wrong)
        stop.set()
        for thread in threads:
            thread.join()
        server.idle()
        assert not wrong, wrong[:3]
        assert set(seen) == set(right)
        assert server.kv_blocks_held() == 0
        assert set(server.service.models._residents) == {"spark@1", "spark:poet@1"}
        poet = home.registry.resolve("spark:poet").weights_hash
        assert [list(b.model.engine.adapters) for b in server.service.models._bases.values()] == [[poet]]
        rows = home.feedback.responses()
        assert {row.status for row in rows} == {"done"}
        by_id = {home.registry.resolve(name).artifact_id: answers for name, answers in right.items()}
        assert all(by_id[row.version_id][row.prompt[0].content] == row.text for row in rows)


def test_a_request_ends_on_the_version_it_began_with(home):
    with running(home) as server:
        hurry = server.slowed(0.1)
        body = ask("spark", max_tokens=100, ignore_eos=True, stream=True)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            home.registry.promote("spark@2")
            wait_for(lambda: version_of(server, "spark") == 2)
            other = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=60).json()
            assert other["prairie"]["version"] == 2
            assert "spark@1" in server.service.models._residents
            hurry.set()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and all('"version":1,' in line for line in [first, *rest[:-1]])
        server.idle()
        # spark:poet stands on the same base, which therefore stays; the name spark@1 does not.
        assert set(server.service.models._residents) == {"spark@2", "spark:poet@1"}


def test_an_old_engine_is_freed_and_rollback_brings_it_back(home):
    home.registry.promote("spark@2")
    with running(home) as server:
        old = weakref.ref(server.service.models._residents["spark@2"].engine)
        home.registry.promote("spark@1")
        wait_for(lambda: version_of(server, "spark") == 1)
        server.idle()
        wait_for(lambda: gc.collect() >= 0 and old() is None)
        home.registry.rollback("spark")
        wait_for(lambda: version_of(server, "spark") == 2)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=60).json()
        assert answer["prairie"]["version"] == 2
        assert 'prairie_swaps_total{model="spark"} 2.0' in httpx.get(f"{server.url}/metrics").text


def test_a_damaged_candidate_changes_nothing(home):
    version = register_model(home, "spark", 9)
    weights = home.artifacts.get(version.artifact_id).path / "model.safetensors"
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-8:] = b"\0" * 8
    weights.write_bytes(content)
    with running(home) as server:
        home.registry.promote(version)
        wait_for(lambda: server.service.metrics.load_failures._value.get() > 0)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=60)
        assert answer.json()["prairie"]["version"] == 1
        asked = httpx.post(f"{server.url}/v1/chat/completions", json=ask(version.name), timeout=60)
        assert asked.status_code == 400 and asked.json()["error"]["code"] == "invalid_model"
        home.registry.promote("spark@2")
        wait_for(lambda: version_of(server, "spark") == 2)


def test_a_new_line_and_a_new_vertical_appear(home):
    with running(home) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.post("/v1/chat/completions", json=ask("ember")).status_code == 404
        ember = register_model(home, "ember", 21)
        home.registry.promote(ember)
        base = home.registry.resolve("spark@1")
        home.registry.promote(register_adapter(home, "spark:cook", base, 22))
        wait_for(lambda: {"ember", "spark:cook"} <= {m["id"] for m in http.get("/v1/models").json()["data"]})
        assert http.post("/v1/chat/completions", json=ask("ember")).json()["prairie"]["line"] == "ember"
        assert len(server.service.models._bases) == 2, "an adapter brings no engine of its own"


def test_many_adapters_in_one_batch(home):
    base = home.registry.resolve("spark@1")
    names = [register_adapter(home, f"spark:v{i}", base, 40 + i).name for i in range(5)]
    for name in names:
        home.registry.promote(name)
    lines = [name.split("@")[0] for name in names] + ["spark", "spark:poet"]
    right = {line: truth(home, line) for line in lines}
    with running(home) as server:
        got = {}

        def one(line, question):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask(line, question), timeout=60).json()
            got[line, question] = answer["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=one, args=(line, q)) for line in lines for q in QUESTIONS[:3]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.service.models._bases) == 1
        assert got == {(line, q): right[line][q] for line in lines for q in QUESTIONS[:3]}


def test_a_candidate_is_loaded_on_demand_and_may_stay_for_a_while(home):
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert set(server.service.models._residents) == {"spark@1", "spark:poet@1"}
        newest = http.post("/v1/chat/completions", json=ask("spark@newest")).json()
        assert newest["prairie"]["version"] == 3
        assert http.post("/v1/chat/completions", json=ask("spark@2")).status_code == 200
        server.idle()
        assert {"spark@2", "spark@3"} <= set(server.service.models._residents)
        register_model(home, "ember", 21)
        assert http.post("/v1/chat/completions", json=ask("ember@1")).status_code == 404, "only what was named"


@pytest.mark.parametrize("names", [["spark@2"], ["spark:poet", "spark@3"]])
def test_named_versions(home, names):
    with running(home, names) as server:
        for name in names:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask(name), timeout=60)
            assert answer.json()["model"] == name
        assert set(names) <= {model["id"] for model in server.service.models.listing()}


def test_the_watcher_outlives_an_unreadable_store(home, monkeypatch):
    from prairie.errors import StoreError

    with running(home) as server:
        broken = threading.Event()
        read = home.registry.generation

        def generation():
            broken.set()
            raise StoreError("the disk is gone")

        monkeypatch.setattr(home.registry, "generation", generation)
        assert broken.wait(60)
        monkeypatch.setattr(home.registry, "generation", read)
        home.registry.promote("spark@2")
        wait_for(lambda: version_of(server, "spark") == 2)
