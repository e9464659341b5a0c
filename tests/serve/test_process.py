"""`prairie serve` and `prairie chat` as commands: ports, signals, sentences, and `kill -9` under a voting client."""

import json
import random
import shutil
import signal
import socket
import threading
import time
import uuid

import httpx
import pytest
from tiny_server import Home, Process, ask, events, make_model, running

from prairie.cli.main import main
from prairie.serve.server import bind

pytestmark = pytest.mark.long


@pytest.fixture
def root(spark_root, tmp_path):
    shutil.copytree(spark_root, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def prairie(capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code, *capsys.readouterr()

    return run


def test_a_server_from_start_to_drain(root, prairie):
    server = Process(root)
    try:
        said = server.wait_ready()
        assert said["pid"] == server.process.pid and said["models"] == ["spark", "spark:poet"]
        url = said["url"]
        code, _, text = prairie("serve", "--home", root, "--port", url.rsplit(":", 1)[1])
        assert code == 1 and text.count("\n") == 1 and "is in use" in text and "--port" in text
        body = ask("spark", max_tokens=140, ignore_eos=True, n=8, temperature=1, stream=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            server.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        assert sum(e["choices"][0]["finish_reason"] == "length" for e in events(text)) == 8
        assert server.process.wait(30) == 0, server.log.read_text()
    finally:
        server.end(signal.SIGKILL)
    with Home(root) as home:
        assert {row.status for row in home.feedback.responses()} == {"done"}


def test_nothing_to_serve_is_one_sentence(tmp_path, prairie):
    (tmp_path / "home").mkdir()
    for names, words in (([], "no model to serve"), (["nobody"], "nobody"), ([str(tmp_path)], "no model folder")):
        code, out, text = prairie("serve", *names, "--home", tmp_path / "home", "--port", 0)
        assert (code, out, text.count("\n")) == (1, "", 1) and words in text, text
        assert text.startswith("error: ")


def test_a_damaged_model_ends_the_start_in_one_sentence(tmp_path, prairie):
    folder = make_model(tmp_path / "broken", 1)
    (folder / "model.safetensors").write_bytes(b"nothing")
    code, out, text = prairie("serve", folder, "--home", tmp_path / "home", "--port", 0)
    assert (code, out, text.count("\n")) == (1, "", 1) and "model.safetensors" in text, text


def test_a_plain_folder_is_served_and_its_answers_take_votes(tmp_path):
    folder = make_model(tmp_path / "folk", 5)
    with Home(tmp_path / "home") as home, running(home, [str(folder)]) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask("folk"), timeout=30).json()
        assert answer["prairie"]["line"] == "folk" and answer["prairie"]["artifact_id"] is None
        vote = {"response_id": answer["id"], "kind": "thumb", "value": "up"}
        assert httpx.post(f"{server.url}/v1/feedback", json=vote, timeout=30).status_code == 201
        assert [v.response.line for v in home.feedback.votes()] == ["folk"]


def test_a_taken_port():
    with bind("127.0.0.1", 0) as first:
        from prairie.errors import BusyError, UsageError

        with pytest.raises(BusyError, match="in use"):
            bind("127.0.0.1", first.getsockname()[1])
        with pytest.raises(UsageError):
            bind("no.such.host.invalid", 0)


def test_chat_in_the_terminal(root, prairie):
    code, out, text = prairie("chat", "spark", "草原 fox", "--home", root, "--temperature", 0, "--max-tokens", 12)
    assert code == 0, text
    code, answer, _ = prairie(
        "chat", "spark@1", "草原 fox", "--home", root, "--temperature", 0, "--max-tokens", 12, "--json"
    )
    assert json.loads(answer)["text"] + "\n" == out and json.loads(answer)["model"] == "spark@1"
    code, _, text = prairie("chat", "nobody", "hi", "--home", root)
    assert code == 1 and "nobody" in text and text.count("\n") == 1


def test_a_terminal_conversation_is_recorded_and_voted_on(root, monkeypatch):
    from prairie.cli import chat

    lines = iter(["fox", "/better 草原", "/again", "/down", "/up", "/nothing", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    chat.chat("spark", home=root, temperature=1.0, max_tokens=5, top_p=1.0, seed=None, threads=1)
    with Home(root) as home:
        assert [(e.kind, e.surface) for e in home.feedback.events()] == [("edit", "terminal")] + [
            ("thumb", "terminal")
        ] * 2
        first, second = home.feedback.responses()
        assert first.prompt == second.prompt and first.status == second.status == "done"
        assert [v.event.thumb for v in home.feedback.votes(kinds=["thumb"])] == ["up"]


class Voter(threading.Thread):
    """Votes as the chat page does: keeps each vote and sends it again, under its key, until it is acknowledged."""

    def __init__(self, url, response_id, seed):
        super().__init__()
        self.url, self.response_id = url, response_id
        self.random = random.Random(seed)
        self.acknowledged = {}
        self.refused = []
        self.stop = threading.Event()

    def run(self):
        with httpx.Client(base_url=self.url, timeout=5) as http:
            while not self.stop.is_set():
                key = str(uuid.UUID(int=self.random.getrandbits(128)))
                self.send(http, key)

    def send(self, http, key):
        body = {"response_id": self.response_id, "kind": "comment", "value": {"text": key}}
        while True:
            try:
                answer = http.post("/v1/feedback", json=body, headers={"Idempotency-Key": key})
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            if answer.status_code in (200, 201):
                self.acknowledged[key] = answer.json()["id"]
            else:
                self.refused.append(answer.text)
            return


def kill_rounds(root, rounds, seed):
    """A server killed again and again under voters; then every acknowledged vote must be there once, under its id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = Process(root, port=port)
    voters = []
    try:
        server.wait_ready()
        answer = httpx.post(f"{url}/v1/chat/completions", json=ask("spark"), timeout=60).json()
        voters = [Voter(url, answer["id"], seed + i) for i in range(4)]
        for voter in voters:
            voter.start()
        dice = random.Random(seed)
        for _ in range(rounds):
            # After some acknowledgements, and a moment: anywhere within the handling of the next votes.
            wanted = sum(len(voter.acknowledged) for voter in voters) + dice.randint(1, 12)
            while sum(len(voter.acknowledged) for voter in voters) < wanted:
                time.sleep(0.001)
            time.sleep(dice.uniform(0.0, 0.02))
            server.end(signal.SIGKILL)
            server = Process(root, port=port)
        for voter in voters:
            voter.stop.set()
        for voter in voters:
            voter.join(60)
            assert not voter.is_alive()
        assert server.end() == 0, server.log.read_text()
    finally:
        for voter in voters:
            voter.stop.set()
        server.end(signal.SIGKILL)
    assert not [text for voter in voters for text in voter.refused]
    acknowledged = {key: id for voter in voters for key, id in voter.acknowledged.items()}
    with Home(root) as home:
        kept = [(event.text, event.id) for event in home.feedback.events()]
    assert len(kept) == len({text for text, _ in kept}), "a vote was doubled"
    assert acknowledged.items() <= dict(kept).items(), "an acknowledged vote is missing"
    return len(acknowledged)


def test_kill_9_loses_no_acknowledged_vote(root):
    assert kill_rounds(root, 3, seed=1) >= 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_9_two_hundred_times(root):
    assert kill_rounds(root, 200, seed=2) >= 600
