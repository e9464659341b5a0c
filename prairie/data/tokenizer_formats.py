"""Tokenizers in older files than `tokenizer.json`, converted to it: GPT-2's two files, BERT's word list, SentencePiece.

Not here: what a tokenizer does (`tokenizer`), the inside of a SentencePiece model (`sentencepiece_model`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from prairie.data.sentencepiece_model import read_model, spec_of
from prairie.errors import TokenizerError

Spec = tuple[dict[str, Any], dict[str, Any]]
"""The contents of `tokenizer.json` and of `tokenizer_config.json`."""


def convert(folder: Path, config: dict[str, Any]) -> Spec:
    """The tokenizer of a folder without `tokenizer.json`. Raises TokenizerError if there is none, or a damaged one."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _gpt2(folder, config)
    if (folder / "vocab.txt").is_file():
        return _bert(folder, config)
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            return _sentencepiece(folder / name, config)
    if (folder / "source.spm").is_file():
        raise TokenizerError(
            f"{folder} has one SentencePiece model for each of two languages (Marian), which is not read",
            got="source.spm and vocab.json",
            wanted="tokenizer.json",
        )
    raise TokenizerError(
        f"{folder} has no tokenizer",
        got="no tokenizer.json",
        wanted="tokenizer.json, vocab.json and merges.txt, vocab.txt, tokenizer.model or spiece.model",
        mend="convert it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
    )


def _gpt2(folder: Path, config: dict[str, Any]) -> Spec:
    """Byte-level BPE in `vocab.json` and `merges.txt` (Radford et al. 2019)."""
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{folder} cannot be read", got=str(error), wanted="vocab.json and merges.txt") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    if backend.token_to_id(end) is not None:
        backend.add_special_tokens([tokenizers.AddedToken(end, special=True, normalized=False)])
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end} | config
    return json.loads(backend.to_str()), config


def _bert(folder: Path, config: dict[str, Any]) -> Spec:
    """WordPiece in `vocab.txt`, one token a line (Devlin et al. 2018, arXiv:1810.04805)."""
    try:
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder / 'vocab.txt'} cannot be read", got=str(error), wanted="UTF-8 text") from None
    vocab = {line: n for n, line in enumerate(lines)}
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    names["mask_token"] = "[MASK]"
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | names | config
    unk, cls, sep = (str(config[key]) for key in ("unk_token", "cls_token", "sep_token"))
    if len(vocab) != len(lines) or any(token not in vocab for token in (unk, cls, sep)):
        raise TokenizerError(
            f"{folder / 'vocab.txt'} is no vocabulary of BERT", wanted=f"{unk}, {cls}, {sep}, each once"
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    backend.add_special_tokens([
        tokenizers.AddedToken(config[key], special=True, normalized=False) for key in names if config[key] in vocab
    ])  # fmt: skip
    return json.loads(backend.to_str()), config


def _sentencepiece(path: Path, config: dict[str, Any]) -> Spec:
    """The model's own pieces, then what `tokenizer_config.json` and `added_tokens.json` add.

    A text begins with bos and ends without eos, unless the config tells otherwise; without a bos it ends with eos.
    """
    model = read_model(path)
    names = {f"{name}_token": model.pieces[id].text for name, id in model.ids.items() if id >= 0}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | names | config
    listed = config.get("added_tokens_decoder") or {}
    added = {int(id): token | {"id": int(id)} for id, token in listed.items() if int(id) >= len(model.pieces)}
    more = _object(path.parent / "added_tokens.json")
    for content, id in more.items():
        added.setdefault(id, {"id": id, "content": content, "special": True, "normalized": False})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    if sorted(added) != list(range(len(model.pieces), len(model.pieces) + len(added))):
        raise TokenizerError(
            f"the tokens added to {path} leave a gap", got=sorted(added)[:3], wanted=f"ids from {len(model.pieces)} on"
        )
    bos, eos = (bool(model.ids[name] >= 0 and config.get(f"add_{name}_token", default)) for name, default in (
        ("bos", True), ("eos", model.ids["bos"] < 0)
    ))  # fmt: skip
    return spec_of(model, [flags | token for token in added.values()], bos=bos, eos=eos), config


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read", got=str(error), wanted="a JSON object") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} cannot be read", got=type(value).__name__, wanted="a JSON object")
    return value
