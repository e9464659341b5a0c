"""Text to token ids and back: a byte-level BPE of our own, or the tokenizer of a model folder.

Text of users never becomes a special token: `encode` reads a literal `<|im_end|>` as plain text unless the caller says
`special=True`, which only templates do. Every id stands for known bytes, so streams of ids decode without guesswork.

Not here: older tokenizer files (`tokenizer_formats`), what a conversation looks like (`chat_template`), rows and
batches (`loader`).
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from prairie.data.tokenizer_formats import convert
from prairie.data.words import EXPRESSIONS, Spans, Words, cuts_at_spaces
from prairie.errors import TokenizerError

CHATML_SPECIALS: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_NUMERALS = "零〇一二三四五六七八九十百千万亿两"
# GPT-2's words with GPT-4's contractions and line ends; every digit alone, Chinese ones too, so that numbers are read
# digit by digit; runs of Han and kana apart from other letters, so that 你好world never becomes one word.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rf"|[{_NUMERALS}]|(?:(?![{_NUMERALS}])[{_CJK}])+"
    rf"| ?(?:(?![{_CJK}])[\p{{L}}\p{{M}}])+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Place = Literal["start", "after_special", "after_text"]
"""Where a piece of text stands; only tokenizers that put a space before the first word tell the places apart."""

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


_CLEANED = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")
"""Pieces that WordPiece's decoder writes without their space; of the library's list those that one token can match."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder reads: `type_ids[i]` is 0 for the first text and its marks, 1 for the second."""

    ids: list[int]
    type_ids: list[int]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes (Radford et al. 2019, `bytes_to_unicode`), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class Tokenizer:
    """A vocabulary with its encoder. Make one by `train_bpe` or `load`; it is immutable."""

    def __init__(self, spec: dict[str, Any], config: dict[str, Any]) -> None:
        """`spec` is the content of `tokenizer.json`, `config` that of `tokenizer_config.json`."""
        self.config = config
        named = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        added_tokens = [
            added | {"special": bool(added.get("special")) or added.get("content") in named.values()}
            for added in spec.get("added_tokens") or []
        ]
        # A row cut in silence by a length that some trainer left in the file is a wrong row.
        spec = spec | {"truncation": None, "padding": None, "added_tokens": added_tokens}
        self._spec = spec
        self._backend = _backend(spec)
        bare = _without_prefix_space(spec)
        self._bare = self._backend if bare is None else _backend(bare)
        self._prefix_after_special = self._bare is not self._backend and not _prefix_only_first(spec)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self._added = {int(added["id"]): added for added in added_tokens}
        self.special_tokens: dict[str, int] = {a["content"]: i for i, a in self._added.items() if a["special"]}
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = named.values()
        self.cls_id, self.sep_id, self.mask_id = (
            vocabulary.get(_content(config.get(key)) or "") for key in ("cls_token", "sep_token", "mask_token")
        )
        for key, token in named.items():
            if token is not None and token not in vocabulary:
                raise TokenizerError(f"`{key}` is not in the vocabulary", got=repr(token), wanted="a token of it")
        self.bos_id: int | None = vocabulary[self.bos_token] if self.bos_token is not None else None
        self.eos_id: int | None = vocabulary[self.eos_token] if self.eos_token is not None else None
        self.pad_id: int | None = vocabulary[self.pad_token] if self.pad_token is not None else None
        self.adds_bos: bool = self.bos_id is not None and self._document_starts_with_bos()
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True, separators=(",", ":"))
        self.hash: str = hashlib.sha256(canonical.encode()).hexdigest()
        self._kind = _decoder_kind(spec)
        self._strips_first_space = _strips_first_space(spec)

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = CHATML_SPECIALS
    ) -> Tokenizer:
        """Learns a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of at most `vocab_size` tokens.

        The special tokens get the first ids; the first of them ends a document and pads. A small text gives a
        smaller vocabulary. The same texts give the same bytes. Raises TokenizerError if `vocab_size` is too small.
        """
        least = 256 + len(special_tokens)
        if vocab_size < least or len(set(special_tokens)) != len(special_tokens):
            raise TokenizerError("this vocabulary cannot be learnt", got=vocab_size, wanted=f"{least} tokens or more")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if special_tokens:
            config |= {"eos_token": special_tokens[0], "pad_token": special_tokens[0]}
            config["additional_special_tokens"] = list(special_tokens[1:])
        return cls(json.loads(backend.to_str()), config)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Reads `tokenizer.json`, else an older form (`tokenizer_formats`); `tokenizer_config.json` names its tokens.

        Raises TokenizerError if the files are missing, damaged, or of a kind whose tokens do not stand for bytes.
        """
        folder = Path(folder)
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                config |= _read_json(folder / name)
        if (folder / "tokenizer.json").is_file():
            return cls(_read_json(folder / "tokenizer.json"), config)
        return cls(*convert(folder, config))

    def save(self, folder: Path | str) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers.AutoTokenizer reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        if path.is_file() and "chat_template" in (old := _read_json(path)):
            config["chat_template"] = old["chat_template"]  # ChatTemplate.save came first
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def encode(self, text: str, *, special: bool = False, place: Place = "start") -> list[int]:
        """Ids of `text`; never adds bos or eos. With `special`, literal special tokens become their ids."""
        if not special:
            return self.encode_batch([text], place=place)[0]
        ids: list[int] = []
        for piece, at in self.pieces(text, place):
            ids += [piece] if isinstance(piece, int) else self.encode(piece, place=at)
        return ids

    def encode_batch(self, texts: Sequence[str], *, place: Place = "start") -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        return self.encode_spans(texts, place=place).lists()

    def encode_spans(self, texts: Sequence[str], *, place: Place = "start") -> Spans:
        """`encode_batch` without a list for each text."""
        sound = [_sound(text) for text in texts]
        words = self._words_at(place)
        if words is None:
            empty = np.zeros(len(sound), np.int64)
            spans, known = Spans(np.zeros(0, np.uint32), empty, empty.copy()), np.zeros(len(sound), np.bool_)
        else:
            spans, known = words.read(sound)
        rest = np.flatnonzero(~known)
        if not len(rest):
            return spans
        read = self._encode_whole([sound[i] for i in rest.tolist()], place)
        spans.sizes[rest] = np.fromiter(map(len, read), np.int64, len(read))
        spans.starts[rest] = len(spans.ids) + np.cumsum(spans.sizes[rest]) - spans.sizes[rest]
        whole = np.fromiter(chain.from_iterable(read), np.uint32)
        return Spans(np.concatenate([spans.ids, whole]), spans.starts, spans.sizes)

    def _encode_whole(self, texts: Sequence[str], place: Place) -> list[list[int]]:
        """Texts that are not read word by word."""
        return [
            ids if self._marks.isdisjoint(ids) else self._encode_parts(self._unforged(text, place), place)
            for ids, text in zip(self._raw_batch(self._backend_at(place), texts), texts, strict=True)
        ]

    def encode_input(self, text: str, pair: str | None = None, *, special: bool = False) -> Encoded:
        """One text, or two, between the marks that the model's own post-processor puts ([CLS] and [SEP], `</s>`).

        With `special`, literal special tokens (`[MASK]`) become their ids.
        """
        first, second = _sound(text), None if pair is None else _sound(pair)
        if special:
            encoding = self._reading_special.encode(first, second, add_special_tokens=True)
        elif self._marks.isdisjoint([*self._raw(first), *self._raw(second or "")]):
            encoding = self._backend.encode(first, second, add_special_tokens=True)
        else:
            parts = self._unforged(first, "start")
            other = None if second is None else self._unforged(second, "start")
            encoding = self._backend.encode(parts, other, is_pretokenized=True, add_special_tokens=True)
        return Encoded(list(encoding.ids), list(encoding.type_ids))

    def pieces(self, text: str, place: Place = "start") -> list[tuple[int | str, Place]]:
        """Cuts at literal special tokens: ids of special tokens and the text between them, each with its place."""
        if not self.special_tokens:
            return [(text, place)] if text else []
        found: list[tuple[int | str, Place]] = []
        for i, part in enumerate(self._special_split.split(text)):
            if i % 2:
                found.append((self.special_id(part), "after_special"))
                place = "after_special"
            elif part:
                found.append((part, place))
        return found

    @cached_property
    def swallows_spaces(self) -> bool:
        """Whether a special token takes white space beside it, or asks what stands beside it."""
        asked = ("lstrip", "rstrip", "single_word")
        return any(self._added[number].get(key) for number in self._special_ids for key in asked)

    def special_id(self, text: str) -> int:
        """Id of what `special_pattern` found; some special tokens swallow the white space beside them."""
        token_id = self.special_tokens.get(text)
        return self.special_tokens[text.strip()] if token_id is None else token_id

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Like transformers, a first prefix space is dropped."""
        special = self._special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(token) for token in ids if token not in special)
        if self._strips_first_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for. Raises TokenizerError for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError("no such token", got=token_id, wanted=f"0 to {self.vocab_size - 1}")
        return self._bytes[token_id]

    @property
    def spec(self) -> dict[str, Any]:
        """The content of `tokenizer.json`."""
        spec: dict[str, Any] = json.loads(self._backend.to_str())
        return spec

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._spec, self.config)

    def _backend_at(self, place: Place) -> tokenizers.Tokenizer:
        prefixed = place == "start" or (place == "after_special" and self._prefix_after_special)
        return self._backend if prefixed else self._bare

    def _words_at(self, place: Place) -> Words | None:
        """The words that a text at `place` is made of; None where words cannot be read one by one."""
        return None if self._words is None else self._words[self._backend_at(place) is self._backend]

    @cached_property
    def _words(self) -> dict[bool, Words] | None:
        """Of texts that get a space put before their first word, and of those that get none."""
        if not cuts_at_spaces(self._spec, EXPRESSIONS | {PRETOKENIZE}):
            return None
        inside = partial(self._raw_batch, self._bare)
        return {
            True: Words(partial(self._raw_batch, self._backend), inside, self._marks),
            False: Words(inside, inside, self._marks),
        }

    @staticmethod
    def _raw_batch(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _raw(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _encode_parts(self, parts: Sequence[str], place: Place) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += self._backend_at(place).encode(part, add_special_tokens=False).ids
            place = "after_text"
        return ids

    def _unforged(self, text: str, place: Place) -> list[str]:
        """Parts of a text that, read one by one, give no special token.

        Unigram models hold their marks as ordinary pieces, and normalisation can write one (a fullwidth `＜/s＞`): the
        text is cut where such a piece was read; a mark of one character is no text and becomes U+FFFD.
        """
        text = _sound(text)
        encoding = self._backend_at(place).encode(text, add_special_tokens=False)
        parts, start = [], 0
        for token_id, (first, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._marks:
                parts.append(text[start:first] + (text[first] if end - first > 1 else "\ufffd"))
                start = first + 1
        if not parts:
            return [text]
        parts.append(text[start:])
        whole = []
        for part in filter(None, parts):
            whole += self._unforged(part, place) if part != text else [part]
            place = "after_text"
        return whole

    @cached_property
    def _marks(self) -> frozenset[int]:
        """Special tokens, except the one that stands for unknown text."""
        model = self._spec["model"]
        unknown = model.get("unk_id")
        if isinstance(token := model.get("unk_token"), str):
            unknown = self._backend.token_to_id(token)
        return self._special_ids - {unknown}

    @cached_property
    def _reading_special(self) -> tokenizers.Tokenizer:
        backend = _backend(self._spec)
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Longest token first, as the `tokenizers` library does."""
        forms = []
        for text, token_id in sorted(self.special_tokens.items(), key=lambda item: (-len(item[0]), item[0])):
            added = self._added[token_id]
            left, right = (r"\s*" if added.get(side) else "" for side in ("lstrip", "rstrip"))
            edge = (r"(?<!\w)", r"(?!\w)") if added.get("single_word") else ("", "")
            forms.append(left + edge[0] + re.escape(text) + edge[1] + right)
        return re.compile("|".join(forms))

    @cached_property
    def _special_split(self) -> re.Pattern[str]:
        """Splits a text at its special tokens and keeps them, at the odd places."""
        return re.compile(f"({self.special_pattern.pattern})")

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        byte_of = _byte_of_char()
        for text, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if self._kind == "words":
                table[token_id] = self._word(text).encode()
            elif token_id in self._added:
                table[token_id] = (text.replace("▁", " ") if self._kind == "pieces" else text).encode()
            elif self._kind == "bytes":
                known = all(char in byte_of for char in text)
                table[token_id] = bytes(byte_of[char] for char in text) if known else text.encode()
            elif fallback := _BYTE_FALLBACK.match(text):
                table[token_id] = bytes([int(fallback.group(1), 16)])
            else:
                table[token_id] = text.replace("▁", " ").encode()
        return table

    def _word(self, text: str) -> str:
        """A WordPiece token as its decoder writes it: a space before all but continuations and punctuation."""
        step = next(step for step in _steps(self._spec.get("decoder")) if step["type"] == "WordPiece")
        prefix = step.get("prefix", "##")
        written = text.removeprefix(prefix) if text.startswith(prefix) else " " + text
        return written[1:] if step.get("cleanup", True) and written in _CLEANED else written

    def _document_starts_with_bos(self) -> bool:
        if isinstance(told := self.config.get("add_bos_token"), bool):
            return told
        return self.bos_id in self._backend.encode("", add_special_tokens=True).ids[:1]


class Detokenizer:
    """Text of a stream of ids: `push` gives what is new and whole, `finish` the rest. Special tokens give no text.

    All pushed text joined equals `decode` of all ids, except that a continuation keeps its first prefix space.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer._strips_first_space and not continuation

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer._special_ids:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What an unfinished character leaves: nothing, or U+FFFD."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _sound(text: str) -> str:
    """Lone surrogates are no Unicode text and cannot be encoded; they become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _content(token: object) -> str | None:
    """A special token in `tokenizer_config.json` is a string, an AddedToken as an object, or null."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _backend(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError("tokenizer.json cannot be read", got=str(error), wanted="a fast tokenizer") from None
    backend.encode_special_tokens = True
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read", got=str(error), wanted="a JSON object") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} cannot be read", got=type(value).__name__, wanted="a JSON object")
    return value


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list."""
    if not part:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    return [step for child in inner for step in _steps(child)] if inner else [part]


def _prepends(step: dict[str, Any]) -> bool:
    """Also `sentencepiece_model`'s, which spares user-defined symbols."""
    pattern = step.get("pattern") or {}
    return step["type"] == "Prepend" or (step["type"] == "Replace" and pattern.get("Regex", "").startswith(r"\A(?!"))


def _without_prefix_space(spec: dict[str, Any]) -> dict[str, Any] | None:
    """The same tokenizer for text in the middle of a text, where no space is put before the first word.

    None if it never puts one.
    """
    normalizer, pre_tokenizer = (copy.deepcopy(spec.get(key)) for key in ("normalizer", "pre_tokenizer"))
    steps = _steps(normalizer)
    if any(_prepends(step) for step in steps):
        rest = [step for step in steps if not _prepends(step)]
        normalizer = {"type": "Sequence", "normalizers": rest} if rest else None
    for step in _steps(pre_tokenizer):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    if normalizer == spec.get("normalizer") and pre_tokenizer == spec.get("pre_tokenizer"):
        return None
    return spec | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


def _prefix_only_first(spec: dict[str, Any]) -> bool:
    """Whether only the start of a text gets the space, and not the text after a special token."""
    if any(_prepends(step) for step in _steps(spec.get("normalizer"))):
        return False
    return any(step.get("prepend_scheme") == "first" for step in _steps(spec.get("pre_tokenizer")))


def _decoder_kind(spec: dict[str, Any]) -> Literal["bytes", "pieces", "words"]:
    kinds = {step["type"] for step in _steps(spec.get("decoder"))}
    if "ByteLevel" in kinds:
        return "bytes"
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return "pieces"
    if kinds == {"WordPiece"}:
        return "words"
    raise TokenizerError(
        "the tokens of this tokenizer do not stand for bytes",
        got=f"the decoder {', '.join(sorted(kinds)) or 'none'}",
        wanted="ByteLevel (GPT-2, Llama 3, Qwen), ByteFallback or Metaspace (Llama 2, T5), or WordPiece (BERT)",
    )


def _strips_first_space(spec: dict[str, Any]) -> bool:
    return any(
        (step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        or step["type"] == "WordPiece"
        for step in _steps(spec.get("decoder"))
    )
