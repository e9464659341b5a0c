"""Encoder-decoders write what transformers' greedy search writes, one text or many, in Python and in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors

import prairie
from prairie.cli.chat import Conversation
from prairie.cli.main import main
from prairie.engine.language_model import LanguageModel
from prairie.engine.request import SamplingParams
from prairie.engine.seq2seq import Seq2Seq
from prairie.errors import ContextLengthError, ModelError, RequestError

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
PIECES += [(f"▁{letter}", -2.0) for letter in LETTERS] + [(letter, -3.0) for letter in LETTERS]
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**BART, "forced_bos_token_id": 7}),
    "marian": ("MarianConfig", "MarianMTModel", {**BART, "bad_words_ids": [[0], [30]]}),
}
TEXTS = ["hello world", "a", "the quick brown fox jumps over the lazy dog"]


def make(folder: Path, case: str) -> Any:
    """A random model with a Unigram tokenizer of T5's make; returns transformers' own."""
    config, name, settings = CASES[case]
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(PIECES)}
    peer = getattr(transformers, name)(getattr(transformers, config)(**vocabulary, **settings)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    peer.save_pretrained(folder)
    backend = tokenizers.Tokenizer(models.Unigram(PIECES, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return peer


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "t5"
    make(folder, "t5")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_equal_transformers(case: str, tmp_path: Path) -> None:
    """With a cache, texts of unlike length in one batch; the folder's rules of writing are kept."""
    peer, model = make(tmp_path, case), prairie.load(tmp_path)
    assert isinstance(model, Seq2Seq)
    answers = model.generate(TEXTS, temperature=0, max_tokens=24)
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = torch.tensor([model.ids(text)])
        asked = {"do_sample": False, "num_beams": 1, "max_new_tokens": 25}  # the last may be a forced end
        theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), **asked)[0].tolist()[1:]
        assert answer.token_ids == theirs[:24]
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == 1 else "length")
        assert answer.text == model.tokenizer.decode(answer.token_ids)
        assert answer.prompt_tokens == len(ids[0])
        assert model.generate(text, temperature=0, max_tokens=24).token_ids == answer.token_ids


def test_log_probabilities_and_seeds(t5: Path) -> None:
    model = prairie.load(t5)
    asked = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "logprobs": 2, "ignore_eos": True}
    many = model.generate(["hello"] * 3, **asked)
    assert len({tuple(answer.token_ids) for answer in many}) == 3
    again = model.generate("hello", **asked | {"seed": 6})
    assert again.token_ids == many[1].token_ids
    assert all(len(best) == 2 for best in again.top_logprobs) and len(again.logprobs) == 12
    peer = transformers.T5ForConditionalGeneration.from_pretrained(t5).eval()
    start = torch.tensor([[0, *again.token_ids[:-1]]])
    with torch.no_grad():
        logits = peer(input_ids=torch.tensor([model.ids("hello")]), decoder_input_ids=start).logits[0]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(again.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(again.logprobs), wanted, atol=1e-4, rtol=1e-4)


def test_stop_strings(t5: Path) -> None:
    model = prairie.load(t5)
    whole = model.generate(TEXTS[2], temperature=0, max_tokens=20, ignore_eos=True).text
    stop = whole[4:6]
    assert model.generate(TEXTS[2], temperature=0, max_tokens=20, stop=stop).text == whole[: whole.index(stop)]


def test_the_terminal_answers(t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = prairie.load(t5).generate("hello world", temperature=0, max_tokens=16)
    with pytest.raises(SystemExit) as end:
        main(["chat", str(t5), "hello world", "--temperature", "0", "--max-tokens", "16"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == wanted.text.strip()


def test_each_line_in_the_terminal_is_answered_alone(
    t5: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prairie.load(t5)
    lines = iter(["hello world", "a", "hello world", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    Conversation(model, SamplingParams(temperature=0, max_tokens=9), (), "t5", None, None).run()
    wanted = model.generate(["hello world", "a", "hello world"], temperature=0, max_tokens=9)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [each.text.strip() for each in wanted]


def test_what_it_cannot_do_is_refused(t5: Path) -> None:
    model = prairie.load(t5)
    with pytest.raises(RequestError, match="knows no conversation: got 2 messages"):
        model.generate([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(RequestError, match="empty"):
        model.generate("")
    with pytest.raises(ContextLengthError, match="at most 512"):
        model.generate("a " * 600)
    with pytest.raises(RequestError, match="gives no vectors"):
        model.embed("a")
    with pytest.raises(ModelError, match="does not continue text: got an encoder_decoder"):
        LanguageModel.load(t5)
