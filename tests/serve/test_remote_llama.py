"""`--remote` before a real server of llama.cpp, with the GGUF file of our exporter: our answers, votes and lineage."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from tiny_server import Home, Settings, running

from prairie.engine.remote import Remote

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
OPENING = [{"role": "user", "content": "Once upon a time, there was a"}]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The small real model, with a chat template of plain lines."""
    source = CHECKOUT.parent / "shared" / "data" / "models" / "stories260K-hf"
    if not source.is_dir():
        pytest.skip("the small real model is not in ../shared/data")
    folder = tmp_path_factory.mktemp("model") / "stories"
    folder.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(stories, tmp_path_factory):
    """The address of llama_cpp.server over the exported file."""
    python = Path(os.environ.get("PRAIRIE_LLAMA_PYTHON") or CHECKOUT / ".peers" / "llama" / "bin" / "python")
    if not python.exists():
        pytest.skip("no llama-cpp-python: `make peers` builds it, or PRAIRIE_LLAMA_PYTHON names a Python that has it")
    root = tmp_path_factory.mktemp("gguf")
    export = [sys.executable, "-m", "prairie", "export", str(stories), str(root / "out"), "--to", "gguf"]
    (root / "home").mkdir()
    subprocess.run([*export, "--dtype", "f32", "--home", str(root / "home")], check=True, capture_output=True)
    (file,) = (root / "out").glob("*.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "llama_cpp.server", "--model", str(file), "--port", str(port), "--n_ctx", "512"]
    command += ["--n_threads", "1", "--n_threads_batch", "1", "--interrupt_requests", "false"]
    with (root / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < until, (root / "log").read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def front(stories, llama, tmp_path_factory):
    """Our server with the same model of its own, and llama.cpp's as `far`."""
    settings = Settings(remotes=[Remote.parse(f"far={llama}#stories")])
    with (
        Home(tmp_path_factory.mktemp("front") / "home") as home,
        running(home, [str(stories)], settings) as front,
    ):
        yield front


def test_chats_streams_votes_and_lineage(front, llama):
    request = {"messages": OPENING, "max_tokens": 14, "temperature": 0}
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        near = client.chat.completions.create(model="stories", **request)
        far = client.chat.completions.create(model="far", **request)
        text = far.choices[0].message.content
        assert text.strip() == near.choices[0].message.content.strip(), "the file holds the same model"
        assert far.model == "far" and far.usage.completion_tokens == 14
        chunks = list(client.chat.completions.create(model="far", stream=True, **request))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[0].id != far.id and chunks[-1].choices[0].finish_reason == "length"
        said = client.completions.create(model="far", prompt=OPENING[0]["content"], max_tokens=14, temperature=0)
        assert said.choices[0].text.strip() == text.strip()
        vote = {"response_id": far.choices[0].response_id, "kind": "thumb", "value": "up", "user": "ada"}
        assert httpx.post(f"{front.url}/v1/feedback", json=vote).status_code == 201
    told = httpx.get(f"{front.url}/v1/feedback/{far.choices[0].response_id}").json()
    assert [event["kind"] for event in told["current"]] == ["thumb"] and told["line"] == "far"
    for id, wanted in ((far.id, text), (chunks[0].id, text), (said.id, said.choices[0].text)):
        row = front.home.feedback.get_response(id)
        assert (row.status, row.text, row.finish_reason) == ("done", wanted, "length")
        assert row.sampling["remote"] == {"url": llama, "model": "stories"} and row.sampling["max_tokens"] == 14
        assert row.line == "far" and row.weights_hash is None, "whose weights they are is not known here"


def test_who_leaves_is_recorded_and_the_next_is_answered(front):
    left = {"model": "far", "messages": OPENING, "max_tokens": 400, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=left, timeout=60) as answer:
        id = json.loads(next(answer.iter_lines()).removeprefix("data: "))["id"]
    front.idle()
    assert front.home.feedback.get_response(id).status in ("aborted", "done")
    whole = {"model": "far", "messages": OPENING, "max_tokens": 4}
    assert httpx.post(f"{front.url}/v1/chat/completions", json=whole, timeout=120).status_code == 200


def test_its_refusals_are_passed_on(front):
    body = {"model": "far", "messages": [{"role": "user", "content": "horse " * 2000}], "max_tokens": 4}
    answer = httpx.post(f"{front.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code in (400, 502) and answer.json()["error"]["message"]
    assert httpx.get(f"{front.url}/healthz").status_code == 200
