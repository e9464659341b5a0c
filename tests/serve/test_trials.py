"""Versions on trial: who gets a canary's answers, what a shadow leaves, and when the guard takes a version back."""

import random
import time

import httpx
import pytest
from test_swap import version_of
from tiny_server import ask, register_model, running, wait_for

from prairie.data.records import Message
from prairie.serve import reload
from prairie.serve.guard import Guard, alarm
from prairie.serve.metrics import Metrics
from prairie.serve.models import is_canary
from prairie.store.feedback import FeedbackEvent, Response
from prairie.store.signals import Signals, signals


def on_trial(server, line="spark"):
    trial = server.service.models._trials.get(line)
    return trial.to_json()["version"] if trial else None


def test_a_canary_answers_its_share_of_the_users_and_always_the_same_ones(home):
    users = [f"user-{n}" for n in range(40)]
    chosen = {user for user in users if is_canary("spark@2", user, 0.3)}
    assert 4 < len(chosen) < 20
    with running(home) as server, httpx.Client(base_url=server.url, timeout=60) as http:

        def who_answers(user, **headers):
            body = ask("spark", user=user) if user else ask("spark")
            return http.post("/v1/chat/completions", json=body, headers=headers).json()["prairie"]["version"]

        home.registry.try_out("spark@2", 0.3)
        wait_for(lambda: on_trial(server) == "spark@2")
        for _ in range(2):
            assert {user: who_answers(user) for user in users} == {u: 2 if u in chosen else 1 for u in users}
        assert who_answers(None) == 1, "nobody without a name is a canary"
        assert who_answers(min(chosen), **{"X-Prairie-Purpose": "gate"}) == 1
        listed = {model["id"]: model["prairie"] for model in http.get("/v1/models").json()["data"]}
        assert listed["spark"]["version"] == 1 and listed["spark"]["trial"]["share"] == 0.3
        home.registry.try_out("spark@2", 0.6)
        wait_for(lambda: server.service.models._trials["spark"].share == 0.6)
        more = {user for user in users if who_answers(user) == 2}
        assert chosen < more, "a larger share adds people"
        server.idle()
        rows = home.feedback.responses()
        ids = {home.registry.resolve(f"spark@{n}").artifact_id: n for n in (1, 2)}
        assert all(ids[row.version_id] == 2 for row in rows if row.user in chosen and row.purpose == "chat")
        home.registry.rollback("spark")
        wait_for(lambda: on_trial(server) is None)
        assert {who_answers(user) for user in users} == {1}
        server.idle()
        assert "spark@2" not in server.service.models._residents, "its weights leave with its last request"


def test_a_shadow_answers_beside_the_champion_and_is_shown_to_nobody(home):
    with running(home) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        home.registry.try_out("spark@2")
        wait_for(lambda: on_trial(server) == "spark@2")
        for number in range(5):
            answer = http.post("/v1/chat/completions", json=ask("spark", f"fox {number}", user="ann")).json()
            assert answer["prairie"]["version"] == 1
        wait_for(lambda: server.service.metrics.shadows.labels("spark", "done")._value.get() == 5)
        server.idle()
        shown, unseen = (home.feedback.responses(purpose=purpose) for purpose in ("chat", "shadow"))
        assert {row.version_id for row in unseen} == {home.registry.resolve("spark@2").artifact_id}
        assert sorted(row.prompt[0].content for row in unseen) == sorted(row.prompt[0].content for row in shown)
        assert {row.status for row in unseen} == {"done"} and len(unseen) == 5
        assert server.kv_blocks_held() == 0
        server.service.desk.max_pending = 1
        http.post("/v1/chat/completions", json=ask("spark"))
        assert server.service.metrics.shadows.labels("spark", "skipped")._value.get() == 1


def test_a_version_that_cannot_be_loaded_is_not_tried_out(home):
    version = register_model(home, "spark", 9)
    weights = home.artifacts.get(version.artifact_id).path / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    with running(home) as server:
        home.registry.try_out(version, 0.5)
        wait_for(lambda: home.registry.trial("spark") is None)
        assert "cannot be loaded" in home.registry.history("spark")[-1].why
        assert version_of(server, "spark") == 1


def test_a_canary_that_fails_is_taken_back_while_the_champion_goes_on(home, monkeypatch):
    monkeypatch.setattr(reload, "GUARD_S", 0.1)
    with running(home) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        home.registry.try_out("spark@2", 0.5)
        wait_for(lambda: on_trial(server) == "spark@2")
        engine = server.service.models._residents["spark@2"].engine
        engine.step = lambda: 1 / 0
        server.service.worker.on_fault = lambda engine: None  # it stays broken, as a version that always breaks would
        codes = []
        for number in range(200):
            codes.append(http.post("/v1/chat/completions", json=ask("spark", user=f"user-{number}")).status_code)
            if home.registry.trial("spark") is None:
                break
        assert home.registry.trial("spark") is None and {200, 500} == set(codes)
        assert codes.count(500) < 60
        ended = home.registry.history("spark")[-1]
        assert (ended.action, ended.who) == ("end", "prairie serve") and "of its answers fail" in ended.why
        wait_for(lambda: on_trial(server) is None)
        after = [http.post("/v1/chat/completions", json=ask("spark", user=f"user-{n}")) for n in range(20)]
        assert {answer.status_code for answer in after} == {200}
        faulty = [row for row in home.feedback.responses() if row.finish_reason == "error"]
        assert len(faulty) == codes.count(500)


def served(home, version, count, disliked=0.0, seed=0, failed=0.0, ms=100.0):
    """Answers of a version to `count` people, each of whom votes."""
    chance = random.Random(f"{version.name}/{seed}/{count}")
    for n in range(count):
        id, user = f"{version.name}-{seed}-{n}", f"{version.name}-{seed}-user-{n}"
        asked = (Message("user", "two?"),)
        home.feedback.start_response(Response(id, "spark", asked, "spark", version.artifact_id, user=user))
        if chance.random() < failed:
            home.feedback.abort_response(id, finish_reason="error")
            continue
        home.feedback.finish_response(id, [1] * 10, None, "2", "stop", ms * chance.uniform(0.5, 1.5))
        home.feedback.add(FeedbackEvent(id, "thumb", "down" if chance.random() < disliked else "up", user))


def test_a_promotion_that_people_dislike_is_taken_back_once(home):
    registry, guard = home.registry, Guard(home, Metrics())
    served(home, registry.resolve("spark@1"), 150, disliked=0.2)
    registry.promote("spark@2")
    served(home, registry.resolve("spark@2"), 40, disliked=0.2)
    guard.look(["spark"])
    assert registry.champion("spark").number == 2, "as good as before"
    served(home, registry.resolve("spark@2"), 110, disliked=0.95, seed=1)
    guard.look(["spark"])
    assert registry.champion("spark").number == 1
    last = registry.history("spark")[-1]
    assert last.action == "rollback" and "of the people who vote dislike its answers" in last.why
    before = len(registry.history("spark"))
    guard.look(["spark"])
    assert len(registry.history("spark")) == before, "what was rolled back to is not watched anew"
    assert guard.metrics.taken_back.labels("spark")._value.get() == 1


def test_a_clock_that_is_put_back_blinds_nobody(home, monkeypatch):
    registry, guard, now = home.registry, Guard(home, Metrics()), time.time()
    served(home, registry.resolve("spark@1"), 60, disliked=0.1)
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    registry.promote("spark@2")
    monkeypatch.setattr(time, "time", lambda: now)
    served(home, registry.resolve("spark@2"), 60, disliked=0.95)
    guard.look(["spark"])
    assert registry.champion("spark").number == 1


def test_what_is_seen_of_a_version(home):
    version = home.registry.resolve("spark@1")
    served(home, version, 3)
    asked = (Message("user", "two?"),)
    home.feedback.start_response(Response("left", "spark", asked, "spark", version.artifact_id))
    home.feedback.abort_response("left", finish_reason="cancelled")
    home.feedback.start_response(Response("broke", "spark", asked, "spark", version.artifact_id))
    home.feedback.abort_response("broke", finish_reason="error")
    for value, user in ((2, "bo"), (5, "bo"), (3, "chen"), (4, "dara")):
        home.feedback.add(FeedbackEvent("broke", "rating", value, user))
    found = signals(home, version)
    assert found.failed == [False, False, False, True], "a client that left is no fault"
    assert found.disliked == [False, False, False, True, False], "a person's first opinion, and none of a 3"
    assert len(found.ms_per_token) == 3 and all(5 <= ms <= 15 for ms in found.ms_per_token)
    home.feedback.start_response(Response("open", "spark", asked, "spark", version.artifact_id))
    served(home, version, 1, seed=7)
    assert len(signals(home, version).failed) == 4, "nothing after an answer that is still written"
    assert len(signals(home, version, backwards=True).failed) == 1
    assert signals(home, version, since=time.time() + 1).failed == []


# --- how often the guard errs -----------------------------------------------------------------------------------------


def drawn(seed, n=400, failed=0.02, slow=1.0, disliked=0.3):
    chance = random.Random(seed)
    return Signals(
        [chance.random() < failed for _ in range(n)],
        [chance.lognormvariate(0, 0.5) * slow for _ in range(n)],
        [chance.random() < disliked for _ in range(n)],
    )


def test_a_version_that_is_no_worse_is_seldom_taken_back():
    wrong = sum(alarm(drawn(2 * n), drawn(2 * n + 1), timed=True) is not None for n in range(300))
    assert wrong / 300 <= 0.03


@pytest.mark.parametrize("worse", [{"failed": 0.15}, {"slow": 3.0}, {"disliked": 0.6}])
def test_a_version_that_is_worse_is_taken_back(worse):
    found = [alarm(drawn(2 * n, **worse), drawn(2 * n + 1), timed=True) for n in range(40)]
    assert sum(why is not None for why in found) >= 38
    assert alarm(drawn(1, slow=3.0), drawn(2), timed=False) is None, "another hour is another load"
