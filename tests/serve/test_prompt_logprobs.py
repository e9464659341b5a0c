"""`prompt_logprobs`, as vLLM's users send it: a map for each token of the prompt, equal to a plain forward pass."""

import httpx
import openai
import pytest
from tiny_server import ask, make_model, running

from prairie.data.records import Message
from prairie.engine.language_model import LanguageModel
from prairie.store.home import Home

UNNAMED = 700
"""Rows of the vocabulary that are no tokens, as published models have them: here most of what is likely."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("padded") / "padded", 1, UNNAMED)


@pytest.fixture(scope="module")
def library(folder):
    return LanguageModel.load(folder)


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    with (
        Home(tmp_path_factory.mktemp("home")) as home,
        running(home, [str(folder)]) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def check(told, ids, library, top):
    """Against log-probabilities of the whole vocabulary, computed one prompt at a time."""
    logprobs_NV = library.logits([ids])[0].log_softmax(-1)
    names = library.tokenizer.vocab_size
    assert told[0] is None and len(told) == len(ids)
    for place, (token, entry) in enumerate(zip(ids[1:], told[1:], strict=True)):
        logprobs_V = logprobs_NV[place]
        likeliest = logprobs_V[:names].argsort(descending=True)[:top].tolist()
        assert list(entry) == [str(token), *(str(t) for t in likeliest if t != token)]
        for rank, each in enumerate(likeliest, 1):
            assert entry[str(each)]["rank"] == rank
        if token not in likeliest:
            assert entry[str(token)]["rank"] == int((logprobs_V > logprobs_V[token]).sum()) + 1
        for each, facts in entry.items():
            assert facts["logprob"] == pytest.approx(float(logprobs_V[int(each)]), abs=1e-4)
            if int(each) not in library.tokenizer.special_tokens.values():
                raw = library.tokenizer.token_bytes(int(each))
                assert facts["decoded_token"] == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("top", [0, 3])
def test_of_texts(client, library, top):
    prompts = ["The quick brown fox", "草原上的马"]
    request = {"model": "padded", "prompt": prompts, "max_tokens": 2, "temperature": 0, "n": 2}
    plain = client.completions.create(**request)
    answer = client.completions.create(**request, extra_body={"prompt_logprobs": top})
    assert [c.text for c in answer.choices] == [c.text for c in plain.choices]
    assert not hasattr(plain.choices[0], "prompt_logprobs")
    for number, choice in enumerate(answer.choices):
        check(choice.prompt_logprobs, library.engine.prompt_ids(prompts[number // 2]), library, top)
        assert choice.logprobs is None


def test_of_a_conversation(client, library):
    answer = client.chat.completions.create(**ask("padded"), extra_body={"prompt_logprobs": 1})
    check(answer.prompt_logprobs, library.template.encode_prompt([Message("user", "草原 fox")]), library, 1)


def test_beside_echo_each_has_its_own_number(client, library):
    """And nothing need be drawn for either."""
    request = {"model": "padded", "prompt": "quick fox", "max_tokens": 0, "extra_body": {"prompt_logprobs": 4}}
    alone = client.completions.create(**request).choices[0]
    both = client.completions.create(**request, echo=True, logprobs=2).choices[0]
    assert (alone.text, both.text) == ("", "quick fox") and alone.prompt_logprobs == both.prompt_logprobs
    check(both.prompt_logprobs, library.engine.prompt_ids("quick fox"), library, 4)
    assert max(map(len, both.logprobs.top_logprobs[1:])) == 2, "half characters have one name between them"
    assert both.logprobs.token_logprobs[1:] == [
        next(iter(entry.values()))["logprob"] for entry in both.prompt_logprobs[1:]
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "come with a whole answer: got a stream"),
        ({"prompt_logprobs": 21}, "got 21, wanted 0 to 20"),
        ({"prompt_logprobs": -1}, "got -1, wanted 0 to 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be(client, change, said):
    for path, body in (("chat/completions", ask("padded")), ("completions", {"model": "padded", "prompt": "x"})):
        answer = httpx.post(f"{client.base_url}{path}", json=body | change)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"
        assert said in answer.json()["error"]["message"]


def test_a_row_without_a_token_is_no_prompt(client, library):
    with pytest.raises(openai.BadRequestError, match="unknown token id"):
        client.completions.create(model="padded", prompt=[1, library.tokenizer.vocab_size], max_tokens=1)
