"""Adapters loaded and unloaded by name while people talk: never the wrong one, never a leak."""

import threading

import httpx
import pytest
import torch
from tiny_server import Settings, ask, make_adapter, running, tokenizer

from prairie.data.chat_template import ChatTemplate
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.weights import load_model
from prairie.store.audit import lines


@pytest.fixture
def folders(home, tmp_path):
    """Adapters of spark@1, by seed."""
    base = home.registry.resolve("spark@1")
    model = load_model(home.artifacts.get(base.artifact_id).path)
    return [make_adapter(tmp_path / f"adapter{n}", model, 20 + n, base.artifact_id) for n in range(3)]


def load(http, name, folder, **more):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder), **more})


def said(http, model, **more):
    answer = http.post("/v1/chat/completions", json=ask(model, max_tokens=20, **more))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_loaded_answers_unloaded_does_not(home, folders):
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        loaded = load(http, "ann", folders[0]).json()
        assert loaded["id"] == "ann" and loaded["prairie"]["adapter_hash"] == LoRA.load(folders[0]).hash
        assert load(http, "ann", folders[0]).json()["prairie"] == loaded["prairie"], "the same again changes nothing"
        refused = load(http, "ann", folders[1])
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert load(http, "bob", folders[1]).status_code == 200
        texts = {said(http, name) for name in ("spark", "ann", "bob")}
        assert len(texts) == 3
        assert {"spark", "ann", "bob"} <= {model["id"] for model in http.get("/v1/models").json()["data"]}
        before = said(http, "ann")
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "ann"}).json()["deleted"] is True
        assert http.post("/v1/chat/completions", json=ask("ann")).status_code == 404
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "ann"}).status_code == 404
        server.idle()
        engine = server.service.models._residents["spark@1"].engine
        assert LoRA.load(folders[0]).hash not in engine.adapters, "it left memory"
        assert load(http, "ann", folders[1]).status_code == 200, "the name is free for another"
        assert said(http, "ann") == said(http, "bob") != before
    acts = [(line["who"], line["act"], line["name"]) for line in lines(home.root)]
    assert acts[0] == ("no key", "load adapter", "ann") and ("no key", "unload adapter", "ann") in acts
    assert all(line["request_id"] for line in lines(home.root))


def test_what_cannot_be_loaded(home, folders, tmp_path):
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for name, folder, status in (
            ("spark", folders[0], 409), ("spark:x", folders[0], 400), ("x@1", folders[0], 400),
            ("x", tmp_path / "nowhere", 400), ("x", tmp_path, 400),
        ):  # fmt: skip
            answer = load(http, name, folder)
            assert answer.status_code == status, (name, answer.text)
        other = home.registry.resolve("spark@2")
        foreign = make_adapter(
            tmp_path / "foreign", load_model(home.artifacts.get(other.artifact_id).path), 9, other.artifact_id
        )
        refused = load(http, "x", foreign)
        assert refused.status_code == 400 and "no base that is served fits" in refused.json()["error"]["message"]
        assert http.post("/v1/load_lora_adapter", json={"lora_name": "x"}).json()["error"]["param"] == "lora_path"
        assert not server.service.models.added


def test_only_administrators(home, folders):
    keys = {name: home.keys.create(name) for name in ("ann", "admin-bob")}
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for name, status in (("ann", 403), ("admin-bob", 200)):
            http.headers["Authorization"] = f"Bearer {keys[name]}"
            assert load(http, "x", folders[0]).status_code == status
    assert [line["who"] for line in lines(home.root)] == ["prairie keys", "prairie keys", "admin-bob"]


def test_no_key_and_reachable_by_others(home, folders):
    with running(home, ["spark"], Settings(admin_without_key=False)) as server:
        answer = load(httpx.Client(base_url=server.url), "x", folders[0])
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")


def test_few_stay_in_memory_and_come_back(home, folders):
    with (
        running(home, ["spark"], Settings(max_adapters=1)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        for n, folder in enumerate(folders):
            assert load(http, f"a{n}", folder).status_code == 200
        first = [said(http, f"a{n}") for n in range(3)]
        server.idle()
        engine = server.service.models._residents["spark@1"].engine
        poet = server.service.models._residents["spark:poet@1"].adapter_hash
        assert set(engine.adapters) == {poet, LoRA.load(folders[2]).hash}, "the latest used"
        listed = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        assert {"a0", "a1", "a2"} <= set(listed)
        assert [said(http, f"a{n}") for n in range(3)] == first and len(set(first)) == 3


def test_loading_and_unloading_under_load(home, folders):
    """Answers of a name are those of the adapter it stood for, or a 404: never another's."""
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        wanted = {}
        for n, folder in enumerate(folders):
            assert load(http, f"n{n}", folder).status_code == 200
            wanted[LoRA.load(folder).hash] = said(http, f"n{n}")
        http.post("/v1/unload_lora_adapter", json={"lora_name": "n0"})
        http.post("/v1/unload_lora_adapter", json={"lora_name": "n1"})
        wrong, answered, stop = [], [0], threading.Event()

        def talk():
            with httpx.Client(base_url=server.url, timeout=60) as mine:
                while not stop.is_set():
                    answer = mine.post("/v1/chat/completions", json=ask("moving", max_tokens=20))
                    if answer.status_code == 404:
                        continue
                    body = answer.json()
                    answered[0] += 1
                    if wanted[body["prairie"]["adapter_hash"]] != body["choices"][0]["message"]["content"]:
                        wrong.append(body)

        threads = [threading.Thread(target=talk) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(8):
            assert load(http, "moving", folders[turn % 2]).status_code == 200
            stop.wait(0.15)
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": "moving"}).status_code == 200
        stop.set()
        for thread in threads:
            thread.join()
        server.idle()
        assert not wrong and answered[0] > 3
        assert server.kv_blocks_held() == 0
        engine = server.service.models._residents["spark@1"].engine
        poet = server.service.models._residents["spark:poet@1"].adapter_hash
        assert set(engine.adapters) == {poet, LoRA.load(folders[2]).hash}


def test_a_stacked_adapter_is_loaded_with_what_it_stands_on(home, tmp_path):
    """As DPO leaves it on its SFT adapter."""
    base = home.registry.resolve("spark@1")
    model = load_model(home.artifacts.get(base.artifact_id).path)
    words = tokenizer()
    hashes = {"tokenizer_hash": words.hash, "template_hash": ChatTemplate.builtin("chatml", words).hash}
    generator = torch.Generator().manual_seed(3)
    below = None
    for name in ("sft", "dpo"):
        lora = LoRA.create(model, LoRAConfig(rank=2), 5, below)
        with torch.no_grad():
            for path in lora.paths:
                lora.pair(path)[1].normal_(0.0, 0.3, generator=generator)
        lora.save(tmp_path / name, base_artifact=base.artifact_id, **hashes)
        below = lora
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for name in ("sft", "dpo"):
            assert load(http, name, tmp_path / name).status_code == 200, name
        assert len({said(http, name) for name in ("spark", "sft", "dpo")}) == 3
