"""Programs that people use with OpenAI's API, against a real server: langchain, llm, schemathesis."""

import json
import os
import subprocess
import sys

import httpx
import pytest
from tiny_server import ask, running


def test_langchain(server):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="spark", temperature=0, max_tokens=12, max_retries=0
    )
    whole = chat.invoke("草原 fox")
    assert whole.content and whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in chat.stream("草原 fox")) == whole.content
    schema = {
        "title": "Pick", "description": "x", "type": "object", "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"], "additionalProperties": False,
    }  # fmt: skip
    structured = chat.model_copy(update={"max_tokens": 100}).with_structured_output(schema, method="json_schema")
    assert structured.invoke("fox?")["yes"] in (True, False)


def test_llm(server, tmp_path):
    """The command `llm`, told of the server by a file with its base URL: whole, and as a stream."""
    pytest.importorskip("llm")
    told = {"model_id": "prairie", "model_name": "spark", "api_base": f"{server.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([told]))
    command = [sys.executable, "-m", "llm", "-m", "prairie", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    said = [
        subprocess.run([*command, *more, "草原 fox"], capture_output=True, text=True, env=environment)
        for more in ([], ["--no-stream"])
    ]
    assert all(run.returncode == 0 for run in said), said[0].stderr
    ours = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30).json()
    assert {run.stdout.strip() for run in said} == {ours["choices"][0]["message"]["content"].strip()}


def schemathesis(url, examples, *more):
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "not_a_server_error",
        "--max-examples", str(examples), "--phases", "fuzzing", "--request-timeout", "20", "--seed", "1", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})


@pytest.mark.slow
def test_schemathesis_finds_no_fault_of_ours(home):
    """A bounded run over every route of /openapi.json: whatever comes in, no answer of 500 or above."""
    pytest.importorskip("schemathesis")
    with running(home, ["spark"]) as server:
        found = schemathesis(server.url, 150)
        assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
        server.idle()
        assert server.kv_blocks_held() == 0
