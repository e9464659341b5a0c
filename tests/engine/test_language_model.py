"""The Python face: answers, numbers, what does not belong together; and a real model against its oracle."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import naive
import pytest
import torch

import prairie
from prairie.data.records import Message
from prairie.data.tokenizer import CHATML_SPECIALS, Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.errors import AdapterError, ContextLengthError, ModelError, NotFoundError, RequestError, TokenizerError
from prairie.models.weights import hash_of, save_model
from prairie.store.home import Home

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "models"


@pytest.fixture
def model():
    return LanguageModel(naive.model(), naive.tokenizer(), naive.template())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and an adapter on it, as stages leave them."""
    root = tmp_path_factory.mktemp("artifacts")
    save_model(naive.model(), root / "base", template_hash=naive.template().hash, tokenizer_hash=naive.tokenizer().hash)
    naive.tokenizer().save(root / "base")
    naive.template().save(root / "base")
    facts = {"template_hash": naive.template().hash, "tokenizer_hash": naive.tokenizer().hash, "base_artifact": "base"}
    naive.adapter(1).save(root / "adapter", **facts)
    return root


def test_one_question_or_many(model):
    talk = [Message("user", "what is 2 + 3?")]
    one = model.generate("what is 2 + 3?", temperature=0, max_tokens=6)
    assert one.token_ids == naive.greedy(naive.template().encode_prompt(talk), 6)
    assert one.text == naive.tokenizer().decode(one.token_ids)
    many = model.generate([talk, "what is 2 + 3?", [{"role": "user", "content": "run"}]], temperature=0, max_tokens=6)
    assert [a.token_ids for a in many[:2]] == [one.token_ids] * 2 and len(many) == 3
    assert model.generate(talk, temperature=0, max_tokens=6).token_ids == one.token_ids
    assert model.generate([], temperature=0) == []
    raw = model.generate_text(["the horses", "grass"], temperature=0, max_tokens=6)
    assert raw[1].token_ids == naive.greedy(naive.tokenizer().encode("grass"), 6)
    assert model.generate("grass", prompt=True, temperature=0, max_tokens=6).token_ids == raw[1].token_ids


def test_seeds(model):
    ask = {"max_tokens": 12, "ignore_eos": True}
    first = model.generate(["run"] * 4, seed=5, **ask)
    assert [a.token_ids for a in first] == [a.token_ids for a in model.generate(["run"] * 4, seed=5, **ask)]
    assert first[2].token_ids == model.generate("run", seed=7, **ask).token_ids
    assert len({tuple(a.token_ids) for a in first}) == 4
    assert model.generate("run", **ask).token_ids != model.generate("run", **ask).token_ids


def test_unknown_sampling_names_the_nearest(model):
    with pytest.raises(RequestError, match="did you mean `temperature`"):
        model.generate("run", temprature=0)
    with pytest.raises(RequestError, match="nothing to answer: got int"):
        model.generate(5)


def test_logits_and_logprobs(model):
    ids = [[5, 6, 7, 8], [9, 10, 11, 12]]
    logits_BTV = model.logits(ids)
    for row, logits_TV in zip(ids, logits_BTV, strict=True):
        torch.testing.assert_close(logits_TV, naive.logits_of(row), atol=1e-4, rtol=1e-4)
    talk = [Message("user", "grass?"), Message("assistant", "grows"), Message("user", "and"), Message("assistant", "5")]
    rendered = naive.template().encode(talk)
    rows = naive.logits_of(rendered.ids).log_softmax(-1)
    wanted = [float(rows[i - 1, rendered.ids[i]]) for i in range(len(rendered.ids)) if rendered.mask[i]]
    assert model.logprobs(talk) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(RequestError, match="no assistant turn"):
        model.logprobs([Message("user", "grass")])
    with pytest.raises(ContextLengthError):
        model.logits([[5] * 97])
    with pytest.raises(RequestError, match="rows of one length"):
        model.logits([5, 6])


def test_an_answer_has_the_logprobs_that_scoring_gives(model):
    answer = model.generate("run", temperature=1.0, seed=3, max_tokens=30)
    if answer.finish_reason == "stop":
        talk = [Message("user", "run"), Message("assistant", answer.text)]
        if naive.template().encode(talk).ids[-len(answer.token_ids) - 1 : -1] == answer.token_ids:
            assert model.logprobs(talk) == pytest.approx(answer.logprobs, abs=1e-4)
    ids = [*naive.template().encode_prompt([Message("user", "run")]), *answer.token_ids]
    rows = model.logits([ids])[0].log_softmax(-1)
    wanted = [float(rows[len(ids) - len(answer.token_ids) - 1 + i, t]) for i, t in enumerate(answer.token_ids)]
    assert answer.logprobs == pytest.approx(wanted, abs=1e-4)


def test_embeddings(model):
    texts = ["the horses run", "草原", "grass grows 12 feet" * 3]
    together = model.embed(texts)
    assert together.shape == (3, model.config.dim)
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(model.embed(text)[0], row, atol=1e-5, rtol=1e-5)
    with pytest.raises(RequestError, match="empty"):
        model.embed([""])


def test_a_folder_and_an_adapter(folders):
    base = LanguageModel.load(folders / "base")
    assert base.weights_hash == hash_of(naive.model()) and base.adapter_hash is None
    poet = prairie.load(folders / "adapter")
    assert poet.adapter_hash == naive.adapter(1).hash and poet.weights_hash == base.weights_hash
    ids = naive.template().encode_prompt([Message("user", "run")])
    assert base.generate("run", temperature=0, max_tokens=8).token_ids == naive.greedy(ids, 8)
    assert poet.generate("run", temperature=0, max_tokens=8).token_ids == naive.greedy(ids, 8, naive.adapter(1))
    torch.testing.assert_close(poet.logits([ids])[0], naive.logits_of(ids, naive.adapter(1)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(poet.embed("run"), base.embed("run"))
    assert repr(poet) != repr(base)


def test_names_of_a_registry(folders, tmp_path):
    ids = {}
    with Home(tmp_path / "home") as home:
        for line, source in (("spark", "base"), ("spark:poet", "adapter")):
            with home.artifacts.create(source, line, {}) as folder:
                shutil.copytree(folders / source, folder, dirs_exist_ok=True)
            ids[line] = home.artifacts.id_of(source, {}, [], "")
            version = home.registry.register(
                line, ids[line], kind=source, base=ids["spark"] if source == "adapter" else None
            )
            home.registry.promote(version)
    for name, lora in (("spark", None), ("spark@1", None), ("spark:poet", naive.adapter(1))):
        model = prairie.load(name, home=tmp_path / "home")
        asked = naive.template().encode_prompt([Message("user", "run")])
        assert model.generate("run", temperature=0, max_tokens=8).token_ids == naive.greedy(asked, 8, lora)
        assert model.name == name
    assert prairie.Registry(tmp_path / "home").champion("spark").artifact_id == ids["spark"]


def test_what_does_not_belong_together_is_refused(folders, tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        LanguageModel.load(tmp_path / "none")
    with pytest.raises(ModelError, match="is an adapter"):
        LanguageModel.load(folders / "adapter")
    save_model(naive.model(1), tmp_path / "other")
    naive.tokenizer().save(tmp_path / "other")
    with pytest.raises(AdapterError, match="stands on base"):
        LanguageModel.load(tmp_path / "other", adapter=folders / "adapter")
    naive.adapter(1).save(tmp_path / "template", template_hash="f" * 64)
    with pytest.raises(AdapterError, match="trained with another template: got template ffff"):
        LanguageModel.load(folders / "base", adapter=tmp_path / "template")
    large = Tokenizer.train_bpe(naive.TEXTS, 450, [*CHATML_SPECIALS, *(f"<{n}>" for n in range(100))])
    assert large.vocab_size > naive.tokenizer().vocab_size
    large.save(tmp_path / "other")
    with pytest.raises(TokenizerError, match="does not fit the model"):
        LanguageModel.load(tmp_path / "other")
    with pytest.raises(NotFoundError):
        prairie.load("nobody", home=tmp_path / "home")
    alone = tmp_path / "alone"
    naive.adapter(1).save(alone, base_artifact="gone")
    with pytest.raises(AdapterError, match="its base is not beside it"):
        prairie.load(alone)


def test_importing_prairie_is_light():
    code = (
        "import sys, prairie; assert prairie.__version__; heavy = {'torch', 'sqlalchemy', 'tokenizers', 'numpy'};"
        "assert not heavy & set(sys.modules); prairie.Registry; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        _ = prairie.nothing


def test_a_real_model_says_what_its_oracle_says():
    folder, oracle = SHARED / "stories260K-hf", SHARED / "stories260K" / "oracle_greedy.json"
    if not folder.is_dir() or not oracle.is_file():
        pytest.skip(f"{folder} is not on this machine")
    rows = [row for row in json.loads(oracle.read_text()) if "prompt" in row]
    model = prairie.load(folder)
    answers = model.generate_text([row["prompt"] for row in rows], temperature=0, max_tokens=200)
    assert len(rows) == 4
    for row, answer in zip(rows, answers, strict=True):
        told = [*row["prompt_ids"], *answer.token_ids][: len(row["ids"])]
        assert told == row["ids"]
        assert (row["prompt"] + answer.text).lstrip().startswith(row["text"])
