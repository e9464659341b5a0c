"""The studio's readings are what the store holds, without anybody's words; administrators alone change champions."""

import httpx
import pytest
from tiny_server import Settings, ask, running, wait_for

from prairie.store.audit import lines

VERDICT = {"win_rate": 0.7, "low": 0.6, "high": 0.8, "n": 40, "users": 10, "reasons": [], "trials": "votes"}


@pytest.fixture
def studio(home):
    strict = Settings(admin_without_key=False)
    with running(home, ["spark"], strict) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        yield home, http


def talk(http, user, thumb="up", secret="my secret question"):
    """Asks, votes, returns the answer's and the vote's ids."""
    answer = http.post("/v1/chat/completions", json=ask("spark", secret, user=user)).json()
    response = answer["choices"][0]["response_id"]
    vote = {"response_id": response, "kind": "thumb", "value": thumb, "user": user}
    return response, http.post("/v1/feedback", json=vote).json()["id"]


def turned(home, number, events, promoted):
    """A turn that learned from `events`, in the store as a wheel would leave it."""
    registry = home.registry
    with home.artifacts.create(
        "votes", "votes-spark", {"events": events}, events=events, figures={"rows": 1}
    ) as folder:
        (folder / "train.jsonl").write_text("{}\n")
    dataset = home.artifacts.id_of("votes", {"events": events}, [], "")
    champion, candidate = registry.resolve("spark@1"), registry.resolve("spark@2")
    registry.record_turn(
        "spark", number, champion.artifact_id, candidate.artifact_id, dataset, VERDICT, promoted, f"key{number}"
    )


def test_traffic_and_votes_are_counted_without_their_text(studio):
    _, http = studio
    for user, thumb in (("ann", "up"), ("bob", "down")):
        talk(http, user, thumb)
    traffic, votes = http.get("/v1/studio/traffic").json(), http.get("/v1/studio/votes").json()
    assert sum(bar["answers"] for bar in traffic["bars"]) == sum(bar["votes"] for bar in traffic["bars"]) == 2
    assert traffic["versions"] == [{**traffic["versions"][0], "line": "spark", "answers": 2, "aborted": 0}]
    assert traffic["versions"][0]["median_ms"] > 0 and len(traffic["latest"]) == 2 and traffic["pending"] == 0
    assert votes["thumbs"] == {"up": 1, "down": 1} and votes["users"] == 2
    for page in ("traffic", "votes", "lines", "votes?user=ann"):
        text = http.get(f"/v1/studio/{page}").text
        assert "secret" not in text and "bob" not in text, "nobody's words, nobody's name"


def test_a_vote_learns_what_became_of_it(studio):
    home, http = studio
    _, used = talk(http, "ann")
    _, left_out = talk(http, "ann")
    fates = {row["id"]: row for row in http.get("/v1/studio/votes", params={"user": "ann"}).json()["data"]}
    assert fates[used]["used"] == [] and fates[used]["passed_by"] == [], "waits"
    turned(home, 1, [used], promoted=True)
    _, later = talk(http, "ann")
    rows = http.get("/v1/studio/votes", params={"user": "ann"}).json()["data"]
    assert [row["id"] for row in rows] == [later, left_out, used], "newest first"
    fates = {row["id"]: row for row in rows}
    assert fates[used]["used"] == [{"turn": 1, "candidate": "spark@2", "promoted": True}]
    assert (fates[left_out]["used"], fates[left_out]["passed_by"]) == ([], [1])
    assert (fates[later]["used"], fates[later]["passed_by"]) == ([], [])
    assert http.get("/v1/studio/votes", params={"user": "nobody"}).json()["data"] == []


def test_turns_and_lineage(studio):
    home, http = studio
    _, vote = talk(http, "ann")
    turned(home, 1, [vote], promoted=False)
    (turn,) = http.get("/v1/studio/turns/spark").json()["data"]
    assert (turn["candidate_name"], turn["champion_name"], turn["votes"]) == ("spark@2", "spark@1", 1)
    assert turn["verdict"]["low"] == 0.6 and turn["promoted"] is False
    assert http.get("/v1/studio/turns/nothing").status_code == 404
    graph = http.get("/v1/studio/lineage/spark@3").json()
    names = {node["id"]: node["version"] for node in graph["nodes"]}
    (arrow,) = graph["arrows"]
    assert [names[end] for end in arrow] == ["spark@1", "spark@3"], "the adapter stands on its base"
    assert http.get("/v1/studio/lineage/spark@9").status_code == 404


def test_champions_change_by_administrators_alone(studio):
    home, http = studio
    change = "/v1/studio/lines/spark/promote"
    refused = http.post(change, json={"version": 2})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "permission_denied"
    plain, admin = home.keys.create("ann"), home.keys.create("admin-root")
    wait_for(lambda: http.post(change, json={"version": 2}).status_code == 401)
    for key, status in ((plain, 403), (admin[:-1], 401)):
        answer = http.post(change, json={"version": 2}, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status, key
    assert home.registry.champion("spark").number == 1
    http.headers["Authorization"] = f"Bearer {admin}"
    assert http.post(change, json={"version": 2, "why": "I say so"}).json() == {"line": "spark", "champion": "spark@2"}
    assert http.post("/v1/studio/lines/spark/rollback", json={}).json()["champion"] == "spark@1"
    assert http.post("/v1/studio/lines/spark/rollback", json={}).status_code == 404
    (line,) = [row for row in http.get("/v1/studio/lines").json()["data"] if row["line"] == "spark"]
    told = [(event["action"], event["number"], event["who"], event["why"]) for event in line["history"]]
    assert told[1:] == [("promote", 2, "admin-root", "I say so"), ("rollback", 1, "admin-root", None)]
    acts = [(line["who"], line["act"]) for line in lines(home.root) if line["who"] == "admin-root"]
    assert acts == [("admin-root", "promote"), ("admin-root", "roll back"), ("admin-root", "roll back")]
