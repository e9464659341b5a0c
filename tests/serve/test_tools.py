"""Tools over HTTP, with a small model that has learnt two calls and two answers by heart."""

import json

import httpx
import openai
import pytest
import tiny_server
import torch

from prairie.data.builtin_templates import BUILTIN
from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import Loader, TokenDataset
from prairie.data.records import Chat, Message, ToolCall, tools_from_json
from prairie.data.tokenizer import CHATML_SPECIALS, Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import save_model
from prairie.store.home import Home
from prairie.train.objectives.causal_lm import CausalLM

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = tools_from_json([{"name": "add", "parameters": PARAMETERS}])
CALLS = (ToolCall("add", '{"a": 1, "b": [2, "草"]}', "abc123def"), ToolCall("add", '{"a": 2}', "abc123dee"))
ASKED = Message("user", "1 + 2?")
RESULTS = tuple(Message("tool", "3", name="add", tool_call_id=call.id) for call in CALLS)
CHATS = [
    Chat((ASKED, Message("assistant", "I add.", CALLS), *RESULTS, Message("assistant", "It is 3 草原.")), tools=TOOLS),
    Chat((ASKED, Message("assistant", "Three."))),
    Chat((Message("user", "hi"), Message("assistant", "Use <tool_ and {.")), tools=TOOLS),
]

MISTRAL = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def learnt_by_heart(folder, chats=CHATS, source=BUILTIN["chatml"], special=CHATML_SPECIALS):
    """A model folder whose greedy answers are those of `chats`."""
    first = ChatTemplate(source, tiny_server.tokenizer())
    words = Tokenizer.train_bpe([first.render(c.messages, c.tools) for c in chats] * 8, 700, special)
    template = ChatTemplate(source, words)
    rows = TokenDataset.from_chats(chats, template, 400)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=words.vocab_size, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, max_context=400,
        eos_id=words.eos_id,
    )  # fmt: skip
    model, objective = Transformer(config).init_weights(0), CausalLM()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    loader = Loader(rows, tokens_per_batch=4000, seed=0)
    for _ in range(300):
        batch = loader.next_step()[0]
        loss = objective.loss(model, batch)[0] / objective.count(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    save_model(model, folder, tokenizer_hash=words.hash, template_hash=template.hash)
    words.save(folder)
    template.save(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Home(tmp_path_factory.mktemp("tools") / "home") as home:
        with home.artifacts.create("model", "tools", {}) as folder:
            learnt_by_heart(folder)
        version = home.registry.register("adder", home.artifacts.list()[0].id, kind="model")
        home.registry.promote(version)
        with tiny_server.running(home) as server:
            yield server


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(*messages, **more):
    return {"model": "adder", "messages": list(messages), "temperature": 0, "max_tokens": 150} | more


QUESTION = {"role": "user", "content": "1 + 2?"}


def test_a_call_its_result_and_the_answer(client, served):
    """OpenAI's loop: the model calls, the client sends the results, the model answers."""
    first = client.chat.completions.create(**asked(QUESTION, tools=list(TOOLS)))
    choice = first.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I add.")
    calls = choice.message.tool_calls
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", call.name, json.loads(call.arguments)) for call in CALLS
    ]
    results = [{"role": "tool", "tool_call_id": call.id, "name": "add", "content": "3"} for call in calls]
    said = choice.message.model_dump(exclude_none=True)
    second = client.chat.completions.create(**asked(QUESTION, said, *results, tools=list(TOOLS)))
    assert second.choices[0].message.content == "It is 3 草原." and second.choices[0].message.tool_calls is None
    assert second.choices[0].finish_reason == "stop"
    row = served.home.feedback.get_response(second.id)
    assert row.sampling["tools"] == [dict(tool) for tool in TOOLS]
    assert [m.role for m in row.prompt] == ["user", "assistant", "tool", "tool"] and len(row.prompt[1].tool_calls) == 2


@pytest.mark.parametrize("question", ["1 + 2?", "hi"])
def test_a_stream_says_the_same(client, question):
    request = asked({"role": "user", "content": question}, tools=list(TOOLS))
    whole = client.chat.completions.create(**request).choices[0]
    chunks = [c.choices[0] for c in client.chat.completions.create(**request, stream=True)]
    assert "".join(c.delta.content or "" for c in chunks) == (whole.message.content or "")
    calls = [call for c in chunks for call in c.delta.tool_calls or ()]
    wanted = whole.message.tool_calls or []
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (n, c.function.name, c.function.arguments) for n, c in enumerate(wanted)
    ]
    assert all(call.id for call in calls)
    assert [c.finish_reason for c in chunks if c.finish_reason] == [whole.finish_reason]
    if question == "hi":
        assert (whole.message.content, whole.finish_reason) == ("Use <tool_ and {.", "stop")
        assert sum(bool(c.delta.content) for c in chunks) > 2, "content is sent as it comes"


def test_tools_are_shown_only_when_they_may_be_called(client, served):
    none = client.chat.completions.create(**asked(QUESTION, tools=list(TOOLS), tool_choice="none"))
    bare = client.chat.completions.create(**asked(QUESTION))
    assert none.choices[0].message.content == bare.choices[0].message.content == "Three."
    assert none.usage.prompt_tokens == bare.usage.prompt_tokens


def test_only_the_first_call_if_one_is_wanted(client):
    request = asked(QUESTION, tools=list(TOOLS), parallel_tool_calls=False)
    whole = client.chat.completions.create(**request).choices[0]
    assert [c.function.name for c in whole.message.tool_calls] == ["add"] and whole.finish_reason == "tool_calls"
    chunks = [c.choices[0] for c in client.chat.completions.create(**request, stream=True)]
    assert len([call for c in chunks for call in c.delta.tool_calls or ()]) == 1


def test_the_library_answers_alike_and_the_answer_can_be_drawn_again(client, served):
    answer = client.chat.completions.create(**asked(QUESTION, tools=list(TOOLS)))
    row = served.home.feedback.get_response(answer.id)
    library = LanguageModel.load(served.home.artifacts.get(row.version_id).path)
    again = library.generate(list(row.prompt), tools=row.sampling["tools"], temperature=0, max_tokens=150)
    assert again.token_ids == list(row.token_ids)


def test_a_call_that_a_special_token_opens(tmp_path):
    """Such a token gives no text, and nothing of the call is sent as text."""
    said = Chat((ASKED, Message("assistant", "", CALLS[:1])), tools=TOOLS)
    with Home(tmp_path / "home") as home:
        with home.artifacts.create("model", "mistral", {}) as folder:
            learnt_by_heart(folder, [said], MISTRAL, (*CHATML_SPECIALS, "[TOOL_CALLS]"))
        home.registry.promote(home.registry.register("adder", home.artifacts.list()[0].id, kind="model"))
        with (
            tiny_server.running(home) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            whole = client.chat.completions.create(**asked(QUESTION, tools=list(TOOLS))).choices[0]
            stream = client.chat.completions.create(**asked(QUESTION, tools=list(TOOLS)), stream=True)
            chunks = [c.choices[0].delta for c in stream]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    assert json.loads(whole.message.tool_calls[0].function.arguments) == json.loads(CALLS[0].arguments)
    assert not any(delta.content for delta in chunks)
    assert [c.function.name for delta in chunks for c in delta.tool_calls or ()] == ["add"]


def test_a_template_without_tools_refuses_them(served, tmp_path):
    with Home(tmp_path / "home") as home:
        with home.artifacts.create("model", "bare", {}) as folder:
            tiny_server.make_model(folder, 1)
            ChatTemplate.builtin("zephyr", tiny_server.tokenizer()).save(folder)
        home.registry.promote(home.registry.register("bare", home.artifacts.list()[0].id, kind="model"))
        with tiny_server.running(home) as server, httpx.Client(base_url=server.url, timeout=30) as http:
            body = asked(QUESTION, tools=list(TOOLS)) | {"model": "bare"}
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400 and "cannot show tools" in answer.json()["error"]["message"]
