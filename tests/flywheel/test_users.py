"""Simulated users against a small HTTP server of the test's own: what they send, how they vote, how they repeat."""

import io
import json
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prairie.errors import DataError
from prairie.flywheel.chat import JUDGES_AT_ONCE, simulated_vote
from prairie.flywheel.gate import judge, vote_test
from prairie.flywheel.users import SimulatedUser, Taste, compare, people, talk, true_preference, win_rate_true
from prairie.pipeline.context import Context
from prairie.recipe import GateRules, Users, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.registry import Version
from prairie.tasks import catalog
from prairie.tasks.task import STYLES

pytestmark = pytest.mark.long

ITEMS = catalog.items(["numbers", "dates"], "held_out", 60, 0)
BY_PROMPT = {item.prompt: item for item in [*ITEMS, *catalog.items(["numbers", "dates"], "held_out", 20, 3)]}


class World:
    """Answers by `answer(model, item, rng)` and keeps votes as the real server does: a key counts once."""

    def __init__(self, answer):
        self.answer, self.responses, self.events, self.asks, self.lock = answer, {}, {}, [], threading.Lock()
        self.fail_asks, self.busy, self.break_votes = 0, 0, 0
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with world.lock:
                    status, answer = world.handle(self.path, body, self.headers)
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(raw)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, path, body, headers):
        if path == "/v1/chat/completions":
            if self.busy:
                self.busy -= 1
                return 429, {"error": {"message": "the queue is full"}}
            if self.fail_asks:
                self.fail_asks -= 1
                return 500, {"error": {"message": "the engine fell over"}}
            self.asks.append((body, dict(headers)))
            item = BY_PROMPT[body["messages"][0]["content"]]
            rng = random.Random(f"{body['model']}{body['seed']}")
            choices = []
            for index in range(body["n"]):
                response_id = f"chatcmpl-{len(self.responses)}"
                text = self.answer(body["model"], item, rng)
                self.responses[response_id] = (body["model"], item, text, body["user"], headers["X-Prairie-Purpose"])
                choices.append({"index": index, "response_id": response_id, "message": {"content": text}})
            return 200, {"choices": choices, "prairie": {"artifact_id": f"id of {body['model']}"}}
        if path == "/v1/feedback":
            if self.break_votes:
                self.break_votes -= 1
                return 503, {"error": {"message": "try again"}}
            key = headers["Idempotency-Key"]
            if body["response_id"] not in self.responses:
                return 404, {"error": {"message": "no such response"}}
            if key in self.events:
                return (200, {"id": key}) if self.events[key] == body else (409, {"error": {"message": "another body"}})
            self.events[key] = body
            return 201, {"id": key}
        return 404, {"error": {"message": path}}

    def choices(self):
        return [event for event in self.events.values() if event["kind"] == "choice"]


@pytest.fixture
def world():
    made = []

    def start(answer):
        made.append(World(answer))
        return made[-1]

    yield start
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def mixed(model, item, rng):
    """Any wording, right in three cases of four."""
    value = item.answer if rng.random() < 0.75 else rng.choice(ITEMS).answer
    return catalog.worded(item, rng.choice(STYLES), value)


# --- taste ----------------------------------------------------------------------------------------


def test_right_counts_most_then_the_wording():
    item = ITEMS[0]
    wrong = next(other.answer for other in ITEMS if other.task == item.task and not catalog.check(item, other.answer))
    worth = [true_preference(item, catalog.worded(item, style)) for style in ("sentence", "plain", "warm")]
    worth += [true_preference(item, catalog.worded(item, style, wrong)) for style in ("sentence", "plain", "warm")]
    worth.append(true_preference(item, "blah blah"))
    assert worth[:4] == sorted(worth[:4], reverse=True) and len(set(worth)) == 7
    assert min(worth[:3]) > max(worth[3:])
    assert Taste.for_style("warm").favourite == "warm"
    with pytest.raises(DataError, match="loud"):
        Taste.for_style("loud")


def test_kinds_vote_as_they_are():
    item, rng = ITEMS[0], random.Random(0)
    good, bad = catalog.worded(item, "sentence"), catalog.worded(item, "warm")
    taste = Taste.for_style("sentence")
    honest, against = SimulatedUser("h", taste, noise=0.0), SimulatedUser("a", taste, noise=0.0, kind="adversarial")
    coin = SimulatedUser("r", taste, noise=0.0, kind="random")
    assert (honest.likes(item, good, bad, rng), honest.likes(item, bad, good, rng)) == (1.0, 0.0)
    assert (against.likes(item, good, bad, rng), against.likes(item, bad, good, rng)) == (0.0, 1.0)
    assert honest.likes(item, good, good, rng) == 0.5
    assert 0.4 < sum(coin.likes(item, good, bad, rng) for _ in range(500)) / 500 < 0.6
    noisy = SimulatedUser("n", taste, noise=0.4)
    assert 0.73 < sum(noisy.likes(item, good, bad, rng) for _ in range(1000)) / 1000 < 0.87


def test_a_population_has_the_shares_asked_for():
    crowd = people(40, 7, poisoned=0.25, minority=0.0)
    assert Counter(user.kind for user in crowd) == {"honest": 30, "adversarial": 5, "random": 5}
    assert {user.taste.favourite for user in crowd} == {"sentence"} and len({user.name for user in crowd}) == 40
    assert crowd == people(40, 7, poisoned=0.25, minority=0.0)
    assert not {user.name for user in crowd} & {user.name for user in people(40, 8)}
    assert {user.taste.favourite for user in people(60, 0, preference="plain", minority=0.3)} == set(STYLES)


def test_true_win_rate():
    items = ITEMS[:40]
    sentence = [catalog.worded(item, "sentence") for item in items]
    warm = [catalog.worded(item, "warm") for item in items]
    assert win_rate_true(sentence, warm, items).value == 1.0 and win_rate_true(sentence, warm, items).low > 0.9
    assert win_rate_true(warm, warm, items).value == 0.5
    assert win_rate_true(sentence, warm, items, preference="warm").value == 0.0


# --- over HTTP ------------------------------------------------------------------------------------


def test_users_talk_and_vote_for_what_they_like(world):
    there = world(mixed)
    crowd = people(12, 0, noise=0.0, minority=0.0)
    seen = []
    report = talk(
        there.url,
        crowd,
        ITEMS,
        "spark",
        seed=1,
        each=10,
        turn="1",
        on_done=lambda done, total: seen.append((done, total)),
    )
    assert (report.requests, report.failed, report.lost_votes, report.errors) == (120, 0, 0, [])
    assert seen == [(n, 120) for n in range(1, 121)]
    assert report.votes == len(there.events) and report.repeated == 0
    assert report.answered_by == {"id of spark": 120}
    assert len(there.choices()) == 120
    for event in there.choices():
        _, item, better, user, purpose = there.responses[event["response_id"]]
        worse = there.responses[event["value"]["over"][0]][2]
        assert event["user"] == user and purpose == "chat"
        difference = true_preference(item, better) - true_preference(item, worse)
        assert abs(difference) < 0.05 if event["value"].get("tie") else difference > 0
    kinds = Counter(event["kind"] for event in there.events.values())
    assert kinds["thumb"] > 5 and kinds["edit"] >= 1
    for event in there.events.values():
        _, item, text, _, _ = there.responses[event["response_id"]]
        if event["kind"] == "edit":
            assert catalog.check(item, event["value"]["text"]) and not catalog.check(item, text)
            assert catalog.style_of(item, event["value"]["text"]) == "sentence"
        elif event["kind"] == "thumb":
            assert (event["value"] == "up") == catalog.check(item, text)
    asked = Counter((body["user"], body["messages"][0]["content"]) for body, _ in there.asks)
    assert set(asked.values()) == {1} and all(body["n"] == 2 for body, _ in there.asks)
    languages = {user.name: user.languages for user in crowd}
    assert all(BY_PROMPT[prompt].language in languages[user] for user, prompt in asked)


def test_the_same_talk_again_doubles_nothing(world):
    there = world(mixed)
    crowd = people(6, 0)
    first = talk(there.url, crowd, ITEMS, "spark", seed=1, each=5, turn="1")
    events = dict(there.events)
    again = talk(there.url, crowd, ITEMS, "spark", seed=1, each=5, turn="1")
    assert there.events == events and (again.votes, again.repeated) == (first.votes, first.votes)
    another = talk(there.url, crowd, ITEMS, "spark", seed=1, each=5, turn="2")
    assert another.repeated == 0 and len(there.events) == first.votes + another.votes
    other_work = talk(there.url, crowd, ITEMS, "spark", seed=1, each=5, turn="1", key="changed")
    assert (other_work.votes, other_work.repeated) == (first.votes, 0), "the same opinions, given anew"


def test_failures_are_counted_and_a_full_queue_is_waited_for(world):
    there = world(mixed)
    there.fail_asks, there.busy, there.break_votes = 3, 2, 2
    report = talk(there.url, people(4, 0), ITEMS, "spark", seed=1, each=5, concurrency=1)
    assert (report.requests, report.failed, report.lost_votes) == (20, 3, 0)
    assert report.errors == ["asking spark: 500 the engine fell over"] * 3
    assert len(there.choices()) == 17
    json.dumps(report.to_json())


def test_nobody_there_is_a_report_and_not_a_crash():
    report = talk("http://127.0.0.1:9", people(2, 0), ITEMS, "spark", seed=1, each=2)
    assert (report.requests, report.failed, report.votes) == (4, 4, 0) and "Connect" in report.errors[0]


def test_a_blind_comparison_finds_the_better_model(world):
    def answer(model, item, rng):
        return catalog.worded(item, "sentence") if model == "new" or rng.random() < 0.3 else mixed(model, item, rng)

    there = world(answer)
    crowd = people(16, 3, prefix="gate")
    found = compare(f"{there.url}/v1", crowd, ITEMS, "new", "old", seed=1, each=8, turn="1")
    assert len(found.comparisons) == 128 and found.report.votes == 128 and found.report.requests == 256
    verdict = judge(found.comparisons)
    assert verdict.passed and verdict.users == 16
    truth = win_rate_true(found.answers_a, found.answers_b, found.items)
    assert truth.value > 0.6 and abs(truth.value - verdict.win_rate) < 0.15
    assert all(headers["X-Prairie-Purpose"] == "gate" for _, headers in there.asks)
    firsts = Counter(body["model"] for body, _ in there.asks[::2])
    assert {event["kind"] for event in there.events.values()} == {"choice"}
    # outcomes are the votes that lie on the server, seen from the first model
    stored = Counter()
    for event in there.choices():
        model = there.responses[event["response_id"]][0]
        stored[0.5 if event["value"].get("tie") else float(model == "new")] += 1
    assert stored == Counter(c.outcome for c in found.comparisons)
    again = compare(there.url, crowd, ITEMS, "new", "old", seed=1, each=8, turn="1")
    assert again.comparisons == found.comparisons and again.report.repeated == 128 and firsts


def test_judges_come_until_the_verdict_about_their_votes_is_certain(world):
    def answer(model, item, rng):
        return catalog.worded(item, "sentence" if model == "spark@2" else rng.choice(STYLES))

    there = world(answer)
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    context = Context(recipe, None, Runtime(threads=1, progress=Progress(io.StringIO(), quiet=True)))
    vote = simulated_vote(context, there.url, Users(), GateRules(users=72, prompts=4), ["numbers", "dates"], "turn1")
    first, second, third = (Version("spark", n, f"artifact {n}", None, "model", None, {}, {}, 0.0) for n in (1, 2, 3))
    better = vote(second, first)
    assert vote_test(better.comparisons).decision == "better"
    assert len({c.user for c in better.comparisons}) == JUDGES_AT_ONCE and better.report.requests == 2 * 4 * 24
    alike = vote(third, first)
    assert len({c.user for c in alike.comparisons}) == 72 and alike.report.votes == len(alike.comparisons) == 288
    assert list(dict.fromkeys(c.user for c in alike.comparisons))[:24] == list(
        dict.fromkeys(c.user for c in better.comparisons)
    ), "in the order in which they came"
    assert len(vote(first, first).shown_first) == 12 * 4


def test_equal_models_tie_on_average_whoever_is_shown_first(world):
    there = world(mixed)
    found = compare(there.url, people(30, 4), ITEMS, "one", "two", seed=1, each=8, concurrency=8)
    rate = sum(c.outcome for c in found.comparisons) / 240
    assert 0.4 < rate < 0.6
    order = Counter()
    for user in {body["user"] for body, _ in there.asks}:
        mine = [body for body, _ in there.asks if body["user"] == user]
        order.update(body["model"] for body in mine[::2])
    assert 80 < order["one"] < 160  # a coin decides who is asked and shown first


def test_an_api_key_and_refusals(world):
    there = world(mixed)
    talk(there.url, people(1, 0), ITEMS, "spark", seed=1, each=1, api_key="secret")
    assert there.asks[0][1]["Authorization"] == "Bearer secret"
    with pytest.raises(DataError, match="too few questions"):
        talk(there.url, people(1, 0), ITEMS[:3], "spark", seed=1, each=10)
    with pytest.raises(DataError, match="one name"):
        talk(there.url, people(1, 0) * 2, ITEMS, "spark", seed=1, each=1)
