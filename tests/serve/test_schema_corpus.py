"""Five hundred schemas over HTTP, drawn from a seed: good ones, damaged ones, and those that are made to explode.

Whatever comes in, each gets an answer that validates or a refusal with a reason, in bounded time; the server goes on.
(The engine's own test of five hundred good schemas is `tests/engine/test_constraint.py`.)
"""

import json
import random
import time
from collections import Counter

import httpx
import pytest
from tiny_server import ask, running

jsonschema = pytest.importorskip("jsonschema")

NAMES = ["a", "name", "c d", '"', "草", "\\", "", "$ref", "type"]
WRONG = [None, True, -1, 1e400, "", "strin", "object", [], [None], {}, {"type": []}, {"$ref": "#"}, "草" * 50]
WORDS = ["type", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "oneOf", "not", "pattern",
         "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "$ref", "$defs",
         "additionalProperties", "patternProperties", "if", "then", "dependentRequired", "format", "new"]  # fmt: skip


def good(rng, depth=0):
    kind = rng.choice(["string", "integer", "boolean", "enum", "const", "pattern"] + ["object", "array", "anyOf"] * 2)
    if depth > 3 and kind in ("object", "array", "anyOf"):
        kind = "boolean"
    match kind:
        case "string":
            low = rng.randrange(4)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(5)}
        case "integer":
            low = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)}
        case "enum":
            return {"enum": rng.sample(["yes", "no", 1, None, True, [1], {"k": "草"}], rng.randrange(1, 4))}
        case "const":
            return {"const": rng.choice(["", 0, [1, "b"], {"k": None}])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-c]{1,4}$", "^(yes|no)$", "^\\d{2}-\\d{2}$"])}
        case "object":
            inner = {name: good(rng, depth + 1) for name in rng.sample(NAMES, rng.randrange(4))}
            required = [name for name in inner if rng.random() < 0.7]
            return {"type": "object", "properties": inner, "required": required, "additionalProperties": False}
        case "array":
            return {"type": "array", "items": good(rng, depth + 1), "maxItems": rng.randrange(3)}
        case "anyOf":
            return {"anyOf": [good(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    return {"type": "boolean"}


def damaged(rng):
    """A good one with some places overwritten by what does not belong there."""
    schema = good(rng)
    for _ in range(rng.randrange(1, 4)):
        place = schema
        while rng.random() < 0.6 and (inner := [v for v in place.values() if isinstance(v, dict)]):
            place = rng.choice(inner)
        place[rng.choice(WORDS)] = rng.choice([*WRONG, rng.randrange(-5, 10**6), good(rng)])
    return schema


def exploding(rng):
    size = rng.choice([40, 300, 2000])
    match rng.randrange(7):
        case 0:
            # As text: Python's own writer gives up on it.
            return '{"type": "array", "items": ' * size + "{}" + "}" * size
        case 1:
            return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(size)}}
        case 2:
            return {"enum": [f"{'x' * rng.randrange(40)}{n}" for n in range(size)]}
        case 3:
            return {"allOf": [{"type": "string", "pattern": f"^[a-z]*{n}[a-z]*$"} for n in range(size)]}
        case 4:
            return {"type": "string", "pattern": "(" * size + "a" + "){1,9}" * size}
        case 5:
            return {"type": "array", "minItems": size * 1000, "items": {"type": "array", "minItems": size * 1000}}
        case _:
            steps = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 4} for n in range(size)}
            return {"$defs": steps | {f"d{size}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def is_schema(schema):
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_schemas(home):
    rng, ends, slowest = random.Random(500), Counter(), 0.0
    makers = [good] * 250 + [damaged] * 180 + [exploding] * 70
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=300) as http:
        for number, make in enumerate(makers):
            schema = make(rng)
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": "@"}}
            body = ask("spark", f"go {number}", temperature=1, seed=number, max_tokens=60, response_format=form)
            # Python writes infinity as no JSON can; the server has to refuse that too.
            text = schema if isinstance(schema, str) else json.dumps(schema)
            content = json.dumps(body).replace('"@"', text)
            began = time.process_time()
            answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            slowest = max(slowest, time.process_time() - began)
            said = answer.json()
            if answer.status_code == 200:
                (choice,) = said["choices"]
                ends[make.__name__, choice["finish_reason"]] += 1
                if choice["finish_reason"] == "stop":
                    value = json.loads(choice["message"]["content"])
                    # The plain validator takes for ever on what explodes, and fails on what is no schema: a keyword
                    # that says nothing of a value of this type may be malformed and is not looked at.
                    if make is not exploding and is_schema(schema):
                        jsonschema.validate(value, schema)
                continue
            assert answer.status_code == 400, (answer.status_code, said, str(schema)[:500])
            assert said["error"]["message"] and said["error"]["code"], said
            ends[make.__name__, said["error"]["code"]] += 1
        server.idle()
        assert server.kv_blocks_held() == 0
        assert http.post("/v1/chat/completions", json=ask("spark")).status_code == 200
    print(dict(ends), f"slowest {slowest:.1f} s of processor time")
    assert ends["good", "stop"] + ends["good", "length"] > 200, ends
    assert ends["damaged", "unsupported_constraint"] > 20, ends
    assert slowest < 30, slowest
