"""Calls are read back as the template writes them, whole and while they come; what is no call stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_real_templates import TOOLS, WORDS, says, template, user

from prairie.data.chat_template import ChatTemplate
from prairie.data.records import Message, ToolCall
from prairie.data.tool_calls import CallFormat, Said

MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == asked[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def named(name: str) -> ChatTemplate:
    if name == "chatml":
        return ChatTemplate.builtin("chatml", WORDS)
    return ChatTemplate(MISTRAL, WORDS) if name == "mistral" else template(name)


FORMATS = {
    "chatml": CallFormat("<tool_call>", "</tool_call>", "arguments"),
    "qwen2_5": CallFormat("<tool_call>", "</tool_call>", "arguments"),
    "qwen3": CallFormat("<tool_call>", "</tool_call>", "arguments"),
    "llama3_1": CallFormat("", "", "parameters"),
    "mistral": CallFormat("[TOOL_CALLS]", "", "arguments"),
}
values = st.one_of(st.text(max_size=8), st.integers(), st.none(), st.lists(st.integers(), max_size=2))
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
NO_CALLS = [
    '<tool_call>\n{"name": "add", "arguments": {}}',
    "<tool_call>\nnot json\n</tool_call>",
    '<tool_call>{"name": 1}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {}}</tool_call> and more',
    '{"name": "sub", "parameters": {}}',
    '{"name": "add", "parameters": [1]}',
    "[TOOL_CALLS] [1]",
    '{"a": 1}',
    "[]",
    "[" * 3000,
]
contents = st.sampled_from(["", "Let me see.", "你好 🙂", "a < b {", "I'll use <tool_ no"])


@pytest.mark.parametrize("name", FORMATS)
def test_the_template_shows_its_format(name: str) -> None:
    assert CallFormat.of(named(name)) == FORMATS[name]


@pytest.mark.parametrize("name", ["glm4moe", "gptoss", "gemma4_v5", "llama3"])
def test_what_is_no_json_is_not_guessed(name: str) -> None:
    assert CallFormat.of(named(name)) is None


@pytest.mark.parametrize("name", FORMATS)
@given(content=contents, values=st.lists(arguments, min_size=1, max_size=2), cut=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_what_the_template_writes_is_read_back(name: str, content: str, values: list[str], cut: int) -> None:
    ours, form = named(name), FORMATS[name]
    if name == "llama3_1":
        values, content = values[:1], ""
    if name == "mistral":
        content = ""
    made = tuple(ToolCall("add", value, "abcdefghi") for value in values)
    prompt = ours.render([user("q")], TOOLS, add_generation_prompt=True)
    text = ours.render([user("q"), says(content, *made)], TOOLS)[len(prompt) :].removeprefix("<think>\n\n</think>\n\n")
    for stop in ours.stop_texts:
        text = text.rstrip("\n").removesuffix(stop)
    said = form.read(text, ["add"])
    assert said.content == content.rstrip()
    assert [(c.name, json.loads(c.arguments)) for c in said.calls] == [("add", json.loads(v)) for v in values]
    assert len({call.id for call in said.calls}) == len(values)
    # While it comes, only the content is shown, and it is never taken back.
    shown = [form.shown(text[:end]) for end in range(0, len(text) + cut, cut)]
    assert shown == sorted(shown) and shown[-1] <= len(said.content)
    # The calls that were read can be shown to the model again.
    result = Message("tool", "1", name="add", tool_call_id=said.calls[0].id)
    if name != "mistral":
        assert "add" in ours.render([user("q"), says(said.content, *said.calls), result], TOOLS)


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.one_of(st.text(max_size=20), st.sampled_from(NO_CALLS)))
@settings(max_examples=40, deadline=None)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    assert FORMATS[name].read(text, ["add"]) == Said(text, ())
    assert 0 <= FORMATS[name].shown(text) <= len(text)
