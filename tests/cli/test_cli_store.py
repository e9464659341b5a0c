"""`prairie models`, `prairie feedback`, `prairie keys`: what they print, and what they do to the home."""

import json

from prairie.store.home import Home


def test_nothing_yet(call, ask):
    assert ask("models", "list") == {"lines": [], "waiting": {}, "generation": 0}
    assert "prairie demo" in call("models", "list")[1]
    assert ask("feedback", "list") == {"total": 0, "events": []}
    assert call("feedback", "list")[1] == "No feedback yet.\n"
    assert ask("feedback", "stats")["events"] == 0
    assert call("models", "show", "spark") == (
        1,
        "",
        "error: no such model: got `spark`, wanted none is registered yet.\n",
    )


def test_models_list(call, ask, filled):
    spark, poet = ask("models", "list")["lines"]
    assert (spark["line"], spark["champion"], [v["name"] for v in spark["versions"]]) == (
        "spark",
        2,
        ["spark@1", "spark@2"],
    )
    assert (poet["champion"], poet["versions"][0]["base_artifact_id"]) == (None, filled["base"])
    lines = call("models", "list")[1].splitlines()
    assert len(lines) == 4
    assert "champion" in lines[2] and "accuracy 0.75" in lines[2] and filled["tuned"] in lines[2]


def test_models_show(call, ask, filled):
    facts = ask("models", "show", "spark")
    assert (facts["name"], facts["champion"], facts["artifact"]["kind"]) == ("spark@2", True, "model")
    assert [event["action"] for event in facts["history"]] == ["promote", "promote"]
    text = call("models", "show", "spark@1")[1]
    assert text.startswith("spark@1\n") and filled["base"] in text and "promote 1 -> 2" in text


def test_models_lineage(call, ask, filled):
    tree = ask("models", "lineage", "spark")
    assert tree["artifact"]["inputs"][1]["events"] == [filled["event"]]
    text = call("models", "lineage", "spark")[1]
    assert text.splitlines()[:4] == [
        "spark@2",
        f"└─ model tuned  {filled['tuned']}",
        f"   ├─ model base  {filled['base']}",
        f"   └─ dataset votes  {filled['votes']}  from 1 feedback events",
    ]
    assert "machine " in text and "promote 1 -> 2" in text
    assert "base: model base" in call("models", "lineage", "spark:poet@1")[1]


def test_models_are_tried_out_beside_the_champion(call, ask, filled):
    tried = ask("models", "promote", "spark@1", "--canary", "10%", "--why", "to see")
    assert (tried["trial"]["version"], tried["trial"]["kind"], tried["trial"]["share"]) == ("spark@1", "canary", 0.1)
    assert "canary 0.1" in call("models", "list")[1] and ask("models", "list")["lines"][0]["champion"] == 2
    assert ask("models", "promote", "spark@1", "--shadow")["trial"]["kind"] == "shadow"
    ended = ask("models", "rollback", "spark")
    assert (ended["champion"], ended["ended"]["version"]) == ("spark@2", "spark@1")
    history = [event["action"] for event in ask("models", "history", "spark")["history"]]
    assert history == ["promote", "promote", "canary", "end", "shadow", "end"]
    assert "to see" in call("models", "history", "spark")[1]
    assert call("models", "promote", "spark@1", "--shadow", "--canary", "10%")[0] == 2
    assert call("models", "promote", "spark@1", "--canary", "many") == (
        2, "", "error: a share is not a number: got 'many', wanted 10% or 0.1.\n",
    )  # fmt: skip
    assert "share of the users is impossible" in call("models", "promote", "spark@1", "--canary", "100%")[2]


def test_models_promote_and_rollback(call, ask, filled, root):
    before = ask("models", "list")["generation"]
    assert ask("models", "rollback", "spark", "--why", "it lies")["champion"] == "spark@1"
    assert call("models", "rollback", "spark") == (
        1,
        "",
        "error: line spark has no champion before spark@1; "
        "choose a version with `prairie models promote spark@NUMBER`.\n",
    )
    assert ask("models", "promote", "spark@2")["generation"] > before
    assert call("models", "promote", "spark:poet@1")[1] == "spark:poet@1 is the champion of spark:poet.\n"
    with Home(root) as home:
        events = home.registry.history("spark")
    assert [(e.action, e.number, e.why) for e in events[2:]] == [("rollback", 1, "it lies"), ("promote", 2, None)]
    assert all(e.who for e in events[2:])


def test_models_export(call, ask, filled, tmp_path, root):
    facts = ask("models", "export", "spark@2", tmp_path / "deep" / "out")
    assert facts["exported"] == "spark@2"
    files = sorted(p.relative_to(tmp_path / "deep" / "out").as_posix() for p in (tmp_path / "deep" / "out").rglob("*"))
    assert files == ["README.md", "config.json", "prairie.json", "sub", "sub/model.safetensors"]
    weights = tmp_path / "deep" / "out" / "sub" / "model.safetensors"
    assert weights.read_text() == "tuned"
    weights.write_text("mine now")  # a copy is writable, the artifact is not touched
    code, _, err = call("models", "export", "spark@2", tmp_path / "deep" / "out")
    assert code == 1 and "holds something already" in err
    (tmp_path / "empty").mkdir()
    code, _, err = call("models", "export", "spark:poet@1", tmp_path / "empty")
    assert code == 0 and filled["base"] in err
    damaged = root / "artifacts" / filled["base"] / "sub" / "model.safetensors"
    damaged.chmod(0o644)
    damaged.write_text("BASE")
    code, _, err = call("models", "export", "spark@1", tmp_path / "never")
    assert code == 1 and "is damaged" in err
    assert not (tmp_path / "never").exists() and not list(tmp_path.glob("*.part"))


def test_models_export_and_import_again(ask, call, tmp_path, root):
    """Out and in: the same weights, under the name that was asked for."""
    from prairie.data.chat_template import ChatTemplate
    from prairie.data.tokenizer import Tokenizer
    from prairie.models.config import ModelConfig
    from prairie.models.transformer import Transformer
    from prairie.models.weights import save_model

    folder = tmp_path / "open model"
    folder.mkdir()
    tokenizer = Tokenizer.train_bpe(["a small text of few words"] * 3, 300)
    tokenizer.save(folder)
    ChatTemplate.builtin("chatml", tokenizer).save(folder)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn_dim=48, max_context=64
    )
    save_model(Transformer(config).init_weights(0), folder)
    facts = ask("models", "import", folder, "smol")
    assert facts["imported"] == "smol@1" and facts["vocab_size"] == tokenizer.vocab_size
    assert ask("models", "import", folder, "smol")["imported"] == "smol@1"
    ask("models", "export", "smol", tmp_path / "out")
    again = ask("models", "import", tmp_path / "out", "other")
    assert again["version"]["weights_hash"] == facts["version"]["weights_hash"]
    code, _, err = call("models", "import", tmp_path / "nowhere", "smol")
    assert code == 1 and "no such model folder" in err


def test_feedback_list_and_stats(call, ask, filled):
    events = ask("feedback", "list")["events"]
    assert [(e["kind"], e["user"]) for e in events] == [("thumb", "ann"), ("comment", "bob")]
    assert [e["user"] for e in ask("feedback", "list", "--user", "bob")["events"]] == ["bob"]
    assert [e["kind"] for e in ask("feedback", "list", "--kind", "thumb")["events"]] == ["thumb"]
    assert ask("feedback", "list", "--purpose", "gate")["total"] == 0
    assert ask("feedback", "list", "--limit", "1") == {"total": 2, "events": events[1:]}
    text = call("feedback", "list", "--limit", "1")[1]
    assert "fine" in text and "(1 older ones" in text
    assert "up (好)" in call("feedback", "list")[1]
    code, _, err = call("feedback", "list", "--kind", "like")
    assert code == 2 and "no such kind of feedback" in err
    assert ask("feedback", "stats")["thumbs"] == {"up": 1}
    assert "thumbs     up 1" in call("feedback", "stats")[1]


def test_feedback_export(call, ask, filled, tmp_path):
    rows = [json.loads(line) for line in call("feedback", "export")[1].splitlines()]
    assert [row["event"]["kind"] for row in rows] == ["thumb", "comment"]
    assert rows[0]["response"]["prompt"] == [{"role": "user", "content": "你好"}]
    assert ask("feedback", "export")["events"] == rows
    assert ask("feedback", "export", tmp_path / "a" / "votes.jsonl") == {
        "file": str(tmp_path / "a" / "votes.jsonl"),
        "events": 2,
    }
    assert [json.loads(line) for line in (tmp_path / "a" / "votes.jsonl").read_text().splitlines()] == rows
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["votes.jsonl"]


def test_feedback_forget(call, ask, filled, monkeypatch):
    code, _, err = call("feedback", "forget", "ann")
    assert code == 2 and "--yes" in err
    assert ask("feedback", "list")["total"] == 2
    code, out, _ = call("feedback", "forget", "ann", "--yes")
    assert code == 0
    assert f"dataset votes ({filled['votes']}) holds 1 of those events" in out
    assert f"model tuned ({filled['tuned']}; spark@2) has learned from them" in out
    assert "still served: spark@2" in out
    assert ask("feedback", "list")["total"] == 1
    assert ask("feedback", "forget", "ann", "--yes")["events"] == 0


def test_keys(call, ask, root):
    assert "the server is open" in call("keys", "list")[1]
    code, out, err = call("keys", "create", "phone")
    assert code == 0 and out.startswith("prairie-") and out.count("\n") == 1 and "shown once" in err
    with Home(root) as home:
        assert home.keys.check(out.strip()) == "phone"
    assert out.strip() not in call("keys", "list")[1]
    second = ask("keys", "create", "laptop")["key"]
    assert [key["name"] for key in ask("keys", "list")["keys"]] == ["phone", "laptop"]
    assert ask("keys", "revoke", "phone") == {"revoked": "phone", "valid_keys": 1}
    code, _, err = call("keys", "revoke", "laptop")
    assert code == 0 and "No valid key is left" in err
    assert second not in str(ask("keys", "list"))
    code, _, err = call("keys", "revoke", "phone")
    assert code == 1 and "no valid key is called `phone`" in err


def test_feedback_import_and_curate(call, ask, root, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}], "label": n % 2 == 0,
         "user": "user-2"}
        for n in range(4)
    ]  # fmt: skip
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"what": 1}]))
    found = ask("feedback", "import", log, "--line", "spark")
    assert (found["responses"], found["events"], found["refused"][0]["row"]) == (4, 4, 5)
    assert "0 pieces of feedback are new" in call("feedback", "import", log, "--line", "spark")[1]
    assert ask("feedback", "stats")["thumbs"] == {"up": 2, "down": 2}
    made = ask("feedback", "curate", "spark", "--share", "0")
    assert (made["events"], made["train"]["labelled"], made["held_out"]["labelled"]) == (4, 4, 0)
    assert "4 labelled" in call("feedback", "curate", "spark", "--share", "0")[1]
    code, _, err = call("feedback", "curate", "spark", "--split", "moon")
    assert code == 2 and "user or time" in err
    code, _, err = call("feedback", "import", tmp_path / "none.jsonl", "--line", "spark")
    assert code == 1 and "there is no file" in err
