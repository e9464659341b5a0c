"""Answers of a given form: what is finished validates, whatever runs beside it; what cannot be kept to is refused."""

import contextlib
import json
import re
import time

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.engine import constraint as module
from prairie.engine.constraint import Constraint, ConstraintError, Grammars
from prairie.engine.engine import Engine
from prairie.engine.request import Request, SamplingParams
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer

TEXTS = ['{"name": "Ann", "age": 31, "tags": ["a", "草原"], "ok": true, "none": null}', "The quick brown fox 1.5e-3"]


def engine(**settings) -> Engine:
    """Random weights: whatever is well formed comes from the grammar alone."""
    words = Tokenizer.train_bpe(TEXTS * 4, 320)
    config = ModelConfig(
        vocab_size=words.vocab_size + 7, dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=32, max_context=400,
        eos_id=words.eos_id,
    )  # fmt: skip
    model = Transformer(config).init_weights(0).eval()
    return Engine(model, words, ChatTemplate.builtin("chatml", words), weights_hash="w", **settings)


@pytest.fixture(scope="module")
def shared():
    return engine()


def answers(engine, constraint, count=4, **more):
    params = SamplingParams(**{"max_tokens": 120, "temperature": 1.0, "constraint": constraint} | more)
    return engine.generate([Request(str(n), [5, 6, 7], params) for n in range(count)])


# Values of these schemas are short, so that random tokens finish them.
def _integer(least, span):
    return {"type": "integer", "minimum": least, "maximum": least + span}


def _string(least, span):
    return {"type": "string", "minLength": least, "maxLength": least + span}


_values = st.sampled_from(["a", "草", 3, 1.5, None, True, "x y"])
_leaf = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"], "minimum": 0, "maximum": 9}]),
    st.builds(_integer, st.integers(-99, 99), st.integers(0, 500)),
    st.builds(_string, st.integers(0, 3), st.integers(0, 4)),
    st.builds(lambda values: {"enum": values}, st.lists(_values, min_size=1, max_size=4, unique_by=repr)),
    st.builds(lambda value: {"const": value}, st.sampled_from(["", 0, [1, "b"], {"k": None}])),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-c]{1,4}$", "^(yes|no)$", "^\\d{2}-\\d{2}$")]),
    st.sampled_from([{"type": "string", "format": f} for f in ("date", "time", "uuid", "ipv4")]),
)


def _array(item, most):
    return {"type": "array", "items": item, "minItems": min(most, 1), "maxItems": most}


def _shared(item):
    return {"$defs": {"it": item}, "type": "array", "items": {"$ref": "#/$defs/it"}, "maxItems": 2}


def _wider(inner):
    names = st.sampled_from(["a", "b", "c d", '"', "草", "\\"])
    return st.one_of(
        st.builds(
            lambda properties, share: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[: round(share * len(properties))],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            st.floats(0, 1),
        ),
        st.builds(_array, inner, st.integers(0, 3)),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    )


_free = st.recursive(_leaf, _wider, max_leaves=5)
SCHEMAS = st.one_of(_free, _free.map(_shared))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(schema=SCHEMAS)
def test_every_finished_answer_validates(shared, schema):
    check(shared, schema)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(schema=SCHEMAS)
def test_every_finished_answer_of_many_schemas_validates(shared, schema):
    check(shared, schema)


def check(shared, schema):
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        found = answers(shared, Constraint.json_schema(schema), 3)
    except ConstraintError as error:
        assert "unsatisfiable" in str(error).lower(), error
        return
    for answer in found:
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), schema)
        else:
            assert answer.finish_reason == "length", answer.finish_reason


def test_most_answers_of_a_bounded_schema_finish(shared):
    schema = {
        "type": "object",
        "properties": {"name": _string(0, 5), "age": _integer(0, 150)},
        "required": ["name", "age"],
        "additionalProperties": False,
    }  # fmt: skip
    found = answers(shared, Constraint.json_schema(schema), 12, max_tokens=300)
    assert [answer.finish_reason for answer in found] == ["stop"] * 12
    for answer in found:
        jsonschema.validate(json.loads(answer.text), schema)
    assert len({answer.text for answer in found}) > 6, "the model still chooses"


def test_expressions_and_choices(shared):
    for pattern in (r"[a-c]{2,5}-\d", "(草|马)+", "x"):
        for answer in answers(shared, Constraint.regex(pattern), max_tokens=40):
            if answer.finish_reason == "stop":
                assert re.fullmatch(pattern, answer.text), answer.text
    choices = ["yes", "no", 'a "quoted" one', "草原\n"]
    said = {answer.text for answer in answers(shared, Constraint.choice(choices), 24)}
    assert said <= set(choices) and len(said) > 1
    greedy = answers(shared, Constraint.choice(["only this"]), 1, temperature=0)[0]
    assert (greedy.text, greedy.finish_reason) == ("only this", "stop")


def test_any_json_object(shared):
    for answer in answers(shared, Constraint.json_object(), 6, max_tokens=200):
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
        else:
            assert answer.text.startswith("{")


def test_biases_and_filters_do_not_get_round_a_form(shared):
    words = shared.tokenizer
    outside = {words.encode("z")[0]: 100.0, words.special_tokens["<|im_end|>"]: 100.0}
    for more in ({"logit_bias": outside}, {"top_k": 1}, {"top_p": 0.3}, {"min_p": 0.5}, {"frequency_penalty": 2.0}):
        for answer in answers(shared, Constraint.regex("[ab]{6}"), 3, **more):
            assert re.fullmatch("[ab]{6}", answer.text), (more, answer.text)


def test_a_form_is_kept_through_preemption_and_beside_free_text():
    """The same answers alone, together with free ones, and thrown out for want of blocks."""
    constraint = Constraint.regex("([ab]|草){90}")
    params = SamplingParams(max_tokens=300, temperature=0, constraint=constraint)
    alone = engine().generate([Request("0", list(range(3, 20)), params)])[0]
    assert len(alone.text) == 90 and alone.finish_reason == "stop"
    small = engine(kv_tokens=16 * 24, max_batch=4)
    free = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    mixed = [Request(str(n), list(range(3, 20)), free if n % 2 else params) for n in range(4)]
    found = small.generate(mixed)
    assert small.scheduler.preemptions > 0
    assert [answer.text for answer in found[::2]] == [alone.text] * 2
    small.cache.pool.check([])


def test_log_probabilities_are_those_of_the_model(shared):
    answer = answers(shared, Constraint.choice(["abc"]), 1, temperature=0)[0]
    ids = [5, 6, 7, *answer.token_ids]
    from prairie.ops.attention import PackedDocuments

    with torch.no_grad():
        hidden = shared.model(torch.tensor(ids), PackedDocuments([len(ids)], torch.device("cpu")))
        wanted = shared.model.logits(hidden).float().log_softmax(-1)
    own = [float(wanted[2 + n, token]) for n, token in enumerate(answer.token_ids)]
    assert answer.logprobs == pytest.approx(own, abs=1e-4)


DEEP: dict = {}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
BAD_SCHEMAS = [
    DEEP,
    {"type": "object", "properties": {f"p{n}": {} for n in range(1001)}},
    {"enum": [f"value {n}" for n in range(2001)]},
    {"description": "x" * (65 << 10)},
    {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(40)]},
    {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(6)]},
    {"allOf": [{"anyOf": [{"type": "string", "pattern": f"{a}.*{b}"} for a in range(8)]} for b in range(8)]},
    {"$ref": "https://example.com/schema"},
    {"$ref": "#/$defs/nowhere"},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "array", "uniqueItems": True},
    {"not": {"type": "string"}},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "pattern": "("},
    {"type": "nonsense"},
    {"type": "integer", "minimum": 5, "maximum": 4},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_what_cannot_be_kept_to_is_refused_in_time(shared, schema):
    started = time.process_time()
    with pytest.raises(ConstraintError) as refused:
        shared.grammars.matcher(Constraint.json_schema(schema))
    assert time.process_time() - started < 5
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


END = {"d20": {"type": "null"}}
LARGE_SCHEMAS = [
    {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1000)}},
    {"enum": [f"value {n}" for n in range(2000)]},
    {"type": "string", "maxLength": 10**9},
    {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    {"type": "string", "pattern": "^(.*a.{30})$"},
    {"anyOf": [{"properties": {"a": {"const": n}}, "required": ["a"], "type": "object"} for n in range(300)]},
    {"$defs": {"tree": {"type": "object", "properties": {"sub": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"},
    {"$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(20)} | END, "$ref": "#/$defs/d0"},
]  # fmt: skip


@pytest.mark.parametrize("schema", LARGE_SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_a_large_schema_is_taken_or_refused_in_time(shared, schema):
    """Within the bounds every schema is answered in bounded time, at each step too."""
    started = time.process_time()
    with contextlib.suppress(ConstraintError):
        answers(shared, Constraint.json_schema(schema), 1, max_tokens=20)
    assert time.process_time() - started < 5


def test_expressions_that_are_none(shared):
    for pattern in ("(", "a{2", r"(a)\1", "(?=x)"):
        with pytest.raises(ConstraintError):
            shared.grammars.matcher(Constraint.regex(pattern))
    for make in (lambda: Constraint.regex(""), lambda: Constraint.regex("a" * 5000), lambda: Constraint.choice([]),
                 lambda: Constraint.choice(["a", ""]), lambda: Constraint.choice(["a"] * 1001)):  # fmt: skip
        with pytest.raises(ConstraintError):
            make()


def test_compiled_grammars_are_kept_and_bounded(shared, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 3)
    grammars = Grammars(shared.tokenizer, shared.template.stop_ids)
    for n in range(10):
        grammars.matcher(Constraint.choice([f"choice {n}"]))
    assert len(grammars._known) == 3


def test_a_vocabulary_without_an_end(shared):
    """Such a model ends where nothing else can follow."""
    bare = Tokenizer.train_bpe(TEXTS, 300, ())
    matcher = Grammars(bare, ()).matcher(Constraint.choice(["ab"]))
    for token in bare.encode("ab"):
        assert not matcher.whole
        matcher.accept(token)
    assert matcher.whole and not matcher.broken
