"""SentencePiece's `tokenizer.model` (Kudo and Richardson 2018, arXiv:1808.06226), read without its library and written
as the content of a `tokenizer.json` that gives the same ids.

The file is a protocol buffer of a few fields, so it is read here: nothing in it can run, and what this conversion does
not know it refuses. Not here: what a tokenizer does (`tokenizer`).
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from prairie.errors import TokenizerError

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "▁"
"""What SentencePiece writes for a space (U+2581)."""


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class Model:
    """What the file says; the fields are those of sentencepiece_model.proto."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    ids: dict[str, int]
    """Of unk, bos, eos and pad; -1 where there is none."""
    charsmap: bytes
    """Rules of normalisation, compiled."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(path: Path) -> Model:
    """Raises TokenizerError for a damaged file or a kind of model that is not known here."""
    try:
        return _model(path.read_bytes())
    except (OSError, ValueError, IndexError, TypeError, struct.error) as error:
        raise TokenizerError(
            f"{path} cannot be read", got=str(error) or type(error).__name__, wanted="a SentencePiece model"
        ) from None


def spec_of(model: Model, added: list[dict[str, Any]], *, bos: bool, eos: bool) -> dict[str, Any]:
    """The content of a `tokenizer.json`. `added`: further tokens, after the model's own; `bos`, `eos`: what a whole
    text gets at its ends.

    Equal to the library but for three things: a text that is nothing but one user-defined symbol gets no prefix space;
    where the model brings rules of normalisation, a letter with several marks or a half-width kana with its voiced mark
    is normalised part by part (as by `tokenizers`); and of two ways to cut a text that Unigram scores alike to the last
    bit of a float32 the other may be taken.
    """
    symbols = [piece.text for piece in model.pieces if piece.kind == _USER_DEFINED]
    tokens = [
        _added(n, piece.text, special=piece.kind != _USER_DEFINED, normalized=piece.kind == _USER_DEFINED)
        for n, piece in enumerate(model.pieces)
        if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    frame = [("bos", bos), ("A", True), ("eos", eos)]
    names = {name: model.pieces[model.ids[name]].text for name in ("bos", "eos") if model.ids[name] >= 0}
    template = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": names[name], "type_id": 0}}
        for name, wanted in frame
        if wanted
    ]
    special = {
        names[name]: {"id": names[name], "ids": [model.ids[name]], "tokens": [names[name]]}
        for name, wanted in frame
        if wanted and name != "A"
    }
    second = json.loads(json.dumps(template).replace('"A"', '"B"'))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted([*tokens, *added], key=lambda token: int(token["id"])),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model, symbols)},
        "pre_tokenizer": _apart(model) if model.model_type == _UNIGRAM else None,
        "post_processor": {
            "type": "TemplateProcessing", "single": template, "pair": template + second, "special_tokens": special,
        },
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _unigram(model) if model.model_type == _UNIGRAM else _bpe(model),
    }  # fmt: skip


# The parts of a tokenizer ---------------------------------------------------------------------------------------------


def _check_charsmap(charsmap: bytes) -> None:
    """Raises TokenizerError for rules of normalisation that `tokenizers` would panic at: a little-endian size, a
    trie of so many bytes, then UTF-8 text."""
    size = int.from_bytes(charsmap[:4], "little")
    try:
        whole = len(charsmap) >= 4 + size and size % 4 == 0
        charsmap[4 + size :].decode("utf-8")
    except UnicodeDecodeError:
        whole = False
    if not whole:
        raise TokenizerError(
            "the rules of normalisation in this SentencePiece model are damaged", got=f"{len(charsmap)} bytes",
            wanted=f"a trie of {size} bytes and UTF-8 text", mend="copy the model again from where it came",
        )  # fmt: skip


def _normalizers(model: Model, symbols: list[str]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        _check_charsmap(model.charsmap)
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.remove_extra_whitespaces:
        steps += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if symbols:
        before = _normalizer(steps)
        changed = [symbol for symbol in symbols if before.normalize_str(symbol) != symbol]
        if changed:
            raise TokenizerError(
                "a user-defined symbol of this SentencePiece model is changed by its own normalisation",
                got=repr(changed[0]), mend="convert it with transformers and save a tokenizer.json",
            )  # fmt: skip
    if model.add_dummy_prefix and symbols:
        # Symbols are looked for in normalised text, and their own text is normalised likewise: it must stay itself.
        steps.append(_replace({"Regex": rf"\A(?!(?:{'|'.join(map(re.escape, symbols))})\z)(?=[\s\S])"}, _SPACE))
    elif model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return [*steps, _replace({"String": " "}, _SPACE)]


def _normalizer(steps: list[dict[str, Any]]) -> Any:
    spec = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    sequence = {"type": "Sequence", "normalizers": steps}
    return tokenizers.Tokenizer.from_str(json.dumps(spec | {"normalizer": sequence})).normalizer


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _apart(model: Model) -> dict[str, Any]:
    """Cuts after the first character of what only looks like a control symbol or a byte: Unigram would take it for
    one."""
    names = [piece.text for piece in model.pieces if piece.kind in (_UNKNOWN, _CONTROL, _BYTE) and len(piece.text) > 1]
    pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _decoders(model: Model) -> list[dict[str, Any]]:
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps: list[dict[str, Any]] = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return steps + ([strip] if model.add_dummy_prefix or model.remove_extra_whitespaces else [])


def _unigram(model: Model) -> dict[str, Any]:
    vocab = [[piece.text, piece.score] for piece in model.pieces]
    return {"type": "Unigram", "unk_id": model.ids["unk"], "vocab": vocab, "byte_fallback": model.byte_fallback}


def _bpe(model: Model) -> dict[str, Any]:
    """The best-scored pair is merged first, so the merges are all ways to make each piece, by its score."""
    rank = {piece.text: n for n, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    merges = []
    for piece in sorted((p for p in model.pieces if p.kind == _NORMAL), key=lambda p: (-p.score, rank[p.text])):
        ways = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
        merges += sorted(
            (way for way in ways if way[0] in rank and way[1] in rank), key=lambda w: (rank[w[0]], rank[w[1]])
        )
    vocab = {piece.text: n for n, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.ids["unk"]].text
    return {
        "type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unknown, "fuse_unk": True,
        "byte_fallback": model.byte_fallback, "ignore_merges": False,
    }  # fmt: skip


def _added(id: int, content: str, *, special: bool, normalized: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": id, "content": content} | flags


# The file -------------------------------------------------------------------------------------------------------------


def _model(data: bytes) -> Model:
    top = _fields(data)
    trainer = dict(_fields(bytes(dict(top).get(2, b""))))
    normalizer = dict(_fields(bytes(dict(top).get(3, b""))))
    denormalizer = dict(_fields(bytes(dict(top).get(5, b""))))
    pieces = tuple(_piece(dict(_fields(value))) for number, value in top if number == 1)
    ids = {name: _signed(trainer.get(40 + n, default)) for n, (name, default) in enumerate(
        {"unk": 0, "bos": 1, "eos": 2, "pad": -1}.items()
    )}  # fmt: skip
    unknown = [
        ("model_type", trainer.get(3, _UNIGRAM), (_UNIGRAM, _BPE)),
        ("treat_whitespace_as_suffix", trainer.get(24, 0), (0,)),
        ("escape_whitespaces", normalizer.get(5, 1), (1,)),
        ("denormalizer", denormalizer.get(2, b""), (b"",)),
        ("kinds of pieces", {p.kind for p in pieces} - {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}, (set(),)),
    ]
    for name, got, wanted in unknown:
        if got not in wanted:
            raise ValueError(f"{name} is {got!r}, which is not known here")
    if not pieces or not all(-1 <= id < len(pieces) for id in ids.values()) or ids["unk"] < 0:
        raise ValueError(f"{len(pieces)} pieces with the special ids {ids}")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise ValueError("a piece stands there twice")
    return Model(
        pieces,
        int(trainer.get(3, _UNIGRAM)),
        bool(trainer.get(35, 0)),
        # A name whose piece is not a control symbol is none (a model without bos says id 1 all the same).
        {n: i if n == "unk" or (i >= 0 and pieces[i].kind == _CONTROL) else -1 for n, i in ids.items()},
        bytes(normalizer.get(2, b"")),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def _piece(fields: dict[int, Any]) -> Piece:
    score = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))[0]
    return Piece(bytes(fields.get(1, b"")).decode(), score, int(fields.get(3, _NORMAL)))


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """(number, value) of each field: an int for a varint, else its bytes."""
    return list(_walk(data))


def _walk(data: bytes) -> Iterator[tuple[int, Any]]:
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, place = _varint(data, place)
        if length is None or place + length > len(data):
            raise ValueError("a field that does not end" if length is not None else f"a field of wire type {wire}")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number that does not end")


def _signed(value: int) -> int:
    """Negative numbers are written as two's complements of 64 bits."""
    return value - 2**64 if value >= 2**63 else value
