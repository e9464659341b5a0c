"""Templates that loop, grow or reach for Python are refused, quickly and in any thread."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prairie.data.chat_template import ChatTemplate
from prairie.data.records import Message
from prairie.data.template_sandbox import Sandbox
from prairie.data.tokenizer import Tokenizer
from prairie.errors import TemplateError

TOKENIZER = Tokenizer.train_bpe(["hello"], 300)
QUESTION = [Message("user", "x" * 1000)]

ENDLESS = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text in loops": "{% for i in range(99999) %}{% for j in range(99) %}" + "y" * 5000 + "{% endfor %}{% endfor %}",
    "comparing in loops": "{% set s = 'a' * 90000 %}{% set t = 'a' * 90000 %}"
    "{% for i in range(99999) %}{% if s == t %}{% endif %}{% endfor %}",
    "slicing in loops": "{% set s = 'a' * 90000 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x.replace('a', 'aa').replace('b', 'bb') %}{% endfor %}",
    "doubling by join": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x.join([n.x, n.x]) %}"
    "{% endfor %}",
    "doubling by format": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "doubling by str.format": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "doubling by a block": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a list of itself": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
    "a dict of itself": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}"
    "{% endfor %}"
    "{{ n.x | tojson }}",
    "dict() of itself": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}"
    "{% endfor %}"
    "{{ n.x == n.x }}",
    "a namespace of others": "{% set z = namespace(x=1) %}" + "".join(
        f"{{% set n{i} = namespace(a={before}, b={before}) %}}"
        for i, before in enumerate(["z", *(f"n{i}" for i in range(59))])
    ) + "{{ n59 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(90) }}",
    "a block that calls itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "many times a text": "{{ 'a' * 10**11 }}",
    "many times a list": "{{ ([0] * 10**11) | length }}",
    "a power": "{{ 10**(10**8) }}",
    "powers of powers": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}{{ n.x }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width in str.format": "{{ '{:>1000000000}'.format(1) }}",
    "a width from an argument": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "a centred text": "{{ 'a'.center(10**9) }}{{ 'a' | center(10**9) }}",
    "a wide indent": "{{ ('\\n' * 90000) | indent(90000) }}",
    "tabs": "{{ ('\\t' * 90000).expandtabs(90000) }}",
    "a deep indent": "{% set n = namespace(x=[1]) %}{% for i in range(900) %}{% set n.x = [n.x, 1] %}{% endfor %}"
    "{{ n.x | tojson(indent=90000) }}",
    "lists that are joined": "{{ (['a' * 90000] * 90000) | select | join }}",
    "lists that are sorted": "{{ (['a' * 90000] * 9000) | select | sort | length }}",
    "a slow search": "{{ ('a' * 900000).rfind('b' + 'a' * 400000) }}",
    "a slow strip": "{{ ('a' * 900000).strip('b' * 400000 + 'a') }}",
    "a recursive loop": "{% for i in [[1]] recursive %}{{ loop(i) }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10**6) }}",
    "a padded batch": "{{ [1] | batch(10**9, 0) | list | length }}",
    "a source without end": "{{ 1 }}" * 300_000,
    "a deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a deep list": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
}  # fmt: skip
REACHING = {
    "class": "{{ ''.__class__ }}",
    "class of messages": "{{ messages.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | list }}",
    "item": "{{ ''['__class__'] }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "strftime globals": "{{ strftime_now.__globals__['__builtins__'] }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "namespace attribute": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
    "namespace argument": "{{ namespace(__html__=1) }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._environment }}",
    "generator": "{{ ([1] | map('string')).gi_frame }}",
    "self": "{{ self._TemplateReference__context }}",
    "loop": "{% for i in [1] %}{{ loop._recurse }}{% endfor %}",
    "mutation": "{{ messages.append(1) }}",
    "dict mutation": "{{ messages[0].update({'role': 'x'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "encode": "{{ 'a'.encode() }}",
}


def refused_after_s(source: str) -> float:
    start = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source, TOKENIZER).render(QUESTION)
    assert "\n" not in str(caught.value)[:200]
    return time.thread_time() - start


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_stopped(name: str) -> None:
    assert refused_after_s(ENDLESS[name]) < 4, "about a second of one core; more is allowed for slow machines"


@pytest.mark.parametrize("name", REACHING)
def test_what_reaches_for_python_is_refused(name: str) -> None:
    assert refused_after_s(REACHING[name]) < 4


def test_it_is_stopped_off_the_main_thread_and_others_go_on() -> None:
    """Fuel is of one rendering: a template without end does not use up that of another thread."""
    good = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", TOKENIZER)
    seen: list[str] = []

    def endless() -> None:
        for _ in range(3):
            try:
                ChatTemplate(ENDLESS["loops in loops"], TOKENIZER).render(QUESTION)
            except TemplateError as error:
                seen.append(str(error))

    thread = threading.Thread(target=endless)
    thread.start()
    for _ in range(200):
        assert good.render(QUESTION) == "x" * 1000
    thread.join()
    assert len(seen) == 3 and all("endless loop" in each for each in seen)


def test_fuel_grows_with_the_conversation() -> None:
    """The cost of a long conversation is in proportion: 3000 long turns are no endless loop."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' and not m.content.startswith('<t>') %}"
        "{{ '<|im_start|>' ~ m.role ~ '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endif %}"
        "{% if loop.last or messages[loop.index0 + 1].role != 'x' %}{% endif %}{% endfor %}"
    )
    messages = [Message("user", "word " * 100)] * 3000
    assert len(ChatTemplate(source, TOKENIZER).render(messages)) > 1_000_000


_BINARY = st.sampled_from(["+", "~", "*", "==", "%", "in", "and"])
_FILTERS = st.sampled_from(["length", "list", "string", "tojson", "trim", "join", "sort", "first", "upper"])
expressions = st.recursive(
    st.sampled_from(["x", "'a'", "[1, 2]", "3", "messages", "{'a': 1}"]),
    lambda inner: st.one_of(
        st.tuples(inner, _BINARY, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, _FILTERS).map(lambda t: f"({t[0]} | {t[1]})"),
        inner.map(lambda e: f"[{e}, {e}]"),
        inner.map(lambda e: f"(x ~ {e})[1:]"),
    ),
    max_leaves=12,
)


@given(expressions)
@settings(max_examples=150, deadline=None)
def test_what_is_allowed_is_what_jinja_computes(expression: str) -> None:
    """The meter changes no value: plain jinja gives the same text, or fails too."""
    source = "{% set x = 'b' %}{% for m in messages %}{{ " + expression + " }}|{% endfor %}"
    variables = {"messages": [{"role": "user", "content": "<q>"}]}
    plain = ImmutableSandboxedEnvironment()
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    ours = theirs = ""
    try:
        ours = Sandbox().load(source)(variables)
    except Exception as error:
        ours = type(error).__name__
    if "SecurityError" in ours:
        return
    try:
        theirs = plain.from_string(source).render(variables)
    except Exception as error:
        theirs = type(error).__name__
    assert ours == theirs
