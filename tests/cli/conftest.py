import json

import pytest

from prairie.cli.main import main
from prairie.data.records import Message
from prairie.store.feedback import Response
from prairie.store.home import Home


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A home that commands find by themselves."""
    monkeypatch.setenv("PRAIRIE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def call(root, capsys):
    """Calls a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def ask(call):
    """Calls a command with --json that must end well, and reads its one object."""

    def ask(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return ask


@pytest.fixture
def filled(root):
    """spark@1 and @2 (the champion, which learned from a vote), an adapter spark:poet@1, votes of ann and bob."""
    with Home(root) as home:
        home.feedback.start_response(Response("r1", "spark", (Message("user", "你好"),), line="spark", user="ann"))
        home.feedback.finish_response("r1", [1], [-0.5], "hello", "stop")
        from prairie.store.feedback import FeedbackEvent

        event, _ = home.feedback.add(FeedbackEvent("r1", "thumb", {"thumb": "up", "reasons": ["好"]}, user="ann"))
        home.feedback.add(FeedbackEvent("r1", "comment", {"text": "fine"}, user="bob"))

        def make(kind, name, inputs=(), events=()):
            with home.artifacts.create(kind, name, {"name": name}, list(inputs), "", events=events) as folder:
                (folder / "config.json").write_text("{}")
                if kind != "dataset":
                    (folder / "prairie.json").write_text("{}")
                (folder / "sub").mkdir()
                (folder / "sub" / "model.safetensors").write_text(name)
            return home.artifacts.id_of(kind, {"name": name}, list(inputs), "")

        base = make("model", "base")
        votes = make("dataset", "votes", events=[event])
        tuned = make("model", "tuned", [base, votes])
        poet = make("adapter", "poet", [base])
        home.registry.register("spark", base, kind="model", figures={"accuracy": 0.5})
        home.registry.register("spark", tuned, kind="model", figures={"accuracy": 0.75})
        home.registry.promote("spark@1")
        home.registry.promote("spark@2", verdict={"better": True})
        home.registry.register("spark:poet", poet, kind="adapter", base=base)
        return {"base": base, "tuned": tuned, "votes": votes, "poet": poet, "event": event}
