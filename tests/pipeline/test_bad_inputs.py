"""What is wrong with an input is one sentence and exit code 1: no traceback, nothing half-written."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from tiny_recipes import (
    chat_rows,
    data_stages,
    learning,
    model_folder,
    quiet_runtime,
    run_here,
    training_recipe,
    write_jsonl,
    write_recipe,
)  # fmt: skip

import prairie
from prairie.cli.main import main
from prairie.errors import AdapterError
from prairie.store.home import Home

pytestmark = pytest.mark.long


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs a recipe that must be refused, and returns the sentence."""
    monkeypatch.setenv("PRAIRIE_HOME", str(tmp_path / "unused"))
    home = tmp_path / "home"

    def refused(tree, *overrides, command="run", made=()):
        recipe = tree if isinstance(tree, str) else write_recipe(tmp_path / "recipe.yaml", tree)
        end_options = ["--threads", "1"] + (["--no-serve"] if command == "run" else [])
        with pytest.raises(SystemExit) as end:
            main([command, str(recipe), *overrides, "--home", str(home), *end_options, "--json"])
        out, err = capsys.readouterr()
        assert end.value.code == 1 and out == ""
        said = err.strip().splitlines()[-1]
        assert said.startswith("error: ") and said.endswith((".", "?")), err
        assert "Traceback" not in err and "unexpected" not in said, err
        if home.exists():
            assert list((home / "tmp").iterdir()) == [], "something half-written is left"
            with Home(home) as opened:
                found = opened.artifacts.list()
                assert made is None or {artifact.name for artifact in found} == set(made)
                for artifact in found:
                    opened.artifacts.verify(artifact.id)
        return said

    return refused


def tree_of(**stages):
    return {"name": "t", "params": {"data": None, "port": 0}, "stages": stages}


def rows(path, **more):
    return {"kind": "prepare", "source": "file", "path": str(path), **more}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sft": {"learning_rate": 1}}, "unknown key `sft.learning_rate`"),
        ({"sft": {"start": "bass"}}, "unknown stage: got `bass`"),
        ({"sft": {"kind": "tarin"}}, "did you mean `train`?"),
        ({"sft": {"steps": "many"}}, "`sft.steps`: Input should be a valid integer"),
        ({"chats": {"path": "${data}"}}, "needs a value for `data`; add data=VALUE"),
        ({"sft": {"data": "tokenizer"}}, "needs a stage that gives rows: got `tokenizer`, a `tokenizer`"),
        ({"publish": {"kind": "publish", "line": "No Line", "model": "base"}}, "a line cannot have this name"),
        (
            {"publish": {"kind": "publish", "line": "t", "model": "chats"}},
            "needs a stage that gives a model: got `chats`",
        ),
        (
            {"sft": {"start": "chats"}},
            "needs a stage that gives a model: got `chats`, a `prepare`, wanted one of `base`",
        ),
    ],
)
def test_a_recipe_with_a_mistake(refused, tmp_path, change, words):
    tree = training_recipe(tmp_path, steps=1)
    del tree["stages"]["dpo"], tree["stages"]["adapter"]
    tree["params"] = {"data": None}
    for name, keys in change.items():
        tree["stages"][name] = {**tree["stages"].get(name, {}), **keys}
    made = {"chats", "pairs", "tokenizer", "base", "sft"} if words == "a line cannot have this name" else set()
    assert words in refused(tree, made=made)


def test_files_that_are_no_recipe(refused, tmp_path):
    assert "no such recipe: got nowhere" in refused("nowhere")
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [unclosed")
    assert "is not YAML" in refused(str(broken))
    assert "needs a value for" in refused("finetune")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, None, "no such data file: got "),
        ("a.jsonl", "", "empty"),
        ("a.jsonl", "\n\n", "empty"),
        ("a.jsonl", "not json\n", "no known shape"),
        ("a.json", '{"messages": [', "a.json"),
        ("a.parquet", "no parquet", "a.parquet"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n", "assistant"),
        ("a.jsonl", json.dumps({"unknown": 1}) + "\n", "a.jsonl"),
        ("a.xyz", "text", "a.xyz"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_data_that_cannot_be_used(refused, tmp_path, name, content, words, command):
    path = tmp_path / (name or "missing.jsonl")
    if name:
        path.write_text(content)
    assert words in refused(tree_of(rows=rows(path, want="chat", held_out=0)), command=command)


def test_bad_rows_are_refused_one_by_one_and_too_many_stop(refused, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*chat_rows(6), {"messages": [{"role": "user", "content": "hi"}]}])
    with Home(tmp_path / "fine") as home:
        made = run_here(tree_of(rows=rows(path, held_out=0)), home)["rows"]
        faults = [json.loads(line) for line in (made.product.path / "refused.jsonl").open()]
    assert (made.figures["rows"], made.figures["refused"]) == (6, 1)
    assert faults[0]["row"] == 7 and faults[0]["file"] == "a.jsonl" and "assistant" in faults[0]["reason"]
    said = refused(tree_of(rows=rows(path, held_out=0, max_refused=0.1)))
    assert "refuses too many rows: got 1 of 7, the first (row 7): " in said and "wanted at most 10%" in said


def test_rows_without_a_supervised_token(refused, tmp_path):
    """Cut before the answer begins, nothing is left to learn: that is no loss of 0.0."""
    long = [
        {"messages": [{"role": "user", "content": f"{n} " + "word " * 80}, {"role": "assistant", "content": "yes"}]}
        for n in range(8)
    ]
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    tree["stages"]["long"] = rows(write_jsonl(tmp_path / "long.jsonl", long), held_out=0)
    tree["stages"]["sft"] = learning(
        2, data="long", tokenizer="tokenizer", shape={"depth": 1, "dim": 16}, on_long="truncate"
    )
    made = {"chats", "pairs", "tokenizer", "long"}
    said = refused(tree, made=made)
    assert "8" in said and "supervised" in said, said
    assert "more than the 96 allowed" in refused(tree, "sft.on_long=refuse", made=made)


def test_models_that_cannot_be_imported(refused, tmp_path):
    def imported(path):
        return refused(tree_of(base={"kind": "import", "path": str(path)}))

    assert "no such model folder" in imported(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in imported(tmp_path / "empty")
    assert "the tokenizer does not fit the model" in imported(model_folder(tmp_path / "small", embeddings=100))
    assert "vocabulary is far larger than the tokenizer's" in imported(model_folder(tmp_path / "big", embeddings=9000))
    cut = model_folder(tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors" in imported(cut)
    strange = model_folder(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "architectures": ["Mamba"], "model_type": "mamba"}))
    assert "mamba" in imported(strange).lower()


def test_an_adapter_of_another_base_is_refused(tmp_path):
    with Home(tmp_path / "home") as home:
        made = run_here(training_recipe(tmp_path, steps=1), home)
        adapter = shutil.copytree(made["adapter"].product.path, tmp_path / "adapter")
        runtime = quiet_runtime()
        base = shutil.copytree(made["dpo"].product.path, tmp_path / made["dpo"].identity)
        prairie.load(adapter, runtime=runtime)
        shutil.rmtree(base)
        with pytest.raises(AdapterError, match="its base is not beside it"):
            prairie.load(adapter, runtime=runtime)
        shutil.copytree(made["sft"].product.path, base)
        with pytest.raises(AdapterError, match="base"):
            prairie.load(adapter, runtime=runtime)


def test_a_model_that_nobody_knows(tmp_path, capsys, monkeypatch):
    Home(tmp_path).close()
    monkeypatch.setenv("PRAIRIE_HOME", str(tmp_path))
    for arguments in (["evaluate", "nobody"], ["gate", "nobody@1", "nobody@2"], ["turn", "nobody"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("error: no such model: got `nobody`"), err


def test_a_port_that_is_taken(refused, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(tree_of(server={"kind": "serve", "port": port}))
    assert f"port {port} on 127.0.0.1 cannot be taken" in said and "port" in said.split(";")[-1]


def test_a_second_run_of_a_home(refused, tmp_path):
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    holder = "import sys, time; from prairie.store.home import Home\n"
    holder += "with Home(sys.argv[1]).lock('run'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "home")], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            said = refused(tree)
            assert f"is in use by process {other.pid}; wait until it is done, or stop that process." in said
        finally:
            other.kill()


def fail_when_writing(monkeypatch, match):
    """From now on there is no room for files whose path matches."""
    plain = os.fsync

    def fsync(descriptor):
        if re.search(match, os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("where", [r"/work/", r"/tmp/[0-9a-f]{16}\.", r"/artifacts$"])
def test_a_disk_that_is_full(refused, tmp_path, monkeypatch, where):
    tree = training_recipe(tmp_path, steps=2)
    made = {"chats", "pairs", "tokenizer"} if where == "/work/" else set()
    with monkeypatch.context() as patch:
        fail_when_writing(patch, where)
        if where == "/artifacts$":  # renamed already: it stands, and the next run finds it
            made = {"chats"}
        said = refused(tree, made=made)
    assert re.search("the disk is full; free some space|No space left on device.*; make room", said), said
    with Home(tmp_path / "home") as home:
        assert len(run_here(tree, home)) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("kilobytes", [60, 700, 1300, 2200])
def test_a_small_disk(refused, tmp_path, kilobytes):
    """Full at other moments: in the database, in data, in weights, in a checkpoint."""
    home = tmp_path / "home"
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", home], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed: {mounted.stderr.decode().strip()}")
    try:
        tree = training_recipe(tmp_path, steps=2)
        tree["stages"]["base"]["shape"] = {"depth": 2, "dim": 64, "context": 128}
        said = refused(tree, made=None)
        assert re.search("disk is full|No space left on device", said), said
        subprocess.run(["mount", "-o", "remount,size=64m", home], check=True)
        with Home(home) as opened:
            assert len(run_here(tree, opened)) == 7
            for artifact in opened.artifacts.list():
                opened.artifacts.verify(artifact.id)
    finally:
        subprocess.run(["umount", "-l", home], check=True)
