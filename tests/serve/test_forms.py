"""Answers of a given form over HTTP: by OpenAI's and vLLM's fields, refused where it cannot be, and recorded."""

import json
import re

import jsonschema
import openai
import pydantic
import pytest
import tiny_server
from test_tools import MISTRAL, QUESTION, TOOLS, asked
from tiny_server import ask

from prairie.data.builtin_templates import BUILTIN
from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import CHATML_SPECIALS, Tokenizer
from prairie.engine.constraint import Constraint
from prairie.engine.language_model import LanguageModel
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import save_model
from prairie.store.home import Home

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
LONG = {"max_tokens": 120, "temperature": 1}


def wanted(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def must_call(name):
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": FORMAT},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=["openai", "guided", "guided text", "structured"],
)  # fmt: skip
def test_json_of_a_schema(http, extra):
    answer = http.post("/v1/chat/completions", json=ask("spark", n=4, seed=1, **LONG) | extra).json()
    finished = [c for c in answer["choices"] if c["finish_reason"] == "stop"]
    assert finished, answer
    for choice in finished:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_expressions_and_choices(http):
    for extra in ({"guided_regex": "[a-c]{3}"}, {"structured_outputs": {"regex": "[a-c]{3}"}}):
        text = http.post("/v1/chat/completions", json=ask("spark") | extra).json()["choices"][0]["message"]["content"]
        assert re.fullmatch("[a-c]{3}", text)
    for extra in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        body = ask("spark") | extra
        text = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert text in ("yes", "no")
        body = {"model": "spark", "prompt": "fox", "max_tokens": 9, **extra}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] in ("yes", "no")


def test_the_openai_client_parses(client):
    class Person(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        age: int = pydantic.Field(ge=0, le=99)
        here: bool

    said = client.chat.completions.parse(**ask("spark", response_format=Person, **LONG))
    assert isinstance(said.choices[0].message.parsed, Person)
    stream = client.chat.completions.create(**ask("spark", seed=3, response_format=FORMAT, **LONG), stream=True)
    chunks = [c.choices[0] for c in stream]
    text = "".join(c.delta.content or "" for c in chunks)
    if chunks[-1].finish_reason == "stop":
        jsonschema.validate(json.loads(text), SCHEMA)
    whole = client.chat.completions.create(**ask("spark", seed=3, response_format=FORMAT, **LONG))
    assert whole.choices[0].message.content == text
    free = client.chat.completions.create(**ask("spark", response_format={"type": "json_object"}, **LONG))
    assert free.choices[0].message.content.startswith("{")


def test_such_an_answer_can_be_drawn_again(client, server):
    answer = client.chat.completions.create(**ask("spark", response_format=FORMAT, **LONG))
    row = server.home.feedback.get_response(answer.id)
    library = LanguageModel.load(server.home.artifacts.get(row.version_id).path)
    keys = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens")
    form = Constraint(**row.sampling["constraint"])
    again = library.generate(list(row.prompt), constraint=form, **{key: row.sampling[key] for key in keys})
    assert again.token_ids == list(row.token_ids)


@pytest.mark.parametrize(
    ("extra", "code", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "invalid_request", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_request", "response_format.json_schema"),
        (wanted(3), "invalid_request", "response_format.json_schema.schema"),
        (wanted({"not": {}}), "unsupported_constraint", None),
        ({"guided_json": "{"}, "invalid_request", "guided_json"),
        ({"guided_json": {"properties": {f"p{n}": {} for n in range(2000)}}}, "unsupported_constraint", "guided_json"),
        ({"guided_regex": "("}, "unsupported_constraint", None),
        ({"guided_choice": []}, "unsupported_constraint", "guided_choice"),
        ({"guided_choice": "yes"}, "invalid_value", "guided_choice"),
        ({"guided_grammar": "start: x"}, "unsupported_parameter", "guided_grammar"),
        ({"structured_outputs": {"grammar": "x"}}, "invalid_value", "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "invalid_request", "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "invalid_request", "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "invalid_request", "ignore_eos"),
        ({"tool_choice": "required"}, "invalid_request", "tool_choice"),
        ({"tools": list(TOOLS), "tool_choice": "always"}, "invalid_request", "tool_choice"),
        ({"tools": list(TOOLS), "tool_choice": must_call("sub")}, "invalid_request", "tool_choice"),
        ({"tools": list(TOOLS), "tool_choice": "required", "guided_regex": "a"}, "invalid_request", "tool_choice"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_are_refused(http, server, extra, code, param):
    before = len(list(server.home.feedback.responses()))
    answer = http.post("/v1/chat/completions", json=ask("spark") | extra)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    assert len(list(server.home.feedback.responses())) == before, "nothing of it is recorded"


def test_a_schema_that_takes_too_long_ends_the_request(http, server, monkeypatch):
    import threading

    held = threading.Event()
    monkeypatch.setattr("prairie.serve.choices.COMPILE_S", 0.05)
    monkeypatch.setattr("prairie.engine.constraint.Grammars._compile", lambda self, constraint: held.wait(10))
    try:
        answer = http.post("/v1/chat/completions", json=ask("spark", guided_regex="slow"))
    finally:
        held.set()
    assert answer.status_code == 400 and "takes too long" in answer.json()["error"]["message"]


# -- calls that must be made

BY = {"type": "object", "properties": {"by": {"enum": [1, 2]}}, "required": ["by"], "additionalProperties": False}
SUB = {"type": "function", "function": {"name": "sub", "parameters": BY}}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
NONE = {"type": "function", "function": {"name": "now", "parameters": EMPTY}}


def unlearnt(folder, source, special):
    """A model that has learnt nothing: its calls come from the form alone."""
    words = Tokenizer.train_bpe(tiny_server.TEXTS * 4, 330, special)
    config = ModelConfig(
        vocab_size=words.vocab_size, dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=32, max_context=1500,
        eos_id=words.eos_id,
    )  # fmt: skip
    template = ChatTemplate(source, words)
    save_model(Transformer(config).init_weights(0), folder, tokenizer_hash=words.hash, template_hash=template.hash)
    words.save(folder)
    template.save(folder)


@pytest.fixture(scope="module")
def adders(tmp_path_factory):
    """Two models whose templates write calls between marks, and after a special token with an id in each."""
    with Home(tmp_path_factory.mktemp("forms") / "home") as home:
        for line, source, special in (
            ("hermes", BUILTIN["chatml"], CHATML_SPECIALS),
            ("mistral", MISTRAL, (*CHATML_SPECIALS, "[TOOL_CALLS]")),
        ):
            with home.artifacts.create("model", line, {"line": line}) as folder:
                unlearnt(folder, source, special)
            id = home.artifacts.id_of("model", {"line": line}, [], "")
            home.registry.promote(home.registry.register(line, id, kind="model"))
        with (
            tiny_server.running(home) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client


@pytest.mark.parametrize("line", ["hermes", "mistral"])
def test_a_call_can_be_demanded(adders, line):
    tools = [SUB, NONE]
    free = adders.chat.completions.create(**asked(QUESTION, tools=tools) | {"model": line})
    assert free.choices[0].message.tool_calls is None
    for choice, names in (("required", {"sub", "now"}), (must_call("sub"), {"sub"})):
        request = asked(QUESTION, tools=tools, tool_choice=choice, max_tokens=500) | {"model": line}
        whole = adders.chat.completions.create(**request).choices[0]
        call = whole.message.tool_calls[0]
        assert whole.finish_reason == "tool_calls" and call.function.name in names and not whole.message.content
        if call.function.name == "sub":
            assert json.loads(call.function.arguments) in ({"by": 1}, {"by": 2})
        chunks = [c.choices[0] for c in adders.chat.completions.create(**request, stream=True)]
        calls = [call for c in chunks for call in c.delta.tool_calls or ()]
        assert [(c.function.name, c.function.arguments) for c in calls] == [
            (call.function.name, call.function.arguments)
        ]
        assert not any(c.delta.content for c in chunks) and chunks[-1].finish_reason == "tool_calls"
