"""Programs that people use with OpenAI's API, against a real server: langchain, lm-eval, schemathesis."""

import json
import os
import subprocess
import sys

import pytest
from tiny_server import running

from prairie.store.home import Home


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


@pytest.fixture(scope="module")
def stories():
    from pathlib import Path

    folder = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("the small real model is not in ../shared/data")
    return folder


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{more}
"""
LINES = ["Once upon a time, there was a little girl named Lily.", "One day, Tom saw a big red ball in the park. He was"]


@pytest.mark.slow
def test_lm_eval_gives_the_scores_of_its_own_backend(stories, tmp_path, monkeypatch):
    """Endings chosen by local-completions as by its transformers backend; a generation by local-chat-completions."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [
        {"q": "Once upon a time, there was a", "choices": [" little girl", " quantum"], "gold": 0, "text": LINES[0]},
        {"q": "One day, Tom saw a big red", "choices": [" equation of", " ball in"], "gold": 1, "text": LINES[1]},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "rows.jsonl"
    choice = 'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]'
    until = (
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: exact_match}]\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}'
    )
    for name, kind, more in (("endings", "multiple_choice", choice), ("goes_on", "generate_until", until)):  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file, kind=kind, more=more))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def scores(model, arguments, names, **more):
        found = evaluator.simple_evaluate(
            model=model, model_args=arguments, tasks=names, task_manager=tasks, bootstrap_iters=0, **more
        )  # fmt: skip
        said = {n: [s["resps"] for s in found["samples"][n]] for n in names}
        return found["results"], said

    theirs, _ = scores("hf", f"pretrained={stories},device=cpu,dtype=float32,add_bos_token=False", ["endings"])
    with Home(tmp_path / "home") as home, running(home, [str(stories)]) as server:
        url = f"base_url={server.url}/v1/completions,model={stories.name},tokenizer={stories},num_concurrent=1"
        ours, _ = scores("local-completions", f"{url},max_length=512", ["endings"])
        chat = f"base_url={server.url}/v1/chat/completions,model={stories.name},num_concurrent=1"
        _, chats = scores("local-chat-completions", chat, ["goes_on"], apply_chat_template=True)
    assert chats["goes_on"][0][0][0]
    assert ours["endings"]["acc,none"] == theirs["endings"]["acc,none"] == 1.0


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
