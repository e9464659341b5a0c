"""POST /v1/embeddings by the official client, against the library's own vectors."""

import base64

import httpx
import numpy as np
import openai
import pytest
import torch
from tiny_server import CONTEXT, tokenizer

import prairie
from prairie.engine.language_model import LanguageModel
from prairie.errors import ModelError


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


TEXTS = ["The quick brown fox", "草原上的马在奔跑。", "🐎", "over 13 lazy dogs " * 6]


def test_vectors_are_those_of_the_library(client, server):
    registry, artifacts = server.home.registry, server.home.artifacts
    library = LanguageModel.load(artifacts.get(registry.resolve("spark@1").artifact_id).path)
    answer = client.embeddings.create(model="spark", input=TEXTS)
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    got = torch.tensor([item.embedding for item in answer.data])
    torch.testing.assert_close(got, library.embed(TEXTS), atol=1e-5, rtol=1e-5)
    tokens = sum(len(library.tokenizer.encode(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert (answer.object, answer.model, answer.prairie["version"]) == ("list", "spark", 1)


def test_an_adapter_gives_vectors_of_its_own(client, server):
    theirs = prairie.load("spark:poet", home=server.home.root).embed(TEXTS[0])[0]
    got = torch.tensor(client.embeddings.create(model="spark:poet", input=TEXTS[0]).data[0].embedding)
    torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        got, torch.tensor(client.embeddings.create(model="spark", input=TEXTS[0]).data[0].embedding)
    )


def test_numbers_and_base64_say_the_same(http):
    ask = {"model": "spark", "input": TEXTS[1]}
    numbers = http.post("/v1/embeddings", json=ask).json()["data"][0]["embedding"]
    coded = http.post("/v1/embeddings", json=ask | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == numbers
    whole = http.post("/v1/embeddings", json=ask | {"dimensions": len(numbers)}).json()["data"][0]["embedding"]
    assert whole == numbers


def test_texts_and_their_token_ids_give_the_same(client):
    words = tokenizer()
    ids = [words.encode(text) for text in TEXTS]
    by_text, by_ids = (client.embeddings.create(model="spark", input=given).data for given in (TEXTS, ids))
    assert [item.embedding for item in by_text] == [item.embedding for item in by_ids]
    alone = client.embeddings.create(model="spark", input=ids[0]).data
    assert len(alone) == 1
    np.testing.assert_allclose(alone[0].embedding, by_text[0].embedding, atol=1e-5)


def test_many_texts_come_back_in_their_order(client):
    texts = [f"fox {number} " * (1 + number % 7) for number in range(300)]
    many = np.array([item.embedding for item in client.embeddings.create(model="spark", input=texts).data])
    for number in (0, 6, 150, 299):
        alone = client.embeddings.create(model="spark", input=texts[number]).data[0].embedding
        np.testing.assert_allclose(many[number], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": ""}, "empty"),
        ({"input": []}, "1 to 2048"),
        ({"input": ["a"] * 2049}, "1 to 2048"),
        ({"input": [["a"]]}, "input"),
        ({"input": [10**6]}, "unknown token ids"),
        ({"input": "草" * 2 * CONTEXT}, "at most 160"),
        ({"dimensions": 7}, "wanted 32; leave dimensions out"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"model": "nobody"}, "no such model"),
    ],
)
def test_what_cannot_be_embedded_is_refused(http, server, change, words):
    answer = http.post("/v1/embeddings", json={"model": "spark", "input": "fox"} | change)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert words in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    server.idle()


# --- an encoder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(minilm, tmp_path_factory):
    """A server of the real MiniLM beside a language model."""
    from tiny_server import Home, make_model, running

    root = tmp_path_factory.mktemp("encoder")
    with Home(root / "home") as home, running(home, [str(minilm), str(make_model(root / "tiny", 1))]) as server:
        yield server


def test_the_real_encoder_is_served(encoder, minilm):
    library = prairie.load(minilm)
    texts = [*TEXTS, "word " * 200, "The house is wonderful."] * 3
    with openai.OpenAI(base_url=f"{encoder.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="model", input=texts)
        got = torch.tensor([item.embedding for item in answer.data])
        assert torch.cosine_similarity(got, library.embed(texts)).min() > 0.9999
        assert answer.usage.total_tokens == sum(len(library.embedder.ids(text)) for text in texts)
        models = {each.id: each.prairie for each in client.models.list().data}
        assert (models["model"]["writes"], models["tiny"]["writes"]) == (False, True)
        assert models["model"]["max_context"] == 256
        assert len(client.embeddings.create(model="tiny", input="fox").data[0].embedding) == 32
        with pytest.raises(openai.BadRequestError, match="at most 256"):
            client.embeddings.create(model="model", input="word " * 300)


def test_an_encoder_does_not_chat(encoder):
    with openai.OpenAI(base_url=f"{encoder.url}/v1", api_key="none", max_retries=0) as client:
        asked = [
            lambda: client.chat.completions.create(model="model", messages=[{"role": "user", "content": "hi"}]),
            lambda: client.completions.create(model="model", prompt="hi"),
            lambda: client.completions.create(model="model", prompt=[5, 6]),
        ]
        for ask in asked:
            with pytest.raises(openai.BadRequestError, match="model reads texts and writes none; POST /v1/embeddings"):
                ask()
    assert httpx.get(f"{encoder.url}/metrics").status_code == 200
    encoder.idle()


def test_an_encoder_decoder_is_not_served(tmp_path):
    from tiny_server import Home, Running

    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 320, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer().save(tmp_path / "t5")
    with Home(tmp_path / "home") as home, pytest.raises(ModelError, match="an encoder-decoder, which the server"):
        Running(home, [str(tmp_path / "t5")])
