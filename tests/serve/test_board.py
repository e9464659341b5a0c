"""Go over HTTP: positions by the rules, thoughts of a real net, and one clear sentence for what cannot be played."""

import httpx
import pytest
from tiny_server import events, running

from prairie.games.sgf import read_sgf
from prairie.models.tower import Tower, TowerConfig, save_tower
from prairie.store.home import Home


def add_go(home):
    """The line go3: an untrained net for boards of 3 lines."""
    with home.artifacts.create("tower", "net", {"seed": 0}) as folder:
        save_tower(Tower(TowerConfig.small(12, 7, blocks=2, width=16, boards=(3,))).init_weights(0), folder)
    made = home.artifacts.id_of("tower", {"seed": 0}, [], "")
    home.registry.promote(home.registry.register("go3", made, kind="tower"))


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """A server that has nothing but a line of Go."""
    with Home(tmp_path_factory.mktemp("go") / "home") as home:
        add_go(home)
        with running(home) as server, httpx.Client(base_url=server.url, timeout=60) as http:
            yield http


def test_a_home_with_nothing_but_go_is_served(go):
    assert go.get("/readyz").status_code == 200
    assert go.get("/v1/models").json()["data"] == []
    (line,) = go.get("/v1/go/lines").json()["data"]
    assert line == {"line": "go3", "champion": "go3@1", "boards": [3], "turns": 0}
    assert go.get("/v1/go/lines/go3").json() == {"line": "go3", "turns": []}
    assert go.get("/v1/go/lines/go9").status_code == 404
    asked = {"model": "go3", "messages": [{"role": "user", "content": "hi"}]}
    refused = go.post("/v1/chat/completions", json=asked)
    assert refused.status_code == 404 and "go3@1 plays Go and writes nothing" in refused.json()["error"]["message"]


def test_a_position_is_what_the_rules_say(go):
    # Black takes white's stone in the corner; white may not fill it back at once (superko), nor play on a stone.
    moves = ["B3", "A3", "A2", "C3", "C1"]
    found = go.post("/v1/go/position", json={"size": 3, "moves": moves, "komi": 0.5}).json()
    assert found["stones"] == [0, 1, 2, 1, 0, 0, 0, 0, 1] and found["to_move"] == "white"
    assert "A3" not in found["legal"] and "B3" not in found["legal"] and "pass" in found["legal"]
    over = go.post("/v1/go/position", json={"size": 3, "moves": ["B2", "pass", "pass"], "komi": 0.5}).json()
    assert over["over"] and over["legal"] == [] and over["score"] == 8.5 and over["result"] == "B+8.5"
    (record,) = read_sgf(over["sgf"].encode())
    assert [move for _, move in record.moves] == [4, 9, 9] and record.result == "B+8.5"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"size": 3, "moves": ["B2", "B2"]}, "move 2: B2 cannot be played: got occupied"),
        ({"size": 3, "moves": ["Z9"]}, "move 1: there is no such point: got Z9"),
        ({"size": 3, "moves": ["pass", "pass", "A1"]}, "move 3: the game is over"),
        ({"size": 30, "moves": []}, "`size` is wrong"),
    ],
)
def test_what_cannot_be_played_is_one_sentence(go, body, sentence):
    answer = go.post("/v1/go/position", json=body)
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


def test_thoughts_end_with_a_move_and_say_what_the_net_sees(go):
    asked = {"model": "go3", "size": 3, "moves": ["B2"], "komi": 0.5, "visits": 60}
    answer = go.post("/v1/go/think", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    thoughts = events(answer.text)
    last = thoughts[-1]
    assert last["model"] == "go3@1" and 59 <= last["visits"] <= 70 and 0 <= last["black_wins"] <= 1
    legal = go.post("/v1/go/position", json=asked).json()["legal"]
    assert last["move"] in legal and last["candidates"][0]["move"] == last["move"]
    assert sum(last["policy"]) == pytest.approx(1, abs=0.01) and last["policy"][4] == 0, "no chance on a stone"
    assert len(last["owner"]) == 9 and all(-1 <= owner <= 1 for owner in last["owner"])
    assert sum(c["visits"] for c in last["candidates"]) <= last["visits"]


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"model": "go19"}, 404, "go19"),
        ({"size": 5, "moves": []}, 400, "the net was not made for this board: got 5 lines, wanted 3"),
        ({"moves": ["pass", "pass"]}, 400, "the game is over"),
        ({"visits": 10**6}, 400, "`visits` is wrong"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_before_the_stream(go, change, status, sentence):
    answer = go.post("/v1/go/think", json={"model": "go3", "size": 3, "moves": [], **change})
    assert answer.status_code == status and sentence in answer.json()["error"]["message"]


def test_lines_that_write_and_lines_that_play_are_served_together(home):
    add_go(home)
    with running(home) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert "go3" not in [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert [line["line"] for line in http.get("/v1/go/lines").json()["data"]] == ["go3"]
        refused = http.post("/v1/go/think", json={"model": "spark", "size": 3})
        assert refused.status_code == 400 and "spark@1 does not play Go" in refused.json()["error"]["message"]
