"""The official client, against a real server."""

import json

import openai
import pytest
from tiny_server import CONTEXT, ask, events

from prairie.data.records import Message
from prairie.engine.language_model import LanguageModel
from prairie.engine.request import SamplingParams


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def library(server):
    """The same model through the library: what the server must say."""
    folder = server.home.artifacts.get(server.home.registry.resolve("spark@1").artifact_id).path
    return LanguageModel.load(folder)


def test_a_greedy_answer_is_that_of_the_library(client, library):
    answer = client.chat.completions.create(**ask("spark"))
    alone = library.generate([Message("user", "草原 fox")], temperature=0, max_tokens=12)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == alone.finish_reason == "length"
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].response_id == answer.id
    assert answer.usage.completion_tokens == len(alone.token_ids)
    assert answer.usage.prompt_tokens == alone.prompt_tokens
    assert answer.usage.total_tokens == alone.prompt_tokens + len(alone.token_ids)
    made_by = answer.prairie
    assert (made_by["line"], made_by["version"], made_by["adapter_hash"]) == ("spark", 1, None)
    assert made_by["weights_hash"] == library.weights_hash
    assert answer.system_fingerprint.startswith("fp_")


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_joins_to_the_same_text(client, seed):
    request = ask("spark", "🐎 naïve 草", temperature=1, seed=seed, max_tokens=40)
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert finishes == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert {c.id for c in chunks} == {chunks[0].id}
    assert all(c.choices[0].response_id == c.id for c in chunks[:-1])


def test_every_event_is_whole_utf8(http):
    """Chunk by chunk: a character is never cut in two, in the bytes or in the deltas."""
    with http.stream(
        "POST", "/v1/chat/completions", json=ask("spark", "草原" * 5, max_tokens=60, stream=True)
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        raw = list(answer.iter_raw())
    for piece in raw:
        piece.decode("utf-8")
    whole = http.post("/v1/chat/completions", json=ask("spark", "草原" * 5, max_tokens=60)).json()
    deltas = [e["choices"][0]["delta"].get("content", "") for e in events(b"".join(raw).decode())]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]


def test_several_choices_differ_and_are_each_recorded(client, server):
    answer = client.chat.completions.create(**ask("spark", temperature=1, n=4, seed=7, max_tokens=16))
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.response_id for c in answer.choices] == [answer.id] + [f"{answer.id}:{i}" for i in (1, 2, 3)]
    assert len({c.message.content for c in answer.choices}) > 1
    rows = [server.home.feedback.get_response(c.response_id) for c in answer.choices]
    assert [row.text for row in rows] == [c.message.content for c in answer.choices]
    assert [row.sampling["seed"] for row in rows] == [7, 8, 9, 10]
    assert answer.usage.completion_tokens == sum(len(row.token_ids) for row in rows)


def test_the_best_of_several_are_the_likeliest_a_token(client, server):
    prompts = ["草原", "fox"]
    request = {"model": "spark", "prompt": prompts, "temperature": 1.3, "seed": 5, "max_tokens": 9, "logprobs": 0}
    every = client.completions.create(**request, n=6)
    best = client.completions.create(**request, n=2, best_of=6)
    mean = {c.text: sum(p := c.logprobs.token_logprobs) / len(p) for c in every.choices}
    wanted = []
    for start in (0, 6):
        ranked = sorted(every.choices[start : start + 6], key=lambda c: -mean[c.text])
        assert len({c.text for c in ranked}) > 3
        wanted += [c.text for c in ranked[:2]]
    assert [c.text for c in best.choices] == wanted and [c.index for c in best.choices] == [0, 1, 2, 3]
    assert best.usage == every.usage, "what was drawn and not given is counted too"
    rows = [server.home.feedback.get_response(c.response_id) for c in best.choices]
    assert [row.text for row in rows] == wanted and all(row.sampling["best_of"] == 6 for row in rows)
    streamed = client.completions.create(**request, n=2, best_of=2, stream=True)
    assert {chunk.choices[0].index for chunk in streamed} == {0, 1, 2, 3}, "nothing is chosen there"


def test_stop_token_ids_end_an_answer_and_are_not_shown(client, library):
    request = ask("spark", max_tokens=30, logprobs=True)
    whole = library.generate([Message("user", "草原 fox")], temperature=0, max_tokens=30)
    stop = next(t for t in whole.token_ids[4:] if t not in whole.token_ids[:4])
    place = whole.token_ids.index(stop)
    cut = client.chat.completions.create(**request, extra_body={"stop_token_ids": [stop]}).choices[0]
    assert cut.finish_reason == "stop" and len(cut.logprobs.content) == place
    assert cut.message.content == library.tokenizer.decode(whole.token_ids[:place])


def test_tokens_of_texts_and_conversations(http, library):
    words = library.tokenizer

    def tokens(**body):
        answer = http.post("/tokenize", json={"model": "spark", **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    said = tokens(prompt="草原 fox", return_token_strs=True)
    assert said["tokens"] == library.engine.prompt_ids("草原 fox") and said["count"] == len(said["tokens"])
    assert said["max_model_len"] == CONTEXT and len(said["token_strs"]) == said["count"]
    chat = tokens(messages=[{"role": "user", "content": "fox"}])
    assert chat["tokens"] == library.template.encode_prompt([Message("user", "fox")]) and chat["token_strs"] is None
    assert tokens(prompt="fox", add_special_tokens=False)["tokens"] == words.encode("fox")
    back = http.post("/detokenize", json={"model": "spark", "tokens": chat["tokens"]}).json()
    assert back == {"prompt": words.decode(chat["tokens"], skip_special=False)}
    for path, body in (
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {}), ("/tokenize", {"prompt": "x", "unknown": 1}), ("/detokenize", {"tokens": [99999]}),
    ):  # fmt: skip
        refused = http.post(path, json={"model": "spark", **body})
        assert refused.status_code == 400 and refused.json()["error"]["param"], refused.text
    assert http.post("/tokenize", json={"model": "nobody", "prompt": "x"}).status_code == 404


def test_choices_in_a_stream_end_once_each(http):
    body = ask("spark", temperature=1, n=3, max_tokens=9, stream=True)
    got = events(http.post("/v1/chat/completions", json=body).text)
    for index in range(3):
        mine = [e["choices"][0] for e in got if e["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in mine].count(None) == len(mine) - 1
        assert mine[-1]["finish_reason"] in ("length", "stop") and mine[-1]["delta"] == {}


def test_without_a_seed_answers_differ_and_with_one_they_do_not(client):
    """At temperature 1 this model says one thing in a fifth of its answers: four of a kind come once in a thousand."""
    free = {client.chat.completions.create(**ask("spark", temperature=2)).choices[0].message.content for _ in range(6)}
    request = ask("spark", temperature=1, seed=11)
    fixed = {client.chat.completions.create(**request).choices[0].message.content for _ in range(3)}
    assert len(free) > 1 and len(fixed) == 1


def test_an_answer_can_be_drawn_again_from_its_record(client, server, library):
    answer = client.chat.completions.create(**ask("spark", temperature=1.0, top_p=0.9, max_tokens=20))
    row = server.home.feedback.get_response(answer.id)
    keys = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens")
    again = library.generate(list(row.prompt), **{key: row.sampling[key] for key in keys})
    assert (again.token_ids, again.text) == (list(row.token_ids), answer.choices[0].message.content)


def test_stop_strings_end_an_answer_and_are_not_shown(client):
    whole = client.chat.completions.create(**ask("spark", max_tokens=30)).choices[0].message.content
    stop = next(c for c in whole[3:] if c not in whole[:3])
    cut = client.chat.completions.create(**ask("spark", max_tokens=30, stop=[stop, "never there"])).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("stop", whole[: whole.index(stop)])
    streamed = client.chat.completions.create(**ask("spark", max_tokens=30, stop=stop), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == cut.message.content


def test_logprobs_are_those_of_the_library(client, library):
    request = ask("spark", max_tokens=8, logprobs=True, top_logprobs=3)
    content = client.chat.completions.create(**request).choices[0].logprobs.content
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    alone = library.engine.generate([library.engine.chat_request("x", [Message("user", "草原 fox")], params)])[0]
    assert [round(t.logprob, 3) for t in content] == [round(p, 3) for p in alone.logprobs]
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob >= t.logprob - 1e-4 for t in content)
    assert bytes(b for t in content for b in t.bytes) == b"".join(
        library.tokenizer.token_bytes(i) for i in alone.token_ids
    )
    streamed = list(client.chat.completions.create(**request, stream=True))
    pieces = [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in pieces] == [t.token for t in content]
    assert [t.logprob for t in pieces] == pytest.approx([t.logprob for t in content], abs=1e-4)


def test_max_completion_tokens_is_the_newer_name(client):
    answer = client.chat.completions.create(**ask("spark", max_tokens=None, max_completion_tokens=3))
    assert answer.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="contradicts"):
        client.chat.completions.create(**ask("spark", max_tokens=4, max_completion_tokens=3))


def test_penalties_and_bias_change_the_answer(client, library):
    plain = client.chat.completions.create(**ask("spark", max_tokens=30)).choices[0].message.content
    biased = client.chat.completions.create(
        **ask("spark", max_tokens=4, logit_bias={str(library.tokenizer.encode("x")[0]): 100})
    )
    assert biased.choices[0].message.content == "xxxx"
    punished = client.chat.completions.create(**ask("spark", max_tokens=30, presence_penalty=2, frequency_penalty=2))
    assert punished.choices[0].message.content != plain


def test_an_open_length_goes_to_the_end_of_the_context(client):
    body = ask("spark", logit_bias={"0": -100})
    del body["max_tokens"]
    answer = client.chat.completions.create(**body)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens <= CONTEXT


def test_text_parts_and_developer_messages(client):
    parts = [{"type": "text", "text": "草原"}, {"type": "text", "text": " fox"}]
    one = client.chat.completions.create(**ask("spark") | {"messages": [{"role": "user", "content": parts}]})
    assert one.choices[0].message.content == client.chat.completions.create(**ask("spark")).choices[0].message.content
    two = [{"role": role, "content": "be brief"} for role in ("developer", "user")]
    three = [{"role": role, "content": "be brief"} for role in ("system", "user")]
    said = [
        client.chat.completions.create(**ask("spark") | {"messages": m}).choices[0].message.content
        for m in (two, three)
    ]
    assert said[0] == said[1]


def test_text_completions(client, library):
    answer = client.completions.create(model="spark", prompt="草原 fox", max_tokens=6, temperature=0)
    alone = library.generate_text("草原 fox", max_tokens=6, temperature=0)
    assert answer.choices[0].text == alone.text and answer.object == "text_completion"
    ids = library.engine.prompt_ids("草原 fox")
    by_ids = client.completions.create(model="spark", prompt=ids, max_tokens=6, temperature=0)
    assert by_ids.choices[0].text == alone.text
    several = client.completions.create(model="spark", prompt=["草原 fox", "dog"], n=2, max_tokens=6, temperature=0)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert [c.text for c in several.choices[:2]] == [alone.text] * 2
    two = client.completions.create(model="spark", prompt=[ids, ids[:2]], max_tokens=6, temperature=0)
    assert two.choices[0].text == alone.text
    streamed = client.completions.create(model="spark", prompt="草原 fox", max_tokens=6, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == alone.text


def test_echo_scores_the_prompt(client, library):
    prompt = "The quick brown fox"
    answer = client.completions.create(model="spark", prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    scored = answer.choices[0].logprobs
    ids = library.engine.prompt_ids(prompt)
    wanted = library.logits([ids])[0].log_softmax(-1)
    assert answer.choices[0].text == prompt and answer.usage.completion_tokens == 0
    assert scored.token_logprobs[0] is None
    assert scored.token_logprobs[1:] == pytest.approx([float(wanted[i, t]) for i, t in enumerate(ids[1:])], abs=1e-3)
    assert "".join(scored.tokens) == prompt
    assert [prompt[o : o + len(t)] for o, t in zip(scored.text_offset, scored.tokens, strict=True)] == scored.tokens
    assert len(scored.top_logprobs[1]) == 2
    more = client.completions.create(model="spark", prompt=prompt, max_tokens=3, echo=True, logprobs=1, temperature=0)
    assert more.choices[0].text.startswith(prompt)
    assert len(more.choices[0].logprobs.tokens) == len(ids) + more.usage.completion_tokens


def test_models_are_listed_with_their_versions(client):
    listed = {model.id: model for model in client.models.list()}
    assert {"spark", "spark:poet"} <= set(listed)
    assert listed["spark"].prairie["version"] == 1 and listed["spark"].prairie["figures"] == {"seed": 1}
    assert listed["spark:poet"].prairie["adapter_hash"]
    assert client.models.retrieve("spark@2").prairie["version"] == 2


def test_versions_and_verticals_answer_apart(client, server):
    def said(model):
        answer = client.chat.completions.create(**ask(model, max_tokens=24))
        return answer.choices[0].message.content, answer.prairie["version"], answer.prairie["adapter_hash"]

    one, two, three, poet = (said(name) for name in ("spark@1", "spark@2", "spark@3", "spark:poet"))
    assert said("spark") == one
    assert len({text for text, _, _ in (one, two, three, poet)}) == 4
    assert (two[1], three[1], poet[1]) == (2, 3, 1)
    prefix = server.home.registry.resolve("spark@2").artifact_id[:8]
    assert said(f"spark@{prefix}") == two
    assert "spark@2" in {model.id for model in client.models.list()}


async def _async_answers(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(**ask("spark"), stream=True)
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        whole = await client.chat.completions.create(**ask("spark"))
        return streamed, whole.choices[0].message.content


def test_the_async_client(server):
    import asyncio

    streamed, whole = asyncio.run(_async_answers(server.url))
    assert streamed == whole


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**ask("nobody"))
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**ask("spark", "fox " * CONTEXT))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as functions:
        client.chat.completions.create(**ask("spark"), functions=[{"name": "f"}])
    assert (functions.value.code, functions.value.param) == ("unsupported_parameter", "functions")


def test_the_schema_names_every_route(http):
    schema = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/feedback", "/healthz"} <= set(schema["paths"])
    assert "422" not in json.dumps(schema["paths"])
